"""The README runs, its links lead somewhere, and the package says the same version everywhere."""

import re
import subprocess
import sys
from pathlib import Path

import secateur

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_runs(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 12
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(word) for word in done.stdout.split(" -> "))
    assert before > 0.9
    assert after < 0.5 * before


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_version_is_the_same_everywhere():
    assert f"version: {secateur.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## {secateur.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_commands_named_in_the_docs_exist():
    from secateur.cli import BENCH, COMMANDS

    for page in (README, (ROOT / "docs" / "cli.md").read_text("utf-8")):
        for verb in re.findall(r"^    secateur (\w+)", page, re.MULTILINE):
            assert verb in {*COMMANDS, "bench"}
        for verb in re.findall(r"^    secateur bench (\w+)", page, re.MULTILINE):
            assert verb in BENCH
