"""URIs may hold passwords and tokens, which are not for messages, logs, manifests, runs and pages."""

from __future__ import annotations

import re

_QUERY = re.compile(r"\?[^\s?'\")>]*=[^\s'\")>]*")
# A database's password may hold a slash; a colon and digits before one are a port.
_USER = re.compile(r"(:/+)(?:[^/\s]*|[^:/\s@]+:(?!\d+/)[^\s@]*)@")


def without_secrets(text: str) -> str:
    """Returns the text, its URIs without users, passwords and queries.

    A query goes from addresses without a scheme as well, as the libraries' errors quote them.
    """
    return _USER.sub(r"\1", _QUERY.sub("", text))
