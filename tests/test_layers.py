"""Imports point one way, in the order of docs/architecture.md, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parent
ORDER = [
    *(
        "errors",
        "binomial",
        "signatures",
        "recipe",
        "effects",
        "types",
        "architectures",
        "state",
        "data",
        "models",
        "intake",
        "forward",
        "attack",
    ),
    *(
        "measure",
        "adversarial_training",
        "train",
        "prune",
        "compress",
        "detect",
        "repair",
        "poison",
        "methods",
        "runs",
        "bench",
        "report",
        "cli",
    ),
]
BESIDE = {("bench", "report"), ("report", "bench")}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    depth = len(path.relative_to(ROOT).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("secateur."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("secateur.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path):
    own = part(path)
    assert own in ORDER, f"'{own}' has no place in the import order: add it to docs/architecture.md and here"
    wrong = {other for other in imported_parts(path) - {own} if ORDER.index(other) >= ORDER.index(own)}
    assert not {other for other in wrong if (own, other) not in BESIDE}


def test_the_order_is_that_of_the_docs():
    text = (ROOT.parents[1] / "docs" / "architecture.md").read_text("utf-8")
    assert " < ".join(ORDER).replace("bench < report", "{bench | report}") in text.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert part(path) == "cli" or not called & {"print", "exit"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "repairs"], ["list", "backdoors", "--json"], ["repair", "--help"], ["attack", "--help"]]
)
def test_light_commands_do_not_import_torch(arguments):
    code = f"import sys; from secateur.cli import run; c = run({arguments!r}); sys.exit(c or 10 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, secateur; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'scipy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
