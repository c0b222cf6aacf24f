"""Making one rank's outcome everybody's: a checkpoint is saved for all or for none, and an error is raised on every rank.

It moves an outcome as small JSON-like values; the state itself never goes through here. Writing and reading take as long as disks do, on
each rank a different time, and a collective has a deadline: so ranks that are done meet those that are not twice a second, and the
deadline only ends what no longer answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from ringfold.collectives import errors

T = TypeVar("T")
_MEET_S = 0.5


class Ranks(Protocol):
    """What a checkpoint needs of a Communicator."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def broadcast_object(self, value: Any, src: int = 0) -> Any: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def gather_object(self, value: Any, dst: int = 0) -> list[Any] | None: ...
    def subgroup(self, ranks: Sequence[int], name: str) -> Ranks: ...
    def close(self) -> None: ...


class _Attempt:
    """An operation in a thread of its own, with what came of it."""

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._operation = operation
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._operation()
        except BaseException as error:
            self.error = error

    def is_done_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


def on_rank_0(comm: Ranks | None, operation: Callable[[], T]) -> T:
    """Run `operation` on rank 0, while the others wait, and return its (small) result on all; its error is raised on all."""
    if comm is None or comm.size == 1:
        return operation()
    result = on_all_ranks(comm, operation if comm.rank == 0 else lambda: None)
    return comm.broadcast_object(result)  # type: ignore[no-any-return]


def on_all_ranks(comm: Ranks | None, operation: Callable[[], T]) -> T:
    """Run `operation` on every rank and return its own result on each; if it failed on any, all of them raise.

    It runs in another thread, so whatever of torch is a thread's own (default device, current stream) is not the caller's.
    """
    if comm is None or comm.size == 1:
        return operation()
    attempt = _Attempt(operation)
    try:
        while not all(comm.all_gather_object(attempt.is_done_within(_MEET_S))):
            pass
    except BaseException:
        attempt.wait()  # nothing goes on behind the caller's back
        raise
    failures = comm.all_gather_object(None if attempt.error is None else [type(attempt.error).__name__, str(attempt.error)])
    if attempt.error is not None:
        raise attempt.error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise _rebuilt(failure, rank)
    return attempt.result  # type: ignore[no-any-return]


def _rebuilt(failure: list[str], rank: int) -> errors.RingfoldError:
    name, message = failure
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if isinstance(kind, type) and issubclass(kind, errors.RingfoldError):
        return kind(f"on rank {rank}: {message}")
    return errors.CheckpointError(f"on rank {rank}: {name}: {message}")
