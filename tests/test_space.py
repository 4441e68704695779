"""The section `sweep` of an experiment file: what it accepts, and the experiments that it makes."""

import pytest
import yaml
from helpers import TINY

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import loading
from pdiff_ray.config import sweep as space


def load(folder, sweep, preset=None, **more):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": str(TINY), "sweep": sweep, **more}, sort_keys=False))
    return space.load(path, [f"storage={folder}"], preset)


def test_a_grid_is_every_combination_and_the_last_varies_fastest(tmp_path):
    file = load(tmp_path, {"parameters": {"generator.members": [4, 12], "zoo.batch_size": {"choice": [16, 32]}}})
    assert [list(a.values()) for a in file.sweep.grid()] == [[4, 16], [4, 32], [12, 16], [12, 32]]
    experiment = file.vary({"generator.members": 4, "zoo.batch_size": 16})
    assert (experiment.generator.members, experiment.zoo.batch_size) == (4, 16)


def test_a_parameter_applies_only_where_its_condition_holds(tmp_path):
    ae = "generator.autoencoder"
    noise = {
        "none": {f"{ae}.parameter_noise": 0, f"{ae}.latent_noise": 0},
        "parameters": {f"{ae}.latent_noise": 0},
        "both": {},
    }
    scale = {"choice": [0.01, 0.1], "when": {"noise": ["parameters", "both"]}}
    file = load(tmp_path, {"parameters": {"noise": {"variants": noise}, f"{ae}.parameter_noise": scale}})
    grid = list(file.sweep.grid())
    assert [len(a) for a in grid] == [1, 2, 2, 2, 2]
    settings = [file.vary(a).generator.autoencoder for a in grid]
    assert [s.parameter_noise for s in settings] == [0, 0.01, 0.1, 0.01, 0.1]
    assert [s.latent_noise for s in settings] == [0, 0, 0, 0.1, 0.1]


def test_generators_vary_with_the_fields_that_one_of_them_has(tmp_path):
    latent_dim = {"choice": [2, 3], "when": {"generator.name": "latent_diffusion"}}
    parameters = {"generator.name": ["gaussian", "latent_diffusion"], "generator.autoencoder.latent_dim": latent_dim}
    file = load(tmp_path, {"parameters": parameters})
    found = [file.vary(assignment).generator for assignment in file.sweep.grid()]
    assert [settings.name for settings in found] == ["gaussian", "latent_diffusion", "latent_diffusion"]
    assert [settings.autoencoder.latent_dim for settings in found[1:]] == [2, 3]
    assert found[1].autoencoder.steps == file.experiment.generator.autoencoder.steps


def test_mappings_are_values_and_have_short_labels(tmp_path):
    file = load(tmp_path, {"parameters": {"zoo.subset": [{"last_norm_layers": 2}, {"names": ["classifier*"]}, "all"]}})
    labels = [a["zoo.subset"] for a in file.sweep.grid()]
    assert labels == ["{last_norm_layers: 2}", "{names: [classifier*]}", "all"]
    assert [str(file.vary(a).zoo.subset) for a in file.sweep.grid()] == [
        "last 2 norm layers",
        "classifier*",
        "all parameters",
    ]


def test_repeats_raise_the_seeds_that_are_named(tmp_path):
    file = load(tmp_path, {"parameters": {"generator.members": [4]}, "repeats": 3}, seed=5)
    third = file.vary({"generator.members": 4}, repeat=2)
    assert (third.seed, third.zoo.seed, third.training.seed, third.data.seed) == (7, 7, 7, 0)
    seeds = ["generator.seed", "sampling.seed"]
    file = load(tmp_path, {"parameters": {"generator.members": [4]}, "repeats": 3, "seeds": seeds}, seed=5)
    third = file.vary({"generator.members": 4}, repeat=2)
    assert (third.seed, third.zoo.seed, third.generator.seed, third.sampling.seed) == (5, 5, 7, 7)


def test_a_preset_is_laid_over_the_file_and_those_it_inherits_from(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"base": str(TINY), "presets": {"small": {"seed": 3}}}))
    more = {"base": "base.yaml", "presets": {"small": {"sweep": {"parameters": {"zoo.batch_size": [8]}}}}}
    file = load(tmp_path, {"parameters": {"generator.members": [4]}}, "small", **more)
    assert file.experiment.seed == 3
    assert list(file.sweep.parameters) == ["zoo.batch_size"], "a preset's parameters are another question's"
    assert load(tmp_path, {"parameters": {"generator.members": [4]}}, **more).experiment.seed == 0
    with pytest.raises(ConfigError, match=r"no preset 'smal' among the mappings there \(small\)"):
        load(tmp_path, {"parameters": {"generator.members": [4]}}, "smal", **more)


