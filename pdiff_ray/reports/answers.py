"""The answers that a result comes down to, with numbers and intervals: for page, terminal and MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pdiff_ray.evaluation.comparison import EQUAL, Z
from pdiff_ray.evaluation.novelty import Undecided

PARTLY = 0.1  # new samples from which on a mixture is partly new

Word = Literal["yes", "partly", "no", "undecided", "unknown"]


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        word: the answer in a word.
        what: that it says no (or partly) to, in another word; may be empty.
        text: the numbers behind it, in sentences.
    """

    question: str
    word: Word
    what: str
    text: str

    @property
    def short(self) -> str:
        """The answer in a few letters, such as "no: interpolation"."""
        return f"{self.word}: {self.what}" if self.what else self.word

    def __str__(self) -> str:
        return f"{self.question} {self.short}. {self.text}"


def answers(summary: Mapping[str, Any]) -> tuple[Answer, ...]:
    """Returns whether it worked, is new, and is better than the simplest thing that works, and, of samples that were
    asked for something, whether they follow; nothing of old summaries.
    """
    if "comparison" not in summary:
        return ()
    found = _worked(summary), _new(summary), _better(summary["comparison"])
    return (*found, _follows(summary["condition"])) if "condition" in summary else found


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the zoo, and what to change, a text per diagnostic."""
    bad = [found for found in summary.get("zoo", ()) if found["good"] is False]
    return [f"{found['name'].replace('_', ' ')} {found['shown']}. {found['advice']}" for found in bad]


def conclusion(summary: Mapping[str, Any]) -> list[str]:
    """Returns the answers as lines of text, with what is wrong with the zoo; of old summaries the verdict alone."""
    lines = [*map(str, answers(summary)), *(f"Zoo: {text}" for text in warnings(summary))]
    return lines or [f"verdict: {summary['verdict']['text']}"]


def points(difference: Mapping[str, Any]) -> str:
    """Returns a difference of accuracies in points with its interval, such as "+0.33 [+0.01, +0.66]"."""
    numbers = (100 * difference[part] for part in ("estimate", "lower", "upper"))
    estimate, *ends = (f"{round(number, 2) + 0.0:+.2f}" for number in numbers)  # no -0.00
    return f"{estimate} [{', '.join(ends)}]"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of so many (Wilson 1927)."""
    middle, weight = share + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + (Z / count) ** 2 / 4)
    return max(0.0, (middle - half) / weight), min(1.0, (middle + half) / weight)


def _worked(summary: Mapping[str, Any]) -> Answer:
    verdict, comparison = summary["verdict"], summary["comparison"]
    mean, members = (comparison["means"][name] for name in ("generated", "original"))
    difference, failed, collapsed = comparison["differences"]["original"], verdict["failed"], verdict["collapsed"]
    interval = f"{100 * mean['lower']:.1f}, {100 * mean['upper']:.1f}"
    text = (
        f"{mean['networks']} samples have a mean test accuracy of {100 * mean['estimate']:.2f}% [{interval}], members "
        f"{100 * members['estimate']:.2f}%: {points(difference)} points. "
    )
    text += f"{failed:.0%} of the samples failed." if failed else "None failed."
    if verdict["word"] == "failed":
        return Answer("Did it work?", "no", "failed", text)
    if collapsed:
        return Answer("Did it work?", "no", "collapsed", f"{text} All samples are alike.")
    if failed or (difference["word"] == "worse" and -difference["estimate"] > EQUAL):
        return Answer("Did it work?", "partly", "some failed" if failed else "accuracy is lost", text)
    return Answer("Did it work?", "yes", "", text)


def _new(summary: Mapping[str, Any]) -> Answer:
    novelty = summary["novelty"]
    word, shares = novelty["word"], novelty["shares"]
    text = novelty["headline"].removeprefix(f"{word}: ") + " "
    if shares:
        new, networks = shares.get("new", 0.0), summary["comparison"]["networks"]
        low, high = (100 * bound for bound in wilson(new, networks))
        text += f"New are {new:.0%} [{low:.0f}, {high:.0f}]. "
    distances = {name.replace("_", " "): found["nearest"] for name, found in novelty["distances"].items()}
    if "samples" in distances:
        own = distances.pop("samples")
        others = ", ".join(f"{name} {distance:.2f}" for name, distance in distances.items())
        text += f"Their nearest member is at {own:.2f} of the mean distance among members ({others})."
    text += "".join(f" {Undecided(**one)}" for one in novelty["undecided"])
    answer: Word = "yes" if word == "new" else "unknown" if word == "unknown" else "no"
    if word == "mixture" and shares.get("new", 0) >= PARTLY:
        answer = "partly"
    return Answer("Is it new?", answer, "" if answer in ("yes", "unknown") else word, text.strip())


def _better(comparison: Mapping[str, Any]) -> Answer:
    known: dict[str | None, tuple[Word, str]] = {
        "better": ("yes", ""),
        "equal": ("no", "equal"),
        "worse": ("no", "worse"),
        "undecided": ("undecided", ""),
        None: ("unknown", ""),
    }
    word = comparison["word"]
    text = comparison["text"].removeprefix(f"{word}: ")
    return Answer("Is it better than the simplest thing that works?", *known[word], text[:1].upper() + text[1:])


def _follows(condition: Mapping[str, Any]) -> Answer:
    """Answers by the field of the condition's own kind on test images, which is the first."""
    parts, words = [], list[Word]()
    for field, found in condition["correlations"].items():
        among = f" (among members {found['members']:+.2f})" if found["members"] is not None else ""
        if found["estimate"] is None:
            words.append("unknown")
            parts.append(f"{field.replace('_', ' ')}: unknown, as nothing varies{among}")
            continue
        words.append("yes" if found["lower"] > 0 else "no" if found["upper"] < 0 else "undecided")
        numbers = f"{found['estimate']:+.2f} [{found['lower']:+.2f}, {found['upper']:+.2f}]"
        parts.append(f"{numbers} with {field.replace('_', ' ')}{among}")
    asked = f"{condition['condition'].replace('_', ' ')} from {condition['lowest']:.4g} to {condition['highest']:.4g}"
    text = f"{condition['samples']} samples were asked for {asked}; its rank correlation is {', '.join(parts)}."
    return Answer("Does asking for more give more?", words[0], "less" if words[0] == "no" else "", text)
