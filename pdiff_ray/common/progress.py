"""What the user sees while work goes on: bars or a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0

Progress = Callable[[str, int, int, str], None]  # task, done, total, note


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """Shows nothing."""


# A pipe has no width; tables need about this much.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def is_live() -> bool:
    """Tells whether what is shown can be replaced: on a terminal, and in a notebook that has ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class Display:
    """A `Progress` function: a bar per task, or a line at its start, its end and every few seconds."""

    def __init__(self, bars: rich.progress.Progress | None) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.printed: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        if self.bars is not None:
            if task not in self.tasks:
                self.tasks[task] = self.bars.add_task(task, total=total, note=note)  # shown at once
            self.bars.update(self.tasks[task], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if done >= total or now - self.printed.get(task, -LINE_EVERY_S) >= LINE_EVERY_S:
            self.printed[task] = now
            console.print(f"  {task}: {done}/{total} {note}".rstrip(), markup=False)


@contextlib.contextmanager
def display() -> Iterator[Display]:
    """Shows the progress of some work: bars on a terminal and in a notebook, lines elsewhere."""
    if not is_live():
        yield Display(None)
        return
    columns = (
        TextColumn("  {task.description:12}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console) as bars:
        yield Display(bars)
