"""Making one rank's outcome everybody's: a checkpoint is saved for all or for none, and an error is raised on every rank.

It moves an outcome as small JSON-like values; the state itself never goes through here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ringfold.collectives import errors

T = TypeVar("T")


class Ranks(Protocol):
    """What a checkpoint needs of a Communicator."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def broadcast_object(self, obj: Any, src: int = 0) -> Any: ...
    def all_gather_object(self, obj: Any) -> list[Any]: ...


def on_rank_0(comm: Ranks | None, operation: Callable[[], T]) -> T:
    """Run `operation` on rank 0, while the others wait, and return its (small) result on all; its error is raised on all."""
    if comm is None or comm.size == 1:
        return operation()
    if comm.rank != 0:
        failure, result = comm.broadcast_object(None)
        if failure is not None:
            raise _rebuilt(failure, 0)
        return result  # type: ignore[no-any-return]
    try:
        result = operation()
    except Exception as error:
        comm.broadcast_object([_described(error), None])
        raise
    comm.broadcast_object([None, result])
    return result


def on_all_ranks(comm: Ranks | None, operation: Callable[[], T]) -> T:
    """Run `operation` on every rank and return its own result on each; if it failed on any, all of them raise."""
    if comm is None or comm.size == 1:
        return operation()
    try:
        result = operation()
    except Exception as error:
        comm.all_gather_object(_described(error))
        raise
    for rank, failure in enumerate(comm.all_gather_object(None)):
        if failure is not None:
            raise _rebuilt(failure, rank)
    return result


def _described(error: Exception) -> list[str]:
    return [type(error).__name__, str(error)]


def _rebuilt(failure: list[str], rank: int) -> errors.RingfoldError:
    name, message = failure
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if isinstance(kind, type) and issubclass(kind, errors.RingfoldError):
        return kind(f"on rank {rank}: {message}")
    return errors.CheckpointError(f"on rank {rank}: {name}: {message}")
