"""The section `sweep` of an experiment file, which says what varies, and the experiments of its trials.

An assignment maps each parameter that applies to one of its values: a number, a truth value, or text that names it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import loading
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import Section, merge

Value = int | float | bool | str | None
Assignment = dict[str, Value]

# What a search may optimize, named as in `evaluation.metrics`. Test labels must not choose anything.
OBJECTIVES = (
    "generated/mean_train_accuracy",
    "generated/mean_train_loss",
    "generated/mean_validation_accuracy",
    "generated/mean_validation_loss",
)
FIXED = ("name", "resources", "tracking", "storage", "sweep")  # fields that are the same in all trials
MAX_TRIALS = 10_000  # of a sweep; each is a run, and an entry of lists
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Parameter(Section):
    """The values that one parameter can have, given by exactly one of choice, variants, uniform, loguniform and int."""

    choice: tuple[Any, ...] | None = Field(
        None, min_length=1, max_length=1000, description="these values; a plain list means the same"
    )
    variants: dict[str, dict[str, Any]] | None = Field(
        None, min_length=1, max_length=1000, description="names, each for fields (dotted paths) and their values"
    )
    uniform: tuple[float, float] | None = Field(None, description="from low to high")
    loguniform: tuple[float, float] | None = Field(None, description="from low to high, evenly in the logarithm")
    integers: tuple[int, int] | None = Field(
        None, alias="int", description="whole numbers from low to high, both included"
    )
    when: dict[str, Any] = Field(
        default_factory=dict, description="applies only where earlier parameters have this value, or one of a list"
    )

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return {"choice": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> Parameter:
        given = self.model_dump(by_alias=True, exclude={"when"}, exclude_none=True)
        if len(given) != 1:
            known = "choice, variants, uniform, loguniform, int"
            raise ValueError(f"takes exactly one of {known}; this one has {', '.join(given) or 'none'}")
        if self.range:
            low, high = self.range
            if not low < high or (self.loguniform and low <= 0):
                above = " above 0" if self.loguniform else ""
                raise ValueError(f"{next(iter(given))} is [low, high] with low < high{above}, not [{low}, {high}]")
        seen: dict[Value, Any] = {}
        for value in self.choice or ():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"choice has {value}; a finite number is wanted")
            # A search takes 1 for True and 1.0, and tables show it as "1".
            for same in dict.fromkeys((as_value(value), str(as_value(value)))):
                if same in seen:
                    raise ValueError(
                        f"choice has {seen[same]!r} and {value!r}, which cannot be told apart; leave one of them out"
                    )
                seen[same] = value
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest value of a uniform, loguniform or int parameter; None of any other."""
        return self.uniform or self.loguniform or self.integers

    @property
    def values(self) -> list[Value]:
        """What a choice or variants offer, lists and mappings as text; empty for a range."""
        return list(self.variants) if self.variants else [as_value(value) for value in self.choice or ()]

    def paths(self, name: str) -> list[str]:
        """Returns the dotted paths of the fields that this parameter, by its name, can change."""
        return [path for fields in self.variants.values() for path in fields] if self.variants else [name]

    def fields(self, name: str, chosen: Value) -> dict[str, Any]:
        """Returns the fields that a value of this parameter changes, by dotted path.

        Args:
            name: the name of this parameter.
            chosen: one of `values`, or a number in the range.
        """
        if self.variants:
            return self.variants[str(chosen)]
        if self.choice:
            return {name: next(value for value in self.choice if as_value(value) == chosen)}
        return {name: chosen}


def as_value(value: Any) -> Value:
    """Returns a value as it is shown and tracked: scalars unchanged, others as one line of YAML."""
    if isinstance(value, int | float | bool | str) or value is None:
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()


