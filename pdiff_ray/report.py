"""Stage `report`: tables and figures from artifacts alone, as one HTML page and PNG files."""

from __future__ import annotations

import base64
import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pdiff_ray.artifacts import STAGES, Artifact, load_tree
from pdiff_ray.config import Experiment
from pdiff_ray.stages.base import HISTORY_FILE
from pdiff_ray.stages.evaluate import SUMMARY_FILE
from pdiff_ray.stages.generate import LATENTS_FILE
from pdiff_ray.store import ParameterStore

REPORT_FILE = "report.html"
COLUMNS = {
    "group": "group",
    "networks": "n",
    "best": "best*",
    "mean": "mean",
    "median": "median",
    "std": "std",
    "similarity": "IoU",
    "similarity_to_originals": "IoU orig.",
    "max_similarity": "IoU max",
    "nearest_distance": "distance",
}
LEGEND = (
    "Test accuracy in percent; *chosen on training images, reported on test images. IoU: overlap of wrong test "
    "predictions within the group, with the originals, and with the most similar original. distance: to the nearest "
    "member in weight space, relative to the mean distance among members."
)
FIGURES = {
    "accuracy": "Test accuracy of every network; lines are means.",
    "similarity": "Similarity: overlap (IoU) of wrong test predictions.",
    "accuracy_similarity": "Accuracy against the largest similarity with an original; copies sit at the far right.",
    "latents": "t-SNE of the latents of members and samples.",
    "losses": "Training losses.",
}


def build(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> None:
    """Builds the report from the evaluation and what led to it."""
    from pdiff_ray import figures  # matplotlib takes a second, and all commands import this module

    started = time.monotonic()
    summary = load_summary(artifacts)
    records = ParameterStore(artifacts["evaluation"]).records()
    num_test = artifacts["evaluation"].manifest()["info"]["test_images"]
    samples, generator = artifacts["samples"], artifacts["generator"]
    latents = {k: v.numpy() for k, v in load_tree(samples.read(LATENTS_FILE), samples.location).items()}
    base = artifacts["base"]
    history = load_tree(base.read(HISTORY_FILE), base.location) if HISTORY_FILE in base.manifest()["files"] else {}
    losses = {"base": history["loss"].tolist()} if len(history.get("loss", ())) else {}
    losses |= {k: v.tolist() for k, v in load_tree(generator.read(HISTORY_FILE), generator.location).items()}
    pngs = {
        "accuracy": figures.accuracy_by_group(records),
        "similarity": figures.similarity_bars(summary),
        "accuracy_similarity": figures.accuracy_against_similarity(records, num_test),
        "latents": figures.latent_map(latents, experiment.seed),
    }
    if losses:  # simple generators have none
        pngs["losses"] = figures.loss_curves(losses)
    rows = table_rows(summary)
    files = {f"{name}.png": png for name, png in pngs.items()}
    files["table.md"] = markdown(rows).encode()
    files["table.csv"] = comma_separated(summary).encode()
    files[REPORT_FILE] = _page(experiment, artifacts, summary, rows, pngs).encode()
    artifacts["report"].commit(files, {}, time.monotonic() - started)


def load_summary(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """The evaluation's summary, as `summary.summarize` made it."""
    return json.loads(artifacts["evaluation"].read(SUMMARY_FILE))


def report_location(artifacts: Mapping[str, Artifact]) -> str:
    """Where the HTML page is."""
    report = artifacts["report"]
    return f"{report.location}/{report.manifest()['files'][REPORT_FILE]['path']}"


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The result table as text, one row per group, headings first."""
    rows = [list(COLUMNS.values())]
    for group in summary["groups"]:
        row = []
        for column in COLUMNS:
            value = group[column]
            if value is None or (column == "std" and group["networks"] == 1):
                row.append("-")
            elif column in ("best", "mean", "median", "std"):
                row.append(f"{100 * value:.2f}")
            else:
                row.append(f"{value:.3f}" if isinstance(value, float) else str(value))
        rows.append(row)
    return rows


def paper_row(summary: Mapping[str, Any]) -> str:
    """original / ensemble / p-diff, each the best as selected on training images: Table 1 of the paper."""
    groups = {g["group"]: g for g in summary["groups"]}
    return " / ".join(f"{100 * groups[name]['best']:.1f}" for name in ("original", "ensemble", "generated"))


def stage_seconds(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    return {stage: artifacts[stage].manifest()["seconds"] for stage in STAGES if artifacts[stage].exists()}


def sharing_text(zoo: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """What sharing the computation of frozen parts achieved, from the `info` of two manifests; empty if unknown."""
    sentences = []
    if reason := evaluation.get("runs_whole"):
        sentences.append(f"Every network was judged with full passes ({reason}).")
    elif "shared" in evaluation:
        took = evaluation["prefix_seconds"] + evaluation["suffix_seconds"]
        sentences.append(
            f"The networks share {evaluation['shared']:.1%} of a pass's FLOPs; judging them took {took:.1f} s of "
            f"computing, {evaluation['unshared_seconds']:.1f} s with full passes (from the measured parts)."
        )
    if "shared" in zoo and not zoo["runs_whole"]:
        if reason := zoo["full_steps"]:
            sentences.append(f"Zoo steps were full passes: {reason}.")
        else:
            saving = zoo.get("steps_saving")
            fast = f" and were {saving:.1f} times as fast as full passes (from the measured parts)" if saving else ""
            sentences.append(f"Zoo steps read what is shared{fast}.")
    if compared := evaluation.get("compared_predictions"):
        changed = evaluation["changed_predictions"]
        sentences.append(f"Reduced precision changed {changed:,} of {compared:,} test predictions compared.")
    return " ".join(sentences)


def achieved_sharing(artifacts: Mapping[str, Artifact]) -> str:
    """`sharing_text` of an experiment."""
    return sharing_text(*(artifacts[stage].manifest()["info"] for stage in ("zoo", "evaluation")))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def comma_separated(summary: Mapping[str, Any]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(summary["groups"][0]))
    writer.writeheader()
    writer.writerows(summary["groups"])
    return sink.getvalue()


def _page(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    summary: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
    pngs: Mapping[str, bytes],
) -> str:
    import yaml

    manifests = {stage: artifacts[stage].manifest() for stage in STAGES if stage != "report"}
    return render(
        "report.html.jinja",
        name=experiment.name,
        rows=rows,
        legend=LEGEND,
        verdict=summary["verdict"]["text"],
        paper=paper_row(summary),
        gate=manifests["generator"]["info"].get("gate"),
        spread=manifests["samples"]["info"]["relative_latent_std"],
        sharing=achieved_sharing(artifacts),
        figures=[(FIGURES[name], base64.b64encode(png).decode()) for name, png in pngs.items()],
        stages=[(stage, m["key"], f"{m['seconds']:.1f}", m["seed"], m["created_at"]) for stage, m in manifests.items()],
        versions=manifests["evaluation"]["versions"],
        configuration=yaml.safe_dump(
            experiment.model_dump(mode="json", exclude={"storage", "tracking"}), sort_keys=False
        ),
    )


def render(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("pdiff_ray", "."))
    return environment.get_template(template).render(**values)
