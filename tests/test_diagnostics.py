"""What is said of zoos: on vectors whose answer is known, and on zoos that were trained well and badly."""

import json

import numpy as np
import pytest
from helpers import TINY, build

import pdiff_ray as pd
from pdiff_ray.config.section import flat
from pdiff_ray.evaluation.diagnostics import LEAST_MEMBERS, MEASURES, diagnose, diagnose_members
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, Record

K, D = 200, 300
ONE_RUN = np.zeros(K, int)


def draw(kind, count=K, dimension=D, seed=0):
    """Members around 5, each value on a scale of its own."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(count, dimension))
    line = np.arange(count)[:, None] / count * random.normal(size=dimension)
    moved = {"draws": noise, "walk": noise.cumsum(0), "line": 10 * line + 0.1 * noise}[kind]
    return 5 + moved * random.lognormal(0, 2, dimension)


def autoregressive(phi, count=4000, dimension=5, seed=0):
    values, random = np.zeros((count, dimension)), np.random.default_rng(seed)
    for step in range(1, count):
        values[step] = phi * values[step - 1] + random.normal(size=dimension)
    return values


def names(findings):
    return {finding.name for finding in findings}


def test_independent_draws_are_good():
    found = diagnose(draw("draws"), ONE_RUN)
    assert not found.bad
    assert found.values["effective_rank"] == pytest.approx(1 / (1 / (K - 1) + 1 / D), rel=0.02)  # as Marchenko-Pastur
    assert found.values["drift"] < 0.01
    assert abs(found.values["autocorrelation"]) < 0.05
    assert found.values["independent_members"] > 0.9 * K


@pytest.mark.parametrize("count", [50, 400])
def test_a_random_walk_has_the_same_numbers_at_any_length(count):
    values = [diagnose(draw("walk", count, 1000, seed), np.zeros(count)).values for seed in range(3)]
    mean = {name: np.mean([found[name] for found in values]) for name in values[0]}
    assert mean["effective_rank"] == pytest.approx(4.1, rel=0.1)
    assert mean["drift"] == pytest.approx(0.43, rel=0.1)
    assert mean["independent_members"] == pytest.approx(5, rel=0.1)


def test_a_line_has_one_direction_and_is_drift():
    found = diagnose(draw("line"), ONE_RUN)
    assert names(found.bad) == {"effective_rank", "drift", "independent_members"}
    assert found.values["effective_rank"] < 1.3
    assert all(finding.advice for finding in found.bad)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_autocorrelation_is_that_of_the_process(phi):
    found = diagnose(autoregressive(phi), np.zeros(4000)).values
    assert found["autocorrelation"] == pytest.approx(phi, abs=0.05)
    assert found["independent_members"] == pytest.approx(4000 * (1 - phi) / (1 + phi), rel=0.2)


def test_runs_that_stay_apart_count_once_each():
    random = np.random.default_rng(0)
    runs = np.arange(K) % 20
    members = random.normal(size=(20, D))[runs] + 0.01 * random.normal(size=(K, D))
    found = diagnose(members, runs)
    assert found.values["independent_members"] == pytest.approx(20, rel=0.1)
    assert found.values["drift"] < 0.01
    independent = diagnose(draw("draws"), range(K)).values
    assert independent["independent_members"] == K
    assert "autocorrelation" not in independent


def test_members_are_taken_in_the_order_of_their_steps():
    shuffled = np.random.default_rng(0).permutation(K)
    members, runs = draw("walk"), np.arange(K) // 100
    found = diagnose(members[shuffled], runs[shuffled], shuffled.tolist()).values
    assert found == pytest.approx(diagnose(members, runs).values)


def test_scales_and_pieces_of_vectors_change_nothing(monkeypatch):
    members = draw("walk")
    found = diagnose(members, ONE_RUN).values
    monkeypatch.setattr("pdiff_ray.evaluation.diagnostics.CHUNK_VALUES", 7 * K)
    scaled = diagnose(np.concatenate([np.full((K, 2), 3.0), -100 * members], 1).astype(np.float32), ONE_RUN).values
    del found["diversity"], scaled["diversity"]
    assert scaled == pytest.approx(found, rel=1e-4)


def test_members_that_predict_the_same_are_a_collapse():
    random = np.random.default_rng(0)
    wrong = random.random((1, 1000)) < 0.1
    same = np.repeat(wrong, K, axis=0)
    found = diagnose(draw("draws"), ONE_RUN, wrong=same)
    assert names(found.bad) == {"disagreement"}
    assert not diagnose(draw("draws"), ONE_RUN, wrong=same ^ (random.random((K, 1000)) < 0.02)).bad


def test_what_the_autoencoder_noted_is_judged():
    def bad(unexplained, decoded, passed):
        gate = {"validation_accuracy": 0.8, "decoded_validation_accuracy": decoded, "passed": passed}
        return names(diagnose(None, ONE_RUN, notes={"unexplained_variance": unexplained, "gate": gate}).bad)

    assert bad(0.1, 0.79, True) == set()
    assert bad(0.9, 0.81, True) == {"unexplained_variance"}  # all decoded to the mean, which is a good network
    assert bad(0.1, 0.7, False) == {"lost_accuracy"}
    assert not diagnose(None, ONE_RUN, notes={"unexplained_variance": None}).findings


@pytest.mark.parametrize("count", [0, 1, 2, 3, LEAST_MEMBERS - 1])
@pytest.mark.parametrize("kind", ["draws", "line"])
def test_few_members_are_not_judged(count, kind):
    wrong = np.eye(max(count, 1), 50, dtype=bool)[:count]
    found = diagnose(draw(kind, count), range(count), [None] * count, wrong)
    assert not found.bad
    assert all(np.isfinite(list(found.values.values())))
    assert bool(found.values) == (count > 1)
    json.dumps(found.to_dict(), allow_nan=False)


def test_equal_members_have_no_rank():
    found = diagnose(np.ones((K, 5)), ONE_RUN, wrong=np.ones((K, 8), dtype=bool))
    assert found.values == {"diversity": 0, "disagreement": 0}


def test_advice_names_fields_that_there_are():
    experiments = [pd.load_experiment(), pd.load_experiment(generator={"name": "latent"})]
    known = {name for experiment in experiments for name, _ in flat(experiment.model_dump())}
    for measure in MEASURES.values():
        fields = [
            w.strip(".,;()") for w in measure.advice.split() if w.split(".")[0].strip("(") in dict(experiments[0])
        ]
        assert all(any(f"{name}.".startswith(f"{field}.") for name in known) for field in fields)
        assert bool(fields) == bool(measure.advice)


def test_members_of_a_run_are_those_with_its_seed():
    wrong, members = np.eye(K, 2 * K, dtype=bool), draw("walk")
    rows = [Record(i, "original", seed=i % 2, step=K - i, wrong=np.packbits(wrong[i]).tobytes()) for i in range(K)]
    steps = [row.step for row in rows]
    assert diagnose_members(members, rows) == diagnose(members, np.arange(K) % 2, steps, wrong)
    imported = [Record(i, "original") for i in range(K)]
    assert diagnose_members(members, imported) == diagnose(members, ONE_RUN)


def test_a_zoo_says_what_is_wrong_with_it_before_a_generator_is_fitted(tmp_path, capsys):
    settings = {"members": 20, "optimizer": {"name": "sgd", "lr": 1e-4}}
    experiment = pd.load_experiment(TINY, storage=str(tmp_path), zoo=settings, generator={"members": None})
    pd.run(experiment, in_process=True, track=False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    place = lines.index(next(line for line in lines if line.startswith("warning: effective rank")))
    stages = [next(i for i, line in enumerate(lines) if line.startswith(f"{s}: done")) for s in ("zoo", "generator")]
    assert stages[0] < place < stages[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"zoo": {"regime": "branches", "branches": 20, "members": 100}}, set()),
        ({}, {"independent_members"}),  # one run: neighbours repeat each other
        (
            {"zoo": {"optimizer": {"name": "sgd", "lr": 0.003}}},
            {"disagreement", "effective_rank", "drift", "independent_members"},
        ),
        ({"zoo": {"optimizer": {"lr": 0.003}}}, {"effective_rank", "drift", "independent_members"}),
        ({"data": {"train_noise": 0.0}}, {"disagreement", "effective_rank", "drift", "independent_members"}),
        ({"generator": {"autoencoder": {"steps": 50}}}, {"independent_members", "unexplained_variance"}),
    ],
)
def test_trained_zoos_are_judged_as_they_were_trained(tmp_path_factory, changes, expected):
    """On the quickstart's data and network; what was measured to set the limits is in docs/method.md."""
    storage = str(tmp_path_factory.getbasetemp() / "zoos")  # zoos share the base
    generator = {"diffusion": {"steps": 1}, **changes.get("generator", {})}
    settings = {"zoo": {}, **changes, "generator": generator}
    experiment = pd.load_experiment("sweeps/quickstart.yaml", storage=storage, **settings)
    artifacts = artifacts_of(experiment, Storage(storage))
    build(experiment, artifacts, "base", "zoo", "generator")
    store, ids = ParameterStore(artifacts["zoo"]), range(experiment.zoo.members)
    notes = artifacts["generator"].manifest().info
    found = diagnose_members(store.vectors(ids), store.records(ids), notes)
    assert names(found.bad) == expected, found.values
    told = [one["name"] for one in artifacts["zoo"].manifest().info["diagnosis"] if one["good"] is False]
    assert set(told) == expected - {"unexplained_variance"}
