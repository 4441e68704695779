"""The paper's tables: each cell has its trial, what is run is kept beside the published, and the words for the two."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import TINY
from test_cli import pdiff

from pdiff_ray.cli.options import complete_cell
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import sweep
from pdiff_ray.running import reproduce
from pdiff_ray.running.reproduce import FILES, Cell, Line, OverSeeds
from pdiff_ray.storage.files import Storage

SWEEPS = Path(__file__).parents[1] / "sweeps"


@pytest.fixture(scope="module")
def loaded():
    return reproduce.load(SWEEPS, reproduce.published(), ["data.root=images"])


# --- cells ------------------------------------------------------------------------------------------------------------


def test_tables_are_the_published_ones():
    cells = {cell.name: cell for cell in reproduce.published()}
    assert len(cells) == len(reproduce.published()) == 76 + 46
    assert cells["v1/mnist/s-1"].text == "87.4 / 87.4 / 88.4"
    assert cells["v1/imagenet/convnext-b"].text == "83.8 / 83.7 / 83.9"
    assert cells["final/cifar100/resnet-18"].text == "77.4 / 77.7 / 77.9"
    assert cells["final/stl10/vit-mini"].text == "52.3 / 52.0 / 52.6"
    assert "v1/imagenet/s-1" not in cells


def test_every_cell_is_a_trial_of_the_shipped_sweeps(loaded):
    assert [Path(file.path).name for file in loaded] == list(FILES)
    assert [len(file.sweep.grid()) for file in loaded] == [28, 10, 48]
    for file, name in zip(loaded, FILES, strict=True):  # whose artifacts are the same, as keys say
        whole = sweep.load(SWEEPS / name, ["data.root=images"])
        for number in (0, -1):
            same = [one.vary(one.sweep.grid()[number], repeat=2) for one in (file, whole)]
            assert same[0] == same[1]
            assert same[0].sampling.seed == 2


def test_both_tables_may_have_a_trial():
    cells = reproduce.choose(["v1/cifar100/vit-tiny", "FINAL/cifar100/vit-tiny"])
    assert len({cell.file for cell in cells}) == 1
    (file,) = reproduce.load(SWEEPS, cells, ())
    assert len(file.sweep.grid()) == 1


def test_cells_are_chosen_by_patterns():
    assert len(reproduce.choose(["*/cifar10/*-mini", "final/cifar10/mlp-mini"])) == 5
    with pytest.raises(ConfigError, match=r"no cell 'v1/mnist/s-4'; did you mean 'v1/mnist/s-"):
        reproduce.choose(["v1/mnist/s-1", "v1/mnist/s-4"])
    with pytest.raises(ConfigError, match=r"no cell '\*/svhn/\*'; .*reproduce --list"):
        reproduce.choose(["*/svhn/*"])


def test_a_shell_completes_cells():
    assert complete_cell(None, None, "final/cifar10/c") == ["final/cifar10/convnet-mini", "final/cifar10/convnext-mini"]


# --- words ------------------------------------------------------------------------------------------------------------


def result(original, generated, half=None, word="new", **groups):
    means = {"original": original, "generated": generated, **groups}
    summary = {
        "groups": [{"group": name.replace("_", " "), "mean": mean} for name, mean in means.items()],
        "verdict": {"word": word},
    }
    if half is not None:
        wide = {"lower": -half, "upper": half}
        summary["comparison"] = {"means": dict.fromkeys(means, wide), "differences": {"original": wide}}
    return SimpleNamespace(summary=summary)


def line(published, *results):
    return Line(Cell("v1", "S-1", "MNIST", dict(zip(reproduce.COLUMNS, published, strict=True))), results)


ABOVE, BELOW = (0.8, 0.8, 0.81), (0.8, 0.8, 0.79)


@pytest.mark.parametrize(
    ("published", "results", "relation"),
    [
        (ABOVE, [result(0.90, 0.91)], "agrees"),
        (ABOVE, [result(0.90, 0.90)], "agrees"),
        (ABOVE, [result(0.90, 0.89)], "differs: original"),
        (ABOVE, [result(0.90, 0.91, ensemble=0.92)], "differs: ensemble"),
        (ABOVE, [result(0.90, 0.89, ensemble=0.92)], "differs: original, ensemble"),
        (BELOW, [result(0.90, 0.89, ensemble=0.92)], "agrees"),
        (BELOW, [result(0.90, 0.89, ensemble=0.88)], "differs: ensemble"),
        (ABOVE, [result(0.90, 0.89, half=0.02)], "agrees"),  # its interval leaves the side open
        (ABOVE, [result(0.90, 0.87, half=0.02)], "differs: original"),
        (BELOW, [result(0.90, 0.91, half=0.02)], "agrees"),
        (BELOW, [result(0.90, 0.93, half=0.02)], "differs: original"),
        (ABOVE, [result(0.90, 0.88), result(0.90, 0.92)], "agrees"),
        (ABOVE, [result(0.90, 0.880), result(0.90, 0.879), result(0.90, 0.881)], "differs: original"),
        (ABOVE, [], "not run"),
    ],
)
def test_relation(published, results, relation):
    assert line(published, *results).relation == relation


def test_digits_are_told_from_the_relation():
    near = line(ABOVE, result(0.801, 0.809, half=0.002, ensemble=0.80))
    assert (near.relation, near.digits) == ("agrees", "agree")
    far = line(ABOVE, result(0.9, 0.91, half=0.002, ensemble=0.8004))
    assert (far.relation, far.digits) == ("agrees", "differ: original, p-diff")
    assert line(ABOVE).digits == "-"
    assert line(ABOVE, result(0.8, 0.81, full_Gaussian=0.7, ensemble=0.8)).cells[3:7] == [
        "80.00±0.00", "80.00±0.00", "70.00±0.00", "81.00±0.00"
    ]  # fmt: skip


def test_intervals_are_the_wider_ones_of_seeds_and_runs():
    assert OverSeeds.of([0.5, 0.5], [0.01, 0.03]).half == pytest.approx(0.02)
    over_seeds = OverSeeds.of([0.50, 0.52, 0.54], [0.001] * 3)
    assert over_seeds.estimate == pytest.approx(0.52)
    assert over_seeds.half == pytest.approx(4.303 * 0.02 / 3**0.5, rel=0.02)
    assert OverSeeds.of([], []) is None


def test_verdicts_of_all_seeds_are_told():
    found = [result(0.8, 0.8), result(0.8, 0.8, word="replica"), result(0.8, 0.8)]
    found[1].summary["verdict"]["accuracy"] = "worse"
    assert line(ABOVE, *found).verdict == "new; replica, worse"


# --- the command ------------------------------------------------------------------------------------------------------

TRIALS = {
    "paper_small.yaml": "network: {variants: {S-1: {}, S-2: {}}}, data: {variants: {MNIST: {}}}",
    "paper_mini.yaml": "cell: {variants: {MLP-mini CIFAR-10: {zoo.branches: 2}}}",
    "paper_table1.yaml": "cell: {variants: {ViT-Tiny Pets: {}}}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sweeps of the shipped ones' names, whose cells take a second."""
    folder = tmp_path_factory.mktemp("sweeps")
    for name, parameters in TRIALS.items():
        (folder / name).write_text(
            f"base: {TINY}\nname: {name.removesuffix('.yaml')}\ngenerator: {{name: gaussian}}\n"
            f"sweep: {{repeats: {2 if 'small' in name else 1}, parameters: {{{parameters}}}}}\n"
        )
    return folder


