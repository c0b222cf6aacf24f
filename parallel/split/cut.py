"""Cut: how one dimension of a tensor is divided among the ranks of one axis.

A dimension is `outer` repetitions of a period, and each rank holds the same runs of every one:

    fused qkv, C each, over 2 ranks      outer 3, period C      rank 0: (0, C/2)        rank 1: (C/2, C)
    (B, T) flattened, T over 2 ranks     outer B, period T      rank 0: (0, T/2)        rank 1: (T/2, T)
    T in zigzag order over 2 ranks       outer 1, period T      rank 0: (0, T/4) (3T/4, T)  rank 1: (T/4, 3T/4)

`regroup` follows a cut through a change of shape. This is where a view of features as heads, or of rows and tokens as one, is understood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from ringfold.parallel.split.axis import Axis
from torch import Tensor

__all__ = ["Cut", "Runs", "regroup", "with_length"]

SOME = 1_000_003  # a prime that no shape has

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """The cut of dimension `dim` over `axis`; `runs` are those of each rank, and together they are all of [0, period)."""

    axis: Axis
    dim: int
    outer: int
    period: int
    runs: tuple[Runs, ...]

    @classmethod
    def evenly(cls, axis: Axis, dim: int, length: int) -> Cut:
        """Return a cut into one run a rank; the first ranks get one more where `length` is no multiple."""
        bounds = [rank * (length // axis.size) + min(rank, length % axis.size) for rank in range(axis.size + 1)]
        return cls(axis, dim, 1, length, tuple(((start, stop),) for start, stop in itertools.pairwise(bounds)))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """What each rank holds of a period."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @property
    def length(self) -> int:
        """The length of the whole dimension."""
        return self.outer * self.period

    @property
    def local_length(self) -> int:
        """The length that this rank holds."""
        return self.outer * self.lengths[self.axis.rank]

    def at(self, dim: int) -> Cut:
        """Return the same cut of another dimension."""
        return self if dim == self.dim else replace(self, dim=dim)

    def matches(self, other: Cut) -> bool:
        """Tell whether ranks hold the same indices of a dimension by both."""
        return self is other or (self.axis is other.axis and (self.outer, self.period, self.runs) == (other.outer, other.period, other.runs))

    def take(self, whole: Tensor, rank: int | None = None) -> Tensor:
        """Return what a rank, this one by default, holds of a tensor; a view where that is one run."""
        runs = self.runs[self.axis.rank if rank is None else rank]
        if not runs or (self.outer == 1 and len(runs) == 1):
            start, stop = runs[0] if runs else (0, 0)
            return whole.narrow(self.dim, start, stop - start)
        periods = whole.unflatten(self.dim, (self.outer, self.period))
        parts = [periods.narrow(self.dim + 1, start, stop - start) for start, stop in runs]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole of what all ranks hold, the inverse of `take`."""
        if self.outer == 1 and self._is_in_order:
            return torch.cat(list(parts), self.dim)
        pieces = []  # (where it begins, values)
        for runs, length, part in zip(self.runs, self.lengths, parts, strict=True):
            begin, periods = 0, part.unflatten(self.dim, (self.outer, length)) if part.shape[self.dim] else None
            for start, stop in runs:
                if periods is not None:
                    pieces.append((start, periods.narrow(self.dim + 1, begin, stop - start)))
                begin += stop - start
        ordered = [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
        return torch.cat(ordered, self.dim + 1).flatten(self.dim, self.dim + 1)

    def within(self, start: int, stop: int) -> tuple[Cut, int] | None:
        """Return the cut of the range [start, stop) of the dimension, and where this rank's share of it begins in what it holds.

        None if a rank's share is not one range there, or if shares are not equal: such a range is better held whole.
        """
        runs, begins = [], []
        for of_rank in self.runs:
            position, found = 0, []
            for a, b in ((a + k * self.period, b + k * self.period) for k in range(self.outer) for a, b in of_rank):
                low, high = max(a, start), min(b, stop)
                if low < high:
                    found.append((position + low - a, low, high))
                position += b - a
            held = sum(high - low for _, low, high in found)
            if not found or found[-1][0] + found[-1][2] - found[-1][1] - found[0][0] != held:
                return None
            begins.append(found[0][0])
            runs.append(tuple((low - start, high - start) for _, low, high in found))
        lengths = [sum(b - a for a, b in of_rank) for of_rank in runs]
        if max(lengths) - min(lengths) > 1:
            return None
        part = Cut(self.axis, self.dim, 1, stop - start, tuple(runs))
        periods = (stop - start) // self.period
        return part.folded(periods) or part, begins[self.axis.rank]

    def folded(self, times: int) -> Cut | None:
        """Return the cut with a period that is so many times shorter, and None if runs do not repeat that often."""
        if times == 1:
            return self
        if times < 1 or self.period % times:
            return None
        short = self.period // times
        runs = []
        for of_rank in self.runs:
            first = tuple((a, b) for a, b in of_rank if b <= short)
            if _merged([(a + k * short, b + k * short) for k in range(times) for a, b in first]) != _merged(of_rank):
                return None
            runs.append(first)
        return Cut(self.axis, self.dim, self.outer * times, short, tuple(runs))

    def coarser(self, unit: int) -> Cut | None:
        """Return the cut counted in units of so many indices, and None if one is divided."""
        if unit == 1:
            return self
        if self.period % unit or any(a % unit or b % unit for of_rank in self.runs for a, b in of_rank):
            return None
        runs = tuple(tuple((a // unit, b // unit) for a, b in of_rank) for of_rank in self.runs)
        return Cut(self.axis, self.dim, self.outer, self.period // unit, runs)

    @cached_property
    def _is_in_order(self) -> bool:
        flat = [run for of_rank in self.runs for run in of_rank]
        return all(one[1] == following[0] for one, following in itertools.pairwise(flat))


def with_length(shape: Sequence[int], cuts: Sequence[Cut]) -> list[int]:
    """Return the shape of what this rank holds of a tensor of `shape`."""
    local = list(shape)
    for cut in cuts:
        local[cut.dim] = cut.local_length
    return local


def regroup(cut: Cut, before: Sequence[int], after: Sequence[int]) -> Cut | None:
    """Return the cut of a tensor of shape `before` once it is viewed in shape `after`; None if no dimension of that is cut."""
    if 0 in before:
        return _regroup_nothing(cut, list(before), list(after))
    for olds, news in _groups(before, after):
        if cut.dim in olds:
            return _through(cut, [before[d] for d in olds], cut.dim - olds[0], [after[d] for d in news], news)
    return None


def _regroup_nothing(cut: Cut, before: list[int], after: list[int]) -> Cut | None:
    """Follow the cut of a tensor without elements, as if there were `SOME` rows where there are none."""
    if before.count(0) != 1 or after.count(0) != 1:
        return None
    place = after.index(0)
    after[place] = 1
    rows = SOME * math.prod(after)  # whatever they are made of there
    if not cut.outer:
        cut = replace(cut, outer=rows)
    before[before.index(0)] = rows * cut.period if before[cut.dim] == 0 else rows
    after[place] = math.prod(before) // math.prod(after)
    found = regroup(cut, before, after) if math.prod(before) == math.prod(after) else None
    return found if found is None or found.outer % SOME else replace(found, outer=0)


def _through(cut: Cut, olds: Sequence[int], place: int, lengths: Sequence[int], news: Sequence[int]) -> Cut | None:
    """Flatten a group of dimensions, in which the cut one stands at `place`, and look for the new one that takes the cut up."""
    inner = math.prod(olds[place + 1 :])
    runs = tuple(tuple((a * inner, b * inner) for a, b in of_rank) for of_rank in cut.runs)
    flat = Cut(cut.axis, 0, math.prod(olds[:place]) * cut.outer, cut.period * inner, runs)
    ahead = 1
    for dim, length in zip(news, lengths, strict=True):
        folded = flat.folded(ahead // math.gcd(ahead, flat.outer))
        if folded is not None and folded.outer % ahead == 0 and length % (folded.outer // ahead) == 0:
            behind = folded.period * (folded.outer // ahead) // length if length else 0
            if behind and (found := folded.coarser(behind)) is not None and found.period > 1:
                return Cut(cut.axis, dim, folded.outer // ahead, found.period, found.runs)
        ahead *= length
    return None


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (dimensions before, dimensions after) that are made of each other, the smallest such groups; lengths of 1 belong to any."""
    i = j = 0
    while i < len(before) or j < len(after):
        olds: list[int] = []
        news: list[int] = []
        old = new = 1
        while True:
            if old == new and olds and news and old > 1:
                break
            if old <= new and i < len(before):
                old *= before[i]
                olds.append(i)
                i += 1
            elif j < len(after):
                new *= after[j]
                news.append(j)
                j += 1
            elif i < len(before):
                old *= before[i]
                olds.append(i)
                i += 1
            else:
                break
        yield olds, news


def _merged(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for a, b in sorted(runs):
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return found
