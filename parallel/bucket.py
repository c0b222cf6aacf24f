"""Bucket: where the elements of a group of parameters lie in one flat vector, and which range of it each rank owns.

    | p9      | p8   | ... |      each begins at a multiple of 64 elements; the length is a multiple of 64 x ranks
    | rank 0  | rank 1     |      so ranges cut parameters at multiples of 64 elements

Parameters are taken in reverse order of their index, which is roughly the order in which backward finishes them, and never in the order
in which hooks fire: that changes under torch.compile, and must be the same on all ranks. A bucket holds one dtype, on one device.

Why 64 elements: a multiple of every vector register and cache line. torch's fused optimizers treat elements in whole registers and what is
left at the end of a tensor one by one, which rounds otherwise; cut at such places a parameter has the same tail, and gets the same bits,
whoever owns it (tests/parallel/test_zero_optimizer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ALIGNMENT", "Bucket", "DtypeOf", "Group", "Piece", "Slot", "own_dtype", "partition"]

Group = Sequence[tuple[str, nn.Parameter]]
DtypeOf = Callable[[str, nn.Parameter], torch.dtype]

ALIGNMENT = 64  # elements


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The place of one parameter in a bucket; elements lie in the order in which they lie in the parameter's own memory."""

    name: str
    parameter: nn.Parameter
    position: int  # among the slots of the bucket
    start: int  # of its elements in the bucket
    shape: torch.Size
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the part of a vector as long as the bucket, seen as the parameter."""
        return flat[self.start : self.start + self.numel].as_strided(self.shape, self.strides)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The elements `start` to `stop` of a parameter, in memory order: what of it lies in one rank's range of a bucket."""

    slot: Slot
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the piece's elements, of a vector as long as the bucket."""
        return flat[self.slot.start + self.start : self.slot.start + self.stop]


class Bucket:
    """The layout of a group of parameters of one dtype, in a vector of `numel` elements that `ranks` divides into equal ranges."""

    def __init__(
        self,
        group: Group,
        ranks: int = 1,
        unlike: Collection[Bucket] = (),
        dtype: torch.dtype | None = None,
        alignment: int = ALIGNMENT,
        device: torch.device | None = None,
    ) -> None:
        """Lay out a group; its length will be that of none of `unlike`, its elements of `dtype` on `device` if those are not the parameters' own.

        alignment: where parameters and ranges begin, in elements; a multiple of 64.
        """
        self.dtype, self.device = dtype or group[0][1].dtype, device or group[0][1].device
        self.ranks = ranks
        self.slots: list[Slot] = []
        end = 0
        for position, (name, parameter) in enumerate(group):
            self.slots.append(Slot(name, parameter, position, end, parameter.shape, _strides(parameter)))
            end += _aligned(parameter.numel(), alignment)
        step, taken = alignment * ranks, {other.numel for other in unlike}
        self.numel: int = max(1, -(-end // step)) * step
        while self.numel in taken:
            self.numel += step

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def range(self, rank: int) -> slice:
        """Return the range of the vector that a rank owns."""
        length = self.numel // self.ranks
        return slice(rank * length, (rank + 1) * length)

    def pieces(self, rank: int) -> Iterator[Piece]:
        """Yield what a rank owns of each parameter, where that is anything."""
        mine = self.range(rank)
        for slot in self.slots:
            start, stop = max(mine.start - slot.start, 0), min(mine.stop - slot.start, slot.numel)
            if start < stop:
                yield Piece(slot, start, stop)


def own_dtype(name: str, parameter: nn.Parameter) -> torch.dtype:  # noqa: ARG001  what a policy is asked
    """Return the dtype that a parameter has."""
    return parameter.dtype


def partition(
    named: Group,
    limit_nbytes: int,
    *,
    first_nbytes: int | None = None,
    ranks: int = 1,
    dtype_of: DtypeOf = own_dtype,
    alignment: int = ALIGNMENT,
) -> list[Bucket]:
    """Group parameters, last one first, by dtype and device, into buckets of at most `limit_nbytes`; a larger parameter has its own.

    The first bucket holds at most `first_nbytes`. dtype_of(name, parameter) is the dtype of its elements in the bucket.
    """
    closed: list[tuple[torch.dtype, list[tuple[str, nn.Parameter]]]] = []
    filling: dict[tuple[torch.dtype, torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
    filled_nbytes: dict[tuple[torch.dtype, torch.dtype, torch.device], int] = {}
    for name, parameter in reversed(named):
        dtype = dtype_of(name, parameter)
        kind, nbytes = (dtype, parameter.dtype, parameter.device), _aligned(parameter.numel(), alignment) * dtype.itemsize
        limit = limit_nbytes if closed or first_nbytes is None else min(limit_nbytes, first_nbytes)
        if kind in filling and filled_nbytes[kind] + nbytes > limit:
            closed.append((dtype, filling.pop(kind)))
        if kind not in filling:
            filling[kind], filled_nbytes[kind] = [], 0
        filling[kind].append((name, parameter))
        filled_nbytes[kind] += nbytes
    closed += [(dtype, group) for (dtype, _, _), group in filling.items()]
    return [Bucket(group, ranks, dtype=dtype, alignment=alignment) for dtype, group in closed]


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _strides(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the parameter's own strides if it fills its memory without gaps (channels_last, transposed), else contiguous ones.

    Autograd and the fused optimizers are fast only when a gradient is laid out like its parameter.
    """
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1 and stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()