class Sweep(Section):
    """The section `sweep`: which fields vary, over which values, and how trials are chosen."""

    unkeyed = frozenset({"num_trials", "max_concurrent", "time_budget", "max_retries", "confirm"})

    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="every combination, independent draws, or Optuna's TPE"
    )
    parameters: dict[str, Parameter] = Field(
        min_length=1, description="by the dotted path of the field; variants by any name"
    )
    repeats: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="seeds per combination; a search optimizes their mean"
    )
    seeds: tuple[str, ...] = Field(
        ("seed",), min_length=1, description="fields that a repeat raises by one; seed is that of all stages"
    )
    num_trials: int | None = Field(None, ge=1, le=MAX_TRIALS, description="of a random or Optuna search")
    metric: str = Field(
        "generated/mean_validation_accuracy", description=f"what is optimized, one of {', '.join(OBJECTIVES)}"
    )
    scheduler: Literal["none", "asha"] = Field("none", description="asha: Ray Tune's ASHA stops hopeless trials early")
    reduction_factor: float = Field(2, gt=1, description="ASHA keeps one of so many trials at each rung")
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; default: as many as find a place")
    time_budget: float | None = Field(
        None, gt=0, description="seconds (or 30m, 2h) after which no trial goes on; the same command continues"
    )
    max_retries: int = Field(1, ge=0, description="of a trial that crashed or lost its node, from where it was")
    confirm: int = Field(
        3,
        ge=0,
        le=1000,
        description="of a search: new seeds with which the best setting and the file's own are compared at the end",
    )
    seed: int = Field(0, ge=0, description="of the search")

    @model_validator(mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        given = str(value.get("time_budget")) if isinstance(value, dict) else ""
        match = re.fullmatch(r"\s*([\d.]+)\s*([smhd])\s*", given)
        return {**value, "time_budget": float(match[1]) * SECONDS[match[2]]} if match else value

    @model_validator(mode="after")
    def _possible(self) -> Sweep:
        if self.metric not in OBJECTIVES:
            test = "test labels must not choose anything; " if "test" in self.metric else ""
            raise ValueError(f"metric is {self.metric!r}; {test}take one of {', '.join(OBJECTIVES)}")
        if self.search == "grid":
            if self.num_trials is not None:
                raise ValueError("num_trials is of random and Optuna searches; a grid has all its combinations")
            for name, parameter in self.parameters.items():
                if parameter.range:
                    raise ValueError(f"parameters.{name} is a range, which a grid cannot enumerate; list its values")
        elif self.num_trials is None:
            raise ValueError(f"num_trials is needed by search {self.search!r}")
        elif self.scheduler == "asha" and self.repeats > 1:
            raise ValueError(
                f"repeats is {self.repeats}; scheduler asha judges one unfinished generator, take repeats 1"
            )
        for position, (name, parameter) in enumerate(self.parameters.items()):
            for other, values in parameter.when.items():
                earlier = list(self.parameters)[:position]
                if other not in earlier:
                    raise ValueError(f"parameters.{name}.when.{other}: not one of the parameters before it")
                known = self.parameters[other].values
                for value in _listed(values):
                    if known and as_value(value) not in known:
                        raise ValueError(f"parameters.{name}.when.{other}: {value!r} is not among its values")
        if self.search == "grid":
            self.grid()
        return self

    @property
    def maximize(self) -> bool:
        """True if larger values of the metric are better."""
        return self.metric.endswith("accuracy")

    @property
    def paths(self) -> list[str]:
        """The dotted paths of the fields that the parameters can change."""
        return [path for name, parameter in self.parameters.items() for path in parameter.paths(name)]

    def applies(self, parameter: Parameter, assignment: Mapping[str, Value]) -> bool:
        """Tells whether the condition `when` of a parameter holds, given the values of the parameters before it."""
        return all(
            name in assignment and assignment[name] in [as_value(v) for v in _listed(values)]
            for name, values in parameter.when.items()
        )

    def grid(self) -> list[Assignment]:
        """Returns every combination of values, with the last parameter varying fastest.

        Raises:
            ValueError: there are more than a sweep may have.
        """
        combinations: list[Assignment] = [{}]
        for name, parameter in self.parameters.items():
            extended: list[Assignment] = []
            for assigned in combinations:
                applies = self.applies(parameter, assigned)
                extended += [{**assigned, name: value} for value in parameter.values] if applies else [assigned]
                if len(extended) * self.repeats > MAX_TRIALS:
                    raise ValueError(
                        f"parameters have more than {MAX_TRIALS:,} combinations and repeats; list fewer values, or "
                        "take search random or optuna"
                    )
            combinations = extended
        return combinations


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


@dataclass(frozen=True)
class SweepFile:
    """An experiment, and the sweep that varies it.

    Attributes:
        experiment: the experiment as the file has it, with nothing varied.
        raw: the mapping from which the experiment was parsed.
        path: the path of the file, for messages.
    """

    experiment: Experiment
    sweep: Sweep
    raw: dict[str, Any]
    path: str
    _varied: dict[str, Experiment] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def question(self) -> str:
        """The first paragraph of the comment that opens the file; empty if there is none or the file cannot be read."""
        try:
            lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return ""
        paragraph = itertools.takewhile(lambda line: line.startswith("#") and line.strip("# "), lines)
        return " ".join(line.strip("# ") for line in paragraph)

    def fields(self, assignment: Assignment) -> dict[str, Any]:
        """Returns the fields that an assignment changes, by dotted path; later parameters take precedence."""
        found: dict[str, Any] = {}
        for name, value in assignment.items():
            found |= self.sweep.parameters[name].fields(name, value)
        return found

    def vary(self, assignment: Assignment, repeat: int = 0) -> Experiment:
        """Returns the experiment of an assignment, with `repeat` added to its seeds. Each is parsed only once.

        Raises:
            ConfigError: fields or values do not exist, or do not fit together.
        """
        key = repr((assignment, repeat))
        if key not in self._varied:
            raw = self.raw
            for path, value in self.fields(assignment).items():
                raw = merge(raw, loading.nested(path, value))
            if repeat:
                raw = self.with_seeds(raw, self.vary(assignment), repeat)
            self._varied[key] = loading.parse_experiment(raw, f"{self.path}: sweep: {describe(assignment)}")
        return self._varied[key]

    def with_seeds(self, raw: dict[str, Any], experiment: Experiment, repeat: int) -> dict[str, Any]:
        """Returns the mapping `raw`, from which `experiment` was parsed, with `repeat` added to its seeds."""
        values = experiment.model_dump()
        for path in self.sweep.seeds:
            raw = merge(raw, loading.nested(path, _at(values, path) + repeat))
        return raw


def describe(assignment: Mapping[str, Value]) -> str:
    """Returns an assignment in a few words."""
    return ", ".join(f"{parts_of(name)[-1]} {format_value(value)}" for name, value in assignment.items())


def parts_of(name: str) -> list[str]:
    """Returns the keys of a field's dotted path; any other name, as variants may have, is one of its own."""
    return name.split(".") if re.fullmatch(r"\w+(\.\w+)*", name) else [name]


def format_value(value: Value) -> str:
    """Returns a value as it is shown, with four significant digits of a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load(path: str | Path, overrides: Sequence[str] = (), preset: str | None = None) -> SweepFile | Experiment:
    """Loads an experiment file as a sweep, or as an experiment if it has no section `sweep`.

    Raises:
        ConfigError: something is wrong; names the file, the dotted path of the field, its value and the remedy.
    """
    raw, where = loading.read(path, overrides, preset), str(path)
    if raw.get("sweep") is None:
        raw.pop("sweep", None)  # an override leaves null
        return loading.parse_experiment(raw, where)
    return parse_sweep(raw, where)


def parse_sweep(raw: dict[str, Any], where: str) -> SweepFile:
    """Validates the mapping of an experiment that has a section `sweep`.

    Args:
        where: names the origin of the mapping in messages.

    Raises:
        ConfigError: the section is missing, or something in the mapping is wrong.
    """
    section, raw = raw.get("sweep"), {name: value for name, value in raw.items() if name != "sweep"}
    if section is None:
        raise ConfigError(f"{where}: sweep: required but not given; it says what varies")
    file = SweepFile(loading.parse_experiment(raw, where), loading.parse(Sweep, section, where, at="sweep"), raw, where)
    _check(file)
    return file


def _check(file: SweepFile) -> None:
    """Raises ConfigError if seeds, parameters or values of the sweep do not exist or do not fit together."""
    sweep, plain = file.sweep, file.experiment.model_dump()
    for path in sweep.seeds:
        if path.rpartition(".")[2] != "seed" or not isinstance(_at(plain, path), int):
            raise ConfigError(f"{file.path}: sweep.seeds: {path!r} is not the path of a seed, such as seed or zoo.seed")
    for name, parameter in sweep.parameters.items():
        for path in parameter.paths(name):
            if path.split(".")[0] in FIXED:
                raise ConfigError(
                    f"{file.path}: sweep.parameters.{name}: {path!r} is the same in all of a sweep's trials"
                )
    for assignment in sweep.grid() if sweep.search == "grid" else itertools.islice(_corners(sweep), MAX_TRIALS):
        file.vary(assignment)


def _corners(sweep: Sweep) -> Iterator[Assignment]:
    """Yields assignments in which both ends of each range, each choice and each value of a condition occur."""
    values: dict[str, list[Value]] = {
        name: list(parameter.range) if parameter.range else parameter.values
        for name, parameter in sweep.parameters.items()
    }
    longest = max(len(v) for v in values.values())
    conditions: list[Assignment] = [
        {other: as_value(value)}
        for parameter in sweep.parameters.values()
        for other, wanted in parameter.when.items()
        for value in _listed(wanted)
    ]
    for forced in [{}, *conditions]:
        for turn in range(longest):
            assignment: Assignment = {}
            for name, parameter in sweep.parameters.items():
                if sweep.applies(parameter, assignment):
                    assignment[name] = forced.get(name, values[name][turn % len(values[name])])
            yield assignment


def _at(tree: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a dotted path, None if there is no such path."""
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
