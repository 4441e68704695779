"""Experiment files of any bytes: each is an experiment, or one message that names the file."""

import io
import os
import random
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers import TINY

from pdiff_ray.cli.main import cli, guarded
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import loading, reading, sweep

ROOT = Path(__file__).parent.parent
SHIPPED = {path: path.read_text() for path in [*sorted((ROOT / "sweeps").rglob("*.yaml")), TINY]}
VALUES = [
    *("null", "[]", "{}", "[1]", "[[]]", "{a: 1}", "{1: 2}", "-1", "0", "1e400", ".inf", ".nan", "9" * 300),
    *("0x" + "f" * 99, "yes", "2001-99-99", "!!binary aGk=", "!!set {a}", "!!python/name:os.system", "&a [*a]", "*a"),
    *("? a", "'", "<<: 1", "{<<: [1]}", '"\\0"', '"\\ud800"', "x" * 999, "../../etc/passwd", "math:tan", "1:30:00"),
    *("{variants: {a: [1]}}", "{choice: [1, 2]}", "{int: [1]}", "[null]", "[.nan]", "{a: {b: {c: 1}}}", "all", "a:b:c"),
]  # fmt: skip


def mutated(text, rng):
    """The text with a few bits, values, keys or lines changed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind, lines = rng.random(), text.split("\n")
        if kind < 0.2:
            content = bytearray(text.encode("utf-8", "surrogateescape"))
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            text = content.decode("utf-8", "surrogateescape")
        elif kind < 0.3:
            start = rng.randrange(len(text))
            text = text[:start] + text[start + rng.randint(1, 6) :]
        elif kind < 0.8:
            places = list(re.finditer(r"(?<=: )[^\n#{}\[\],]+|(?<=[\[,{])[\w.]+|\w+(?=:)", text))
            place = rng.choice(places)
            text = text[: place.start()] + rng.choice(VALUES) + text[place.end() :]
        else:
            line = lines.pop(rng.randrange(len(lines)))
            if kind < 0.9:
                lines[rng.randrange(len(lines)) : 0] = [line, line]
            text = "\n".join(lines)
    return text


def test_mutated_files(tmp_path):
    rng = random.Random(0)
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    for number in range(400):
        origin = rng.choice(list(SHIPPED))
        file = tmp_path / "mutated.yaml"
        text = mutated(SHIPPED[origin].replace("base: ", f"base: {origin.parent}/"), rng)
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            loaded = sweep.load(file)
        except ConfigError as error:
            message = str(error)
            assert message.encode(), number
            assert all(line.startswith(("/", "error")) for line in message.splitlines()), (number, message)
        else:
            (loaded if hasattr(loaded, "zoo") else loaded.experiment).model_dump_json()


MANY = "".join(f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcd", "bcde", strict=True))
REFUSED = {
    "a list within itself": ("name: &a [*a]", "line 1: not valid YAML: *a stands within itself"),
    "a mapping within itself": ("zoo: &a {<<: *a}", "*a stands within itself"),
    "the document within itself": ("&a\nname: *a", "*a stands within itself"),
    "an alias of nothing": ("name: *a", "line 1: not valid YAML: found undefined alias 'a'"),
    "two documents": ("name: a\n---\nname: b", "but found another document"),
    "deep lists": ("[" * 60, "line 1: not valid YAML: nested more than 50 deep"),
    "deep mappings": ("{a: " * 60, "nested more than 50 deep"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(60)), "line 50: not valid YAML: nested more than 50"),
    "a key that is a number": ("network: {args: {1: 2}}", "the key '1' is not text; if it is meant so, put it"),
    "a key that is a truth value": ("on: 1", "the key 'on' is not text"),
    "a key that is a list": ("{[a]: 1}", "the key a mapping or a list is not text"),
    "a key that is null": ("~: 1", "the key '~' is not text"),
    "a key that moves the cursor": ('"\\e[2J": 1', r"the key '\x1b[2J' is not text"),
    "an object": ("name: !!python/object:os.system {}", "could not determine a constructor for the tag"),
    "bytes": ("name: !!binary aGk=", "could not determine a constructor"),
    "a set": ("network: {args: {x: !!set {a}}}", "could not determine a constructor"),
    "no truth value": ("name: a\nseed: !!bool x", "line 2: not valid YAML: no bool: 'x'"),
    "half a character": ('name: "\\ud800"', "text with a character that no file or terminal takes"),
    "a null in a path": ('storage: "a\\0b"', "text with a character that no file or terminal takes"),
    "a number of 300 digits": ("generator: {autoencoder: {stride: " + "9" * 300 + "}}", "whole number beyond 64 bits"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "line 1: not valid YAML: no int: Exceeds the limit"),
    "a date that is none": ("seed: 2001-99-99", "seed: '2001-99-99' is not accepted"),
    "a base that is a folder": ("base: .", "no regular file"),
    "presets as a list": ("name: a\npresets: [1]", "presets: [1] is not accepted: it takes a mapping"),
    "a variant that lacks a number": (
        "name: a\nsweep: {parameters: {v: {variants: {a: {zoo.subset.norm_layers: [1]}}}}}",
        "zoo.subset.norm_layers.1: required but not given",
    ),
    "a variant that is a list": (
        "name: a\nsweep: {parameters: {v: {variants: {a: [1]}}}}",
        "sweep.parameters.v.variants: [1] is not accepted",
    ),
    "a long value": ("name: a\nzoo: " + "x" * 9000, "zoo: 'xxx"),
    "a long value of a sweep": (
        f"name: a\nsweep: {{parameters: {{generator.normalize: [{'x' * 9000}]}}}}",
        "sweep: normalize xxx",
    ),
    "many networks": ("name: a\nevaluation: {baseline_networks: 10000000000}", "less than or equal to 100000"),
    "a large image": ("name: a\ndata: {image_size: 1000000000}", "less than or equal to 4096"),
    "many repeats": ("name: a\nsweep: {repeats: 1000000000, parameters: {seed: [1]}}", "less than or equal to 1000"),
    "a large grid": (
        f"name: a\nsweep: {{repeats: 500, parameters: {{zoo.members: {list(range(200, 222))}}}}}",
        "sweep: parameters have more than 10,000 combinations and repeats",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, text, expected):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        sweep.load(file)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert expected in message
    assert len(message) < 2500


def test_what_aliases_repeat_is_counted(tmp_path, monkeypatch):
    file = tmp_path / "many.yaml"
    file.write_text(f"a: &a [x, x, x]\n{MANY}")
    monkeypatch.setattr(reading, "MAX_NODES", 1000)
    with pytest.raises(ConfigError, match=r"line 4: not valid YAML: more than 1,000 values"):
        loading.load(file)
    file.write_text("name: a\nzoo: {optimizer: &o {lr: 0.5}}\ntraining: {optimizer: *o}")
    assert loading.load(file).training.optimizer.lr == 0.5


def test_files_that_are_too_long_or_none(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long.yaml").write_text("name: long")
    monkeypatch.setattr(reading, "MAX_BYTES", 5)
    with pytest.raises(ConfigError, match=r"long\.yaml: cannot be read: it has 10 bytes; 5 are the most"):
        loading.load(tmp_path / "long.yaml")
    with pytest.raises(ConfigError, match=r"--set seed=123456: has 6 characters; 5 are the most"):
        loading._parse_override("seed=123456")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="cannot be read: it is no regular file"):
            loading.load(path)


def test_problems_beyond_some_are_counted(tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_text("name: a\nzoo: {" + ", ".join(f"membrs{i}: 1" for i in range(500)) + "}")
    with pytest.raises(ConfigError) as caught:
        loading.load(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == loading.MAX_PROBLEMS + 1
    assert lines[-1].endswith("and 480 more")


def test_dates_are_text():
    assert reading.parse_yaml("2024-01-31", "test") == "2024-01-31"


@pytest.mark.parametrize(
    "override",
    ["data.name=../../etc/passwd", "network.name=../../etc/passwd", "generator.name=../x", "seed=&a [*a]", "seed=[[[["],
)
def test_refusals_end_in_one_message(tmp_path, override):
    printed = io.StringIO()
    arguments = ["sweep", str(TINY), "--storage", str(tmp_path), "--set", override, "--in-process"]
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as stopped:
        guarded(cli, arguments)
    assert stopped.value.code == 2
    assert len(printed.getvalue().splitlines()) == 1
    assert override.partition("=")[0] in printed.getvalue()
