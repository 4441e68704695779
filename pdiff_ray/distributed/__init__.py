"""The Ray layer, which runs the functions of `pdiff_ray.stages` on a cluster; no other layer imports Ray."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdiff_ray.config.schema import Resources


def ray_address(resources: Resources) -> str | None:
    """Returns the address of the cluster to connect to, or None for a local Ray."""
    return resources.address or os.environ.get("RAY_ADDRESS")


def driver_name(resources: Resources) -> str:
    """Returns the name of this machine if others may do the work; with a local Ray none is needed."""
    return socket.gethostname() if ray_address(resources) else ""


def prepare(resources: Resources) -> None:
    """Sets the environment variables that Ray reads while it is imported; to be called before that."""
    if not ray_address(resources):
        # Makes a local Ray listen on the loopback interface alone, as it does by default on macOS and Windows.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # How often Ray Train looks whether its workers have ended; every 2 s is for many nodes.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    # Under `uv run`, Ray would build the environment anew for its workers, from a copy of the current folder.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # How long a group that has lost a worker waits for the others to leave; Ray's default is 30 s.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "3")
    # The ledger and the sweep's display replace Tune's own output; the command line handles Ctrl-C.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # This is the default of Ray's next version; setting it avoids a notice.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
