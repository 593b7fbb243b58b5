"""What users install: the wheel is small and works outside the tree."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds the unpacked wheel and nothing else."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = out.glob("*.whl")
    assert wheel.stat().st_size <= 5_000_000
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def python(site, code, folder):
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_the_package_and_its_data(site):
    assert (site / "secateur" / "py.typed").exists()
    assert (site / "secateur" / "report" / "result.schema.json").exists()
    assert (site / "secateur" / "repair" / "onp" / "pretrained" / "policy.safetensors").exists()
    assert not (site / "tests").exists()


def test_the_demo_runs_from_the_wheel_and_meets_its_target(site, tmp_path, schema):
    code = (
        "import secateur.cli\n"
        f"assert secateur.__file__.startswith({str(site)!r})\n"
        "sys.exit(secateur.cli.run(['demo', '--threads', '1', '-q', '-o', 'out']))"
    )
    done = python(site, code, tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    schema.validate(record)
    assert record["kind"] == "demo"
    assert record["before"]["attack_success"]["value"] >= 0.9
    assert record["after"]["attack_success"]["value"] <= 0.05
    assert len(record["details"]["compared"]) == 3
    arguments = ["repair", "out/victim", "--data", "out/clean.npz", "-q", "-o", "mine"]
    done = python(site, f"import secateur.cli\nsys.exit(secateur.cli.run({arguments!r}))", tmp_path)
    assert done.returncode == 0, done.stderr
