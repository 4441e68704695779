"""The architecture, read off the sources: imports point downward, Ray and MLflow stay in their layers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

PACKAGE = Path(__file__).parent.parent / "pdiff_ray"
# Top floor first: a module imports from its own floor or those below it.
FLOORS = [
    {"sweep"},
    {"cli"},
    {"printing"},
    {"sweeping", "sweep_report", "sweep_plan"},
    {"pipeline", "doctor"},
    {"distributed"},
    {"tracking"},
    {"sweep_table"},
    {"trials"},
    {"report", "exchange"},
    {"sweep_figures", "estimate"},
    {"figures", "stages", "measure"},
    {"summary", "judge", "generators", "anatomy"},
    {"frontier"},
    {"store", "networks", "split"},
    {"data", "subset", "similarity", "optimization"},
    {"sources"},
    {"artifacts", "console", "search"},
    {"space"},
    {"loading"},
    {"config", "seeds", "devices"},
    {"errors", "__init__"},
]
FLOOR_OF = {name: height for height, names in enumerate(reversed(FLOORS)) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part(dotted: str) -> str:
    """The part of the package a dotted name belongs to; the package itself is `__init__`."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in FLOOR_OF else "__init__"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(source):
    own = source.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in FLOOR_OF, f"{own} has no floor: add it to FLOORS"
    for module in imported_modules(source):
        if module.split(".")[0] == "pdiff_ray":
            assert FLOOR_OF[part(module)] <= FLOOR_OF[own], f"{own} imports {module} from a floor above"


@pytest.mark.parametrize(("library", "home"), [("ray", "distributed"), ("mlflow", "tracking")])
def test_only_one_layer_imports(library, home):
    users = {
        source.relative_to(PACKAGE).with_suffix("").parts[0]
        for source in SOURCES
        if any(module.split(".")[0] == library for module in imported_modules(source))
    }
    assert users == {home}


def test_the_core_works_without_ray_and_mlflow(tmp_path):
    """From data to report where neither can be imported."""
    code = f"""
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
from pdiff_ray.cli import main
sys.argv = ["pdiff", "run", "report", {str(TINY)!r}, "--storage", {str(tmp_path)!r}, "--in-process"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "report").glob("*/report-*.html"))
