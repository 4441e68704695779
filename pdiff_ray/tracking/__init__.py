"""MLflow: an experiment per configuration name; a run per zoo, per trial and per sweep.

Storage is the source: runs are written from it, and can be written again, so a server that is down costs nothing but a
warning. A run carries the key of what it describes and is never written twice. Imports sweeps and below. Only this
folder imports MLflow.
"""

from pdiff_ray.tracking.database import TrackingError, database
from pdiff_ray.tracking.pages import links
from pdiff_ray.tracking.runs import record
from pdiff_ray.tracking.server import (
    Server,
    experiment_name,
    get_ready,
    reachable,
    tracking_uri,
    warn,
)
from pdiff_ray.tracking.sweeps import follow, log
from pdiff_ray.tracking.usage import Usage

__all__ = [
    "Server",
    "TrackingError",
    "Usage",
    "database",
    "experiment_name",
    "follow",
    "get_ready",
    "links",
    "log",
    "reachable",
    "record",
    "tracking_uri",
    "warn",
]
