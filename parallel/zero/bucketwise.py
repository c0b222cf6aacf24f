"""BucketwiseStep: an optimizer that steps on one bucket at a time, where it cannot have everything at once.

16-bit gradients   are given to it in the masters' dtype; no more than one bucket of them exists so
offloaded to host  gradients are brought there, the step runs on the host's masters
in a file          what it steps on, and its state, lie in a `ShardFile`: of two rows of memory one is stepped on while the other is written back
                   and read for the bucket after the next

    disk      read 0 | read 1 | write 0 | read 2 | write 1 | read 3 | ...
    step              0        1                  2

An optimizer leaves alone what has no gradient, so its own `step` is called once a bucket, with the pieces of that bucket only. What it counts in
its groups or itself (steps, sums of learning rates) it is made to count once.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from ringfold.parallel.bucket import Bucket
from ringfold.parallel.zero.cuts import Cuts
from ringfold.parallel.zero.optimizer import States
from ringfold.parallel.zero.shard_file import BLOCK_NBYTES, ShardFile, Transfer
from torch import nn
from torch.optim import Optimizer

__all__ = ["BucketwiseStep"]

ROWS = 2


@dataclass(eq=False)
class _Row:
    """What of one bucket lies in a file: `trained` (and `home`, if that is another copy), and vectors of state, each as long as this rank's range."""

    pieces: list[nn.Parameter]
    starts: list[int]  # of the pieces in the vectors
    length: int
    trained: torch.Tensor | None
    home: torch.Tensor | None
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def resting(self) -> list[torch.Tensor]:
        return [vector for vector in (self.trained, self.home, *self.state.values()) if vector is not None]

    @property
    def nbytes(self) -> int:
        return sum(_padded(vector.nbytes) for vector in self.resting)

    def part(self, vector: torch.Tensor, number: int) -> torch.Tensor:
        """Return what of a vector belongs to a piece."""
        return vector[self.starts[number] :][: self.pieces[number].numel()]


