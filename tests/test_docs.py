"""Documentation that is made from the code is up to date, and links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from pdiff_ray.config import sweep
from pdiff_ray.running.sweep import check_sweep
from pdiff_ray.sweeps.ledger import Ledger

ROOT = Path(__file__).parent.parent


spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.TABLES)
def test_the_table_of_fields_is_the_schemas(name):
    page = generate.page(name)
    assert (generate.FOLDER / name).read_text() == page, "run `uv run python docs/generate.py`"
    for line in page.partition(generate.MARK)[2].splitlines():
        assert line in ("", "| field | default | |") or not line.endswith("|  |"), f"{line}: it has no description"


def test_the_table_of_networks_is_counted(tmp_path):
    page = (generate.FOLDER / generate.NETWORKS).read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(("| timm |", "| torchvision |"))]
    for row in rows:
        (tmp_path / "{}-{}.md".format(*row.replace(" ", "").split("|")[1:3])).write_text(row + "\n", encoding="utf-8")
    assert generate.networks(tmp_path) == page


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.S)


@pytest.mark.parametrize("text", [block for block in BLOCKS if "sweep:" in block])
def test_sweeps_that_are_shown_can_be_run(tmp_path, text):
    written = yaml.safe_load(text)
    path = tmp_path / f"{written.get('name', 'shown')}.yaml"
    path.write_text(yaml.safe_dump({"name": "shown", **written, "base": str(ROOT / "sweeps/quickstart.yaml")}))
    file = sweep.load(path, [f"storage={tmp_path}"])
    if file.sweep.search == "grid":
        assert [file.vary(assignment) for assignment in file.sweep.grid()]
    assert check_sweep(Ledger(file)) is None
