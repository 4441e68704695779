"""The actor beside the driver; a module of its own without imports, as its process would import torch for nothing."""

from __future__ import annotations


class Events:
    """The actor that keeps the progress and the failures of workers until the driver fetches them."""

    def __init__(self) -> None:
        self.updates: dict[str, tuple[str, int, int, str]] = {}
        self.failures: dict[str, str] = {}

    def update(self, task: str, done: int, total: int, note: str) -> None:
        # Only the newest update of a task is kept, so that a slow driver does not fall behind; parallel runs report out
        # of order.
        newest = self.updates.get(task)
        if newest is None or done >= newest[1] or total != newest[2]:
            self.updates[task] = (task, done, total, note)

    def take(self) -> list[tuple[str, int, int, str]]:
        updates, self.updates = list(self.updates.values()), {}
        return updates

    def fail(self, key: str, message: str) -> None:
        self.failures.setdefault(key, message)

    def failed(self) -> dict[str, str]:
        return self.failures