class BucketwiseStep:
    """Steps of `optimizer`, whose parameters are the pieces of `cuts`; `states` is what it keeps, for which `file` has to have room.

    Raises:
        ConfigError: it has not.
    """

    def __init__(self, optimizer: Optimizer, cuts: Cuts, file: ShardFile | None, states: States) -> None:
        self._optimizer = optimizer
        self._cuts = cuts
        self._file = file
        self._buckets = [(bucket, [piece for _, piece in mine]) for bucket, mine in cuts.of.items() if bucket.slots[0].parameter.requires_grad]
        self._rows = [] if file is None else [self._row(file, bucket, pieces, states) for bucket, pieces in self._buckets]
        largest = max((row.nbytes for row in self._rows), default=0)
        # mapped, so that it begins on a page
        self._memory = [torch.frombuffer(mmap.mmap(-1, max(largest, 1)), dtype=torch.uint8) for _ in self._rows[:ROWS]]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that buckets pass through."""
        return sum(memory.nbytes for memory in self._memory)

    def settle(self) -> None:
        """Move state that was loaded into the file."""
        if self._file is not None:
            for _ in self._in_memory():
                pass

    def step(self, gradient_of: Callable[[nn.Parameter], torch.Tensor | None]) -> None:
        """Step on what `gradient_of` returns for each piece, in the piece's dtype and on its device; None: the piece is left alone."""
        restore = _counts(self._optimizer)
        for number, pieces in enumerate(self._in_memory()):
            for piece in pieces:
                piece.grad = gradient_of(piece)
            if number:
                restore()
            with self._only(pieces):
                self._optimizer.step()
            for piece in pieces:
                piece.grad = None

    @contextmanager
    def _only(self, pieces: Sequence[nn.Parameter]) -> Iterator[None]:
        chosen = set(map(id, pieces))
        whole = [group["params"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["params"] = [piece for piece in group["params"] if id(piece) in chosen]
        try:
            yield
        finally:
            for group, pieces_of_group in zip(self._optimizer.param_groups, whole, strict=True):
                group["params"] = pieces_of_group

    def _in_memory(self) -> Iterator[list[nn.Parameter]]:
        """Yield the pieces of each bucket while they, and their state, are in memory; masters are rounded back."""
        file = self._file
        if file is None:
            for bucket, pieces in self._buckets:
                yield pieces
                if bucket in self._cuts.masters:
                    self._cuts.homes[bucket].copy_(self._cuts.masters[bucket], non_blocking=True)
            return
        vectors = [self._views(row, self._memory[number % ROWS]) for number, row in enumerate(self._rows)]
        reads: list[list[Transfer]] = [self._read(file, *pair) for pair in zip(self._rows[:ROWS], vectors, strict=False)]
        writes: list[Transfer] = []
        for number, (row, (bucket, pieces)) in enumerate(zip(self._rows, self._buckets, strict=True)):
            for transfer in reads[number]:
                transfer.wait()
            here = dict(zip(map(id, row.resting), vectors[number], strict=True))
            self._bring(row, here)
            yield pieces
            self._adopt(row, here)
            if bucket in self._cuts.masters:
                master, home = self._cuts.masters[bucket], self._cuts.homes[bucket]
                here.get(id(home), home).copy_(here[id(master)])
            writes += [file.store(resting, here[id(resting)]) for resting in row.resting]
            if number + ROWS < len(self._rows):  # the thread reads it after it has written this one
                reads.append(self._read(file, self._rows[number + ROWS], vectors[number + ROWS]))
            self._rest(row)
        for transfer in writes:
            transfer.wait()

    def _row(self, file: ShardFile, bucket: Bucket, pieces: list[nn.Parameter], states: States) -> _Row:
        home = self._cuts.homes[bucket]
        trained = self._cuts.masters.get(bucket, home)
        row = _Row(
            pieces,
            [self._cuts.start(bucket, piece) for piece, _ in self._cuts.of[bucket]],
            home.numel(),
            trained if file.holds(trained) else None,
            home if trained is not home and file.holds(home) else None,
        )
        for piece in pieces:
            for key, dtype in states[id(piece)].items():
                if key not in row.state:
                    row.state[key] = file.new(row.length, dtype)
        return row

    def _read(self, file: ShardFile, row: _Row, vectors: list[torch.Tensor]) -> list[Transfer]:
        return [file.fetch(resting, vector) for resting, vector in zip(row.resting, vectors, strict=True) if resting is not row.home]

    def _views(self, row: _Row, memory: torch.Tensor) -> list[torch.Tensor]:
        views, begin = [], 0
        for resting in row.resting:
            views.append(memory[begin : begin + resting.nbytes].view(resting.dtype))
            begin += _padded(resting.nbytes)
        return views

    def _bring(self, row: _Row, here: Mapping[int, torch.Tensor]) -> None:
        """Point pieces and state at memory; state that lies elsewhere (it was loaded) is copied there."""
        for number, piece in enumerate(row.pieces):
            if row.trained is not None:
                piece.data = row.part(here[id(row.trained)], number)
            state = self._optimizer.state.get(piece, {})
            for key, resting in row.state.items():
                if key in state:
                    there = row.part(here[id(resting)], number)
                    if state[key].data_ptr() != row.part(resting, number).data_ptr():
                        there.copy_(state[key])
                    state[key] = there

    def _adopt(self, row: _Row, here: Mapping[int, torch.Tensor]) -> None:
        """Take over state that the optimizer has made anew."""
        for number, piece in enumerate(row.pieces):
            state = self._optimizer.state.get(piece, {})
            for key, resting in row.state.items():
                if key in state:
                    there = row.part(here[id(resting)], number)
                    if state[key].data_ptr() != there.data_ptr():
                        there.copy_(state[key])

    def _rest(self, row: _Row) -> None:
        """Point pieces and state at the file."""
        for number, piece in enumerate(row.pieces):
            if row.trained is not None:
                piece.data = row.part(row.trained, number)
            state = self._optimizer.state.get(piece, {})
            for key, resting in row.state.items():
                if key in state:
                    state[key] = row.part(resting, number)


def _counts(optimizer: Optimizer) -> Callable[[], None]:
    """Return what gives the options of all groups, and the optimizer's own numbers, the values that they have now."""
    groups = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    numbers = {key: value for key, value in vars(optimizer).items() if isinstance(value, int | float)}

    def restore() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(before))
        vars(optimizer).update(numbers)

    return restore


def _padded(nbytes: int) -> int:
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES
