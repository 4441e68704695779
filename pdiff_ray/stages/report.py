"""Stage `report`: tables and figures from artifacts alone, as one HTML page and PNG files."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

import yaml

from pdiff_ray.common.errors import StorageError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.groups import groups_of
from pdiff_ray.evaluation.metrics import described, named_metrics, verdict_words
from pdiff_ray.reports import figures
from pdiff_ray.reports.answers import answers, conclusion, warnings
from pdiff_ray.reports.pages import render
from pdiff_ray.reports.tables import DIFFERENCE, comma_separated, headline, legend, markdown, sharing_text, table_rows
from pdiff_ray.stages.base import HISTORY_FILE
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.evaluation import SUMMARY_FILE
from pdiff_ray.stages.samples import LATENTS_FILE
from pdiff_ray.storage.artifacts import ANEW, Artifact
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.storage.trees import load_tree

REPORT_FILE = "report.html"
FIGURES = {
    "accuracy_similarity": "Accuracy against the largest similarity with an original: of every network, and of each "
    "group's median; framed, and on the right, is where members and samples are. Copies are at the far right.",
    "accuracy": "Test accuracy of every network, and means. Beside it, the mean of samples less the group's: green, "
    "better; blue, equal; red, worse; grey, undecided.",
    "similarity": "Similarity: overlap (IoU) of wrong test predictions, each row and column a network.",
    "latents": "t-SNE of the latents of members and samples.",
    "losses": "Training losses.",
}


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Builds the report from the evaluation and what led to it."""
    started = time.monotonic()
    summary = load_summary(artifacts)
    records, groups = ParameterStore(artifacts["evaluation"]).records(), groups_of(experiment.evaluation)
    num_test = artifacts["evaluation"].manifest().info["test_images"]
    samples = artifacts["samples"]
    latents = {k: v.numpy() for k, v in load_tree(samples.read(LATENTS_FILE), samples.location).items()}
    losses = {"base": load_history(artifacts["base"]).get("loss", [])} | load_history(artifacts["generator"])
    differences = summary.get("comparison", {}).get("differences")
    pngs = {
        "accuracy_similarity": figures.accuracy_against_similarity(records, num_test, groups),
        "accuracy": figures.accuracy_by_group(records, groups, differences),
        "similarity": figures.similarity_matrix(records, num_test, groups),
        "latents": figures.latent_map(latents, experiment.seed),
    }
    if any(losses.values()):  # an imported base and simple generators have none
        pngs["losses"] = figures.loss_curves(losses)
    files = {f"{name}.png": png for name, png in pngs.items()}
    files["table.md"] = markdown(table_rows(summary, differences=True)).encode()
    files["table.csv"] = comma_separated(summary).encode()
    files[REPORT_FILE] = _page(experiment, artifacts, summary, pngs).encode()
    artifacts["report"].commit(files, {}, time.monotonic() - started)


def load_summary(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Returns the evaluation's summary, as `summary.summarize` made it.

    Raises:
        StorageError: it is missing, damaged, or no such summary.
    """
    evaluation = artifacts["evaluation"]
    content = evaluation.read(SUMMARY_FILE)
    try:
        summary: dict[str, Any] = json.loads(content)
        # What a summary has, its uses say.
        _ = table_rows(summary, differences=True), comma_separated(summary), legend(described(summary))
        _ = headline(summary), conclusion(summary), verdict_words(summary), _yardsticks(summary.get("novelty", {}))
        _ = [float(number) for number in named_metrics(summary).values()], summary["verdict"]["text"]
        if any(group["group"] == "ensemble" and group.get("best_id") is not None for group in summary["groups"]):
            # An earlier version gave the ids of the evaluation's rows, which nothing but the evaluation has.
            store = ParameterStore(evaluation)
            for group in summary["groups"]:
                group["best_id"] = store.records([group["best_id"]])[0].number
    except StorageError:  # of the evaluation's parts
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StorageError(f"{evaluation.location}: {SUMMARY_FILE}: no summary ({error!r}); {ANEW}") from None
    return summary


def load_history(artifact: Artifact) -> dict[str, list[float]]:
    """Returns what the training of a base or a generator has noted, by name; nothing of an imported base."""
    if HISTORY_FILE not in artifact.manifest().files:
        return {}
    return {name: values.tolist() for name, values in load_tree(artifact.read(HISTORY_FILE), artifact.location).items()}


def report_location(artifacts: Mapping[str, Artifact]) -> str:
    """Returns where the HTML page is."""
    report = artifacts["report"]
    return f"{report.location}/{report.manifest().files[REPORT_FILE].path}"


def stage_seconds(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """Returns the seconds that each finished stage took."""
    return {stage: artifact.manifest().seconds for stage, artifact in artifacts.items() if artifact.exists()}


def achieved_sharing(artifacts: Mapping[str, Artifact]) -> str:
    """Returns `sharing_text` of an experiment."""
    return sharing_text(*(artifacts[stage].manifest().info for stage in ("zoo", "evaluation")))


def _page(
    experiment: Experiment, artifacts: Mapping[str, Artifact], summary: Mapping[str, Any], pngs: Mapping[str, bytes]
) -> str:
    manifests = {stage: artifact.manifest() for stage, artifact in artifacts.items() if stage != "report"}
    configuration = experiment.model_dump(mode="json", exclude={"storage", "tracking"})
    return render(
        "report.html.jinja",
        name=experiment.name,
        answers=answers(summary),
        warnings=warnings(summary),
        verdict=summary["verdict"]["text"],
        rows=table_rows(summary, differences=True),
        legend=legend(described(summary)) + (f" {DIFFERENCE}" if "comparison" in summary else ""),
        zoo=summary.get("zoo"),
        yardsticks=_yardsticks(summary.get("novelty", {})),
        novelty=summary.get("novelty", {}).get("text"),
        headline=headline(summary),
        gate=manifests["generator"].info.get("gate"),
        spread=manifests["samples"].info["relative_latent_std"],
        sharing=achieved_sharing(artifacts),
        figures=[(FIGURES[name], base64.b64encode(png).decode()) for name, png in pngs.items()],
        stages=[(stage, m.key, f"{m.seconds:.1f}", m.seed, m.created_at) for stage, m in manifests.items()],
        versions=manifests["evaluation"].versions,
        configuration=yaml.safe_dump(configuration, sort_keys=False),
    )


def _yardsticks(novelty: Mapping[str, Any]) -> list[list[str]]:
    """Returns how near samples and yardsticks are to the members, as a table with headings; empty if unknown."""
    copying, rows = novelty.get("copying", {}), []
    for name, found in novelty.get("distances", {}).items():
        known = copying.get(name)
        measured = [f"{known[part]:.1f}" for part in ("c_t", "z", "effective")] if known else ["-"] * 3
        rows.append([name.replace("_", " "), f"{found['nearest']:.2f}", f"{found['cosine']:.2f}", *measured])
    return [["networks", "nearest", "cosine", "C_T of samples", "z", "effective"], *rows] if rows else []
