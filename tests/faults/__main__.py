"""Sweeps on a simulated cluster, disturbed until so many faults are in: `python -m tests.faults --faults 100`."""

import argparse
import sys
import tempfile
from pathlib import Path

from .cluster import missing
from .sweeps import disturbed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="how many to inject at least; 0: see it run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="disturb the short form's sweep")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(f"this machine cannot do it: {reason}")
    with tempfile.TemporaryDirectory(prefix="pdiff-faults-") as folder:
        disturbed(Path(folder), arguments.faults, arguments.seed, arguments.small)


if __name__ == "__main__":
    main()
