"""The handle of one operation in flight.

The communicator keeps the operation's tensors alive until it is done, so a Work may be dropped without waiting.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfold.collectives._native import check, core

__all__ = ["Work"]


class Work:
    """One operation that has been issued: `wait()` for it, or ask whether it is `done()`."""

    __slots__ = ("_finish", "_handle", "_tensors")

    def __init__(self, handle: object | None, tensors: tuple[object, ...], finish: Callable[[], None] | None = None) -> None:
        """Wrap a native handle (None: already complete); `finish` runs once, at the end of the first wait."""
        self._handle = handle
        self._tensors = tensors
        self._finish = finish

    def wait(self) -> None:
        """Block until the operation is complete; may be called again.

        Raises:
            CommunicationError: PeerLost, CollectiveTimeout or CollectiveMismatch: what ended the operation. The tensors' contents are undefined.
        """
        if self._handle is not None:
            check(core.wait(self._handle))
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        self._tensors = ()

    def done(self) -> bool:
        """Tell whether `wait` would return at once."""
        return self._handle is None or core.done(self._handle)