def test_cells_are_run_once_and_stand_beside_the_published(folder, tmp_path):
    options = ("--sweeps", folder, "--storage", tmp_path)
    cells = ("v1/mnist/s-1", "final/cifar10/mlp-mini")
    planned = pdiff("reproduce", *cells, *options, "--dry-run")
    assert "S-1 MNIST" in planned
    assert "S-2" not in planned
    assert not list(tmp_path.rglob("*.safetensors"))

    said = pdiff("reproduce", *cells, *options, "--in-process", "--set", "training.epochs=1")
    assert "v1/mnist/s-1: with training.epochs=1" in said
    lines = reproduce.lines(Storage(str(tmp_path)), reproduce.choose(["v1/mnist/*", "final/cifar10/*"]))
    done = [one for one in lines if one.results]
    assert [one.cell.name for one in done] == list(cells)
    assert [len(one.results) for one in done] == [2, 1]
    assert done[0].relation.partition(":")[0] in ("agrees", "differs")
    assert done[0].mean(reproduce.GAUSSIAN) is not None

    page = (tmp_path / "reproduced/report.html").read_text()
    assert page.count("not run<br>") == 76 + 46 - 2
    assert "10.0 / 10.1 / 10.0" in page
    for address in {one.split('"')[0] for one in page.split('href="')[1:]}:
        assert (tmp_path / "reproduced" / address).is_file()

    again = pdiff("reproduce", *cells, *options, "--in-process", "--set", "training.epochs=1")
    assert "trial" not in again.partition("report  ")[0]  # nothing is planned or run
    listed = pdiff("reproduce", "--list", "v1/mnist/s-*", *options)
    assert listed.count("not run") == 2
    assert "reproduced: whole" in pdiff("artifacts", "verify", "--storage", tmp_path)

    record = tmp_path / "reproduced/mnist_s-1.json"
    record.write_text(record.read_text().replace("epochs=1", "epochs=2"))
    assert "mnist_s-1.json: damaged" in " ".join(pdiff("reproduce", "--list", "v1/mnist/s-1", *options).split())
    assert "reproduced: 1 damaged" in pdiff("artifacts", "verify", "--storage", tmp_path, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name CELLs"),
        (("v1/mnist/s1",), "did you mean 'v1/mnist/s-1'"),
        (("--list", "v1/mnist/s1"), "did you mean 'v1/mnist/s-1'"),
        (("v1/mnist/s-1", "--sweeps", "nowhere"), "nowhere/paper_small.yaml: no such file"),
        (("v1/mnist/s-1", "--set", "zoo.member=3"), "zoo.member: unknown key; did you mean 'members'"),
        (("v1/mnist/s-3",), "have no trial S-3 MNIST"),
    ],
)
def test_bad_input(folder, tmp_path, arguments, message):
    options = () if "--sweeps" in arguments else ("--sweeps", folder)
    text = pdiff("reproduce", *arguments, *options, "--storage", tmp_path, code=2)
    assert message in " ".join(text.split())
