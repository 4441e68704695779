"""The Ray layer, on one local Ray shared by these tests: same results as in this process, and lost workers."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import TINY, build, marked, tiny, until, with_

from pdiff_ray.common.errors import PdiffError, UnavailableError
from pdiff_ray.common.progress import Display
from pdiff_ray.config.schema import Data, Resources
from pdiff_ray.reports.tables import table_rows
from pdiff_ray.running import experiment as experiment_running
from pdiff_ray.running.experiment import make_plan
from pdiff_ray.running.experiment import run as run_plan
from pdiff_ray.stages.evaluation import make_tasks, networks_to_judge, num_networks
from pdiff_ray.stages.report import load_summary
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore

ROOT = Path(__file__).parent.parent
TWO = ("resources.workers=2", "resources.actors=2")


pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The tiny experiment, run in this process."""
    experiment, artifacts = tiny(tmp_path_factory.mktemp("here"))
    build(experiment, artifacts)
    return experiment, artifacts


def test_workers_use_this_environment(ray):
    """Under `uv run`, Ray would build another one for them."""
    assert ray.get(ray.remote(lambda: sys.executable).remote()) == sys.executable
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_a_local_ray_listens_on_loopback_alone(ray):
    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"


def test_a_node_s_process_tells_which_node_of_which_cluster_it_is(ray):
    """`cluster/node.sh notice` reads it where it tells Ray that the machine will be gone."""
    context, pattern = ray.get_runtime_context(), "(?<=--{}=)[0-9a-f.:]+"  # the script's
    assert pattern.format("$1") in (ROOT / "cluster/node.sh").read_text()
    every = [process.info for process in psutil.process_iter(["name", "cmdline"])]  # others may end meanwhile
    commands = [" ".join(one["cmdline"]) for one in every if one["name"] == "raylet" and one["cmdline"]]
    found = {tuple(re.search(pattern.format(f), c)[0] for f in ("gcs-address", "node_id")) for c in commands}
    assert (context.gcs_address, context.get_node_id()) in found


def test_a_node_that_is_short_of_memory_or_disk_is_told_of(tmp_path, monkeypatch):
    from pdiff_ray.distributed import nodes

    monkeypatch.setenv("PDIFF_CACHE", str(tmp_path / "cache"))
    storage = Storage(str(tmp_path / "storage"))
    storage.write("there", b"1")
    wanted = nodes.software(), Data(name="digits"), storage.place, "there", b"1"
    look = lambda: nodes._look(*wanted)  # noqa: E731
    assert look()[1] == []
    gone = SimpleNamespace(available=2**30, free=2**29)
    monkeypatch.setattr(nodes.psutil, "virtual_memory", lambda: gone)
    monkeypatch.setattr(nodes.shutil, "disk_usage", lambda _: gone)
    memory, disk = look()[1]
    assert memory.startswith("1.0 GiB of memory free, where a worker takes 2")
    assert disk.startswith("0.5 GiB free for the cache ")
    assert "PDIFF_CACHE" in disk


def test_the_same_table_as_in_process(here, tmp_path):
    experiment, artifacts = tiny(tmp_path, *TWO)
    # The base is trained by one worker: two would split its batches, and round otherwise.
    build(experiment, artifacts, "base")
    run_plan(make_plan(experiment))
    assert table_rows(load_summary(artifacts)) == table_rows(load_summary(here[1]))
    workers = {record.worker for record in ParameterStore(artifacts["zoo"]).records()}
    assert len(workers) == 2, "each worker should have made a branch"


def test_base_training_is_data_parallel(here, tmp_path):
    experiment, artifacts = tiny(tmp_path, *TWO, "training.epochs=4")
    run_plan(make_plan(experiment, target="base"))
    one, its = tiny(tmp_path / "one", "training.epochs=4")
    build(one, its, "base")
    two_workers, one_worker = (a["base"].manifest().info["validation_accuracy"] for a in (artifacts, its))
    assert two_workers == pytest.approx(one_worker, abs=0.12)  # BatchNorm sees half batches
    assert artifacts["base"].key != its["base"].key, "results differ, so keys must"


