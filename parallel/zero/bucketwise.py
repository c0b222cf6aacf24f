"""BucketwiseStep: an optimizer that steps on one bucket at a time, where it cannot have everything at once.

16-bit gradients   are given to it in the masters' dtype; no more than one bucket of them exists so
offloaded to host  gradients are brought there, the step runs on the host's masters
in a file          what it steps on, and its state, lie in a `ShardFile`, and pass a part of a bucket at a time through two rows of memory: one is
                   stepped on while the other is written back and read for the part after the next

    disk      read 0 | read 1 | write 0 | read 2 | write 1 | read 3 | ...
    step              0        1                  2

An optimizer leaves alone what has no gradient, so its own `step` is called once a bucket, with the pieces of that bucket only. What it counts in
its groups or itself (steps, sums of learning rates) it is made to count once.
"""

from __future__ import annotations

import copy
import itertools
import mmap
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from ringfold.parallel.bucket import Bucket
from ringfold.parallel.zero.cuts import Cuts
from ringfold.parallel.zero.optimizer import States
from ringfold.parallel.zero.shard_file import BLOCK_NBYTES, ShardFile, Transfer
from torch import nn
from torch.optim import Optimizer

__all__ = ["BucketwiseStep"]

ROWS = 2
ROW_NUMEL = 2 << 20  # of each vector in a row; a larger piece is a row of its own


@dataclass(eq=False)
class _Row:
    """Pieces that lie one after the other in a bucket, and their range of each vector: what is trained, its home if that is another, state."""

    bucket: Bucket
    pieces: list[nn.Parameter]
    starts: list[int]  # of the pieces in the vectors
    trained: torch.Tensor
    home: torch.Tensor | None
    state: dict[str, torch.Tensor]
    resting: list[torch.Tensor]  # those of the vectors that lie in the file

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
        self.is_halfway = False  # whether a step runs, or has failed, that has changed a part
        buckets = [bucket for bucket in cuts.of if bucket.slots[0].parameter.requires_grad]
        self._rows = [row for bucket in buckets for row in self._cut(bucket, states)]
        largest = max((row.nbytes for row in self._rows), default=0)
        # mapped, so that it begins on a page
        self._memory = [torch.frombuffer(mmap.mmap(-1, largest), dtype=torch.uint8) for _ in self._rows[:ROWS]] if largest else []

    @property
    def nbytes(self) -> int:
        """Bytes of memory that buckets pass through."""
        return sum(memory.nbytes for memory in self._memory)

    def settle(self) -> None:
        """Move state that was loaded into the file; a step that failed is over."""
        for _ in self._in_memory() if self._file is not None else ():
            pass
        self.is_halfway = False

    def step(self, gradient_of: Callable[[nn.Parameter], torch.Tensor | None], pass_gate: Callable[[Bucket], None] = lambda _: None) -> None:
        """Step on what `gradient_of` returns for each piece, in the piece's dtype and on its device; None: the piece is left alone.

        pass_gate: returns when the pieces of a bucket may be stepped on.
        """
        restore = _counts(self._optimizer)
        with closing(self._in_memory(pass_gate)) as rows:
            for number, pieces in enumerate(rows):
                for piece in pieces:
                    piece.grad = gradient_of(piece)
                if number:
                    restore()
                self.is_halfway = True
                with self._only(pieces):
                    self._optimizer.step()
                for piece in pieces:
                    piece.grad = None
        self.is_halfway = False

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

    def _in_memory(self, pass_gate: Callable[[Bucket], None] = lambda _: None) -> Generator[list[nn.Parameter]]:
        """Yield the pieces of each row while they, and their state, are in memory; masters are rounded back. It ends with no transfer under way."""
        file = self._file if self._memory else None  # it may have nothing to keep
        vectors = [self._views(row, self._memory[number % ROWS]) for number, row in enumerate(self._rows)] if self._memory else []
        reads = [self._read(file, *pair) for pair in zip(self._rows[:ROWS], vectors, strict=False)] if file is not None else []
        writes: list[Transfer] = []
        try:
            for number, row in enumerate(self._rows):
                pass_gate(row.bucket)
                here: dict[int, torch.Tensor] = {}
                if file is not None:
                    for transfer in reads[number]:
                        transfer.wait()
                    here = dict(zip(map(id, row.resting), vectors[number], strict=True))
                    self._bring(row, here)
                yield row.pieces
                self._adopt(row, here)
                if row.home is not None:
                    here.get(id(row.home), row.home).copy_(here.get(id(row.trained), row.trained), non_blocking=True)
                if file is not None:
                    writes += [file.store(resting, here[id(resting)]) for resting in row.resting]
                    if number + ROWS < len(self._rows):  # the thread reads it after it has written this one
                        reads.append(self._read(file, self._rows[number + ROWS], vectors[number + ROWS]))
                    self._rest(row)
        finally:
            for transfer in itertools.chain(writes, *reads):
                transfer.wait()

    def _cut(self, bucket: Bucket, states: States) -> Iterator[_Row]:
        """Cut what this rank has of a bucket into rows; where nothing lies in a file that is one row."""
        file, home = self._file, self._cuts.homes[bucket]
        trained = self._cuts.masters.get(bucket, home)
        mine = [(self._cuts.start(bucket, piece), parameter) for piece, parameter in self._cuts.of[bucket]]
        kinds = {key: dtype for _, parameter in mine for key, dtype in states[id(parameter)].items()}
        state = {} if file is None else {key: file.new(home.numel(), dtype) for key, dtype in kinds.items()}
        while mine:
            begin = mine[0][0]
            count = 1 + sum(start + p.numel() - begin <= ROW_NUMEL for start, p in mine[1:]) if file is not None else len(mine)
            taken, mine = mine[:count], mine[count:]
            end = taken[-1][0] + taken[-1][1].numel()
            of_row = {key: vector[begin:end] for key, vector in state.items()}
            row_trained, row_home = trained[begin:end], home[begin:end] if trained is not home else None
            vectors = [row_trained, *([] if row_home is None else [row_home]), *of_row.values()]
            resting = [] if file is None else [vector for vector in vectors if file.holds(vector)]
            yield _Row(bucket, [p for _, p in taken], [start - begin for start, _ in taken], row_trained, row_home, of_row, resting)

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
            if id(row.trained) in here:
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