def test_a_file_with_a_sweep_is_an_experiment_without_it(tmp_path):
    load(tmp_path, {"parameters": {"generator.members": [4]}})
    assert loading.load(tmp_path / "sweep.yaml").num_members == 12
    assert space.load(tmp_path / "sweep.yaml", ["sweep=null"]).num_members == 12


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"parameters": {"generator.member": [4]}}, r"generator\.member: unknown key.*members"),
        (
            {"parameters": {"generator.members": [4, 500]}},
            r"members 500: generator\.members is 500, but the zoo has 12",
        ),
        ({"parameters": {"generator.members": {"uniform": [1, 2]}}}, r"is a range, which a grid cannot enumerate"),
        ({"parameters": {"generator.members": {"uniform": [1, 2], "choice": [1]}}}, r"takes exactly one of"),
        ({"parameters": {"storage": ["a", "b"]}}, r"sweep\.parameters\.storage: 'storage' is the same in all"),
        ({"parameters": {}}, r"sweep\.parameters: \{\} is not accepted"),
        (
            {"parameters": {"zoo.members": 3}},
            r"sweep\.parameters\.zoo\.members: 3 is not accepted: .* choice, variants",
        ),
        (
            {"parameters": {"generator.autoencoder.latent_noise": [1, 2, 1.0]}},
            r"sweep\.parameters\.generator\.autoencoder\.latent_noise: choice has 1 and 1\.0, which cannot be told",
        ),
        ({"parameters": {"zoo.steps_per_member": {"choice": [0, False]}}}, r"choice has 0 and False, which cannot be"),
        ({"parameters": {"generator.members": [4, 4]}}, r"choice has 4 and 4, which cannot be told apart"),
        ({"parameters": {"generator.members": ["4", 4]}}, r"choice has '4' and 4, which cannot be told apart"),
        ({"parameters": {"network.args": [{"widths": [4]}, "{widths: [4]}"]}}, r"which cannot be told apart"),
        ({"parameters": {"generator.autoencoder.latent_noise": [float("nan")]}}, r"choice has nan; a finite number"),
        ([1], r"sweep: \[1\] is not accepted: it takes a mapping with some of search, parameters"),
        (
            {"parameters": {"generator.members": [4]}, "repeat": 2},
            r"sweep\.repeat: unknown key; did you mean 'repeats'",
        ),
        ({"parameters": {"generator.members": [4]}, "num_trials": 2}, r"num_trials is of random and Optuna searches"),
        ({"parameters": {"generator.members": [4]}, "search": "optuna"}, r"num_trials is needed by search 'optuna'"),
        ({"parameters": {"generator.members": [4]}, "seeds": ["zoo.members"]}, r"'zoo\.members' is not the path of a"),
        (
            {"parameters": {"generator.members": [4]}, "metric": "generated/best_test_accuracy"},
            r"test labels must not choose anything; take one of generated/mean_train_accuracy",
        ),
        (
            {"parameters": {"zoo.batch_size": {"choice": [8], "when": {"generator.members": 3}}}},
            r"zoo\.batch_size\.when\.generator\.members: not one of the parameters before it",
        ),
        (
            {
                "parameters": {
                    "generator.members": [4],
                    "zoo.batch_size": {"choice": [8], "when": {"generator.members": 3}},
                }
            },
            r"when\.generator\.members: 3 is not among its values",
        ),
        (
            {"search": "random", "num_trials": 2, "parameters": {"generator.autoencoder.lr": {"loguniform": [0, 1]}}},
            r"loguniform is \[low, high\] with low < high above 0",
        ),
        (
            {"search": "random", "num_trials": 2, "parameters": {"generator.members": {"int": [1, 50]}}},
            r"members 50: generator\.members is 50, but the zoo has 12",
        ),
    ],
)
def test_impossible_sweeps_are_refused_with_the_field_and_the_remedy(tmp_path, sweep, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, sweep)
    assert "sweep.yaml" in str(error.value)


@pytest.mark.parametrize(("given", "seconds"), [(90, 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), (None, None)])
def test_time_budgets(tmp_path, given, seconds):
    sweep = {"parameters": {"generator.members": [4]}, "time_budget": given}
    assert load(tmp_path, sweep).sweep.time_budget == seconds