@pytest.mark.slow
def test_what_a_worker_finds_wrong_reaches_the_user(tmp_path):
    experiment, artifacts = tiny(tmp_path, "training.optimizer={name: sgd, lr: 1e30}", *TWO)
    with pytest.raises(PdiffError, match=r"training\.optimizer\.lr"):
        run_plan(make_plan(experiment, target="base"))
    assert not artifacts["base"].exists()


@pytest.mark.slow
def test_a_lost_zoo_worker_costs_the_members_in_flight(here, tmp_path, ray):
    overrides = ("zoo.members=120", "evaluation.networks_per_task=5", *TWO)
    whole, its = tiny(here[0].storage, *overrides)
    build(whole, its, "base", "zoo")
    experiment, artifacts = tiny(tmp_path, *overrides)
    plan = make_plan(experiment, target="zoo")
    assert plan.missing == ("base", "zoo")
    build(experiment, artifacts, "base")  # the workers are told to build it, and find it finished
    killed, tasks = [], set()

    class Killer(Display):
        """Kills a worker once there are parts of the zoo."""

        def __call__(self, task, done, total, note=""):
            kept = ParameterStore(artifacts["zoo"])
            tasks.add(task)
            if task == "zoo" and not killed and kept.ids:
                killed.append(
                    {"pid": int((kept.records([kept.ids[0]])[0].worker or "").split(":")[1]), "ids": kept.ids}
                )
                os.kill(killed[0]["pid"], signal.SIGKILL)

    experiment_running._run_on_ray(plan, Killer(None))
    assert killed
    assert "base" not in tasks, "a finished stage was run again"
    assert len(killed[0]["ids"]) < 120
    vectors = [ParameterStore(a["zoo"]).vectors().tobytes() for a in (artifacts, its)]
    assert vectors[0] == vectors[1]


@pytest.mark.slow
def test_a_cache_that_fails_for_a_while_costs_a_restart(tmp_path, ray):
    from pdiff_ray.distributed import session, train

    experiment, artifacts = tiny(tmp_path, "data.seed=77")  # whose images are in no cache
    cache = Path(os.environ["PDIFF_CACHE"])
    kept = cache.rename(cache.with_name("kept"))
    cache.write_text("in the way")

    def mend():
        until(lambda: train.UNAVAILABLE in session.failures(events))
        cache.unlink()
        kept.rename(cache)

    with session.connect(experiment.resources, Display(None)) as events:
        mending = threading.Thread(target=mend)
        mending.start()
        assert train.train([train.Job(experiment, artifacts, ["base", "zoo"])], events) == {}
        mending.join()
    assert artifacts["zoo"].exists()


@contextlib.contextmanager
def pool_of(experiment, artifacts, actors):
    """A pool of so many actors, and tasks of one network each that are not judged yet."""
    from pdiff_ray.distributed.pool import Pool
    from pdiff_ray.distributed.session import connect

    resources = experiment.resources.model_copy(update={"actors": actors})
    evaluation = experiment.evaluation.model_copy(update={"networks_per_task": 1})
    wanted = networks_to_judge(experiment, ParameterStore(artifacts["zoo"]))
    tasks = make_tasks(experiment.model_copy(update={"evaluation": evaluation}), wanted)
    with (
        connect(experiment.resources, Display(None)) as events,
        Pool(experiment.model_copy(update={"resources": resources}), artifacts, events) as pool,
    ):
        yield pool, tasks


@pytest.fixture
def sampled(here, tmp_path):
    """The tiny experiment in a storage of its own, evaluated by nobody."""
    shutil.copytree(here[0].storage, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "evaluation")
    return tiny(tmp_path)


