"""Figures of a sweep, as PNG bytes: accuracy and similarity over the values that vary, and the course of a search."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pdiff_ray.evaluation.groups import GROUPS
from pdiff_ray.reports.figures import bare, new_figure, png, with_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 3  # panels side by side
MAX_PANELS = 30  # of a figure: the others are in the tables, and each takes some tenths of a second to draw
MAX_TICKS = 10  # with more values than this, matplotlib chooses the ticks
MAX_CHARACTERS = 40  # of a title, or of the name of an axis or a value
LOG_RATIO = 20  # an axis is logarithmic if the largest value is at least this many times the smallest
MEASURES = {"best": ("#D55E00", "^"), "average": ("#0072B2", "o"), "median": ("#009E73", "s")}  # colour, marker


@dataclass(frozen=True)
class Panel:
    """The combinations of a sweep that differ in one parameter only.

    Attributes:
        title: the values that they share.
        parameter: the name of the parameter in which they differ.
        values: the values of this parameter, in order.
        curves: for each quantity, its mean, standard deviation, minimum and maximum over seeds at each value; NaN where
            there are no results.
    """

    title: str
    parameter: str
    values: Sequence[Any]
    curves: Mapping[str, np.ndarray]  # (values, 4)

    @property
    def numeric(self) -> bool:
        """True if the values are at least two numbers, which then have a scale."""
        return are_numbers(self.values) and len(self.values) > 1

    @property
    def places(self) -> np.ndarray:
        """The positions of the values on the x axis: the numbers themselves, or 0, 1, 2 and so on for names."""
        return np.array(self.values, float) if self.numeric else np.arange(len(self.values))


def are_numbers(values: Iterable[Any]) -> bool:
    """Tells whether all values are numbers; truth values are not."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def accuracy_over(panels: Sequence[Panel]) -> bytes:
    """Draws the best, average and median test accuracy of the generated networks, beside the originals' average.

    Args:
        panels: have the curves `best`, `average`, `median` and `originals`, as fractions.
    """
    figure, grid = _figure(panels[:MAX_PANELS])
    for axes, panel in zip(grid, panels, strict=False):
        _reference(axes, panel, 100 * panel.curves["originals"][:, 0], "originals, average")
        for index, (name, (colour, marker)) in enumerate(MEASURES.items()):
            # Between names there is room to draw the measures side by side, so that no error bar hides another.
            places = panel.places if panel.numeric else panel.places + 0.2 * (index - 1)
            _points(axes, panel, places, 100 * panel.curves[name], colour, marker, f"generated, {name}")
    return _explained(figure, grid, "test accuracy (%)", len(panels))


def similarity_over(panels: Sequence[Panel]) -> bytes:
    """Draws the range and the average, over generated networks, of their largest similarity with an original.

    Args:
        panels: have the curves `smallest`, `average`, `largest` and `originals`.
    """
    figure, grid = _figure(panels[:MAX_PANELS])
    for axes, panel in zip(grid, panels, strict=False):
        _reference(axes, panel, panel.curves["originals"][:, 0], "originals with another one, average")
        low, high = panel.curves["smallest"][:, 2], panel.curves["largest"][:, 3]
        colour = GROUPS["generated"].colour
        shade: dict[str, Any] = {"color": colour, "alpha": 0.25, "linewidth": 0}
        if panel.numeric:
            axes.fill_between(panel.places, low, high, label="generated, range", **shade)
        else:
            axes.bar(panel.places, high - low, 0.35, low, label="generated, range", **shade)
        _points(axes, panel, panel.places, panel.curves["average"], colour, "o", "generated, average")
    return _explained(figure, grid, "largest IoU with an original", len(panels))


@dataclass(frozen=True)
class Search:
    """The trials of a search, by their numbers, as the figures need them.

    Attributes:
        objective: the name of the objective, for the axis.
        maximize: whether larger objectives are better.
        finished: the objective of each finished trial; there is at least one.
        stopped: the objective that each stopped trial had reached when the scheduler stopped it.
        failed: the numbers of the failed trials.
        reference: the objective of the experiment as the file has it, or None if it is not known.
    """

    objective: str
    maximize: bool
    finished: Mapping[int, float]
    stopped: Mapping[int, float]
    failed: Sequence[int]
    reference: float | None

    @property
    def best(self) -> int:
        """The number of the finished trial with the best objective."""
        return (max if self.maximize else min)(self.finished, key=lambda number: self.finished[number])

    @property
    def last(self) -> int:
        """The highest number of a trial that has ended."""
        return max([*self.finished, *self.stopped, *self.failed])


