"""The display of a running sweep: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

from rich import box
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdiff_ray.common.progress import Display, console, is_live
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.table import amount
from pdiff_ray.sweeps.trial import Trial, best_setting

STAGES_EVERY_S = 60.0  # how often lines say what trials are doing
STAGES_SHOWN = 8


class SweepDisplay:
    """The trials of a sweep, shown as a live table, or as a line whenever a trial begins or ends and each minute.

    It is a `Progress` function, too, for which a task of a trial is named `trial <number>|<stage>`.

    Args:
        ledger: the sweep's trials, of which some may have ended before.
        live: whether to show the table.
    """

    def __init__(self, ledger: Ledger, live: bool) -> None:
        self.total, self.sweep, self.live = ledger.total, ledger.sweep, live
        again = {trial.number for trial in ledger.open_trials()}
        self.trials = {trial.number: trial for trial in ledger.done() if trial.number not in again}
        self.began: dict[int, float] = {}
        self.tasks: dict[str, tuple[int, int, str]] = {}  # those of the whole sweep
        self.stages: dict[int, tuple[str, int, int]] = {}  # what running trials are doing
        self.lines = Display(None)
        self.printed = time.monotonic()  # when a line said last what trials are doing
        self.widest = 1  # the most trials that have run at a time

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        trial, bar, stage = task.partition("|")
        if bar:
            self.stages[int(trial.removeprefix("trial "))] = (stage, done, total)
            if not self.live and time.monotonic() - self.printed >= STAGES_EVERY_S:
                self.printed = time.monotonic()
                doing = [
                    f"trial {n}: {stage} {done}/{total}" for n, (stage, done, total) in sorted(self.stages.items())
                ]
                more = f"; {len(doing) - STAGES_SHOWN} more" if len(doing) > STAGES_SHOWN else ""
                console.print(f"  {'; '.join(doing[:STAGES_SHOWN])}{more}", markup=False)
        elif self.live:
            self.tasks[task] = (done, total, note)
        else:
            self.lines(task, done, total, note)

    def of(self, number: int) -> Callable[[str, int, int, str], None]:
        """Returns the progress function of a trial."""
        return lambda task, *rest: self(f"trial {number}|{task}", *rest)

    def clear(self) -> None:
        """Removes the tasks of the whole sweep, which are done."""
        self.tasks.clear()

    def change(self, trial: Trial) -> None:
        """Shows that a trial has begun or ended."""
        self.trials[trial.number] = trial
        if trial.state == "running":
            self.began[trial.number] = time.monotonic()
            self.widest = max(self.widest, len(self._running()))
        else:
            self.stages.pop(trial.number, None)
        if not self.live:
            outcome = "" if trial.objective is None else f" {amount(self.sweep.metric, trial.objective)}"
            state = "started" if trial.state == "running" else trial.state
            reason = f" ({trial.reason})" if trial.reason else ""
            after = f"; {self.headline()}" if trial.state != "running" else ""
            console.print(f"  trial {trial.number} [{trial.text}] {state}{outcome}{reason}{after}", markup=False)

    def headline(self) -> str:
        """Returns how far the sweep is: the trials that have ended, the best objective so far, and the time left."""
        ended = [trial for trial in self.trials.values() if trial.state != "running"]
        parts = [f"{len(ended)} of {self.total} trials"]
        if best := best_setting(ended, self.sweep.maximize):
            parts.append(f"best {self.sweep.metric} {amount(self.sweep.metric, best.objective)} ({best.text})")
        seconds = [t.seconds for t in ended if t.seconds and t.number in self.began]
        if seconds and len(ended) < self.total:
            left = statistics.fmean(seconds) * (self.total - len(ended)) / self.widest
            parts.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
        return ", ".join(parts)

    def _running(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state == "running"]

    def __rich__(self) -> RenderableType:
        table = Table(title=self.headline(), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("trial", "values", "state", "stage", "objective", "seconds"):
            table.add_column(column, justify="right" if column in ("trial", "objective", "seconds") else "left")
        for task, (done, total, note) in self.tasks.items():
            table.add_row("", "", task, Text(f"{done}/{total} {note}"), "", "")
        running = sorted(self._running(), key=lambda t: t.number)
        rows = max(3, console.height - 8 - len(self.tasks) - len(running))  # what the terminal has room for
        ended = [t for t in self.trials.values() if t.state != "running"][-rows:]
        for trial in [*sorted(ended, key=lambda t: t.number), *running]:
            stage, done, total = self.stages.get(trial.number, ("", 0, 0))
            seconds = trial.seconds or time.monotonic() - self.began.get(trial.number, time.monotonic())
            table.add_row(
                str(trial.number),
                Text(trial.text),
                trial.state,
                f"{stage} {done}/{total}" if stage else "",
                "" if trial.objective is None else amount(self.sweep.metric, trial.objective),
                f"{seconds:.0f}",
            )
        return table


@contextlib.contextmanager
def sweep_display(ledger: Ledger) -> Iterator[SweepDisplay]:
    """Shows a sweep while the context lasts."""
    shown = SweepDisplay(ledger, is_live())
    with Live(shown, console=console, refresh_per_second=2) if shown.live else contextlib.nullcontext():
        yield shown
