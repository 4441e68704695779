"""`python -m benchmarks [NAME ...] [--json FILE]`: runs all benchmarks, or some, and prints a table."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch

from benchmarks.harness import Result
from pdiff_ray.common.devices import exact_float32

# Those of `cluster` and `whole` run experiments or start Ray; `scale` writes to MLflow. The others need neither.
BENCHMARKS = {
    "evaluate": "judging",
    "zoo_step": "judging",
    "sampling": "core",
    "few_step": "core",
    "training": "core",
    "store": "core",
    "searching": "searching",
    "growth": "judging",
    "fit": "latents",
    "fit_memory": "latents",
    "growth_D": "latents",
    "verdict_D": "latents",
    "whole": "latents",
    "verdict": "verdict",
    "align": "aligning",
    "actors": "cluster",
    "ray_overhead": "cluster",
    "nodes": "cluster",
    "trial_overhead": "cluster",
    "start": "cluster",
    "rerun": "cluster",
    "baselines": "cluster",
    "scale": "scale",
    "requests": "scale",
}
COLUMNS = "{:<12} {:>10} {:>10} {:>8}  {:<15} {:>3} {:>8} {:>8} {:>8}  {}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as a list of objects")
    parser.add_argument("--seeds", type=int, metavar="N", help="of those that are repeated over seeds")
    parser.add_argument("--threads", type=int, default=1, help="of both ways; default: 1, as an actor or worker has")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    torch.set_num_threads(options.threads)
    exact_float32()
    results: list[Result] = []
    header = ("name", "ours", "other", "ratio", "(spread)", "n", "target", "limit", "MiB")
    print(COLUMNS.format(*header, "ours against other"))
    for name in options.names or BENCHMARKS:
        benchmark = getattr(importlib.import_module(f"benchmarks.{BENCHMARKS[name]}"), name)
        repeated = options.seeds and "seeds" in inspect.signature(benchmark).parameters
        for result in benchmark(**({"seeds": options.seeds} if repeated else {})):
            results.append(result)
            print(row(result), flush=True)
            if options.json:  # what is done is kept
                write(options.json, results)
    for hardware in dict.fromkeys(result.hardware for result in results):
        print(hardware)
    if results:
        print(", ".join(f"{package} {version}" for package, version in results[0].versions.items()))


def row(result: Result) -> str:
    """The result as a line of the table, and another one for its note."""
    low, high = result.spread
    line = COLUMNS.format(
        result.name,
        f"{result.ours_s:.4g} {result.unit}".rstrip(),
        f"{result.other_s:.4g} {result.unit}".rstrip(),
        f"{result.ratio:.2f} x",
        f"({low:.2f}-{high:.2f})",
        result.n,
        "" if result.target is None else f"{result.target:.2f}",
        "" if result.limit is None else f"{result.limit:.2f}",
        "" if result.peak_mib is None else f"{result.peak_mib:.0f}",
        f"{result.what} against {result.against}",
    )
    return f"{line}\n{'':<13}{result.note}" if result.note else line


def write(file: Path, results: list[Result]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps([result.to_json() for result in results], indent=1))
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
