"""Boxes: what two ranges of local tensors have in common, as views of both.

A range of a flattened tensor is a few slabs, each whole rows of some dimension; a local tensor is a few blocks of the whole one (placement.py).
Where a slab meets a block is a box: slices of the whole tensor, and slices of the range's own memory.

    (4, 3), elements 2 to 10     . . a      the end of row 0, rows 1 and 2, the beginning of row 3
                                 b b b
                                 b b b
                                 c . .

So values go from any range of any placement to any other by copies of views: no index of each element, and no tensor in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from ringfold.parallel.placement import Local, Slices


class Box(NamedTuple):
    """A box of the whole tensor; its values are `of_slab` of those of a range that begin at element `begins` of it and have `shape`."""

    of_whole: Slices
    begins: int
    shape: tuple[int, ...]
    of_slab: Slices

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(one.stop - one.start for one in self.of_whole)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this box of the range's values."""
        return flat[self.begins : self.begins + prod(self.shape)].view(self.shape)[self.of_slab]

    def within(self, of_whole: Slices) -> Box:
        """Return the part of this box that is those slices of the whole tensor."""
        return self._replace(of_whole=of_whole, of_slab=_moved(of_whole, self.of_whole, self.of_slab))


def boxes(local: Local, start: int, stop: int) -> list[Box]:
    """Return what elements `start` to `stop` of a flattened local tensor are of the whole one."""
    found, begins, blocks = [], 0, list(local.blocks())
    for slab in _slabs(local.shape, start, stop):
        shape = tuple(one.stop - one.start for one in slab)
        for of_whole, of_local in blocks:
            if (met := _common(slab, of_local)) is not None:
                found.append(Box(_moved(met, of_local, of_whole), begins, shape, _moved(met, slab, tuple(map(slice, [0] * len(slab), shape)))))
        begins += prod(shape)
    return found


def overlaps(ours: list[Box], theirs: list[Box]) -> Iterator[tuple[Box, Box]]:
    """Yield, for all that two ranges of one tensor have in common, the box of each."""
    for mine in ours:
        for other in theirs:
            if (both := _common(mine.of_whole, other.of_whole)) is not None:
                yield mine.within(both), other.within(both)


def _slabs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Slices]:
    """Yield the elements `start` to `stop` of a flattened tensor as slices of it, in order, each of which lies in one stretch of memory."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    length = prod(shape[1:])
    first, last = -(-start // length), stop // length
    if first > last:  # inside of one row
        yield from _of_row(shape, last, start - last * length, stop - last * length)
        return
    yield from _of_row(shape, first - 1, start - (first - 1) * length, length)
    if first < last:
        yield slice(first, last), *(slice(0, other) for other in shape[1:])
    yield from _of_row(shape, last, 0, stop - last * length)


def _of_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Slices]:
    return ((slice(row, row + 1), *slab) for slab in _slabs(shape[1:], start, stop))


def _common(ours: Slices, theirs: Slices) -> Slices | None:
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(ours, theirs, strict=True))
    return both if all(one.start < one.stop for one in both) else None


def _moved(slices: Slices, origin: Slices, to: Slices) -> Slices:
    """Return slices that lie in `to` as the given ones lie in `origin`."""
    return tuple(slice(one.start - a.start + b.start, one.stop - a.start + b.start) for one, a, b in zip(slices, origin, to, strict=True))
