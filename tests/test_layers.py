"""The architecture, read off the sources: `docs/structure.md` names every file, and imports point down its list."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import TINY

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pdiff_ray"
SOURCES = {str(source.relative_to(PACKAGE)): source for source in sorted(PACKAGE.rglob("*.py"))}


def listed():
    """Folders and files of `docs/structure.md`, in order; a folder is named by its `__init__.py`."""
    names, folder = [], ""
    for indent, name in re.findall(r"^( *)- `([\w./]+)`: \S", (ROOT / "docs/structure.md").read_text(), re.MULTILINE):
        if name.endswith("/"):
            folder, name = name, f"{name}__init__.py"
        elif indent:
            name = folder + name
        names.append(name)
    return names


HEIGHT = {name: -position for position, name in enumerate(listed())}


def imported_modules(source):
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def file_of(module):
    """The package's file that a dotted name leads to."""
    path = "/".join(module.split(".")[1:])
    parent = path.rpartition("/")[0]
    tries = (f"{path}.py", f"{path}/__init__.py", f"{parent}.py", f"{parent}/__init__.py", "__init__.py")
    return next(name for name in (one.lstrip("/") for one in tries) if name in SOURCES)


def test_the_page_names_every_file():
    assert sorted(listed()) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_downward(name):
    for module in imported_modules(SOURCES[name]):
        if module.split(".")[0] == "pdiff_ray":
            other = file_of(module)
            within = Path(other).parent == Path(name).parent
            if other in (name, "__init__.py") or (within and "__init__.py" in (Path(name).name, Path(other).name)):
                continue  # a folder's own front, and the version
            assert HEIGHT[other] < HEIGHT[name], f"{name} imports {other}, which stands above it in docs/structure.md"


@pytest.mark.parametrize(("library", "home"), [("ray", "distributed"), ("mlflow", "tracking")])
def test_only_one_layer_imports(library, home):
    users = {
        Path(name).parts[0]
        for name, source in SOURCES.items()
        if any(module.split(".")[0] == library for module in imported_modules(source))
    }
    assert users == {home}


# Packages that take tenths of a second or seconds to import, and that not every command needs.
SLOW = {"ray", "mlflow", "matplotlib", "sklearn", "timm", "torchvision", "optuna", "scipy"}


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("cli/")])
def test_only_slow_imports_wait(name):
    """Imports stand at the top, but for the command line's, whose help is to come at once."""
    for function in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    text = ast.unparse(node)
                    # Ray comes with the layer that imports it, and the Python API waits for its first use.
                    waits = text.startswith("from pdiff_ray.distributed import") or name == "__init__.py"
                    assert text.split()[1].split(".")[0] in SLOW or waits, text


def test_what_is_imported_is_declared():
    """A package that another one brings along today may be gone tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {re.split(r"[=\[<>~ ]", line)[0].lower() for line in project["project"]["dependencies"]}
    named = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    imported = {module.split(".")[0] for source in SOURCES.values() for module in imported_modules(source)}
    assert {named.get(name, name) for name in imported - sys.stdlib_module_names - {"pdiff_ray"}} <= declared


def test_every_folder_says_what_lives_there_and_what_it_imports():
    for name, source in SOURCES.items():
        if name.endswith("/__init__.py"):
            assert re.search(r"\bImports? |\bimports ", ast.get_docstring(ast.parse(source.read_text()))), name


def test_the_core_works_without_ray_and_mlflow(tmp_path):
    """From data to report where neither can be imported."""
    code = f"""
import sys
import tomllib
sys.modules["ray"] = sys.modules["mlflow"] = None
from pdiff_ray.cli.main import main
sys.argv = ["pdiff", "run", "report", {str(TINY)!r}, "--storage", {str(tmp_path)!r}, "--in-process"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "report").glob("*/report-*.html"))


def test_the_actor_beside_the_driver_is_light():
    """Its process, of which each command waits for one, is there without the seconds that torch takes."""
    code = "import pdiff_ray.distributed.events, sys; print(sorted({'torch', 'ray', 'numpy'} & {*sys.modules}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
