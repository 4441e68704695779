"""The Ray layer: runs the functions of `pdiff_ray.stages` on a cluster. Imports sweeps and below; only it imports
Ray.
"""

from __future__ import annotations

import os

from pdiff_ray.config.schema import Resources


def ray_address(resources: Resources) -> str | None:
    """The cluster to connect to; None for a local Ray."""
    return resources.address or os.environ.get("RAY_ADDRESS")


def prepare(resources: Resources) -> None:
    """Sets what Ray reads from the environment while it is imported."""
    if not ray_address(resources):
        # A local Ray then listens on the loopback interface alone, as it does by default on macOS and Windows.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Under `uv run`, Ray would build the environment again for its workers, from a copy of the current folder.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # How long a group that lost a worker waits for the others to say goodbye; Ray's default is 30 s.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "3")
    # Tune tells what the ledger and the sweep's own display tell; Ctrl-C is the command line's.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # The default of Ray's next version, set to be spared the notice.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
