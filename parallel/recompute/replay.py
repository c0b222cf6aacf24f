"""Answers that a block's second run takes over from its first: those of collectives, which cost time and need all ranks.

A layer that communicates in forward asks through `once(function, ...)`. Where nothing is recomputed that is `function(...)`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["Tape", "once"]

Answer = TypeVar("Answer")


class Tape:
    """What `once` returned during one call of a block, in order."""

    def __init__(self) -> None:
        self._answers: list[Any] = []
        self._position: int | None = None  # None: recording

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep every answer that this thread gets from `once`."""
        with self._running(None):
            yield

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the kept answers again, from the first on."""
        with self._running(0):
            yield

    @contextlib.contextmanager
    def _running(self, position: int | None) -> Iterator[None]:
        outer = getattr(_thread, "tape", None)
        self._position, _thread.tape = position, self
        try:
            yield
        finally:
            _thread.tape = outer

    def take(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._position is None:
            self._answers.append(function(*arguments))
            return self._answers[-1]
        # Past the end: this run has another course than the first, which the saved tensors will show.
        if self._position == len(self._answers):
            return function(*arguments)
        self._position += 1
        return self._answers[self._position - 1]


_thread = threading.local()  # the tape of the block that this thread runs: backward has threads of its own for each GPU


def once(function: Callable[..., Answer], *arguments: Any) -> Answer:
    """Return `function(*arguments)`; when a block runs again in backward, what that returned in forward.

    The answers are kept from forward to backward, so they should be small, and nothing should change them in place.
    """
    tape: Tape | None = getattr(_thread, "tape", None)
    return function(*arguments) if tape is None else tape.take(function, arguments)
