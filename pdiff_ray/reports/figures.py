"""The report's figures, as PNG bytes, from an evaluation's rows and the histories of training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pdiff_ray.common.devices import one_thread
from pdiff_ray.config.split import MEMBER_GROUPS
from pdiff_ray.evaluation.groups import GROUPS, Group
from pdiff_ray.evaluation.similarity import iou, unpack_wrong
from pdiff_ray.evaluation.summary import by_title
from pdiff_ray.storage.parameters import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 500  # t-SNE
LEAST_SHOWN, MOST_SHOWN = 8, 40  # networks of a group in a matrix
SHOWN_BELOW = 3  # times as far below the best network as nine tenths of all are
MOST_APART = 5  # times the usual difference, which an axis shows
FACES = "osDvPXhp^"  # markers with a face, which an edge sets off
COLOURS = {"better": "#009E73", "equal": "#0072B2", "worse": "#D55E00"}


def accuracy_by_group(
    records: Sequence[Record], groups: Mapping[str, Group] = GROUPS, differences: Mapping[str, Any] | None = None
) -> bytes:
    """Draws the test accuracy of every network, a row per group, with its mean; beside it, how far the samples differ.

    Args:
        differences: of the samples' mean from that of other groups, by group (`comparison.Difference`, as JSON values).
    """
    rows = by_title(records, groups)
    figure = new_figure(9 if differences else 7.5, 0.9 + 0.26 * len(rows))
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if differences else [figure.add_subplot()]
    for axes in panels:
        bare(axes, "x").tick_params(labelsize=8)
        axes.tick_params(axis="y", length=0)
    axes, lowest, random = panels[0], _lowest(records), np.random.default_rng(0)
    for row, networks in enumerate(rows.values()):
        accuracies, colour = _accuracies(networks), _style(networks[0], groups, records)[0]
        spread = random.uniform(-0.28, 0.28, len(networks))
        axes.scatter(accuracies.clip(lowest), row + spread, s=9, alpha=0.4, color=colour, linewidths=0)
        axes.vlines(max(accuracies.mean(), lowest), row - 0.34, row + 0.34, color="black", linewidth=1.5)
        place: dict[str, Any] = {"xy": (1.01, row), "xycoords": ("axes fraction", "data")}
        axes.annotate(f"{accuracies.mean():.1f}", **place, fontsize=8, va="center")
    axes.set_yticks(range(len(rows)), [f"{name} ({len(networks)})" for name, networks in rows.items()])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"test accuracy (%){_left_out(records, lowest)}", fontsize=8)
    if differences:
        _intervals(panels[1], {list(rows).index(name): found for name, found in differences.items()})
    return png(figure)


def _intervals(axes: Any, differences: Mapping[int, Any]) -> None:
    """Draws differences with their intervals, by row; those far beyond the others leave the axes."""
    parts = {row: [100 * known[part] for part in ("estimate", "lower", "upper")] for row, known in differences.items()}
    for row, (estimate, *ends) in parts.items():
        colour = COLOURS.get(differences[row]["word"], "#666666")
        axes.hlines(row, *ends, color=colour, linewidth=1.8)
        axes.plot(estimate, row, "o", markersize=4, color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    _, lower, upper = np.array(list(parts.values())).T
    most = MOST_APART * float(np.median(np.maximum(-lower, upper)))
    axes.set_xlim(1.05 * max(lower.min(), -most) - 0.01, 1.05 * min(upper.max(), most) + 0.01)
    axes.set_xlabel("generated minus group (points, 95 % interval)", fontsize=8)


def similarity_matrix(records: Sequence[Record], num_test: int, groups: Mapping[str, Group] = GROUPS) -> bytes:
    """Draws the similarity of wrong predictions (IoU) of networks with each other, ordered by group."""
    shown = {}
    for name, networks in by_title(records, groups).items():
        count = min(max(len(networks), LEAST_SHOWN), MOST_SHOWN)  # a few are repeated, or they could not be seen
        shown[name] = [networks[index * len(networks) // count] for index in range(count)]
    wrong = unpack_wrong([record.wrong or b"" for networks in shown.values() for record in networks], num_test)
    similarity = iou(wrong, wrong)
    figure = new_figure(7.5, 6.4)
    axes = figure.add_subplot()
    image = axes.imshow(similarity, cmap="viridis", vmin=np.quantile(similarity, 0.02), vmax=1, interpolation="nearest")
    edges = np.cumsum([0, *map(len, shown.values())]) - 0.5
    for line in (axes.axhline, axes.axvline):
        for edge in edges[1:-1]:
            line(edge, color="white", linewidth=0.7)
    centres = (edges[:-1] + edges[1:]) / 2
    axes.set_xticks(centres, list(shown), rotation=90)
    axes.set_yticks(centres, list(shown))
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    scale = figure.colorbar(image, shrink=0.6, extend="min")
    scale.set_label("IoU of wrong predictions", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    return png(figure)


def accuracy_against_similarity(
    records: Sequence[Record], num_test: int, groups: Mapping[str, Group] = GROUPS
) -> bytes:
    """Draws test accuracy against the largest similarity with an original but itself, as in figure 4 of the paper.

    Each network is a dot, and a group's mark is at its median. The second panel shows where members and samples are.
    """
    originals = unpack_wrong([r.wrong or b"" for r in records if r.group == "original"], num_test)
    figure = new_figure(9, 4.4)
    everything, near = map(bare, figure.subplots(1, 2, width_ratios=(2, 3)))
    framed = []
    for name, networks in by_title(records, groups).items():
        similarity = iou(unpack_wrong([r.wrong or b"" for r in networks], num_test), originals)
        group = groups[networks[0].group]
        if group.name == "original":
            if len(networks) < 2:
                continue
            np.fill_diagonal(similarity, -1)
        points = np.stack([similarity.max(1), _accuracies(networks)])
        front = group.name == "generated"
        if front or group.name in MEMBER_GROUPS:
            framed.append(points)
        colour, marker = _style(networks[0], groups, records)
        dots: dict[str, Any] = {"s": 8, "alpha": 0.7 if front else 0.3, "color": colour, "linewidths": 0, "zorder": 2}
        mark: dict[str, Any] = {"s": max(50, group.size), "marker": marker, "color": colour, "zorder": 3}
        if marker in FACES:
            mark |= {"edgecolors": "white", "linewidths": 0.7}
        if front:
            mark |= {"s": 80, "edgecolors": "black"}
        for axes in (everything, near):
            if len(networks) > 1:
                axes.scatter(*points, **dots)
            axes.scatter(*np.median(points, 1), label=name, **mark)
    x, y = np.concatenate(framed, 1)
    for limit, values in ((near.set_xlim, [*x, 1.0]), (near.set_ylim, y)):  # copies of members are at 1
        margin = 0.05 * float(np.ptp(values)) or 0.01
        limit(np.min(values) - margin, np.max(values) + margin)
    everything.indicate_inset((*near.viewLim.p0, near.viewLim.width, near.viewLim.height), edgecolor="black")
    figure.supxlabel("largest similarity with an original (IoU of wrong predictions)", fontsize=9)
    everything.set_ylabel("test accuracy (%)", fontsize=9)
    for axes in (everything, near):
        axes.tick_params(labelsize=8)
    return png(with_legend(figure, columns=1, where="right"))


def _accuracies(records: Sequence[Record]) -> np.ndarray:
    """Returns test accuracies (n,) in percent."""
    return 100 * np.array([record.test_accuracy or 0 for record in records])


def _style(record: Record, groups: Mapping[str, Group], records: Sequence[Record]) -> tuple[str, str]:
    """Returns colour and marker of a network's line in figures; those of other sigmas have others."""
    sigmas = sorted({r.sigma for r in records if r.sigma is not None})
    return groups[record.group].style(0 if record.sigma is None else sigmas.index(record.sigma))


