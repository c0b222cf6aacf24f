"""The handle of one operation in flight.

The communicator keeps the operation's tensors alive until it is done, so a Work may be dropped without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ringfold.collectives._native import Outcome, core

__all__ = ["Work", "Works"]


class Work:
    """One operation that has been issued: `wait()` for it, or ask whether it is `done()`."""

    __slots__ = ("_fail", "_finish", "_handle", "_lock", "_tensors")

    def __init__(
        self,
        handle: object | None = None,
        tensors: Sequence[object] = (),
        fail: Callable[[Outcome], None] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """Wrap a native handle (None: already complete); `fail` raises what an outcome stands for, `finish` runs once, after the first wait."""
        self._handle = handle
        self._tensors = tensors
        self._fail = fail
        self._finish = finish
        self._lock = None if finish is None else threading.Lock()

    def wait(self) -> None:
        """Block until the operation is complete; may be called again.

        Raises:
            CommunicationError: PeerLost, CollectiveTimeout or CollectiveMismatch: what ended the operation. The tensors' contents are undefined.
        """
        if self._handle is not None:
            outcome = core.wait(self._handle)
            if outcome is not None and self._fail is not None:
                self._fail(outcome)
        if self._lock is not None:
            with self._lock:  # whoever waits beside the first returns after it, not before the result is where it belongs
                finish, self._finish = self._finish, None
                if finish is not None:
                    finish()
        self._tensors = ()

    def done(self) -> bool:
        """Tell whether `wait` would return at once."""
        return self._handle is None or core.done(self._handle)

    @property
    def source(self) -> int:
        """The rank at the other end of a message; of a receive from anybody, known when it is done (-1 before, and of what is no message)."""
        return -1 if self._handle is None else core.source(self._handle)


class Works(Work):
    """Several operations as one: complete when all are."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Work], finish: Callable[[], None] | None = None) -> None:
        super().__init__(finish=finish)
        self._parts = parts

    def wait(self) -> None:
        """Block until all are complete; raises what ended the first that failed."""
        for part in self._parts:
            part.wait()
        super().wait()

    def done(self) -> bool:
        """Tell whether `wait` would return at once."""
        return all(part.done() for part in self._parts)
