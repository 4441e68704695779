#!/usr/bin/env bash
# diffusers 0.42.1: with timestep_spacing="trailing", set_timesteps(n) gives one timestep too many for some n, and the last is -1.
#
# Seen with DDIMScheduler, DDPMScheduler and DPMSolverMultistepScheduler for 62 of the numbers of steps 1 to 1000 (of 1000
# training timesteps), the first of which are 61, 103, 121 and 122; for all others there are n timesteps from 999 down to 0.
# The range that is rounded to timesteps ends at 0 and steps by 1000 / n; where rounding leaves its last value a little above
# 0, it is kept, and becomes 0 - 1. A denoiser is then asked for timestep -1, which it was never trained for: an index of -1
# takes the last row of a table of timesteps, an embedding computes something new.
#
# Output seen:
#   DDIMScheduler 62 [61, 103, 121, 122] 62 timesteps for 61 steps, the last -1
#   DDPMScheduler 62 [61, 103, 121, 122] 62 timesteps for 61 steps, the last -1
#   DPMSolverMultistepScheduler 62 [61, 103, 121, 122] 62 timesteps for 61 steps, the last -1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet diffusers==0.42.1 torch==2.15.0 numpy==2.4.6
env/bin/python - <<'PYTHON' | tee output
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

for kind in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
    scheduler = kind(num_train_timesteps=1000, timestep_spacing="trailing")
    odd = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:
            odd.append(steps)
    scheduler.set_timesteps(61)
    last = scheduler.timesteps[-1].item()
    print(kind.__name__, len(odd), odd[:4], len(scheduler.timesteps), f"timesteps for 61 steps, the last {last}")
PYTHON
diff output - <<'EXPECTED'
DDIMScheduler 62 [61, 103, 121, 122] 62 timesteps for 61 steps, the last -1
DDPMScheduler 62 [61, 103, 121, 122] 62 timesteps for 61 steps, the last -1
DPMSolverMultistepScheduler 62 [61, 103, 121, 122] 62 timesteps for 61 steps, the last -1
EXPECTED
echo "as described"
