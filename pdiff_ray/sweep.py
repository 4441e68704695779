"""`python -m pdiff_ray.sweep FILE`: the same as `pdiff sweep FILE`."""

from pdiff_ray.cli.experiments import sweep
from pdiff_ray.cli.main import guarded

if __name__ == "__main__":
    guarded(sweep)
