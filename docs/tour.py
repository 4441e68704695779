"""The Python API in one script: `uv run python docs/tour.py [FOLDER]`, half a minute on two cores.

The same lines work in a notebook.
"""

import sys
import tempfile
from pathlib import Path

import pdiff_ray as pd

storage = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

# An experiment comes from a YAML file, from keyword arguments, or from a file and arguments that change it.
experiment = pd.load_experiment(
    name="tour",
    storage=storage,
    data={"name": "digits", "pixel_noise": 0.7, "train_noise": 0.5},
    network={"name": "convnet", "args": {"widths": [16, 32]}},
    training={"epochs": 10, "batch_size": 64},
    zoo={"members": 40, "subset": {"last_norm_layers": 1}, "steps_per_member": 5},
    generator={"name": "gaussian"},
    sampling={"samples": 20},
)
print(pd.plan(experiment))

# On Ray without `in_process`. What is in storage is used again: a second call returns at once.
result = pd.run(experiment, in_process=True, track=False)
print(result)
print(result.groups().to_pandas()[["group", "networks", "mean", "std"]])

# The zoo: vectors, state dicts, a table.
zoo = result.zoo
vectors = zoo.vectors(experiment.split.learned)  # the others are what new networks are compared with
print(f"{len(vectors)} of {len(zoo)} networks to learn, {vectors.shape[1]} numbers each: {', '.join(zoo.subset.names)}")
print(zoo.table().to_pandas()[["id", "step", "test_accuracy"]].tail(3))
first = next(zoo.state_dicts())
print(f"a whole network has {len(first)} tensors")

# A generator learns from any tensor (K, D); what it draws is judged as the experiment's own samples are.
generator = pd.fit(vectors, "latent_diffusion", seed=1, autoencoder={"steps": 200}, diffusion={"steps": 200})
samples = generator.sample(10, seed=2, sampler="ddim", steps=50)
judged = pd.judge(experiment, samples).to_pandas()
print(f"10 networks of another generator: test accuracy {judged.test_accuracy.mean():.3f}")

# Networks as files that plain PyTorch loads.
for file in result.samples.export(Path(storage) / "networks", ids=[0, 1]):
    print(file)
