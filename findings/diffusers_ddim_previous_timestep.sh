#!/usr/bin/env bash
# diffusers 0.42.1: DDIMScheduler steps to a timestep that is not the next of its own where n does not divide the number of training timesteps.
#
# step() takes for the previous timestep t - 1000 // n, whichever timesteps set_timesteps(n) has given, and leaves the sample at
# the noise level of that one; the denoiser is then told the next of the given ones. With 501 steps the difference is 1 where the
# given ones are 2 apart, so that half of the noise level's way is lost in each step. No warning is given. Here the denoiser is
# exact, for samples of N(1, 0.5^2), so that the mean is to be 1.0 and the standard deviation 0.5: they are with 500 steps, and
# with 501 and 600 they are not, with any timestep_spacing. DDPMScheduler, which looks the next one up, is right with all of them.
#
# Output seen:
#   DDIMScheduler leading 500 mean 1.0 std 0.5
#   DDIMScheduler leading 501 mean 0.9 std 0.5
#   DDIMScheduler linspace 500 mean 1.0 std 0.5
#   DDIMScheduler linspace 501 mean 0.6 std 0.7
#   DDIMScheduler trailing 500 mean 1.0 std 0.5
#   DDIMScheduler trailing 501 mean 0.6 std 0.7
#   DDIMScheduler trailing 600 mean 0.7 std 0.7
#   DDPMScheduler trailing 501 mean 1.0 std 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet diffusers==0.42.1 torch==2.15.0 numpy==2.4.6
env/bin/python - <<'PYTHON' | tee output
import torch
from diffusers import DDIMScheduler, DDPMScheduler

MEAN, STD = 1.0, 0.5


def sample(kind, spacing, steps):
    scheduler = kind(num_train_timesteps=1000, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=random)
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t]
        x_0 = MEAN + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (x - a.sqrt() * MEAN)
        noise = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        given = {"generator": random} if kind is DDPMScheduler else {}
        x = scheduler.step(noise, t, x, **given).prev_sample
    print(kind.__name__, spacing, steps, f"mean {x.mean():.1f} std {x.std():.1f}")


for spacing in ("leading", "linspace", "trailing"):
    sample(DDIMScheduler, spacing, 500)
    sample(DDIMScheduler, spacing, 501)
sample(DDIMScheduler, "trailing", 600)
sample(DDPMScheduler, "trailing", 501)
PYTHON
diff output - <<'EXPECTED'
DDIMScheduler leading 500 mean 1.0 std 0.5
DDIMScheduler leading 501 mean 0.9 std 0.5
DDIMScheduler linspace 500 mean 1.0 std 0.5
DDIMScheduler linspace 501 mean 0.6 std 0.7
DDIMScheduler trailing 500 mean 1.0 std 0.5
DDIMScheduler trailing 501 mean 0.6 std 0.7
DDIMScheduler trailing 600 mean 0.7 std 0.7
DDPMScheduler trailing 501 mean 1.0 std 0.5
EXPECTED
echo "as described"
