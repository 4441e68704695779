"""`python -m benchmarks [NAME ...] [--json FILE]`: runs all benchmarks, or some, and prints a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.core import BENCHMARKS
from benchmarks.harness import Result

COLUMNS = "{:<12} {:>10} {:>10} {:>8}  {:<13} {:>2}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as a list of objects")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    results: list[Result] = []
    print(COLUMNS.format("name", "ours (s)", "other (s)", "ratio", "(spread)", "n", "ours against other"))
    for name in arguments.names or BENCHMARKS:
        for result in BENCHMARKS[name]():
            results.append(result)
            low, high = result.spread
            print(
                COLUMNS.format(
                    result.name, f"{result.ours_s:.4g}", f"{result.other_s:.4g}", f"{result.ratio:.1f} x",
                    f"({low:.1f}-{high:.1f})", result.n, f"{result.what} against {result.against}",
                )
            )  # fmt: skip
            if result.note:
                print(f"{'':<13}{result.note}")
            sys.stdout.flush()
    if results:
        print(results[0].hardware)
        print(", ".join(f"{package} {version}" for package, version in results[0].versions.items()))
    if arguments.json:
        temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
        temporary.write_text(json.dumps([result.to_json() for result in results], indent=1))
        temporary.replace(arguments.json)


main()