@pytest.mark.parametrize("actors", [2, *marked("slow", 1)])
def test_work_of_a_dead_actor_is_done_by_the_others(here, sampled, ray, actors):
    """Or by itself, when it has been restarted; every network is judged once, and stored by whom judged it."""
    experiment, artifacts = sampled
    with pool_of(experiment, artifacts, actors) as (pool, tasks):
        pids = [ray.get(actor.__ray_call__.remote(lambda self: os.getpid())) for actor in pool.actors]
        done = 0
        for count in pool.evaluate(tasks):
            done += count
            if done == 2:
                os.kill(pids[0], signal.SIGKILL)
    assert done == (total := num_networks(experiment))
    assert sum(pool.deaths.values()) == 1
    store, expected = (ParameterStore(a["evaluation"]) for a in (artifacts, here[1]))
    assert {r.id: r.wrong for r in store.records()} == {r.id: r.wrong for r in expected.records()}
    assert len(store.manifest_entries(store.ids)) == total
    assert len(list((Path(store.artifact.location) / "networks").glob("*.parquet"))) == total, (
        "a network was judged twice"
    )
    assert all(r.worker.split(":")[1] != str(os.getpid()) for r in store.records())


def test_four_actors_judge_alike_in_another_order(here, sampled):
    experiment, artifacts = sampled
    with pool_of(experiment, artifacts, 4) as (pool, tasks):
        assert sum(pool.evaluate(tasks[::-1])) == num_networks(experiment)
    found, expected = (ParameterStore(a["evaluation"]).records() for a in (artifacts, here[1]))
    for one, other in zip(found, expected, strict=True):
        assert (one.id, one.wrong, one.wrong_classes) == (other.id, other.wrong, other.wrong_classes)
    assert len({record.worker for record in found}) > 1


def test_rows_that_a_dead_actor_has_stored_are_not_judged_again(sampled, ray):
    """It may die before it can say so."""

    def die_when_stored(worker):
        evaluate = worker.evaluator.evaluate

        def deadly(task):
            evaluate(task)
            os._exit(1)

        worker.evaluator.evaluate = deadly

    experiment, artifacts = sampled
    with pool_of(experiment, artifacts, 2) as (pool, tasks):
        assert sum(pool.evaluate(tasks[:4])) == 4
        ready = [actor.__ray_call__.remote(lambda worker: worker.evaluator is not None) for actor in pool.actors]
        actor = pool.actors[ray.get(ready).index(True)]
        ray.get(actor.__ray_call__.remote(die_when_stored))
        assert sum(pool.evaluate(tasks[4:])) == (total := num_networks(experiment)) - 4
    assert sum(pool.deaths.values()) == 1
    assert len(list((Path(artifacts["evaluation"].location) / "networks").glob("*.parquet"))) == total
    assert ParameterStore(artifacts["evaluation"]).ids == list(range(total))


def test_an_actor_has_other_work_before_its_result_is_looked_at(sampled, ray):
    """The caller may take its time meanwhile."""

    def count(worker):
        evaluate, worker.tasks = worker.evaluator.evaluate, 0

        def counted(task):
            worker.tasks += 1
            return evaluate(task)

        worker.evaluator.evaluate = counted

    experiment, artifacts = sampled
    with pool_of(experiment, artifacts, 1) as (pool, tasks):
        (actor,) = pool.actors
        list(pool.evaluate(tasks[:1]))
        ray.get(actor.__ray_call__.remote(count))
        results = pool.evaluate(tasks[1:4])
        next(results)
        assert ray.get(actor.__ray_call__.remote(lambda worker: worker.tasks)) == 2
        assert len(list(results)) == 2


def test_an_address_is_tried_where_a_ray_is_there(here, ray):
    from pdiff_ray.distributed.session import connect

    resources = here[0].resources.model_copy(update={"address": "127.0.0.1:1"})
    with pytest.raises(PdiffError, match=r"no Ray cluster at '127\.0\.0\.1:1'"), connect(resources, Display(None)):
        pass


