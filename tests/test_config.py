"""What is refused, and in which words; inheritance, overrides, recipes and seeds."""

import re
from pathlib import Path

import pytest
from helpers import TINY

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.registry import fingerprint, imported
from pdiff_ray.config import loading, section
from pdiff_ray.config.schema import Experiment
from pdiff_ray.generators.autoencoder import AutoencoderSettings
from pdiff_ray.generators.baselines import GaussianSettings
from pdiff_ray.generators.latent import RECIPES
from pdiff_ray.running.experiment import make_plan

SWEEPS = sorted((Path(__file__).parents[1] / "sweeps").glob("**/*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text, name="experiment.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def load(write):
    return lambda text, *overrides: loading.load(write(f"name: test\n{text}"), overrides)


# Each message names the field, the value and the remedy.
REFUSED = {
    "unknown key": ("zoo: {membrs: 5}", ["zoo.membrs", "unknown key", "did you mean 'members'"]),
    "unknown key, nothing near": ("data: {zzz: 1}", ["data.zzz", "unknown key", "known here", "validation_fraction"]),
    "unknown section": ("zo: {}", ["zo: unknown key", "'zoo'"]),
    "unknown key deep down": (
        "generator: {autoencoder: {latent_dims: 4}}",
        ["generator.autoencoder.latent_dims", "'latent_dim'"],
    ),
    "text for a number": ("zoo: {members: many}", ["zoo.members", "'many'", "valid integer"]),
    "text for a number or auto": (
        "resources: {gpus_per_worker: some}",
        ["resources.gpus_per_worker: 'some'", "valid number", "'auto'"],
    ),
    "none of the choices": (
        "sampling: {sampler: eulr}",
        ["sampling.sampler", "'eulr'", "known: ddpm, ddim", "'euler'"],
    ),
    "unknown data set": (
        "data: {name: cifar-10}",
        ["data.name", "'cifar-10'", "custom, digits", "mean 'cifar10'"],
    ),
    "unknown optimizer": ("zoo: {optimizer: {name: adamx}}", ["zoo.optimizer.name", "'adamx'", "'adam'"]),
    "a schedule that is not there": (
        "training: {optimizer: {schedule: 'math:tann'}}",
        ["training.optimizer.schedule", "'math:tann'", "module 'math' has no attribute 'tann'"],
    ),
    "unknown generator": (
        "generator: {name: gausian, autoencoder: {latent_dims: 4}}",
        ["generator.name", "no generator 'gausian'", "latent_diffusion, latent, gaussian", "did you mean"],
    ),
    "a generator that is no text": (
        "generator: {name: [gaussian]}",
        ["generator.name", "['gaussian']", "valid string"],
    ),
    "a generator that is none": ("generator: {name: 'math:tan'}", ["generator", "'math:tan'", "no class Settings"]),
    "a field of another generator": (
        "generator: {name: gaussian, autoencoder: {latent_dim: 4}}",
        ["generator.autoencoder", "unknown key", "known here: name, members, seed"],
    ),
    "a subset's function in no module": ("zoo: {subset: {function: biases}}", ["zoo.subset.function", "'biases'"]),
    "number for a section": ("zoo: 3", ["zoo: 3", "takes a mapping with some of members"]),
    "bad element": ("evaluation: {noise_sigmas: [0.1, big]}", ["evaluation.noise_sigmas.1", "'big'"]),
    "too small": ("zoo: {members: 0}", ["zoo.members", "0 is not accepted", "greater than or equal to 1"]),
    "not finite": ("zoo: {optimizer: {lr: .inf}}", ["zoo.optimizer.lr", "inf", "finite"]),
    "seed as text": ("seed: '7'", ["seed", "'7'", "valid integer"]),
    "K beyond the zoo": (
        "zoo: {members: 10}\ngenerator: {members: 11}",
        ["generator.members is 11", "zoo has 10", "lower the first or raise the second"],
    ),
    "two subset rules": (
        "zoo: {subset: {last_norm_layers: 2, names: [fc.*]}}",
        ["zoo.subset", "exactly one", "last_norm_layers, names"],
    ),
    "no subset rule": ("zoo: {subset: {}}", ["zoo.subset", "exactly one", "none"]),
    "empty range of layers": ("zoo: {subset: {norm_layers: [4, 4]}}", ["zoo.subset", "[4, 4]", "[start, stop)"]),
    "layers counted from 0": ("zoo: {subset: {norm_layers: [0, 2]}}", ["zoo.subset", "[0, 2]", "from 1"]),
    "independent with frozen statistics": (
        "zoo: {regime: independent, subset: all, batchnorm: frozen}",
        ["zoo", "regime independent", "frozen", "'included' or 'recalibrated'"],
    ),
    "independent with a part": (
        "zoo: {regime: independent, batchnorm: included}",
        ["zoo", "regime independent", "last 2 norm layers", "must be 'all'"],
    ),
    "more branches than members": (
        "zoo: {regime: branches, branches: 5, members: 4}",
        ["zoo", "branches is 5", "members (4)", "lower it"],
    ),
    "no steps between members": ("zoo: {steps_per_member: 0}", ["zoo", "steps_per_member is 0", "'epoch'"]),
    "other word for an epoch": ("zoo: {steps_per_member: epochs}", ["zoo.steps_per_member: 'epochs'", "'epoch'"]),
    "even kernel": (
        "generator: {autoencoder: {kernel_size: 4}}",
        ["generator.autoencoder", "kernel_size is 4", "must be odd"],
    ),
    "more sampling steps than timesteps": (
        "sampling: {steps: 50}\ngenerator: {diffusion: {num_timesteps: 20}}",
        ["sampling.steps is 50", "num_timesteps is 20", "lower the first"],
    ),
    "base as a section": ("base: {epochs: 3}", ["base", "{'epochs': 3}", "'training:'"]),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused(load, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(text)
    message = str(caught.value)
    assert message.split(":")[0].endswith("experiment.yaml")
    assert [part for part in expected if part not in message] == []
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 2


def test_all_problems_are_told_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("zoo: {membrs: 5}\nseed: -1\nsampling: {samples: none}")
    assert {line.split(": ")[1] for line in str(caught.value).splitlines()} == {
        "zoo.membrs",
        "seed",
        "sampling.samples",
    }


def test_name_is_required(write):
    with pytest.raises(ConfigError, match="name: required but not given"):
        loading.load(write("seed: 1"))


def test_missing_file_suggests_a_near_one(write):
    path = write("name: test", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"quickstrat\.yaml: no such file; did you mean 'quickstart\.yaml'"):
        loading.load(path.with_name("quickstrat.yaml"))


def test_missing_base_names_the_file_that_asked(load):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml \(base of experiment\.yaml\): no such file"):
        load("base: nowhere.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: it is no regular file"),
        ("a: [", r"line 1: not valid YAML"),
        ("- 1", "an experiment file is a mapping of sections, this one is list"),
        ("long", "cannot be read: File name too long"),
    ],
)
def test_what_is_wrong_with_a_base_names_the_file_that_asked(load, write, tmp_path, content, expected):
    name = "x" * 300 if content == "long" else "b.yaml"
    if content is None:
        (tmp_path / name).mkdir()
    elif content != "long":
        write(content, name)
    with pytest.raises(ConfigError, match=rf"{name} \(base of experiment\.yaml\): ?{expected}"):
        load(f"base: {name}")


def test_a_long_value_does_not_hide_what_is_said_of_it(load):
    with pytest.raises(ConfigError, match=r"experiment\.yaml: base: \[0, 0.* \.\.\. .*\] is not a file name") as caught:
        load(f"base: {[0] * 5000}")
    assert len(str(caught.value)) <= 1000
    again = type(caught.value)(str(caught.value))
    assert str(again) == str(caught.value)


def test_circular_base(write):
    write("base: b.yaml\nname: a", "a.yaml")
    with pytest.raises(ConfigError, match="in a circle"):
        loading.load(write("base: a.yaml\nname: b", "b.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nzoo: {members: 3}\nzoo: {members: 4}", "line 3: not valid YAML: the key 'zoo' is given twice"),
        ("name: [", "line 1: not valid YAML"),
        ("- a", "mapping of sections, this one is list"),
        ("", "NoneType"),
    ],
)
def test_no_experiment(write, text, expected):
    with pytest.raises(ConfigError, match=expected):
        loading.load(write(text))


def test_merged_keys_may_be_given_again(load):
    text = "presets: {p: {mid: &m {<<: &b {seed: 1}, seed: 2}}}\nzoo: {<<: *m, <<: *b, seed: 3}"
    assert load(text).zoo.seed == 3


def test_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        loading.load(tmp_path)


def test_base_is_merged_field_by_field(load, write):
    write("name: grand\nseed: 3\nzoo: {members: 7, optimizer: {lr: 0.5, name: sgd}}", "grand.yaml")
    write("base: grand.yaml\nname: parent\nzoo: {members: 8, warmup_steps: 0}", "parent.yaml")
    experiment = load("base: parent.yaml\nzoo: {optimizer: {lr: 0.25}}")
    assert experiment.name == "test"
    assert experiment.seed == 3
    assert (experiment.zoo.members, experiment.zoo.warmup_steps) == (8, 0)
    assert (experiment.zoo.optimizer.lr, experiment.zoo.optimizer.name) == (0.25, "sgd")


def test_subset_is_replaced(load, write):
    write("name: parent\nzoo: {subset: {names: [fc.*]}}", "parent.yaml")
    assert load("base: parent.yaml\nzoo: {subset: {norm_layers: [1, 3]}}").zoo.subset.norm_layers == (1, 3)
    assert load("base: parent.yaml", "zoo.subset.last_norm_layers=1").zoo.subset.last_norm_layers == 1
    assert load("base: parent.yaml", "zoo.subset=all").zoo.subset.all is True
    assert load("base: parent.yaml").zoo.subset.names == ("fc.*",)


def test_another_generator_drops_the_fields_that_it_does_not_have(load, write):
    text = "generator: {members: 3, gate_points: 1, autoencoder: {latent_dim: 4}}"
    write(f"name: parent\nzoo: {{members: 5}}\n{text}", "parent.yaml")
    for experiment in (load(text, "generator.name=gaussian"), load("base: parent.yaml\ngenerator: {name: gaussian}")):
        assert type(experiment.generator) is GaussianSettings
        assert experiment.generator.members == 3
    back = load(text, "generator.name=gaussian", "generator.name=latent_diffusion", "generator.gate_points=7").generator
    assert (back.gate_points, back.autoencoder.latent_dim) == (7, AutoencoderSettings().latent_dim)
    same = load(text, "generator.name=latent_diffusion").generator
    assert (same.gate_points, same.autoencoder.latent_dim) == (1, 4)
    with pytest.raises(ConfigError, match=r"generator\.mebmers: unknown key; did you mean 'members'"):
        load("generator: {mebmers: 3}", "generator.name=gaussian")


def test_generators_are_written_with_the_fields_that_they_have(load):
    plain, gaussian = load(""), load("", "generator.name=gaussian")
    assert plain.model_dump()["generator"]["autoencoder"]["latent_dim"] == AutoencoderSettings().latent_dim
    assert gaussian.model_dump()["generator"] == {"name": "gaussian", "members": None, "seed": 0}
    assert Experiment.model_validate(gaussian.model_dump()) == gaussian
    assert Experiment(name="test", generator=gaussian.generator).generator == gaussian.generator


def test_fields_that_came_later_are_no_part_of_the_key_at_their_defaults(load):
    keyed = load("").zoo.keyed()["subset"]
    assert keyed == {"all": None, "last_norm_layers": 2, "norm_layers": None, "names": None}
    own = load("zoo: {subset: {function: 'torch:typename'}}").zoo.keyed()["subset"]
    assert own["function"] == "torch:typename"
    assert own["code"] == {"function": fingerprint("torch:typename")}


def test_the_users_own_code_is_part_of_the_key(load, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for factor in (1, 2):
        (tmp_path / "own_schedule.py").write_text(f"def constant(step, num_steps): return {factor}.0")
        keys.append(load("", "zoo.optimizer.schedule=own_schedule:constant").zoo.keyed()["optimizer"])
    assert keys[0]["code"]["schedule"] != keys[1]["code"]["schedule"]
    assert "code" not in load("").zoo.keyed()["optimizer"]


def test_overrides(load):
    experiment = load(
        "zoo: {members: 5}",
        "zoo.members=6",
        "training.optimizer.lr=1e-3",
        "evaluation.noise_sigmas=[0.1, 2]",
        "network.args={widths: [4, 8]}",
        "generator.members=",
        "data.download=true",
    )
    assert experiment.zoo.members == 6
    assert experiment.training.optimizer.lr == 0.001
    assert experiment.evaluation.noise_sigmas == (0.1, 2.0)
    assert experiment.network.args == {"widths": [4, 8]}
    assert experiment.generator.members is None
    assert experiment.data.download is True


def test_a_part_of_a_section_keeps_its_other_defaults(load):
    plain, changed = load(""), load("zoo: {optimizer: {lr: 0.5}}", "training.optimizer.lr=1e-4")
    assert changed.training.optimizer == plain.training.optimizer.model_copy(update={"lr": 1e-4})
    assert changed.zoo.optimizer == plain.zoo.optimizer.model_copy(update={"lr": 0.5})
    assert plain.training.optimizer.schedule == "onecycle"
    assert plain.zoo.optimizer.weight_decay > 0


@pytest.mark.parametrize("override", ["zoo.members", "=3", "zoo..members=3", "zoo.members=[1"])
def test_malformed_override(load, override):
    with pytest.raises(ConfigError) as caught:
        load("", override)
    assert f"--set {override}" in str(caught.value)


def test_override_of_an_unknown_key(load):
    with pytest.raises(ConfigError, match=r"zoo\.member: unknown key; did you mean 'members'"):
        load("", "zoo.member=3")


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_recipe_is_one_switch(load, recipe):
    plain, chosen = load("").generator, load("", f"generator.recipe={recipe}").generator
    for part in ("autoencoder", "diffusion"):
        others = getattr(plain, part).model_dump()
        assert getattr(chosen, part).model_dump() == {**others, **RECIPES[recipe][part]}
    assert chosen.normalize == RECIPES[recipe]["normalize"]
    assert chosen.keyed() != plain.keyed()


def test_explicit_values_win_over_the_recipe(load):
    generator = load("generator: {recipe: paper, autoencoder: {steps: 7}, diffusion: {prediction: v}}").generator
    assert (generator.autoencoder.steps, generator.autoencoder.batch_size) == (7, 200)
    assert (generator.diffusion.prediction, generator.diffusion.denoiser) == ("v", "cnn")


def test_seeds_are_handed_down(load):
    experiment = load("seed: 5\nzoo: {seed: 9}\ntraining:\n")
    assert (experiment.training.seed, experiment.zoo.seed, experiment.generator.seed, experiment.sampling.seed) == (
        5,
        9,
        5,
        5,
    )
    assert Experiment(name="x").sampling.seed == 0
    assert load("seed: 5").zoo.keyed() == load("", "zoo.seed=5").zoo.keyed()


def test_keys_leave_out_what_changes_no_result(load):
    first = load("")
    second = load("data: {root: /elsewhere, loader_workers: 7}\nevaluation: {networks_per_task: 3}")
    assert first.data.keyed() == second.data.keyed()
    assert first.evaluation.keyed() == second.evaluation.keyed()
    assert first.data.keyed() != load("data: {train_noise: 0.5}").data.keyed()


def test_old_names_of_fields_are_read(load, capsys):
    """With one note for each name."""
    old = "evaluation: {stack: 7, vmap: 3}\nzoo: {vmap: 2}"
    new = "evaluation: {networks_per_task: 7, networks_per_program: 3}\nzoo: {runs_per_program: 2}"
    section._note.cache_clear()
    assert load(old) == load(old) == load(new)
    assert capsys.readouterr().err.splitlines() == [
        "note: zoo.vmap is called zoo.runs_per_program now",
        "note: evaluation.stack is called evaluation.networks_per_task now",
        "note: evaluation.vmap is called evaluation.networks_per_program now",
    ]
    with pytest.raises(ConfigError, match="evaluation: networks_per_task is given twice, once by its old name stack"):
        load("evaluation: {stack: 7, networks_per_task: 7}")


def test_fields_of_later_versions_are_keyed_once_they_are_set(load):
    assert "metrics" not in load("").evaluation.keyed()
    assert load("evaluation: {metrics: ['a:b']}").evaluation.keyed()["metrics"] == ["a:b"]


def test_data_folder_becomes_absolute(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load("data: {root: images}").data.root == str(tmp_path / "images")


def test_storage_by_precedence(load, monkeypatch):
    monkeypatch.setenv("PDIFF_STORAGE", "from-environment")
    assert load("storage: from-file").storage_uri == "from-file"
    assert load("").storage_uri == "from-environment"
    monkeypatch.delenv("PDIFF_STORAGE")
    assert load("").storage_uri == "pdiff-storage"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_committed_files_load(path):
    assert loading.load(path).name == path.stem


def test_there_are_committed_files():
    assert {"quickstart", "mnist_s2", "cifar10_convnet3"} <= {path.stem for path in SWEEPS}


def test_own_code_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in {"halved": "def f(:", "undefined": "f = nowhere", "ended": "raise OSError('gone')"}.items():
        (tmp_path / f"{name}.py").write_text(content)
        with pytest.raises(ConfigError, match=f"'{name}:f' .module:attribute. cannot be imported"):
            imported(f"{name}:f")


@pytest.mark.parametrize("field", ["storage", "data.root"])
def test_a_home_of_nobody_is_told_of(field, tmp_path):
    home = "~nobody-has-this-name/x"
    with pytest.raises(PdiffError, match=f"{re.escape(field)}: '{home}' is n"):
        make_plan(loading.load(TINY, [f"storage={tmp_path}", f"{field}={home}"]))
