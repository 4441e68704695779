#!/usr/bin/env bash
# Ray 2.60.0: ASHAScheduler records a trial that reports first above a rung at the rungs below, with what it has reached later.
#
# With stop_last_trials=True, the default, a result counts for the highest milestone at or below its time at which the trial has
# none yet. Of a trial whose first report is at 4, as of one that resumes from a checkpoint or whose first stages report nothing,
# the result at 5 goes to the rung of 2, and that at 6 to the rung of 1. Trials that start later are compared with those: here one
# that is better than the first trial at every time is stopped at 1, as 0.35 is less than what others had at 6. With
# stop_last_trials=False a result goes to no rung below one that the trial has passed, and none is stopped.
#
# Output seen:
#   stop_last_trials=True: whole ends at 8, late at 8, late too at 8, better at 1
#     rung 1 has 0.30 0.35 0.85, rung 2 has 0.50 0.80, rung 4 has 0.70, rung 8 has 0.90
#   stop_last_trials=False: whole ends at 8, late at 8, late too at 8, better at 8
#     rung 1 has 0.30 0.35, rung 2 has 0.50 0.55, rung 4 has 0.70 0.75, rung 8 has 0.90 0.95
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet 'ray[tune]==2.60.0'
cat >tries.py <<'PYTHON'
import os

from ray import tune
from ray.tune.schedulers import ASHAScheduler

CURVES = {  # by trial: the time of its first report, and what it reports from then on
    "whole": (1, [0.30, 0.50, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90]),
    "late": (4, [0.70, 0.80, 0.85, 0.88, 0.90]),
    "late too": (4, [0.70, 0.80, 0.85, 0.88, 0.90]),
    "better": (1, [0.35, 0.55, 0.65, 0.75, 0.80, 0.85, 0.90, 0.95]),
}


def reports(config):
    first, scores = CURVES[config["name"]]
    for at, score in enumerate(scores, first):
        tune.report({"at": at, "score": score})


for stop in (True, False):
    asha = ASHAScheduler(time_attr="at", max_t=8, grace_period=1, reduction_factor=2, stop_last_trials=stop)
    tuner = tune.Tuner(
        reports,
        param_space={"name": tune.grid_search(list(CURVES))},
        tune_config=tune.TuneConfig(metric="score", mode="max", scheduler=asha, max_concurrent_trials=1),
        run_config=tune.RunConfig(verbose=0, storage_path=os.path.abspath("results")),
    )
    ended = {found.config["name"]: found.metrics["at"] for found in tuner.fit()}
    first, *others = (f"{name} ends at {at}" if name == "whole" else f"{name} at {at}" for name, at in ended.items())
    rungs = sorted((milestone, sorted(set(recorded.values()))) for milestone, recorded in asha._brackets[0]._rungs)
    print(f"seen stop_last_trials={stop}: {', '.join([first, *others])}")
    print("seen  ", ", ".join(f"rung {at} has {' '.join(f'{score:.2f}' for score in scores)}" for at, scores in rungs))
PYTHON
RAY_ADDRESS= env/bin/python tries.py 2>errors | sed -n 's/^seen //p' | tee output
diff output - <<'EXPECTED'
stop_last_trials=True: whole ends at 8, late at 8, late too at 8, better at 1
  rung 1 has 0.30 0.35 0.85, rung 2 has 0.50 0.80, rung 4 has 0.70, rung 8 has 0.90
stop_last_trials=False: whole ends at 8, late at 8, late too at 8, better at 8
  rung 1 has 0.30 0.35, rung 2 has 0.50 0.55, rung 4 has 0.70 0.75, rung 8 has 0.90 0.95
EXPECTED
echo "as described"
