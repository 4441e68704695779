"""`python -m pdiff_ray.sweep FILE`: the same as `pdiff sweep FILE`."""

from pdiff_ray.cli.main import guarded, sweep

if __name__ == "__main__":
    guarded(sweep)
