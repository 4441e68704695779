"""MLflow: an experiment per configuration name; a run per zoo, per trial and per sweep.

Storage is the source: runs are written from it, and can be written again, so a server that is down costs nothing but a
warning. A run carries the key of what it describes and is never written twice. Imports sweeps and below. Only this
folder imports MLflow.
"""

from pdiff_ray.tracking.pages import links
from pdiff_ray.tracking.runs import record
from pdiff_ray.tracking.server import (
    Server,
    TrackingError,
    database,
    reachable,
    tracking_uri,
    warn,
    without_secret,
)
from pdiff_ray.tracking.sweeps import follow, log

__all__ = [
    "Server",
    "TrackingError",
    "database",
    "follow",
    "links",
    "log",
    "reachable",
    "record",
    "tracking_uri",
    "warn",
    "without_secret",
]
