"""Errors that a user can cause. The command line prints their message alone; anything else is a bug and keeps its
traceback."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import islice

from pdiff_ray.common.secrets import without_secrets

MAX_MEANT = 200  # characters of a name that a near one is looked for, and
MAX_KNOWN = 5000  # names that it is looked for in
MAX_LINE = 1000  # characters of a message's line, which may hold what others have written
GAP = " ... "


def printable(text: str) -> str:
    """Returns the text with escapes in place of characters that a terminal obeys or that cannot be encoded."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shortened(line: str) -> str:
    """Returns a line, if it is a long one without its middle: it begins with the place and ends with the remedy."""
    half = (MAX_LINE - len(GAP)) // 2
    return line if len(line) <= MAX_LINE else f"{line[:half]}{GAP}{line[-half:]}"


class PdiffError(ValueError):
    """Something the user can mend; the message names the field or file, the value and the remedy, but no secrets."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(shortened, printable(without_secrets(message)).split("\n"))))


class ConfigError(PdiffError):
    """The configuration or the command line is wrong; nothing was started."""

    exit_code = 2


class StorageError(PdiffError):
    """Storage cannot be read or written, or what it holds is damaged."""

    exit_code = 2


class UnavailableError(StorageError):
    """Storage, a node's cache or its software is not as it must be; another attempt, or another node, may do better."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; its kind, if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x' or 'y'?"` with the known names nearest to `name`, or an empty string."""
    if len(name) > MAX_MEANT:
        return ""
    near = difflib.get_close_matches(name, dict.fromkeys(islice(known, MAX_KNOWN)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def some_of(names: Collection[str]) -> str:
    """Returns names as part of a message: all of a few, the first and the last of many."""
    listed = list(names)
    return ", ".join(listed if len(listed) <= 6 else [*listed[:3], "...", *listed[-2:]])