def test_actors_that_find_no_place_are_not_waited_for(sampled, ray):
    """The others do their work."""
    experiment, artifacts = sampled
    free = int(ray.available_resources()["CPU"])
    with pool_of(experiment, artifacts, free + 1) as (pool, tasks):
        assert len(tasks) > free
        assert sum(pool.evaluate(tasks)) == num_networks(experiment)
    assert ParameterStore(artifacts["evaluation"]).ids == list(range(num_networks(experiment)))


@pytest.mark.parametrize(
    ("settings", "workers", "expected"),
    [
        ({"actors": 3}, 2, 2),
        ({"actors": 3, "cpus_per_worker": 2}, 2, 0),
        ({"actors": 3, "cpus_per_actor": 2}, 1, 1),
        ({"actors": 2, "gpus_per_actor": 0.5}, 1, 0),
        ({"actors": 1}, 1, 1),
        ({"actors": 2, "address": "127.0.0.1:1"}, 1, 0),
    ],
)
def test_actors_start_beside_workers_where_both_have_room(sampled, ray, settings, workers, expected):
    from pdiff_ray.distributed.pool import Pool

    experiment, artifacts = sampled
    experiment = with_(experiment, resources=with_(experiment.resources, **settings))
    until(lambda: ray.available_resources().get("CPU") == 4)  # those of other tests have ended
    with Pool(experiment, artifacts, "nobody", beside=workers) as pool:
        assert len(pool.actors) == expected
        assert pool.size == settings["actors"]


def test_more_than_this_ray_has(ray, capsys):
    from pdiff_ray.distributed.session import connect, shortages

    (found,) = shortages(Resources(workers=1000), [{"CPU": 4.0}, {"CPU": 2.0}])
    assert found.startswith("resources.workers: 1000 workers with 1 cores each, but this Ray has 6; lower it or resou")
    (found,) = shortages(Resources(cpus_per_trial=6), [{"CPU": 4.0}, {"CPU": 2.0}])
    assert found == "resources.cpus_per_trial: a trial with 6 cores, but no node has more than 4; lower it"
    with connect(Resources(workers=1000), Display(None)):  # of a Ray that is there already, and may grow
        assert "or wait until there is more" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Could not find any running Ray instance."),
        ValueError("Malformed address: nonsense"),
        RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_message(monkeypatch, error):
    from pdiff_ray.distributed import session

    def refuse(**_):
        raise error

    monkeypatch.setattr(session.ray, "init", refuse)
    with pytest.raises(PdiffError, match=f"resources.address: auto: {str(error)[:20]}.*; name a cluster that runs"):
        session._init("auto")


def test_an_address_that_is_none_is_told_of(tmp_path):
    command = "from pdiff_ray.cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", command, "run", "zoo", TINY, "--storage", tmp_path, "--address", "nonsense"],
        capture_output=True,
        text=True,
    )
    assert "error: resources.address: nonsense: " in ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr


class Scarce:
    """In place of an actor: its node has no room, for the first tries of each task."""

    tries = 1

    def __init__(self, *given):
        pass

    def ready(self):
        pass

    def evaluate(self, task, failures):
        if failures < self.tries:
            raise UnavailableError("cache /x: no space left on device")
        return len(task)


class Full(Scarce):
    tries = 9


def test_what_an_actors_node_lacks_is_looked_for_elsewhere(sampled, ray, monkeypatch):
    from pdiff_ray.distributed import pool

    experiment, artifacts = sampled

    def given(**resources):
        return with_(experiment, resources=with_(experiment.resources, **resources)), artifacts, "nobody"

    monkeypatch.setattr(pool, "_Worker", Scarce)
    with pool.Pool(*given(actors=2)) as scarce:
        assert sorted(scarce.evaluate([["one"], ["two", "three"]])) == [1, 2]
        assert len(scarce.actors) == 2  # others have taken the places of those that were let go
    monkeypatch.setattr(pool, "_Worker", Full)
    with pool.Pool(*given(actors=1, max_failures=1)) as full, pytest.raises(UnavailableError, match="no space left"):
        list(full.evaluate([["one"]]))