def history(search: Search) -> bytes:
    """Draws the objective of every trial, and the best objective so far."""
    figure = new_figure(6, 3.6)
    axes = bare(figure.add_subplot())
    numbers, values = list(search.finished), list(search.finished.values())
    best = (np.maximum if search.maximize else np.minimum).accumulate(values)
    axes.step([*numbers, search.last], [*best, best[-1]], where="post", color=MEASURES["best"][0], label="best so far")
    axes.scatter(numbers, values, s=22, color=MEASURES["average"][0], label="finished", zorder=3)
    _stopped(axes, list(search.stopped), list(search.stopped.values()))
    if search.failed:
        # Failed trials have no objective, so they stand at the lower edge of the axes.
        edge = axes.get_xaxis_transform()
        axes.scatter(
            search.failed, [0.02] * len(search.failed), s=22, marker="|", color="black", transform=edge, label="failed"
        )
    _as_in_the_file(axes, search)
    axes.set_xlim(min([*numbers, *search.stopped, *search.failed]) - 0.5, search.last + 0.5)
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _explained(figure, [axes], search.objective)


def importances(shares: Mapping[str, float]) -> bytes:
    """Draws the share of the objective's variance that each parameter explains."""
    names, values = zip(*sorted(shares.items(), key=lambda share: share[1]), strict=True)
    figure = new_figure(6, 0.8 + 0.32 * len(names))
    axes = bare(figure.add_subplot(), "x")
    axes.bar_label(axes.barh(names, values, 0.6, color=MEASURES["average"][0]), fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, max(values) * 1.12)
    axes.set_xlabel("importance (fANOVA; all sum to 1)")
    axes.tick_params(axis="y", labelsize=8, length=0)
    return png(figure)


@dataclass(frozen=True)
class Slice:
    """The values of one parameter in the trials of a search.

    Attributes:
        parameter: the name of the parameter.
        values: its value in each trial to which it applies, by the number of the trial.
        choices: all values that it can have, or None if it has a range.
        log: whether its range is searched on a logarithmic scale.
    """

    parameter: str
    values: Mapping[int, Any]
    choices: Sequence[Any] | None
    log: bool

    def places(self, numbers: Iterable[int]) -> list[float]:
        """Returns the positions on the x axis of the trials with the given numbers."""
        return [self.choices.index(self.values[n]) if self.choices else self.values[n] for n in numbers]


def slices(search: Search, parameters: Sequence[Slice]) -> bytes:
    """Draws the objective against each parameter, with later trials darker."""
    figure, grid = _grid(len(parameters), 2.6)
    for axes, parameter in zip(grid, parameters, strict=True):
        finished = [n for n in search.finished if n in parameter.values]
        stopped = [n for n in search.stopped if n in parameter.values]
        objectives = [search.finished[n] for n in finished]
        _stopped(axes, parameter.places(stopped), [search.stopped[n] for n in stopped])
        axes.scatter(
            parameter.places(finished),
            objectives,
            c=finished,
            cmap="Blues",
            vmin=-0.4 * search.last - 1,  # below 0, so that the first trials are not white on white
            vmax=search.last,
            s=22,
            edgecolors="#08306b",
            linewidths=0.4,
            label="finished (later ones darker)",
            zorder=3,
        )
        if search.best in parameter.values:
            place = parameter.places([search.best])
            colour = MEASURES["best"][0]
            axes.scatter(place, [search.finished[search.best]], s=90, marker="*", color=colour, label="best", zorder=4)
        _as_in_the_file(axes, search)
        axes.set_xlabel(_cut(parameter.parameter), fontsize=9)
        if parameter.choices:
            axes.set_xlim(-0.5, len(parameter.choices) - 0.5)
            _name_ticks(axes, parameter.choices)
        elif parameter.log:
            _logarithmic(axes, list(parameter.values.values()))
        elif all(isinstance(value, int) for value in parameter.values.values()):
            axes.xaxis.get_major_locator().set_params(integer=True)
    return _explained(figure, grid, search.objective)


def _as_in_the_file(axes: Any, search: Search) -> None:
    if search.reference is not None:
        axes.axhline(search.reference, color="black", linestyle="--", linewidth=1, label="as in the file")


def _stopped(axes: Any, places: Sequence[float], values: Sequence[float]) -> None:
    if places:
        axes.scatter(places, values, s=18, marker="x", color="#999999", linewidths=1, label="stopped early")


