"""Python imports this in processes of the simulated nodes, which write down what members of zoos they train."""

import os
import sys
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class Tracing(MetaPathFinder):
    """Changes `SubsetTraining` when it is imported: Ray, which imports much, starts as fast as ever."""

    def find_spec(self, name, path=None, target=None):
        if name != "pdiff_ray.training.subset":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def traced(module):
            execute(module)
            trace(module.SubsetTraining)

        spec.loader.exec_module = traced
        return spec


def trace(kind):
    run = kind.run

    def traced(self, dataset, start, stop, seeds):
        zoo = sha256(self.config.model_dump_json().encode()).hexdigest()[:8]
        with open(os.environ["PDIFF_TEST_TRACE"], "a", encoding="utf-8") as file:
            file.write(f"{zoo} {seeds} {stop}\n")
        run(self, dataset, start, stop, seeds)

    kind.run = traced


if "PDIFF_TEST_TRACE" in os.environ:
    sys.meta_path.insert(0, Tracing())
