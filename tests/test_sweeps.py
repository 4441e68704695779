"""Every experiment in sweeps/: it loads with and without its preset, and all its trials fit its networks."""

import functools
import json
import random
import re
from pathlib import Path

import pytest
import torch

from pdiff_ray.cli import experiments as commands
from pdiff_ray.config import loading
from pdiff_ray.config import schema as config
from pdiff_ray.config import sweep as space
from pdiff_ray.data import sources
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.build import check_network
from pdiff_ray.running.experiment import make_plan
from pdiff_ray.stages.zoo import subset_of

FOLDER = Path(__file__).parents[1] / "sweeps"
FILES = sorted(FOLDER.glob("**/*.yaml"))
CASES = [
    (path, preset)
    for path in FILES
    for preset in (None, "small")
    if preset is None or "presets:" in path.read_text() or "base/" in path.read_text()
]
IDS = [f"{path.stem}-{preset}" if preset else path.stem for path, preset in CASES]


@pytest.fixture
def load(tmp_path):
    return lambda path, preset=None: space.load(path, [f"storage={tmp_path}"], preset)


def trials(file):
    """The experiments of a file: all of a grid, some draws of a search."""
    if isinstance(file, config.Experiment):
        return [file]
    sweep = file.sweep
    assignments = list(sweep.grid()) if sweep.search == "grid" else [draw(sweep, seed) for seed in range(20)]
    return [file.vary(assignment, repeat) for assignment in assignments for repeat in range(sweep.repeats)]


def draw(sweep, seed):
    """An assignment such as a search makes; every other one at the ends of the ranges."""
    rng, assignment = random.Random(seed), {}
    for name, parameter in sweep.parameters.items():
        if not sweep.applies(parameter, assignment):
            continue
        if parameter.range is None:
            assignment[name] = rng.choice(parameter.values)
        elif seed % 2:
            assignment[name] = rng.choice(parameter.range)
        else:
            value = rng.uniform(*parameter.range)
            assignment[name] = round(value) if parameter.integers else value
    return assignment


@pytest.mark.parametrize(("path", "preset"), CASES, ids=IDS)
def test_all_trials_can_be_planned(path, preset, load):
    found = trials(load(path, preset))
    for experiment in found:
        assert make_plan(experiment).missing[0] == "base"
    for experiment in covering(found):
        with torch.device("meta"):  # a network without storage, having taken images of the data's size
            network = check_network(experiment.network, sources.describe(experiment.data))
            subset = subset_of(experiment, network)
            make_generator(experiment.generator, subset)


def covering(experiments):
    """Those of experiments that have data, a network with its subset, or a generator that none before has."""
    seen = set()
    for experiment in experiments:
        images = experiment.data.model_dump_json(include={"name", "channels", "image_size"})
        network = experiment.network.model_dump_json() + experiment.zoo.subset.model_dump_json()
        shapes = {images, network, experiment.generator.model_dump_json()}
        if not shapes <= seen:
            seen |= shapes
            yield experiment


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_opens_with_question_and_command(path):
    head = path.read_text().partition("\nname:")[0]
    name = path.relative_to(FOLDER.parent)
    assert f"uv run python -m pdiff_ray.sweep {name}" in head
    assert loading.load(path).name == path.stem
    if "sweep:" in path.read_text():
        assert "?" in head.partition("\n\n")[0]
        assert f"{name} --preset small" in head
        assert re.search(r"The small preset takes \d+ minutes on 2 cores", head.replace("\n#", "")), "its cost"


# Distinct artifacts that a sweep's trials share; the same for the preset.
SHARED = {
    "ablate_layers": {"base": 3, "zoo": 15},
    "ablate_members": {"base": 1, "zoo": 1, "generator": 15},
    "beat_baselines": {"base": 2, "zoo": 6, "alignment": 2},
    "ablate_encoder": {"base": 1, "zoo": 1, "generator": 18},
    "ablate_noise": {"base": 1, "zoo": 1, "generator": 36},
    "ablate_optimizer": {"base": 3, "zoo": 18},
    "ablate_diffusion_steps": {"base": 1, "zoo": 1, "generator": 15, "samples": 30},
    "ablate_regime": {"base": 3, "zoo": 9},
    "ablate_batchnorm": {"base": 3, "zoo": 15, "alignment": 6, "generator": 15},
    "ablate_alignment": {"base": 6, "zoo": 6, "alignment": 12, "generator": 36},
    "deepweightflow": {"base": 3, "zoo": 3, "alignment": 3, "generator": 12},
    "whole_networks": {"base": 15, "zoo": 15, "alignment": 15, "generator": 60},
    "tune_autoencoder": {"base": 1, "zoo": 1},
    "tune_diffusion": {"base": 1, "zoo": 1},
}


@pytest.mark.parametrize("preset", [None, "small"])
@pytest.mark.parametrize("name", SHARED)
def test_trials_share_what_they_can(name, preset, load):
    plans = [make_plan(experiment) for experiment in trials(load(FOLDER / f"{name}.yaml", preset))]
    found = {s: {plan.artifacts[s].key for plan in plans if s in plan.artifacts} for s in SHARED[name]}
    assert {stage: len(keys) for stage, keys in found.items()} == SHARED[name]


@pytest.mark.parametrize("preset", [None, "small"])
@pytest.mark.parametrize("name", ["tune_autoencoder", "tune_diffusion"])
def test_searches_contain_the_defaults(name, preset, load):
    file = load(FOLDER / f"{name}.yaml", preset)
    default, assignment = file.experiment, {}
    for parameter_name, parameter in file.sweep.parameters.items():
        if not file.sweep.applies(parameter, assignment):
            continue
        if parameter.variants:
            # The one that changes nothing; of several, that which leaves most to the parameters after it.
            same = [label for label in parameter.values if file.vary({parameter_name: label}) == default]
            assert same
            assignment[parameter_name] = same[-1]
            continue
        value = functools.reduce(lambda tree, key: tree[key], parameter_name.split("."), default.model_dump())
        value = list(value) if isinstance(value, tuple) else value
        if parameter.range:
            assert parameter.range[0] <= value <= parameter.range[1]
        else:
            assert space.as_value(value) in parameter.values
        assignment[parameter_name] = space.as_value(value)
    assert file.vary(assignment) == default


def test_table_has_every_network_on_every_data_set(load):
    file = load(FOLDER / "paper_table1.yaml")
    cells = [(e.network.name, e.data.name) for e in map(file.vary, file.sweep.grid())]
    assert len(set(cells)) == len(cells) == len({n for n, _ in cells}) * len({d for _, d in cells}) == 48
    assert json.dumps(cells).count("imagenet") == 6


@pytest.mark.parametrize(("path", "preset"), CASES, ids=IDS)
def test_dry_run_tells_what_it_would_take(path, preset, tmp_path, capsys):
    options = ["--preset", preset] if preset else []
    commands.sweep.main([str(path), "--storage", str(tmp_path / "none"), "--dry-run", *options], standalone_mode=False)
    told = capsys.readouterr().out
    assert "to build" in told
    assert "of devices" in told
    assert "GiB" in told
    assert not (tmp_path / "none").exists(), "a dry run leaves nothing"
