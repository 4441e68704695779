"""What Ray loses and cannot make up for ends a command with one message; the same command goes on from there."""

import os
import signal
import time

import mlflow
import psutil
import pytest
from test_signals import LONG, ended, sweep

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Resources


def test_a_lost_process_is_one_message_and_a_bug_keeps_its_traceback(ray):
    from pdiff_ray.distributed import session

    class Actor:
        def end(self):
            os._exit(1)

        def fail(self):
            raise ZeroDivisionError("a bug")

    actor = ray.remote(Actor).remote()
    with pytest.raises(ZeroDivisionError), session.told_of_losses():
        ray.get(actor.fail.remote())
    message = r"^Ray: The actor died unexpectedly.*, and the same command goes on"
    with pytest.raises(PdiffError, match=message) as caught, session.told_of_losses():
        ray.get(actor.end.remote())
    assert len(str(caught.value)) < 300
    assert "pid" not in str(caught.value)
    coloured = session.reason_of(RuntimeError("It died in \x1b[36mray::X()\x1b[39m. And more"))
    assert coloured == "It died in ray::X()"


def test_progress_goes_on_when_the_actor_that_keeps_it_has_died(ray):
    from pdiff_ray.distributed import session

    seen = []
    with session.connect(Resources(), lambda *update: seen.append(update)) as events:
        progress = session.report_progress(events)
        os.kill(ray.get(ray.get_actor(events).__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not seen:
            assert time.monotonic() < deadline
            progress("task", 1, 1)
            time.sleep(0.1)
        assert session.failures(events) == {}


def killed(name):
    """Kills the first process below the driver with a name."""

    def act(process):
        time.sleep(1)
        below = psutil.Process(process.pid).children(recursive=True)
        next(p for p in below if name in " ".join(p.cmdline())).kill()

    return act


ONE_ZOO = {"parameters": {"generator.members": [4, 12]}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seen", "sections"),
    [
        ("gcs/gcs_server", " 0/400", LONG),
        ("raylet/raylet", "trial 0", {"generator": LONG["generator"]}),
        ("TrainController", " 0/400", LONG),
        # Several zoos may each lose a worker.
        ("RayTrainWorker", " 0/400", {**LONG, "resources": {"max_failures": 0}, "sweep": ONE_ZOO}),
    ],
)
def test_what_ray_cannot_make_up_for_is_one_message(tmp_path, name, seen, sections):
    code, said = ended(killed(name), sweep(tmp_path, **sections), tmp_path, seen)
    assert code == PdiffError.exit_code, said
    assert "error: Ray: " in said.splitlines()[-1]
    assert said.endswith("what is finished is kept, and the same command goes on from there\n")
    assert "Traceback" not in said
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert "RUNNING" not in {run.info.status for run in runs}