def _lowest(records: Sequence[Record]) -> float:
    """Returns where an axis of accuracies begins: networks far below would press all others together."""
    accuracies = _accuracies(records)
    high = accuracies.max()
    return float(max(accuracies.min(), high - SHOWN_BELOW * (high - np.quantile(accuracies, 0.1))))


def _left_out(records: Sequence[Record], lowest: float) -> str:
    below = int((_accuracies(records) < lowest).sum())
    return f"; {below} below {lowest:.2f} are at the edge" if below else ""


def get_ready() -> None:
    """Imports what figures are made with, which takes two seconds: for a thread, while others work."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import sklearn.manifold  # noqa: F401


def latent_map(latents: Mapping[str, np.ndarray], seed: int) -> bytes:
    """Draws a t-SNE of the latents of members and samples (van der Maaten and Hinton 2008), whose axes mean nothing."""
    from sklearn.manifold import TSNE

    chosen = {group: values[:MAX_POINTS] for group, values in latents.items()}
    points = np.concatenate(list(chosen.values()))
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] > 1 else "random"
    with one_thread():
        placed = TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(points)
    figure, axes = _figure(5, 4.2)
    parts = np.split(placed, np.cumsum([len(values) for values in chosen.values()])[:-1])
    for group, part in zip(chosen, parts, strict=True):
        colour, marker = GROUPS[group].style(0)
        axes.scatter(part[:, 0], part[:, 1], s=14, marker=marker, color=colour, alpha=0.7, label=group)
    axes.set_axis_off()
    return png(with_legend(figure))


def loss_curves(histories: Mapping[str, Sequence[float]]) -> bytes:
    """Draws training losses on logarithmic axes, a panel per model."""
    shown = {name: np.asarray(values) for name, values in histories.items() if len(values)}
    figure = new_figure(3.2 * max(1, len(shown)), 2.8)
    for index, (name, values) in enumerate(shown.items()):
        axes = bare(figure.add_subplot(1, len(shown), index + 1))
        axes.plot(values, linewidth=0.5, color="#0072B2", alpha=0.5 if len(values) > 100 else 1)
        if len(values) > 100:  # one value per step: smoothed over 2 % of them
            width = max(2, len(values) // 50)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(np.arange(len(smooth)) + width / 2, smooth, linewidth=1.5, color="#D55E00")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("epoch" if name == "base" else "step", fontsize=8)
        axes.set_ylabel("" if index else "loss", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
    return png(figure)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(width: float, height: float, grid: Literal["x", "y"] = "y") -> tuple[Figure, Any]:
    figure = new_figure(width, height)
    return figure, bare(figure.add_subplot(), grid)


def bare(axes: Any, grid: Literal["x", "y"] = "y") -> Any:
    """Gives axes thin lines along their quantity, and nothing else around what they show."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    return axes


def with_legend(
    figure: Figure, size: float = 7, columns: int = 4, where: Literal["upper center", "right"] = "upper center"
) -> Figure:
    """Names all that is labelled in a figure's axes, each name once, outside of them, where no point can be."""
    marks: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(name, handle)
    columns = max(1, min(columns, len(marks)))
    place: dict[str, Any] = {"loc": f"outside {where}", "ncols": columns, "frameon": False}
    figure.legend(marks.values(), marks.keys(), fontsize=size, **place)
    return figure


def png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    sink = io.BytesIO()
    # Without the version of matplotlib in it, the same numbers give the same file.
    figure.savefig(sink, format="png", dpi=150, metadata={"Software": None})
    return sink.getvalue()
