"""The stages in this process: what they store, and that they repeat nothing and depend on nothing but their inputs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    EVALUATED,
    build,
    build_missing,
    context,
    interrupted_zoo,
    pixels,
    tiny,
    with_vectors,
    write_parquet,
)

from pdiff_ray.cli import printing
from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.partition import partition_network
from pdiff_ray.networks.subset import RULES
from pdiff_ray.reports.tables import sharing_text, table_rows
from pdiff_ray.running.experiment import make_plan
from pdiff_ray.running.experiment import run as run_plan
from pdiff_ray.running.results import open_result
from pdiff_ray.stages import base, evaluation, report, zoo
from pdiff_ray.stages import context as stages_context
from pdiff_ray.stages.evaluation import Evaluator, make_tasks, networks_to_judge
from pdiff_ray.stages.report import load_summary
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, Record
from pdiff_ray.training import subset as subset_training


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    experiment, artifacts = tiny(tmp_path_factory.mktemp("storage"))
    build(experiment, artifacts)
    return experiment, artifacts


def test_same_seed_same_table_whatever_the_tasks(done, tmp_path):
    experiment, artifacts = tiny(tmp_path, "evaluation.networks_per_task=3")
    build(experiment, artifacts)
    assert table_rows(load_summary(artifacts)) == table_rows(load_summary(done[1]))
    np.testing.assert_array_equal(ParameterStore(artifacts["zoo"]).vectors(), ParameterStore(done[1]["zoo"]).vectors())


def test_test_labels_choose_nothing(tmp_path):
    """With other test labels everything is the same but what is said of test images."""
    summaries, rows, drawn = [], [], []
    train, test, labels = pixels(300), pixels(60, seed=1), np.arange(300) % 3
    train[np.arange(300), labels, labels] = 255  # something to learn
    for name, of_test in {"one": np.arange(60) % 3, "other": np.random.default_rng(0).integers(0, 3, 60)}.items():
        write_parquet(tmp_path / name / "train.parquet", train, labels)
        write_parquet(tmp_path / name / "test.parquet", test, of_test)
        data = {"name": "custom", "source": "parquet", "root": str(tmp_path / name), "train_noise": 0.3}
        experiment, artifacts = tiny(tmp_path / f"storage-{name}", f"data={json.dumps(data)}")
        build(experiment, artifacts)
        summaries.append(load_summary(artifacts))
        rows.append(ParameterStore(artifacts["evaluation"]).records())
        drawn.append([ParameterStore(artifacts[stage]).vectors() for stage in ("zoo", "samples")])
        drawn[-1].append(artifacts["generator"].manifest().info)
    for one, other in zip(*rows, strict=True):
        of_test = ("test_accuracy", "test_loss", "wrong", "wrong_classes", "created_at", "worker")
        assert replace(one, **dict.fromkeys(of_test)) == replace(other, **dict.fromkeys(of_test))
    assert [row.wrong for row in rows[0]] != [row.wrong for row in rows[1]]
    for one, other in zip(drawn[0][:2], drawn[1][:2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert drawn[0][2]["gate"] == drawn[1][2]["gate"]
    for field in ("best_id", "chosen_on"):
        assert [line[field] for line in summaries[0]["groups"]] == [line[field] for line in summaries[1]["groups"]]
    assert summaries[0]["comparison"]["best"] == summaries[1]["comparison"]["best"]
    assert [line["mean"] for line in summaries[0]["groups"]] != [line["mean"] for line in summaries[1]["groups"]]


def test_another_seed_gives_other_networks(done, tmp_path):
    experiment, artifacts = tiny(tmp_path, "seed=1")
    build(experiment, artifacts, "base", "zoo")
    assert artifacts["zoo"].key != done[1]["zoo"].key
    assert not np.allclose(ParameterStore(artifacts["zoo"]).vectors(), ParameterStore(done[1]["zoo"]).vectors())


def test_members_are_what_their_rows_say(done):
    """A member's vector in the plain network has the stored accuracy and wrong predictions."""
    experiment, artifacts = done
    store = ParameterStore(artifacts["zoo"])
    (record,) = with_vectors(store, [7])
    network = base.load_network(experiment, artifacts)
    network.load_state_dict(store.subset().unflatten(torch.from_numpy(record.vector.copy())), strict=False)
    dataset = base.open_dataset(experiment, context())
    wrong = []
    with torch.no_grad():
        for images, labels in dataset.test.in_order(100):
            wrong.append(network(dataset.prepare(images, torch.device("cpu"))).argmax(1) != labels)
    misses = torch.cat(wrong).numpy()
    assert record.test_accuracy == pytest.approx(1 - misses.mean())
    assert record.wrong == np.packbits(misses).tobytes()


