"""The report of a sweep: what its table, files and figures say, whatever became of the trials."""

import csv
import io
import itertools
import statistics
import struct
from dataclasses import replace

import numpy as np
import pytest
import yaml
from helpers import TINY, context

from pdiff_ray.cli import printing
from pdiff_ray.config import sweep as space
from pdiff_ray.reports.tables import markdown
from pdiff_ray.running.sweep import open_sweep, run_trials
from pdiff_ray.stages.report import load_summary
from pdiff_ray.sweeps import figures as sweep_figures
from pdiff_ray.sweeps import report as sweep_report
from pdiff_ray.sweeps import table as sweep_table
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.table import Result, Row
from pdiff_ray.sweeps.trial import Trial, run_trial

MEAN = "generated/mean_test_accuracy"
GRID = {
    "parameters": {
        "generator.members": [2, 10],
        "noise": {"variants": {"none": {"generator.autoencoder.latent_noise": 0}, "much": {}}},
    },
    "repeats": 2,
    "seeds": ["generator.seed", "sampling.seed"],
}
SEARCH = {
    "search": "random",
    "num_trials": 5,
    "metric": "generated/mean_validation_loss",  # accuracies of so small networks may be equal
    "repeats": 2,
    "seeds": ["generator.seed", "sampling.seed"],
    "parameters": {
        "generator.autoencoder.lr": {"loguniform": [1e-4, 1e-2]},
        "generator.diffusion.lr": {"loguniform": [1e-4, 1e-2]},
        "sampling.sampler": ["ddpm", "ddim"],
        "sampling.steps": {"int": [5, 20], "when": {"sampling.sampler": "ddim"}},
    },
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


def ledger_of(storage, sweep, name="question"):
    """A sweep over the tiny experiment; all sweeps here share its base and zoo."""
    path = storage / f"{name}.yaml"
    content = yaml.safe_dump({"base": str(TINY), "name": name, "sweep": sweep}, sort_keys=False)
    path.write_text(f"# Does it matter,\n# and how much?\n#\n#   a command\n{content}")
    return Ledger(space.load(path, [f"storage={storage}"]))


@pytest.fixture(scope="module")
def grid(storage):
    ledger = ledger_of(storage, GRID)
    run_trials(ledger, in_process=True)
    return ledger


def groups(ledger, trial):
    """The groups of a trial's evaluations, one mapping per repeat."""
    summaries = [load_summary(ledger.artifacts(experiment)) for experiment in ledger.experiments(trial)]
    return [{group["group"]: group for group in summary["groups"]} for summary in summaries]


def read(ledger, name):
    return ledger.storage.read(f"{ledger.folder}/{name}")


def lines(ledger, name):
    return list(csv.DictReader(io.StringIO(read(ledger, name).decode())))


def size(png):
    """Width and height of a PNG, from its header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_rows_are_means_and_deviations_over_seeds(grid):
    rows = sweep_table.table(grid)
    assert [row.assignment for row in rows] == list(grid.sweep.grid())
    for row in rows:
        values = [groups(grid, trial)[0]["generated"]["mean"] for trial in row.trials]
        assert len(values) == 2
        found = row.statistic(MEAN)
        assert (found.mean, found.std) == (
            pytest.approx(statistics.mean(values)),
            pytest.approx(statistics.stdev(values)),
        )
        objective = row.objective(grid.sweep.metric)
        assert objective.mean == pytest.approx(statistics.mean(trial.objective for trial in row.trials))
        text = f"{100 * found.mean:.2f}±{100 * found.std:.2f}"
        assert text in sweep_table.cells(grid, [row])[1]


def test_words_of_a_row_are_those_of_most_seeds(grid):
    assert sweep_table.common([]) is None
    assert sweep_table.common(["worse"] * 3) == "worse"
    assert sweep_table.common(["equal", "worse", "worse"]) == "worse 2/3"
    row = sweep_table.table(grid)[0]
    verdicts = [load_summary(result.artifacts)["verdict"] for result in row.results]
    assert [result.words["accuracy"] for result in row.results] == [verdict["accuracy"] for verdict in verdicts]
    head, cells = sweep_table.cells(grid, [row])
    assert cells[head.index("baseline")] == row.word("accuracy") == lines_of(grid)[0]["accuracy"]
    assert cells[head.index("verdict")] == row.word("verdict")
    other = replace(row.results[0], words={"verdict": "new", "accuracy": "better"})
    assert replace(row, results=[other]).word("verdict") == "new"
    assert replace(row, results=[replace(other, words={})]).word("verdict") is None
    assert "lead" in head


def lines_of(ledger):
    sweep_report.write(ledger)
    return lines(ledger, "summary.csv")


def test_csv_has_full_paths_and_full_numbers(grid):
    sweep_report.write(grid)
    summary, trials = lines(grid, "summary.csv"), lines(grid, "trials.csv")
    assert (len(summary), len(trials)) == (4, 8)
    assert summary[0]["generator.members"] == "2"
    assert (summary[0]["noise"], summary[0]["generator.autoencoder.latent_noise"]) == ("none", "0")
    assert (summary[1]["noise"], summary[1]["generator.autoencoder.latent_noise"]) == ("much", "")
    row = sweep_table.table(grid)[0]
    assert float(summary[0][MEAN]) == row.statistic(MEAN).mean
    assert float(summary[0][f"{MEAN}_std"]) == row.statistic(MEAN).std
    assert summary[0][f"{MEAN}_n"] == summary[0]["seeds"] == "2"
    assert [line["repeat"] for line in trials if line["trial"] in ("0", "4")] == ["0", "1"]
    for line in trials:
        mean = float(line["generated/max_similarity"])
        assert float(line[sweep_table.LOWEST]) <= mean + 1e-6
        assert float(line[sweep_table.HIGHEST]) >= mean - 1e-6
    assert {line["zoo"] for line in trials} == {trials[0]["zoo"]}


def test_table_fits_its_width(grid):
    rows = sweep_table.table(grid)
    for width in (80, 120, 200):
        found = sweep_table.cells(grid, rows, width)
        assert sum(max(map(len, column)) + 1 for column in zip(*found[1:], strict=True)) <= width
        assert {"verdict", "baseline", "mean", "objective"} < {*found[0]}
    assert {"mean", "objective"} < {*sweep_table.cells(grid, rows, 40)[0]}


def test_page_and_markdown(grid):
    sweep_report.write(grid)
    page, markdown = read(grid, "report.html").decode(), read(grid, "summary.md").decode()
    assert "Does it matter, and how much?" in page
    assert page.count("data:image/png;base64,") == 2
    links = [part.split('"')[0] for part in page.split('href="')[1:]]
    assert len(links) == 8 + 5
    folder = grid.storage.local / grid.folder
    assert all((folder / link).resolve().is_file() for link in links)
    assert "8 of 8 trials finished" in page
    assert "8 of 8 trials finished" in markdown
    assert "| members | noise | n |" in markdown


def test_figures_are_pictures(grid):
    pngs = sweep_report.figures(grid, sweep_table.table(grid))
    assert set(pngs) == {"accuracy", "similarity"}
    for png in pngs.values():
        width, height = size(png)
        assert 600 <= width <= 1600
        assert 400 <= height <= 1600


def test_panels_have_numbers_as_axis_and_names_as_titles(grid):
    panels = sweep_report._panels(grid, sweep_table.table(grid), {"average": MEAN})
    assert [(p.title, p.parameter, p.values) for p in panels] == [
        ("noise none", "members", [2, 10]),
        ("noise much", "members", [2, 10]),
    ]
    assert panels[0].numeric
    assert panels[0].curves["average"][:, 0] == pytest.approx(
        [sweep_table.table(grid)[index].statistic(MEAN).mean for index in (0, 2)]
    )


def test_conditional_parameters_have_panels_of_their_own(storage):
    conditional = {
        "kind": {"variants": {"none": {}, "latent": {}, "both": {}}},
        "generator.autoencoder.latent_noise": {"choice": [1.0, 0.01], "when": {"kind": "latent"}},
    }
    ledger = ledger_of(storage, {"parameters": conditional}, "conditional")
    panels = sweep_report._panels(ledger, sweep_table.table(ledger), {})
    assert [(p.title, p.parameter, p.values) for p in panels] == [
        ("", "kind", ["none", "both"]),
        ("kind latent", "latent_noise", [0.01, 1.0]),
    ]


def test_failed_and_missing_seeds_are_told(grid):
    """Of the last combination one seed fails, the other has not been run."""
    ledger = ledger_of(grid.storage.local, GRID)
    *_, last = ledger.trials
    first = last - 4
    ledger.trials[first] = Trial(first, ledger.trials[first].assignment, (0,), "failed", reason="<out of memory>")
    del ledger.trials[last]
    rows = sweep_table.table(ledger)
    assert (rows[-1].evaluated, rows[-1].seeds, rows[-1].state) == (0, 2, "1 failed")
    assert rows[-1].statistic(MEAN) is None
    head, *body = sweep_table.cells(ledger, rows)
    assert body[-1][head.index("n")] == "0/2"
    assert body[-1][head.index("state")] == "1 failed"
    assert body[-1][head.index("mean")] == "-"
    assert sweep_report.headline(ledger) == "6 of 8 trials finished, 1 failed, 1 still to come"
    try:
        sweep_report.write(ledger)
        assert "&lt;out of memory&gt;" in read(ledger, "report.html").decode()
        assert [line["reason"] for line in lines(ledger, "trials.csv")].count("<out of memory>") == 1
    finally:
        sweep_report.write(grid)


def test_an_autoencoder_that_loses_accuracy_is_told(grid):
    rows = sweep_table.table(grid)
    assert all(result.gate for row in rows for result in row.results)
    first, second = rows[0].results
    lossy, fine = replace(first, gate={"passed": False}), replace(second, gate={"passed": True})
    expected = f"The encoder loses accuracy in 1 of 2 results (trials {first.trial.number})"
    assert sweep_report.warning([replace(rows[0], results=[lossy, fine])]).startswith(expected)
    assert sweep_report.warning([replace(rows[0], results=[fine])]) == ""


def test_single_seed_has_no_deviation(grid):
    ledger = ledger_of(grid.storage.local, {"parameters": GRID["parameters"], "seeds": GRID["seeds"]}, "single")
    sweep_report.write(ledger)  # before anything has run
    assert sweep_report.headline(ledger) == "0 of 4 trials finished, 4 still to come"
    run_trials(ledger, in_process=True)
    rows = sweep_report.write(ledger)
    assert rows[0].statistic(MEAN).std is None
    assert not any("±" in cell for row in sweep_table.cells(ledger, rows) for cell in row)
    assert lines(ledger, "summary.csv")[0][f"{MEAN}_std"] == ""


def test_short_names_tell_paths_apart():
    names = ["generator.autoencoder.lr", "generator.diffusion.lr", "zoo.members", "noise"]
    assert list(sweep_table.short_names(names).values()) == ["autoencoder.lr", "diffusion.lr", "members", "noise"]


@pytest.fixture(scope="module")
def searched(storage):
    """Two trials that have run, one that was stopped, one that failed, one to come."""
    run_trials(ledger_of(storage, SEARCH | {"num_trials": 2}, "search"), in_process=True)
    ledger = ledger_of(storage, SEARCH, "search")
    values = {"generator.autoencoder.lr": 0.001, "generator.diffusion.lr": 0.001, "sampling.sampler": "ddpm"}
    ledger.record(Trial(2, values, (0, 1), "stopped", 0.15, curve=((1, 0.1), (2, 0.15))))
    ledger.record(Trial(3, values, (0, 1), "failed", reason="its process died"))
    return ledger


def test_search_has_the_best_first(searched):
    rows = sweep_table.table(searched)
    assert [row.name for row in rows][2:] == ["2", "3"]
    first, second = (searched.trials[int(row.name)].objective for row in rows[:2])
    assert first <= second
    head, *body = sweep_table.cells(searched, rows)
    assert head[:6] == ["trial", "autoencoder.lr", "diffusion.lr", "sampler", "steps", "n"]
    assert [row[head.index("state")] for row in body] == ["", "", "stopped at rung 2", "failed"]
    assert body[2][head.index("objective")] == "0.150"
    assert sweep_report.headline(searched) == "2 of 5 trials finished, 1 stopped, 1 failed, 1 still to come"


def test_search_figures_and_files(searched, recwarn):
    sweep_report.write(searched)
    for name in ("history", "importances", "slices"):
        assert min(size(read(searched, f"{name}.png"))) > 200
    assert len(lines(searched, "trials.csv")) == 8
    assert "its process died" in read(searched, "report.html").decode()
    assert not recwarn.list


def test_the_files_own_setting_is_a_row_if_it_is_evaluated(searched):
    own = searched.experiments(Trial(-1, {}, (0, 1)))
    run_trial(own, searched.storage, context(), searched.sweep.metric)
    rows = sweep_table.table(searched)
    assert rows[0].name == "as in the file"
    assert len(rows) == 5


def test_a_search_is_confirmed_with_new_seeds(storage):
    ledger = ledger_of(storage, SEARCH | {"num_trials": 2, "confirm": 2}, "confirmed")
    assert ledger.confirmation() is None
    run_trials(ledger, in_process=True)
    assert "has not been measured" in sweep_report.verdict(ledger)
    confirmation = ledger.confirmation()
    best = ledger.best()
    seen = {experiment.generator.seed for trial in ledger.done() for experiment in ledger.experiments(trial)}
    planned = [confirmation.experiments(trial) for trial in confirmation.planned()]
    assert {experiment.generator.seed for (experiment,) in planned} == {2, 3}
    assert seen == {0, 1}
    plain = {experiment.generator.seed: experiment for (experiment,) in planned[::2]}
    assert plain[2] == ledger.file.vary({}, 2)
    assert planned[1] == [ledger.file.vary(best.assignment, 2)]
    run_trials(confirmation, in_process=True)
    losses = [g[0]["generated"]["validation_loss_mean"] for g in (groups(confirmation, t) for t in confirmation.done())]
    wins = sum(winner < own for own, winner in zip(losses[::2], losses[1::2], strict=True))
    assert f"better in {wins} of 2 seeds" in sweep_report.verdict(ledger)
    sweep_report.write(ledger)
    assert f"better in {wins} of 2 seeds" in read(ledger, "summary.md").decode()


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ((0.9, 0.9), "beats the file's own setting: "),
        ((0.9, 0.8), "no more than chance may be"),  # in both seeds, with an interval from -0.3 to 1.0
        ((0.9, 0.4), "no more than chance may be"),
        ((0.5, 0.5), "has not beaten"),
        ((0.4, 0.5), "has not beaten"),
    ],
)
def test_verdict_is_honest(storage, mine, words):
    ledger = ledger_of(storage, SEARCH | {"metric": "generated/mean_validation_accuracy"}, "verdict")
    metric = ledger.sweep.metric
    best = Trial(0, {}, (0, 1), "finished", statistics.mean(mine))

    def row(values):
        results = [Result(best, r, {}, {metric: value, MEAN: value}) for r, value in enumerate(values)]
        return Row("", {}, 2, (best,), results)

    told = sweep_report._verdict(ledger, best, [row((0.5, 0.5)), row(mine)])
    assert words in told
    assert f"{100 * statistics.mean(mine):.2f}" in told


@pytest.mark.parametrize("states", [(), ("failed",), ("stopped", "running"), ("finished",), ("finished", "finished")])
def test_search_with_few_results(storage, states):
    """Too few trials, equal objectives, and nothing but conditional parameters cost figures, not the report."""
    parameters = {
        "sampling.sampler": ["ddim"],
        "sampling.steps": {"int": [5, 20], "when": {"sampling.sampler": "ddim"}},
    }
    name = "few" + "-".join(states)
    ledger = ledger_of(storage, SEARCH | {"parameters": parameters}, name)
    ledger.trials = {
        number: Trial(number, {"sampling.sampler": "ddim", "sampling.steps": 5 + number}, (0,), state, 0.5)
        for number, state in enumerate(states)
    }
    sweep_report.write(ledger)
    names = {file.rpartition("/")[2] for file in ledger.storage.list(ledger.folder)}
    assert {"report.html", "summary.csv", "trials.csv", "summary.md"} <= names
    assert ("history.png" in names) == ("finished" in states)
    assert "importances.png" not in names


def test_command_prints_the_table(grid, capsys):
    printing.print_sweep(open_sweep(grid))
    printed = capsys.readouterr().out
    assert "8 of 8 trials finished" in printed
    assert max(len(line) for line in printed.splitlines() if "±" in line and "seeds" not in line) <= 120
    assert f"{grid.storage.location(grid.folder)}/report.html" in printed
    assert "pdiff ui" in printed


@pytest.mark.parametrize("decades", [0.3, 1, 1.3, 2, 6])
def test_labels_of_a_logarithmic_axis_do_not_overlap(decades, monkeypatch):
    monkeypatch.setattr(sweep_figures, "png", lambda figure: figure)
    monkeypatch.setattr(sweep_figures, "with_legend", lambda figure, *_: figure)
    found = {n: float(n) for n in range(5)}
    search = sweep_figures.Search("loss", False, found, {}, [], None)
    values = {n: 3e-4 * 10 ** (decades * n / 4) for n in found}
    figure = sweep_figures.slices(search, [sweep_figures.Slice("lr" * 40, values, None, log=True)] * 3)
    figure.draw_without_rendering()
    for axes in figure.axes:
        ticks = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
        low, high = axes.get_xlim()
        shown = [t for t in ticks if t.get_text() and low <= t.get_position()[0] <= high]
        boxes = sorted((t.get_window_extent() for t in shown), key=lambda box: box.x0)
        assert boxes
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
        assert axes.xaxis.label.get_window_extent().width <= figure.bbox.width / 3


def test_parameters_without_a_result_have_no_panel(searched, monkeypatch):
    monkeypatch.setattr(sweep_figures, "slices", lambda search, parameters: [p.parameter for p in parameters])
    pngs = sweep_report.figures(searched, sweep_table.table(searched))
    tried = {name for t in searched.done() if t.state in ("finished", "stopped") for name in t.assignment}
    assert pngs["slices"] == [
        name
        for name in ("autoencoder.lr", "diffusion.lr", "sampler", "steps")
        if any(full.endswith(f".{name}") for full in tried)
    ]


def test_figures_of_awkward_values():
    """Zero among decades, one value alone, nothing known, many long names."""
    nothing = np.full((3, 4), np.nan)
    curves = {
        name: np.abs(np.random.default_rng(0).normal(size=(3, 4)))
        for name in ("best", "average", "median", "originals", "smallest", "largest")
    }
    for values in (
        [0, 0.01, 10.0],
        [1, 2, 3],
        [True, False, True],
        ["a very long name indeed", "unsplittableword" * 2, ""],
        ["cost $5 and $6", r"$\frac{1$", "[/close]"],
    ):
        for known in (curves, dict.fromkeys(curves, nothing)):
            panels = [sweep_figures.Panel("", "parameter", values, known)] * 4
            assert size(sweep_figures.accuracy_over(panels))
            assert size(sweep_figures.similarity_over(panels[:1]))
    alone = {name: curve[:1] for name, curve in curves.items()}
    assert size(sweep_figures.similarity_over([sweep_figures.Panel("", "members", [5], alone)]))


def test_more_panels_than_a_figure_has_room_for_are_left_to_the_tables(monkeypatch):
    known = {name: np.full((2, 4), 0.5) for name in ("best", "average", "median", "originals", "smallest", "largest")}
    panels = [sweep_figures.Panel(str(number), "parameter", [1, 2], known) for number in range(7)]
    monkeypatch.setattr(sweep_figures, "MAX_PANELS", 3)
    for draw in (sweep_figures.accuracy_over, sweep_figures.similarity_over):
        assert size(draw(panels)) == size(draw(panels[:3]))
        assert draw(panels) != draw(panels[:3])  # it says that there are more


def test_trials_that_failed_before_any_other_are_in_the_history(monkeypatch):
    figures = []
    monkeypatch.setattr(sweep_figures, "_explained", lambda figure, *_: figures.append(figure) or b"")
    search = sweep_figures.Search("objective", True, {1: 0.5, 2: 0.6}, {}, [0, 5], None)
    sweep_figures.history(search)
    assert figures[0].axes[0].get_xlim() == (-0.5, 5.5)


def test_bars_do_not_split_cells():
    assert markdown([["a", "b"], ["x|y", "1"]]).splitlines()[-1] == r"| x\|y | 1 |"
