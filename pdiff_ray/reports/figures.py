"""The report's figures, as PNG bytes, from an evaluation's rows and the histories of training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pdiff_ray.evaluation.groups import GROUPS, Group
from pdiff_ray.evaluation.similarity import iou, unpack_wrong
from pdiff_ray.evaluation.summary import by_title
from pdiff_ray.storage.parameters import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 500  # t-SNE


def accuracy_by_group(records: Sequence[Record], groups: Mapping[str, Group] = GROUPS) -> bytes:
    """Draws the test accuracy of every network, a column per group, with its mean."""
    columns = by_title(records, groups)
    figure, axes = _figure(7, 4)
    random = np.random.default_rng(0)
    for column, members in enumerate(columns.values()):
        accuracies = 100 * np.array([r.test_accuracy for r in members])
        spread = random.uniform(-0.25, 0.25, len(members))
        colour = groups[members[0].group].colour
        axes.scatter(column + spread, accuracies, s=12, alpha=0.5, color=colour, linewidths=0)
        axes.hlines(accuracies.mean(), column - 0.35, column + 0.35, color="black", linewidth=1.5)
        axes.annotate(f"{accuracies.mean():.1f}", (column + 0.37, accuracies.mean()), fontsize=8, va="center")
    _name_columns(axes, [f"{name} ({len(members)})" for name, members in columns.items()])
    axes.set_xlim(-0.5, len(columns) - 0.2)
    axes.set_ylabel("test accuracy (%)")
    return png(figure)


def similarity_bars(summary: Mapping[str, Any]) -> bytes:
    """Draws the similarity of wrong predictions: within groups, to the originals, and to the most similar original."""
    kinds = (
        ("similarity", "within the group", "#0072B2"),
        ("similarity_to_originals", "with the originals", "#56B4E9"),
        ("max_similarity", "with the most similar original", "#D55E00"),
    )
    groups = summary["groups"]
    figure, axes = _figure(7, 3.6)
    for index, (key, label, colour) in enumerate(kinds):
        heights = [group[key] or 0 for group in groups]
        bars = axes.bar(np.arange(len(groups)) + 0.27 * (index - 1), heights, 0.25, label=label, color=colour)
        labels = [f"{h:.2f}" if group[key] is not None else "" for h, group in zip(heights, groups, strict=True)]
        axes.bar_label(bars, labels, fontsize=6)
    _name_columns(axes, [g["group"] for g in groups])
    axes.set_ylabel("IoU of wrong predictions")
    axes.set_ylim(0, 1.18)
    axes.legend(fontsize=7, ncols=3, loc="upper center", frameon=False)
    return png(figure)


def accuracy_against_similarity(
    records: Sequence[Record], num_test: int, groups: Mapping[str, Group] = GROUPS
) -> bytes:
    """Draws test accuracy against the largest similarity with an original but itself, as in figure 4 of the paper."""
    originals = unpack_wrong([r.wrong or b"" for r in records if r.group == "original"], num_test)
    figure, axes = _figure(6, 4.2)
    sigmas = sorted({r.sigma for r in records if r.sigma is not None})
    for name, members in by_title(records, groups).items():
        similarity = iou(unpack_wrong([r.wrong or b"" for r in members], num_test), originals)
        group = groups[members[0].group]
        if group.name == "original":
            if len(members) < 2:
                continue
            np.fill_diagonal(similarity, -1)
        sigma = members[0].sigma
        colour, marker = group.style(0 if sigma is None else sigmas.index(sigma))
        accuracies = [100 * (r.test_accuracy or 0) for r in members]
        look = {"s": group.size, "marker": marker, "color": colour, "zorder": 3 if group.size > Group.size else 2}
        axes.scatter(similarity.max(1), accuracies, alpha=0.7, label=name, **look)
    axes.set_xlabel("largest similarity with an original (IoU of wrong predictions)")
    axes.set_ylabel("test accuracy (%)")
    return png(with_legend(figure))


def latent_map(latents: Mapping[str, np.ndarray], seed: int) -> bytes:
    """Draws a t-SNE of the latents of members and samples (van der Maaten and Hinton 2008), whose axes mean nothing."""
    from sklearn.manifold import TSNE

    chosen = {group: values[:MAX_POINTS] for group, values in latents.items()}
    points = np.concatenate(list(chosen.values()))
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] > 1 else "random"
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


def _name_columns(axes: Any, names: Sequence[str]) -> None:
    """Writes names below columns, a word to a line, as neighbours would touch."""
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = new_figure(width, height)
    return figure, bare(figure.add_subplot())


def bare(axes: Any, grid: Literal["x", "y"] = "y") -> Any:
    """Gives axes thin lines along their quantity, and nothing else around what they show."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    return axes


def with_legend(figure: Figure, size: float = 7, columns: int = 4) -> Figure:
    """Names all that is labelled in a figure's axes, each name once, above them, where no point can be."""
    marks: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(name, handle)
    columns = max(1, min(columns, len(marks)))
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    figure.legend(marks.values(), marks.keys(), fontsize=size, **place)
    return figure


def png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    sink = io.BytesIO()
    # Without the version of matplotlib in it, the same numbers give the same file.
    figure.savefig(sink, format="png", dpi=150, metadata={"Software": None})
    return sink.getvalue()