def test_one_piece_of_work_starts_one_actor(sampled, ray, monkeypatch):
    from pdiff_ray.distributed import pool

    monkeypatch.setattr(pool, "_room", lambda *_: 0)  # as on a cluster
    experiment, artifacts = sampled
    with pool_of(experiment, artifacts, 3) as (actors, tasks):
        assert not actors.actors
        list(actors.evaluate(tasks[:1]))
        assert len(actors.actors) == 1
        list(actors.evaluate(tasks[1:]))
        assert len(actors.actors) == 3


def test_gpus_that_stay_idle_are_told_of():
    from pdiff_ray.distributed.session import idle_gpus

    (found,) = idle_gpus(Resources(actors=9), {"GPU": 8.0})
    assert found == "resources.actors: 9 actors, 2 to a GPU, leave 3 of 8 GPUs idle; 8 or 16 use all"
    assert not idle_gpus(Resources(actors=16, workers=8), {"GPU": 8.0})
    assert not idle_gpus(Resources(actors=3), {"GPU": 2.0})
    assert not idle_gpus(Resources(actors=9), {})


def test_workers_of_a_group_meet_where_ray_is(ray):
    """Whatever a host's name stands for, other nodes reach the address that Ray uses."""
    import psutil

    def meet(nodes):
        from pdiff_ray.distributed import train

        for node in nodes:
            train.ray.util.get_node_ip_address = lambda node=node: node
            train.name_interface()
            yield os.environ.pop("GLOO_SOCKET_IFNAME")

    addresses = {a.address: name for name, all in psutil.net_if_addrs().items() for a in all if "." in a.address}
    assert "127.0.0.1" in addresses
    named = ray.remote(max_calls=1)(lambda nodes: list(meet(nodes)))
    assert ray.get(named.remote(list(addresses))) == list(addresses.values())


def test_gpus_are_shared_such_that_all_find_a_place(monkeypatch):
    from pdiff_ray.distributed import session

    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert session.gpu_share("auto", 1) == session.gpu_share("auto", 2) == 1
    assert session.gpu_share("auto", 3) == 0.5
    assert session.gpu_share(0.25, 3) == 0.25
    (found,) = session.shortages(Resources(workers=3, gpus_per_worker=1), [{"CPU": 8.0, "GPU": 2.0}])
    assert "3 workers with 1 GPUs each, but this Ray has 2" in found
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 8.0})
    assert session.gpu_share("auto", 2) == 0


def test_a_process_keeps_to_its_share_of_a_gpu(monkeypatch):
    """And leaves room in it for what CUDA itself takes."""
    from pdiff_ray.distributed import session

    fractions = []
    monkeypatch.setattr(session.ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100 * session.CONTEXT_BYTES))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *args: fractions.append(args), raising=False)
    threads = torch.get_num_threads()
    try:
        for share in (1, 0.5, 0.01):
            assert session.take_place(threads, share).type == "cuda"
    finally:
        torch.set_num_threads(threads)
    assert fractions == [(0.49, 0), (0.005, 0)]


def test_progress_reaches_the_driver(ray):
    from pdiff_ray.distributed.session import connect, report_progress

    heard = []
    with connect(Resources(), lambda *update: heard.append(update)) as events:
        report_progress(events)("zoo", 3, 10, "note")
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.05)
    assert heard == [("zoo", 3, 10, "note")]


RELEASES = """
import threading, time, ray
from pdiff_ray import distributed
from pdiff_ray.config.schema import Resources
distributed.prepare(Resources())
from pdiff_ray.distributed import session
ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)
references = [ray.put(i) for i in range(20_000)]
def churn():
    while references:
        cycle = [references.pop()]
        cycle.append(cycle)
        time.sleep(1e-5)
threading.Thread(target=churn, daemon=True).start()
session._shutdown()
print("alive")
"""


@pytest.mark.slow
def test_ray_ends_while_another_thread_collects_references():
    ended = subprocess.run([sys.executable, "-c", RELEASES], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("alive\n")
