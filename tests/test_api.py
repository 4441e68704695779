"""The Python API: what is loaded, run, opened, fitted and judged from Python is what the command line gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY

import pdiff_ray as pd
from pdiff_ray.reports.answers import conclusion
from pdiff_ray.storage.parameters import ParameterStore

SWEEP = {"parameters": {"generator.name": ["gaussian", "latent_diffusion"]}}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return str(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def experiment(storage):
    return pd.load_experiment(TINY, storage=storage)


@pytest.fixture(scope="module")
def result(experiment):
    return pd.run(experiment, in_process=True, track=False)


def test_the_tour_runs(tmp_path):
    script = Path(__file__).parent.parent / "docs/tour.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Did it work?" in done.stdout
    assert len(list((tmp_path / "networks").glob("*.safetensors"))) == 2


def test_importing_the_package_imports_no_library():
    code = "import sys, pdiff_ray; print(*dir(pdiff_ray)); print(*sys.modules)"
    names, modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert set(pd.__all__) <= set(names.split())
    assert not {"torch", "pydantic", "pyarrow", "ray"} & set(modules.split())
    assert all(getattr(pd, name) for name in pd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'zoo_of'"):
        _ = pd.zoo_of


def test_arguments_are_laid_over_the_file(storage):
    changed = pd.load_experiment(TINY, storage=storage, zoo={"members": 5}, seed=3)
    assert (changed.zoo.members, changed.zoo.seed, changed.network.args) == (5, 3, {"widths": [4, 8]})
    assert pd.load_experiment(name="plain").zoo.members == 200
    with pytest.raises(pd.ConfigError, match=r"zoo\.member: unknown key; did you mean 'members'"):
        pd.load_experiment(TINY, zoo={"member": 5})
    with pytest.raises(pd.ConfigError, match="sweep: required"):
        pd.load_sweep(TINY)
    with pytest.raises(pd.ConfigError, match="preset: 'small' is given without the file"):
        pd.load_experiment(preset="small")


def test_the_site_counts_without_a_file(tmp_path, monkeypatch):
    (tmp_path / "site.yaml").write_text("resources: {workers: 2}\n")
    monkeypatch.setenv("PDIFF_SITE", str(tmp_path / "site.yaml"))
    assert pd.load_experiment().resources.workers == 2
    assert pd.load_experiment(resources={"workers": 4}).resources.workers == 4


def test_a_plan_says_what_is_there(result, experiment, storage):
    assert pd.plan(experiment).missing == ()
    other = pd.plan(pd.load_experiment(TINY, storage=storage, sampling={"seed": 7}))
    assert other.missing == ("samples", "evaluation", "report")
    assert str(other).count("to build") == 3


def test_a_result_is_opened_only_when_it_is_there(result, experiment, storage):
    assert pd.open_result(experiment).to_dict() == result.to_dict()
    json.dumps(result.to_dict())
    assert all(line in str(result) for line in conclusion(result.summary))
    assert result.groups()["group"].to_pylist()[0] == "original"
    assert len(result.networks()) == sum(result.groups()["networks"].to_pylist())
    with pytest.raises(pd.PdiffError, match="samples, evaluation, report missing"):
        pd.open_result(pd.load_experiment(TINY, storage=storage, sampling={"seed": 8}))


def test_a_zoo_as_vectors_state_dicts_and_table(result, storage):
    zoo = pd.open_networks(storage, result.artifacts["zoo"].key)
    vectors = zoo.vectors()
    assert vectors.shape == (len(zoo), zoo.subset.size)
    assert np.array_equal(vectors, ParameterStore(result.artifacts["zoo"]).vectors())
    assert zoo.table(ids=[3, 1])["id"].to_pylist() == [3, 1]
    dicts = list(zoo.state_dicts(ids=[2]))
    assert torch.equal(zoo.subset.flatten(dicts[0]), vectors[2])
    assert set(next(zoo.state_dicts(subset_only=True))) == set(zoo.subset.names) < set(dicts[0])
    with pytest.raises(pd.StorageError, match="holds no networks"):
        pd.open_networks(storage, result.artifacts["base"].key)


def test_a_generator_learns_from_any_tensor():
    vectors = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    for name, settings in {"gaussian": {}, "latent_diffusion": {"autoencoder": {"steps": 5, "latent_dim": 4}}}.items():
        first, again = (pd.fit(vectors, name, seed=1, **settings) for _ in range(2))
        assert first.sample(7, seed=2).shape == (7, 30)
        assert torch.equal(first.sample(7, seed=2), again.sample(7, seed=2))
        assert not torch.equal(first.sample(7, seed=2), first.sample(7, seed=3))
    for wrong in (vectors[0], vectors[:0], vectors[:, :0]):
        with pytest.raises(pd.PdiffError, match="shape"):
            pd.fit(wrong)
    with pytest.raises(pd.ConfigError, match="gaussia"):
        pd.fit(vectors, "gaussia")
    with pytest.raises(pd.ConfigError, match=r"sampler"):
        first.sample(2, sampler="euler")


def test_fitting_makes_sums_exact():
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = False, True
    pd.fit(torch.randn(3, 4), "gaussian")
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == (True, False)


def test_judging_refuses_what_are_no_networks(result, experiment):
    vectors = result.samples.vectors()
    for wrong in (vectors[0], vectors[:, 1:]):
        with pytest.raises(pd.PdiffError, match=r"vectors: shape .*; \(n, \d+\) is wanted"):
            pd.judge(experiment, wrong)
    with pytest.raises(pd.PdiffError, match="splits: 'val' is none of selection, validation, test"):
        pd.judge(experiment, vectors, splits=["val"])


def test_judging_gives_what_the_evaluation_found(result, experiment, storage):
    judged = pd.judge(experiment, result.samples.vectors())
    rows = [row for row in result.networks().to_pylist() if row["group"] == "generated"]
    assert judged["test_accuracy"].to_pylist() == [row["test_accuracy"] for row in rows]
    assert judged["wrong"].to_pylist() == [row["wrong"] for row in rows]
    with pytest.raises(pd.PdiffError, match="base missing"):
        pd.judge(pd.load_experiment(TINY, storage=storage, training={"seed": 9}), result.samples.vectors())


def test_a_sweep(result, storage):
    sweep = pd.run(pd.load_sweep(TINY, storage=storage, sweep=SWEEP), in_process=True, track=False)
    assert sweep.table()["generator.name"].to_pylist() == ["gaussian", "latent_diffusion"]
    assert sweep.failed == []
    assert Path(sweep.report).exists()
    own = next(group for group in result.summary["groups"] if group["group"] == "generated")
    assert sweep.table()["generated/mean_test_accuracy"].to_pylist()[1] == own["mean"]
    json.dumps(sweep.to_dict())