def _figure(panels: Sequence[Panel]) -> tuple[Figure, list[Any]]:
    """Returns a figure and the axes of its panels, with their titles, scales and ticks."""
    figure, grid = _grid(len(panels), 3.6 if len(panels) == 1 else 3)
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(_cut(panel.title), fontsize=9)
        axes.set_xlabel(_cut(panel.parameter), fontsize=9)
        if not panel.numeric:
            axes.set_xlim(-0.5, len(panel.values) - 0.5)
            _name_ticks(axes, panel.values)
            continue
        positive = panel.places[panel.places > 0]
        if len(positive) and panel.places.min() >= 0 and positive.max() >= LOG_RATIO * positive.min():
            if (panel.places > 0).all():
                axes.set_xscale("log")
            else:  # a logarithmic axis has no zero; this one has it to the left of the smallest value
                axes.set_xscale("symlog", linthresh=positive.min(), linscale=0.5)
        if len(panel.values) <= MAX_TICKS:
            axes.set_xticks(panel.places, [f"{value:g}" for value in panel.values], fontsize=8)
            axes.minorticks_off()
    return figure, grid


def _grid(panels: int, height: float) -> tuple[Figure, list[Any]]:
    """Returns a figure and axes for so many panels, which share one y axis; `height` is in inches per row."""
    columns = min(panels, MAX_COLUMNS)
    rows = -(-panels // columns)
    figure = new_figure(6 if columns == 1 else 3.2 * columns, height * rows + 0.4)
    grid: list[Any] = []
    for index in range(panels):
        axes = bare(figure.add_subplot(rows, columns, index + 1, sharey=grid[0] if grid else None))
        axes.tick_params(labelsize=8, labelleft=index % columns == 0)
        grid.append(axes)
    return figure, grid


def _explained(figure: Figure, grid: Sequence[Any], quantity: str, panels: int = 0) -> bytes:
    """Labels the y axes, names what the panels show, and returns the figure as PNG bytes.

    Args:
        panels: that there would be; how many are left out is said.
    """
    if panels > len(grid):
        figure.supxlabel(f"the first {len(grid)} of {panels:,} panels; the tables have all", fontsize=9)
    figure.supylabel(quantity, fontsize=9) if len(grid) > MAX_COLUMNS else grid[0].set_ylabel(quantity, fontsize=9)
    return png(with_legend(figure, 8, 4 if figure.get_figwidth() > 6 else 2))


def _points(
    axes: Any, panel: Panel, places: np.ndarray, curve: np.ndarray, colour: str, marker: str, text: str
) -> None:
    """Draws means with error bars, joined by lines if the panel's values are numbers."""
    mean, std = curve.T[:2]
    known = ~np.isnan(mean)
    axes.errorbar(
        places[known],
        mean[known],
        std[known],
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.3 if panel.numeric else 0,
        elinewidth=1,
        capsize=2.5,
        label=text,
    )


def _reference(axes: Any, panel: Panel, values: np.ndarray, text: str) -> None:
    """Draws what the generated networks are compared with, at each value."""
    known = ~np.isnan(values)
    places, values = panel.places[known], values[known]
    style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1, "label": text}
    if panel.numeric:
        axes.plot(places, values, **style)
    else:
        axes.hlines(values, places - 0.4, places + 0.4, **style)


def _cut(text: str) -> str:
    """Returns so much of a text as there is room for, in which dollars are no formula's."""
    shown = text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
    return shown.replace("$", r"\$")


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """Makes the x axis logarithmic, with labels that do not overlap however few decades it has."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    ratio = max(values) / min(values)
    if ratio < 30:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ratio > 5 else MaxNLocator(3))
        axes.xaxis.set_major_formatter("{x:g}")


def _name_ticks(axes: Any, names: Sequence[Any]) -> None:
    """Labels the ticks with names that do not overlap: broken into lines or, if their words are too long, slanting."""
    inches = axes.figure.get_figwidth() / axes.get_gridspec().ncols - 0.6
    room = max(4, int(14 * inches / len(names)))  # characters per name, at this font size
    texts = [_cut(f"{name:g}" if isinstance(name, float) else str(name)) for name in names]
    if max(len(word) for text in texts for word in text.split() or [""]) <= room:
        axes.set_xticks(range(len(names)), [textwrap.fill(text, room) for text in texts], fontsize=8)
    else:
        axes.set_xticks(range(len(names)), texts, fontsize=8, rotation=35, ha="right", rotation_mode="anchor")
