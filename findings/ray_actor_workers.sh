#!/usr/bin/env bash
# ray 2.60.0: the process of an idle worker that has run a task is not used for an actor, which starts a process of its own.
#
# Ray keeps processes of workers that have nothing to do, as many as it has cores, and runs later tasks of the same job in
# them. To warm them up with a task, so that an actor finds what it needs already imported, is in vain: its process is a new
# one, or one that has run nothing yet. So the imports of an actor (torch: two seconds) are on the way to its first result
# unless the actor itself is started early.
#
# Output seen:
#   later tasks in processes of earlier tasks: 2 of 2
#   actors in processes of tasks: 0 of 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet ray==2.60.0
env/bin/python - <<'PYTHON' | tee output
import os
import time

import ray

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@ray.remote
def process():
    time.sleep(2)  # so that each has one of its own
    return os.getpid()


@ray.remote(num_cpus=1)
class Actor:
    def process(self):
        return os.getpid()


first = ray.get([process.remote() for _ in range(2)])
again = ray.get([process.remote() for _ in range(2)])
print("later tasks in processes of earlier tasks:", len(set(first) & set(again)), "of", len(set(again)))
time.sleep(0.5)  # they are idle now, and are kept for longer
actors = [Actor.remote() for _ in range(2)]
found = ray.get([actor.process.remote() for actor in actors])
print("actors in processes of tasks:", len({*first, *again} & set(found)), "of", len(set(found)))
PYTHON
diff output - <<'EXPECTED'
later tasks in processes of earlier tasks: 2 of 2
actors in processes of tasks: 0 of 2
EXPECTED
echo "as described"
