"""Signals that end a command as Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)  # beside SIGINT

_received = [signal.SIGINT]


def exit_code() -> int:
    """Returns the code with which to exit after a KeyboardInterrupt: 128 and the number of the signal that came."""
    return 128 + _received[-1]


def interrupt(number: int, _: object = None) -> NoReturn:
    """Handles a signal: raises KeyboardInterrupt, which Ray passes on, as it does no exception of one's own."""
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Has SIGTERM and SIGHUP raise KeyboardInterrupt, so that what is under way is left in order."""
    with kept():
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` asks for
                signal.signal(number, interrupt)
        yield


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Gives signals the meanings back that they have now, whatever a library makes of them."""
    if threading.current_thread() is not threading.main_thread():  # in others they cannot be changed
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
