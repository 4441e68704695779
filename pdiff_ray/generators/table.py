"""Every generator by its name in the configuration."""

from __future__ import annotations

from pdiff_ray.common.registry import Registry
from pdiff_ray.config import schema
from pdiff_ray.generators.baselines import (
    Average,
    DiagonalGaussian,
    Gaussian,
    Interpolation,
    KernelDensity,
    Noise,
    PrincipalGaussian,
)
from pdiff_ray.generators.imported import Imported
from pdiff_ray.generators.interface import Generator
from pdiff_ray.generators.latent import Latent, LatentDiffusion
from pdiff_ray.networks.subset import Subset

GENERATORS: Registry[type[Generator]] = Registry(
    "generator",
    {
        "latent_diffusion": LatentDiffusion,
        "latent": Latent,
        "gaussian": Gaussian,
        "gaussian_diagonal": DiagonalGaussian,
        "gaussian_pca": PrincipalGaussian,
        "gaussian_kernel": KernelDensity,
        "average": Average,
        "interpolation": Interpolation,
        "noise": Noise,
        "imported": Imported,
    },
)


def make_generator(settings: schema.Generator, subset: Subset) -> Generator:
    """Returns an unfitted generator of vectors of `subset`."""
    return GENERATORS[settings.name](settings, subset)
