"""What a block would keep from forward to backward, and the seconds that it takes to compute it again.

A byte counts once per storage: an activation that two operations save is kept once, and a view keeps all of what it is a view of.
Parameters and buffers do not count, and the arguments of blocks are booked apart: they are kept also where a block is recomputed.
Bytes are those alive at a time, at most: of all calls of a block, and of as many microbatches as were between forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Account", "Arguments", "SavedBytes", "Stopwatch"]

Stopwatch = Callable[[], contextlib.AbstractContextManager[None]]


class SavedBytes:
    """The bytes of tensors that are added, each storage once. Tensors without one storage of their own (sparse ones) do not count."""

    def __init__(self, block: nn.Module, arguments: Iterable[Tensor]) -> None:
        self.nbytes = 0
        # Weak references: the storages may be freed at once, and only with such a reference are their addresses not those of the next.
        self._seen = {StorageWeakRef(t.untyped_storage()) for t in (*block.parameters(), *block.buffers(), *arguments) if _has_storage(t)}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, unless its storage is the block's own, an argument's, or counted already."""
        if _has_storage(tensor):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._seen:
                self._seen.add(reference)
                self.nbytes += storage.nbytes()


class Account:
    """The bytes and seconds of one block."""

    def __init__(self) -> None:
        self.nbytes = 0  # the most that was alive at a time
        self.kept_nbytes = 0  # of these, what its calls kept nevertheless
        self._alive = self._alive_kept = 0
        self._runs: list[list[Callable[[], float]]] = []

    def open(self, nbytes: int, kept_nbytes: int) -> None:
        """Book what a call saved."""
        self._alive += nbytes
        self._alive_kept += kept_nbytes
        self.nbytes = max(self.nbytes, self._alive)
        self.kept_nbytes = max(self.kept_nbytes, self._alive_kept)

    def close(self, nbytes: int, kept_nbytes: int) -> None:
        """Book that backward is done with it."""
        self._alive -= nbytes
        self._alive_kept -= kept_nbytes

    def stopwatch(self, device: torch.device) -> Stopwatch:
        """Return the context in which both runs of one call are to be timed."""
        runs: list[Callable[[], float]] = []
        self._runs.append(runs)
        return functools.partial(_timed, runs, device)

    @property
    def seconds(self) -> float:
        """The seconds of running all calls again, once the GPU is done with them; 0 where backward did not ask for it.

        Of both runs of a call the shorter one counts: the first block of a step and its first second run also pay for what is done once.
        """
        return sum(min(seconds() for seconds in runs) for runs in self._runs if len(runs) > 1)


@contextlib.contextmanager
def _timed(runs: list[Callable[[], float]], device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        try:
            yield
        finally:
            ended.record()

            def seconds() -> float:
                ended.synchronize()
                return float(began.elapsed_time(ended)) / 1e3

            runs.append(seconds)
    else:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            runs.append(lambda: elapsed)


class Arguments:
    """The arguments of all blocks: a storage that several blocks are given (a mask, the positions) is kept once."""

    def __init__(self) -> None:
        self.nbytes = 0  # the most that was alive at a time
        self._alive = 0
        self._holders: Counter[StorageWeakRef] = Counter()

    def open(self, tensors: Iterable[Tensor]) -> list[tuple[StorageWeakRef, int]]:
        """Book the arguments of a call, which holds them until it is closed with what this returns."""
        held = {StorageWeakRef(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors if _has_storage(t)}
        for reference, nbytes in held.items():
            self._alive += 0 if self._holders[reference] else nbytes
            self._holders[reference] += 1
        self.nbytes = max(self.nbytes, self._alive)
        return list(held.items())

    def close(self, held: list[tuple[StorageWeakRef, int]]) -> None:
        """Book that a call has let go of its arguments."""
        for reference, nbytes in held:
            self._holders[reference] -= 1
            if not self._holders[reference]:
                del self._holders[reference]
                self._alive -= nbytes


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided
