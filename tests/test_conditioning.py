"""Generators that are told something of each member: what they learn, how they are asked, and what is said of it."""

import numpy as np
import pytest
import torch
from helpers import build, context, tiny, with_
from scipy import stats

import pdiff_ray as pd
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.evaluation.conditioning import compare_asked
from pdiff_ray.evaluation.metrics import named_metrics
from pdiff_ray.generators.conditioning import ConditionedDenoiser, ConditionedTraining
from pdiff_ray.generators.diffusion import DENOISERS, Diffusion, DiffusionSettings
from pdiff_ray.reports.answers import answers
from pdiff_ray.stages import generator as generator_stage
from pdiff_ray.stages import report
from pdiff_ray.stages.generator import load_generator
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage.parameters import ParameterStore, Record
from pdiff_ray.storage.trees import load_tree

LATENT = "generator={name: latent, process: {name: flow, steps: 60, width: 16, condition: validation_accuracy}}"


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DENOISERS.names)
def test_guidance_leads_from_the_untold_to_the_told_prediction_and_beyond(name):
    denoiser = ConditionedDenoiser(DENOISERS[name](32, 16, 2)).eval()
    x, time = rows(5, 32), denoiser.embedding(torch.tensor([7]))
    condition = torch.tensor([0.5, -1.0, 2.0, torch.nan, 0.0])
    found = {}
    with torch.no_grad():
        for guidance in (0.0, 1.0, 3.0):
            with denoiser.told(condition, guidance):
                found[guidance] = denoiser(x, time)
        untold = denoiser(x, time)
    torch.testing.assert_close(found[0.0], untold, rtol=0, atol=0)
    torch.testing.assert_close(found[1.0][3], untold[3])  # of which nothing is known
    assert (found[1.0] - untold).abs().amax(1)[[0, 1, 2, 4]].min() > 1e-4
    torch.testing.assert_close(found[3.0], untold + 3 * (found[1.0] - untold), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dropout", "told"), [(0.0, [True] * 4), (0.999, [False] * 4)])
def test_conditions_are_told_unless_they_are_dropped(dropout, told):
    """The loss is that of rows whose conditions, or none of them, are told; the last column is no latent."""
    model = Diffusion(DiffusionSettings(width=8, depth=1, condition="step"), 3)
    latents = rows(4, 4)
    random = torch.Generator().manual_seed(3)
    loss = ConditionedTraining(model, dropout).loss(latents, random)
    random.manual_seed(3)
    torch.rand(4, generator=random)
    with model.denoiser.told(latents[:, -1].where(torch.tensor(told), torch.nan)):
        torch.testing.assert_close(loss, model.loss(latents[:, :-1], random))
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert (model.denoiser.code[0].weight.grad.abs().sum() > 0) == told[0]


@pytest.mark.parametrize("process", ["flow", "diffusion"])
def test_samples_are_what_they_are_asked_for(process):
    """The first value of a vector is what is known of it; another one is as wide, and independent of that."""
    vectors = rows(200, 6)
    settings = {"name": process, "condition": "validation_loss", "width": 64, "steps": 300}
    known = {"validation_loss": (5 + vectors[:, 0]).tolist()}
    fitted = pd.fit(vectors, "latent", known=known, encoder={"name": "none"}, process=settings)
    sampling = {"steps": 20} if process == "flow" else {"steps": 20, "sampler": "ddim"}
    asked = torch.tensor([3.5, 5.0, 6.5])
    drawn = fitted.sample(300, condition=asked.tolist(), **sampling).reshape(100, 3, 6)
    torch.testing.assert_close(drawn[:, :, 0].mean(0), asked - 5, rtol=0, atol=0.3)
    assert drawn[:, :, 0].std(0).max() < 0.8 * drawn[:, :, 1].std(0).min()
    usual = fitted.sample(300, **sampling)  # as the members are
    assert abs(float(usual[:, 0].std()) - 1) < 0.25
    assert np.corrcoef(usual[:, 0], np.arange(300))[0, 1] > 0.8
    ignored = fitted.sample(300, condition=6.5, guidance=0, **sampling)
    assert abs(float(ignored[:, 0].mean())) < 0.3
    assert float(fitted.sample(100, condition=6.0, guidance=2, **sampling)[:, 0].mean()) > 1.1


def test_the_papers_pair_takes_a_condition():
    coder = {"channels": [4], "latent_dim": 3, "steps": 2}
    known, options = {"step": list(range(20))}, {"condition": "step", "steps": 2, "width": 8}
    fitted = pd.fit(rows(20, 30), "latent_diffusion", known=known, autoencoder=coder, diffusion=options)
    first, last = (fitted.sample(2, condition=step, sampler="ddim", steps=2) for step in (0, 1000))
    assert (first - last).abs().max() > 1e-6


def test_what_is_not_known_of_a_member_is_not_told():
    vectors = rows(20, 4)
    known = {"train_loss": [float("nan"), float("inf"), *range(18)]}
    options = {"process": {"condition": "train_loss", "width": 8, "steps": 3}}
    assert pd.fit(vectors, "latent", known=known, **options).sample(5, steps=2).isfinite().all()


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, r"known: 'train_loss' has shape \(0,\); \(20,\) is wanted"),
        ({"train_loss": [1.0] * 20}, r"generator\.process\.condition is train_loss, in which members do not differ"),
    ],
)
def test_nothing_to_tell_is_said_before_training(known, words):
    with pytest.raises(ConfigError, match=words):
        pd.fit(rows(20, 4), "latent", known=known, process={"condition": "train_loss"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["sampling.condition=0.9"], "sampling.condition is 0.9, but the generator has learned no condition"),
        (["sampling.guidance=2"], "sampling.guidance is 2.0, but the generator has learned no condition"),
        (["generator={name: gaussian}", "sampling.condition=[0.9]"], "learned no condition"),
        ([LATENT, "sampling.condition=90"], "sampling.condition is 90.0, which is no validation_accuracy"),
        ([LATENT, "sampling.condition=[]"], "sampling.condition"),
        ([LATENT, "generator.process.condition=test_accuracy"], "generator.process.condition"),
        (
            [LATENT, "generator.process.condition=step", "zoo={regime: independent, subset: all, batchnorm: included}"],
            "condition is step, but only members that were trained from the base",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused_before_work(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        tiny(tmp_path, *changes)


def test_keys_have_conditions_only_where_there_are_some(tmp_path):
    plain, told = tiny(tmp_path)[0], tiny(tmp_path, LATENT, "sampling.condition=0.5")[0]
    assert "condition" not in str(plain.generator.keyed()) + str(plain.sampling.keyed())
    assert told.generator.keyed()["process"]["condition"] == "validation_accuracy"
    assert told.sampling.keyed()["condition"] == 0.5


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The tiny experiment with a conditioned flow: members of very different accuracy."""
    fast = ["zoo.warmup_steps=1", "zoo.steps_per_member=1", "zoo.optimizer.lr=0.3", "sampling.samples=12"]
    experiment, artifacts = tiny(tmp_path_factory.mktemp("conditioned"), LATENT, *fast)
    build(experiment, artifacts, *artifacts)
    return experiment, artifacts


def test_samples_know_what_they_were_asked_for(done):
    experiment, artifacts = done
    members = [r.validation_accuracy for r in ParameterStore(artifacts["zoo"]).records(experiment.split.learned)]
    asked = [r.asked for r in ParameterStore(artifacts["samples"]).records()]
    assert asked == sorted(asked)
    assert min(members) <= asked[0] < asked[-1] <= max(members)
    assert Networks(artifacts["samples"]).table()["asked"].to_pylist() == asked
    generator = load_generator(experiment, artifacts)
    wanted = generator.asked(5, with_(experiment.sampling, condition=(0.25, 0.75)))
    assert wanted.tolist() == [0.25, 0.75, 0.25, 0.75, 0.25]


def test_a_result_says_whether_asking_helps(done):
    """In its summary, as an answer on page and terminal, and as metrics."""
    _, artifacts = done
    summary = report.load_summary(artifacts)
    asked = [r.asked for r in ParameterStore(artifacts["samples"]).records()]
    judged = [r for r in ParameterStore(artifacts["evaluation"]).records() if r.group == "generated"]
    judged.sort(key=lambda record: record.parent)
    for field in ("test_accuracy", "validation_accuracy"):
        found = summary["condition"]["correlations"][field]
        expected = stats.spearmanr(asked, [getattr(r, field) for r in judged]).statistic
        assert found["estimate"] == pytest.approx(expected)
        assert found["lower"] <= found["estimate"] <= found["upper"]
        assert named_metrics(summary)[f"generated/asked_{field}"] == found["estimate"]
        assert named_metrics(summary)[f"generated/asked_{field}_lower"] == found["lower"]
    assert summary["condition"]["correlations"]["validation_accuracy"]["members"] == pytest.approx(1)
    last = answers(summary)[-1]
    assert last.question == "Does asking for more give more?"
    assert "12 samples were asked for validation accuracy from" in last.text
    assert last.question in artifacts["report"].read("report.html").decode()


def test_an_interrupted_fit_ends_in_the_same_generator(done, tmp_path):
    experiment, artifacts = tiny(tmp_path, LATENT)
    build(experiment, artifacts, "base", "zoo")

    class Killed(Exception):
        pass

    def stop(task, count, total, note=""):
        if task == "flow" and count == 50:
            raise Killed

    with pytest.raises(Killed):
        generator_stage.build(experiment, artifacts, context(progress=stop, checkpoint_s=0))
    build(experiment, artifacts, "generator")
    again, others = tiny(tmp_path, LATENT, "generator.process.lr=0.001000000001")
    build(again, others, "generator")
    kept, whole = (load_tree(a["generator"].read("generator.safetensors"), "") for a in (artifacts, others))
    torch.testing.assert_close(kept["process"], whole["process"], rtol=1e-3, atol=1e-5)


def test_members_of_other_code_are_judged_for_it(done, tmp_path):
    """Rows without judgements, as an imported zoo has them: what they lack is computed without test images."""
    experiment, artifacts = done
    store = ParameterStore(artifacts["zoo"])
    bare = [Record(r.id, r.group) for r in store.records(experiment.split.learned)]
    judge = base_judge(experiment, artifacts, store.subset(), context())
    found = generator_stage._judged(bare, store, judge, "validation")
    for record, known in zip(found, store.records(experiment.split.learned), strict=True):
        assert record.validation_accuracy == pytest.approx(known.validation_accuracy)
        assert record.test_accuracy is None


@pytest.mark.parametrize("slope", [1, -1, 0])
def test_intervals_hold_the_correlation_as_often_as_they_say(slope):
    random = np.random.default_rng(0)
    signs = []
    for trial in range(10):
        asked = random.uniform(size=60)
        came = slope * asked + random.normal(0, 0.3, 60)
        records = [Record(i, "generated", test_accuracy=v, validation_accuracy=v) for i, v in enumerate(came)]
        found = compare_asked("validation_accuracy", asked.tolist(), records, records, trial)["correlations"]
        interval = found["test_accuracy"]
        signs.append((interval["lower"] > 0) - (interval["upper"] < 0))
    assert abs(sum(signs) - 10 * slope) <= 2


def test_a_correlation_of_what_does_not_vary_is_unknown():
    records = [
        Record(i, "generated", test_loss=1.0, validation_loss=float("nan"), test_accuracy=0.1 * i) for i in range(5)
    ]
    found = compare_asked("train_loss", [1.0, 2.0, 3.0, 4.0, 5.0], records, records, 0)["correlations"]
    assert found["test_loss"]["estimate"] is None
    assert found["validation_loss"]["estimate"] is None
    assert found["test_accuracy"]["estimate"] == pytest.approx(1)