def test_frozen_parameters_stay_the_bases(done):
    experiment, artifacts = done
    subset = ParameterStore(artifacts["zoo"]).subset()
    assert subset.names == ["layers.1.bn.weight", "layers.1.bn.bias"]
    network = base.load_network(experiment, artifacts)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training = subset_training.SubsetTraining(experiment, network, subset, 10, torch.device("cpu"))
    started_from = training.vectors()
    training.run(base.open_dataset(experiment, context()), 0, 10, seeds=[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert list(training.tensors) == subset.names
    assert (training.vectors() != started_from).any()


def test_groups_and_their_networks(done):
    _experiment, artifacts = done
    records = ParameterStore(artifacts["evaluation"]).records()
    counts = {group: sum(r.group == group for r in records) for group in {r.group for r in records}}
    drawn = ("average_2", "average_4", "average_16", "interpolation", "noise_added", "gaussian_diagonal", "gaussian")
    own = {"original": 12, "ensemble": 1, "fine_tuned": 2, "generated": 6}
    assert counts == own | dict.fromkeys([*drawn, "gaussian_pca", "autoencoder", "decoded"], 1)
    assert all(r.judged and r.vector is None for r in records)
    # Originals keep the judgement of their making.
    zoo_rows = ParameterStore(artifacts["zoo"]).records()
    assert [r.wrong for r in records[:12]] == [r.wrong for r in zoo_rows]


def test_tasks_shrink_toward_the_end_when_workers_share_them(tmp_path):
    experiment, _ = tiny(tmp_path, "evaluation.networks_per_task=20")
    judged = [Record(id_, "original", wrong=b"") for id_ in range(30)]
    made = [Record(30, "ensemble"), *(Record(id_, "generated") for id_ in range(31, 71)), Record(71, "fine_tuned")]

    def sizes(workers):
        tasks = make_tasks(experiment, [*judged, *made], workers)
        assert sorted(record.id for task in tasks for record in task) == list(range(72))
        return [(task[0].group, len(task)) for task in tasks]

    ends = [("ensemble", 1), ("original", 20), ("original", 10)]
    assert sizes(1) == [("fine_tuned", 1), ("generated", 20), ("generated", 20), *ends]
    shrinking = [("generated", size) for size in (20, 11, 5, 4)]
    assert sizes(2) == [("fine_tuned", 1), *shrinking, *ends]


def test_tasks_are_cut_for_the_actors_there_are(done, tmp_path):
    experiment, artifacts = tiny(tmp_path, "sampling.samples=12", "evaluation.baseline_networks=0")
    build(experiment, artifacts, "base", "zoo", "generator", "samples")
    sizes = []

    def note(tasks):
        sizes.extend(len(task) for task in tasks if task[0].group == "generated")
        return []

    evaluation.judge_missing(experiment, artifacts, context(), note, actors=3)
    assert sizes == [4, 3, 2, 2, 1]


def test_rows_of_an_earlier_version_are_taken(tmp_path):
    """Which did not say with them what they took."""
    experiment, artifacts = tiny(tmp_path)
    build(experiment, artifacts)
    rows, subset = ParameterStore(artifacts["evaluation"]).records(), ParameterStore(artifacts["zoo"]).subset()
    summary = load_summary(artifacts)
    shutil.rmtree(artifacts["evaluation"].location)
    experiment, artifacts = tiny(tmp_path)  # a storage that has not seen it finished
    ParameterStore(artifacts["evaluation"]).append(rows, subset)
    build(experiment, artifacts)
    assert load_summary(artifacts) == summary


def test_ensemble_and_distances(done):
    experiment, artifacts = done
    members = ParameterStore(artifacts["zoo"]).vectors()
    evaluator = Evaluator(experiment, artifacts, context())
    wanted = networks_to_judge(experiment, ParameterStore(artifacts["zoo"]))
    ensemble = next(r for r in wanted if r.group == "ensemble")
    np.testing.assert_array_equal(evaluator.groups["ensemble"].vector(ensemble, evaluator.material), members.mean(0))
    (judged,), _ = evaluator.judged([replace(wanted[3], nearest_distance=None)])
    pairs = np.linalg.norm(members[:, None].astype(float) - members[None], axis=2)
    mean = pairs[~np.eye(12, dtype=bool)].mean()
    assert judged.nearest_distance == pytest.approx(np.delete(pairs[3], 3).min() / mean)


def test_a_manifest_says_what_was_shared(done):
    _experiment, artifacts = done
    zoo_info, info = (artifacts[stage].manifest().info for stage in ("zoo", "evaluation"))
    assert zoo_info["shared"] == info["shared"] == pytest.approx(0.989, abs=1e-3)  # all but the head
    assert zoo_info["runs_whole"] is info["runs_whole"] is None
    assert "train_noise" in zoo_info["full_steps"]
    assert 0 < info["suffix_seconds"] < info["unshared_seconds"]
    assert (info["networks_at_a_time"], info["images_at_a_time"]) == (1, 500)
    assert "changed_predictions" not in info
    text = sharing_text(zoo_info, info)
    assert "98.9% of a pass's FLOPs" in text
    assert "Zoo steps were full passes: images vary: data.augment or data.train_noise" in text
    assert not sharing_text({}, {})  # imported, or of another version


def test_a_network_is_split_once_for_all_stages(tmp_path, monkeypatch):
    split = []

    def counted(network, names, images):
        split.append(names)
        return partition_network(network, names, images)

    monkeypatch.setattr("pdiff_ray.evaluation.judge.partition_network", counted)
    here = context()
    for number, overrides in enumerate([[], ["generator.seed=1"], ["zoo.batchnorm=recalibrated"]], 1):
        experiment, artifacts = tiny(tmp_path, "data.train_noise=0", *overrides)
        for stage in EVALUATED:
            build_missing(stage, experiment, artifacts, here)
        assert len([names for names in split if names]) == max(1, number - 1)


def test_an_interrupted_evaluation_says_what_all_of_it_took(done, tmp_path):
    experiment, artifacts = tiny(tmp_path, "evaluation.precision=bfloat16")
    build(experiment, artifacts, "base", "zoo", "generator", "samples")

    def stop(task, done, total, note=""):
        if task == "evaluation" and done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.build(experiment, artifacts, context(progress=stop))
    store = ParameterStore(artifacts["evaluation"])
    kept = [store.about(part) for part in store.manifest_entries(store.ids)]
    build(experiment, artifacts)
    info = artifacts["evaluation"].manifest().info
    assert info["suffix_seconds"] > sum(about["counts"]["suffix_seconds"] for about in kept) > 0
    assert artifacts["evaluation"].manifest().seconds > sum(end - start for start, end in (a["span"] for a in kept)) > 0
    assert info["compared_predictions"] == 2 * 897  # one network of each of two tasks


def test_a_reason_is_printed_as_it_is(done, monkeypatch, capsys):
    """Reasons are first lines of exceptions, which may look like markup."""
    experiment, artifacts = done
    report.build(experiment, artifacts, context())
    monkeypatch.setattr(report, "sharing_text", lambda *_: "runs whole: shape [b, 3] is no [/x]")
    printing.print_result(open_result(experiment))
    assert "shared: runs whole: shape [b, 3] is no [/x]" in capsys.readouterr().out


def test_reduced_precision_says_what_it_changes(done):
    experiment, _ = done
    reduced, artifacts = tiny(experiment.storage, "evaluation.precision=bfloat16")
    assert artifacts["evaluation"].key != done[1]["evaluation"].key
    build(reduced, artifacts)
    info = artifacts["evaluation"].manifest().info
    assert info["compared_predictions"] == 2 * 897  # one network of each of two tasks
    assert 0 <= info["changed_predictions"] < 90
    generated = ParameterStore(artifacts["evaluation"]).records()[-6:]
    some = [replace(record, wrong=None) for record in generated[1:3]]  # however tasks are cut, the same are compared
    _, about = Evaluator(reduced, artifacts, context()).judged(some)
    assert "compared_predictions" not in about["counts"]
    assert "of 1,794 test predictions" in sharing_text(done[1]["zoo"].manifest().info, info)
    half, full = (ParameterStore(a["evaluation"]).records() for a in (artifacts, done[1]))
    assert [r.test_loss for r in half[:12]] != [r.test_loss for r in full[:12]]  # the originals too


def test_fewer_members_share_the_zoo(done, tmp_path):
    experiment, artifacts = done
    fewer, its = tiny(experiment.storage, "generator.members=5")
    assert its["zoo"].key == artifacts["zoo"].key
    assert its["generator"].key != artifacts["generator"].key
    build(fewer, its)
    assert json.loads(its["evaluation"].read("summary.json"))["groups"][0]["networks"] == 5


def test_one_member_works(done):
    experiment, _ = done
    one, artifacts = tiny(experiment.storage, "generator.members=1")
    build(one, artifacts)
    summary = load_summary(artifacts)
    assert summary["verdict"]["word"] == "unknown"
    assert "-" in table_rows(summary)[1]  # no similarity among one original
    assert artifacts["samples"].manifest().info["relative_latent_std"] is None
    assert artifacts["generator"].manifest().info["unexplained_variance"] is None
    report.build(one, artifacts, context())


@pytest.mark.parametrize(("steps", "keeps"), [(300, True), (1, False)])
def test_the_released_recipe_keeps_members_if_it_is_trained(done, steps, keeps):
    changes = ["generator.recipe=released", f"generator.autoencoder.steps={steps}", "generator.autoencoder.lr=0.01"]
    experiment, artifacts = tiny(done[0].storage, *changes)
    build(experiment, artifacts, "generator", "samples")
    info = artifacts["generator"].manifest().info
    assert (info["unexplained_variance"] < 0.1) == keeps
    assert info["gate"]["passed"] or not keeps
    assert np.isfinite(ParameterStore(artifacts["samples"]).vectors()).all()


@pytest.mark.parametrize("regime", ["trajectory", "independent"])
def test_other_regimes(regime, tmp_path):
    overrides = [f"zoo.regime={regime}", "zoo.members=5", "zoo.second_run=0"]
    if regime == "independent":
        overrides += ["zoo.subset=all", "zoo.batchnorm=included"]
    experiment, artifacts = tiny(tmp_path, *overrides)
    build(experiment, artifacts)
    members = ParameterStore(artifacts["zoo"])
    assert members.ids == list(range(5))
    assert len({vector.tobytes() for vector in members.vectors()}) == 5
    if regime == "independent":
        # Whole networks: the vector alone, in an untrained network, has the stored accuracy.
        (record,) = with_vectors(members, [2])
        dataset = base.open_dataset(experiment, context())
        network = build_network(experiment.network, dataset.info, "untrained")
        judge = Judge(network, members.subset(), dataset, torch.device("cpu"))
        judgement = judge.judge(torch.from_numpy(record.vector[None].copy()))[0]
        assert judgement.test_accuracy == record.test_accuracy


@pytest.mark.parametrize("policy", ["included", "recalibrated"])
def test_batchnorm_policies(policy, tmp_path):
    experiment, artifacts = tiny(tmp_path, f"zoo.batchnorm={policy}", "zoo.members=4")
    build(experiment, artifacts)
    names = ParameterStore(artifacts["zoo"]).subset().names
    assert ("layers.1.bn.running_var" in names) == (policy == "included")


@pytest.mark.parametrize("lost", [0, 1])
def test_an_interrupted_zoo_goes_on(tmp_path, lost):
    """Parts and states of a run that stops in the middle are used; the zoo is the same as in one go.

    So it is if a part was damaged, and deleted as the message says.
    """
    whole, its = tiny(tmp_path / "whole")
    build(whole, its, "base", "zoo")
    experiment, artifacts = tiny(tmp_path / "interrupted")
    build(experiment, artifacts, "base")

    kept = interrupted_zoo(experiment, artifacts, 10)
    gone, files = sorted(kept._parts)[:lost], set(sorted(kept._parts)[lost:])
    for name in gone:
        kept.storage.delete(f"{artifacts['zoo'].folder}/{name}")
    zoo.build(experiment, artifacts, context())
    assert files <= set(artifacts["zoo"].manifest().files)
    np.testing.assert_array_equal(ParameterStore(artifacts["zoo"]).vectors(), ParameterStore(its["zoo"]).vectors())
    assert not artifacts["zoo"].storage.list(f"{artifacts['zoo'].folder}/work", recursive=True)


@pytest.mark.parametrize("gone_on", [True, False])
def test_a_state_that_another_builder_takes_further_is_not_gone_on_from(tmp_path, monkeypatch, gone_on):
    """Or one that it needs no more, having finished the zoo."""
    (whole, its), (experiment, artifacts) = (tiny(tmp_path / name, "evaluation.networks_per_task=1") for name in "ab")
    build(experiment, artifacts, "base")
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    interrupted_zoo(whole, its, 5)
    interrupted_zoo(experiment, artifacts, 3)
    state, load_network = zoo._state_file(zoo.runs_of(experiment.zoo)[0]), zoo.load_network

    def meanwhile(*arguments):
        if gone_on:
            artifacts["zoo"].save_work(state, its["zoo"].load_work(state))
        else:
            artifacts["zoo"].storage.delete(artifacts["zoo"].work(state))
        return load_network(*arguments)

    monkeypatch.setattr(zoo, "load_network", meanwhile)
    zoo.build(experiment, artifacts, context())
    monkeypatch.undo()
    zoo.build(whole, its, context())
    np.testing.assert_array_equal(ParameterStore(artifacts["zoo"]).vectors(), ParameterStore(its["zoo"]).vectors())


@pytest.mark.parametrize("changes", [{"checkpoint_s": 0.0}, {"leaving": lambda: True}], ids=["time", "notice"])
def test_members_in_flight_are_stored_after_a_while_and_before_the_machine_goes(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(stages_context, "LEAVING_S", 0.0)
    experiment, artifacts = tiny(tmp_path, "evaluation.networks_per_task=100")
    build(experiment, artifacts, "base")

    def stop(task, done, total, note=""):
        if task == "zoo" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.build(experiment, artifacts, context(progress=stop, **changes))
    assert ParameterStore(artifacts["zoo"]).ids == [0, 2, 4, 6, 8]
    seen = []
    zoo.build(experiment, artifacts, context(progress=lambda task, done, *_: seen.append(done)))
    assert len(list(filter(None, seen))) == 7, "none is made again"


def test_a_stored_zoo_says_which_parameters_it_holds(tmp_path, monkeypatch):
    """A rule that chooses other layers than in an earlier version changes nothing of what is there, nor is it mixed."""
    experiment, artifacts = tiny(tmp_path, "zoo.subset={last_norm_layers: 1}", "evaluation.fine_tuned_networks=0")
    build(experiment, artifacts, "base")
    interrupted_zoo(experiment, artifacts, 10)
    monkeypatch.setitem(RULES, "last_norm_layers", lambda *_: ["fc.weight"])
    build(experiment, artifacts, "zoo", "generator", "samples", "evaluation")
    names = ["layers.1.bn.weight", "layers.1.bn.bias"]
    assert all(ParameterStore(artifacts[stage]).subset().names == names for stage in ("zoo", "samples", "evaluation"))

    shutil.rmtree(tmp_path / artifacts["zoo"].folder)
    again = artifacts_of(experiment, Storage(str(tmp_path)))
    build(experiment, again, "zoo")
    shutil.rmtree(tmp_path / artifacts["evaluation"].folder)
    with pytest.raises(StorageError, match=r"samples/.* holds other tensors than the zoo"):
        build(experiment, artifacts_of(experiment, Storage(str(tmp_path))), "evaluation")


def test_interrupted_base_training_goes_on(tmp_path):
    whole, its = tiny(tmp_path / "whole", "training.epochs=4")
    build(whole, its, "base")
    experiment, artifacts = tiny(tmp_path / "interrupted", "training.epochs=4")

    def stop(task, done, total, note=""):
        if task == "base" and note.startswith("epoch 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.build(experiment, artifacts, context(progress=stop, checkpoint_s=0.0))
    epochs = []
    base.build(experiment, artifacts, context(progress=lambda task, done, total, note="": epochs.append(note)))
    assert not any(note.startswith("epoch 1/") for note in epochs)
    first, second = base.load_network(whole, its), base.load_network(experiment, artifacts)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_nan_in_training_is_one_message(tmp_path):
    experiment, artifacts = tiny(tmp_path, "training.optimizer.name=sgd", "training.optimizer.lr=1e30")
    with pytest.raises(PdiffError, match=r"loss is (nan|inf).*training\.optimizer\.lr"):
        build(experiment, artifacts, "base")
    assert not artifacts["base"].exists()


def test_zoo_nan_names_its_field(done):
    experiment, artifacts = tiny(done[0].storage, "zoo.optimizer.lr=1e30", "zoo.optimizer.name=sgd", "zoo.subset=all")
    with pytest.raises(PdiffError, match=r"zoo\.optimizer\.lr"):
        build(experiment, artifacts, "base", "zoo")


def test_a_batch_larger_than_the_data(tmp_path):
    experiment, artifacts = tiny(tmp_path, "training.batch_size=5000")
    with pytest.raises(ConfigError, match="5000"):
        build(experiment, artifacts, "base")


def test_dropout_is_seeded(tmp_path):
    """Whatever the state of the global generator, and interrupted or not."""
    vectors = []
    for index in range(2):
        overrides = ["network={name: resnet18, source: timm, args: {drop_rate: 0.5}}", "training.epochs=1"]
        experiment, artifacts = tiny(tmp_path / str(index), *overrides, "data.train_noise=0")
        torch.manual_seed(index)
        build(experiment, artifacts, "base")
        vectors.append(torch.cat([p.flatten() for p in base.load_network(experiment, artifacts).parameters()]))
    assert torch.equal(*vectors)


@pytest.mark.parametrize("shift", [0, 1])
def test_workers_that_look_at_different_times_make_all_members(tmp_path, shift):
    """The second worker starts when the first has finished its share."""
    experiment, artifacts = tiny(tmp_path, "zoo.branches=4")
    build(experiment, artifacts, "base")
    for rank in (1, 0):
        zoo.finish(experiment, artifacts, 1.0)  # it is not complete
        zoo.build(experiment, artifacts, context(rank=rank, world=2), shift)
        assert not artifacts["zoo"].exists(), "who sees it complete might not be the only one"
    assert ParameterStore(artifacts["zoo"]).ids == list(range(12))
    zoo.finish(experiment, artifacts, 1.0)
    assert artifacts["zoo"].exists()


def test_a_deleted_evaluation_is_made_again(tmp_path):
    experiment, artifacts = tiny(tmp_path)
    run_plan(make_plan(experiment), in_process=True)
    assert make_plan(experiment).missing == ()
    shutil.rmtree(tmp_path / artifacts["evaluation"].folder)
    plan = make_plan(experiment)
    assert plan.missing == ("evaluation",)
    run_plan(plan, in_process=True)
    assert load_summary(artifacts)["groups"]


def test_a_network_that_cannot_take_the_images_is_refused_before_work(tmp_path):
    overrides = ["network={name: googlenet, source: torchvision, args: {}}", "data.channels=3"]
    experiment, _artifacts = tiny(tmp_path, *overrides)
    with pytest.raises(ConfigError, match="cannot take images of 3 x 8 x 8"):
        run_plan(make_plan(experiment), in_process=True)


def test_code_of_ones_own_network_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for width in (1, 2):
        (tmp_path / "own_network.py").write_text(f"def build(**kwargs):\n    return {width}\n")
        _, artifacts = tiny(tmp_path, "network={name: 'own_network:build', args: {}}")
        keys.append(artifacts["base"].key)
    assert keys[0] != keys[1]


def test_the_generators_seed_is_that_of_its_fit(tmp_path):
    learned = []
    for folder, seed in (("a", 0), ("b", 1), ("c", 1)):
        experiment, artifacts = tiny(tmp_path / folder, f"generator.seed={seed}")
        build(experiment, artifacts, "base", "zoo", "generator", "samples")
        learned.append(ParameterStore(artifacts["samples"]).vectors())
    assert not np.array_equal(learned[0], learned[1])
    assert np.array_equal(learned[1], learned[2])
