"""Ring attention: every rank has a part of the sequence; keys and values go round (Liu et al., arXiv:2310.01889).

    step 0      1      2             each rank's queries meet the keys of one rank a step, while those of the next are on their way;
    0:   0      2      1             in backward the gradients of keys and values go round with them, and end at home
    1:   1      0      2
    2:   2      1      0

A part is one or more runs of the sequence. Under a causal mask a run sees those before it and itself up to the diagonal; so with runs in zigzag order
(rank r has the r-th and the r-th last of 2n) all ranks have the same to do in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ringfold.collectives.work import Work
from ringfold.parallel.context.partial_attention import attend, attend_backward, merged
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from torch import Tensor

__all__ = ["ring_attention", "zigzag"]


def zigzag(axis: Axis, dim: int, length: int) -> Cut:
    """Return the cut of a sequence in which every rank has as much to do under a causal mask; `length` is at least twice the ranks."""
    chunks = 2 * axis.size
    bounds = [k * (length // chunks) + min(k, length % chunks) for k in range(chunks + 1)]
    runs = [(bounds[k], bounds[k + 1]) for k in range(chunks)]
    return Cut(axis, dim, 1, length, tuple((runs[r], runs[-1 - r]) for r in range(axis.size)))


def ring_attention(query: Tensor, key: Tensor, value: Tensor, cut: Cut, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Return attention of this rank's queries to all keys, [B, H, t, E]; each rank gives its part of the sequence by `cut`.

    mask: of all queries and keys, with lengths of 1 where it is repeated; it gets no gradient.
    """
    return _RingAttention.apply(query, key, value, cut, mask, is_causal, scale)  # type: ignore[no-any-return]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: Cut, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        meetings = _Meetings(cut, mask, is_causal)
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in meetings.queries]
        for source, (keys, values) in _round(cut.axis, cut, (key, value)):
            for number, queries, seen, of_mask, diagonal in meetings.with_keys_of(source):
                parts[number].append(attend(query[:, :, queries], keys[:, :, seen], values[:, :, seen], of_mask, diagonal, scale))
                parts[number] = [merged(parts[number])]
        outs, lses = zip(*(of_run[0] for of_run in parts), strict=True)
        out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.cut, ctx.meetings, ctx.scale = cut, meetings, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        cut: Cut = ctx.cut
        axis = cut.axis
        of_query = torch.zeros_like(query)
        travelling: tuple[Tensor, ...] = ()
        for step, (source, (keys, values)) in enumerate(_round(axis, cut, (key, value))):
            if step:
                travelling = _pass_on(axis, travelling, _lengths_of(source, cut, (key, value)))
            else:
                travelling = (torch.zeros_like(keys), torch.zeros_like(values))
            of_keys, of_values = travelling
            for _, queries, seen, of_mask, diagonal in ctx.meetings.with_keys_of(source):
                of_run = out[:, :, queries], lse[:, :, queries], of_mask, diagonal, ctx.scale
                found = attend_backward(grad[:, :, queries], query[:, :, queries], keys[:, :, seen], values[:, :, seen], *of_run)
                of_query[:, :, queries] += found[0]
                of_keys[:, :, seen] += found[1]
                of_values[:, :, seen] += found[2]
        if axis.size > 1:
            travelling = _pass_on(axis, travelling, [each.shape for each in (key, value)])
        return of_query, *travelling, None, None, None, None


class _Meetings:
    """Which queries of this rank see which keys of another, by the runs of both."""

    def __init__(self, cut: Cut, mask: Tensor | None, is_causal: bool) -> None:
        self._cut = cut
        self._mask = mask
        self._is_causal = is_causal
        self.queries = list(_places(cut, cut.axis.rank))

    def with_keys_of(self, source: int) -> Iterator[tuple[int, slice, slice, Tensor | None, bool]]:
        """Yield (number of the query's run, queries, keys, mask, whether only up to the diagonal); runs that follow each other are one."""
        for number, (queries, (start, stop)) in enumerate(self.queries):
            before: list[tuple[slice, tuple[int, int]]] = []
            for keys, run in _places(self._cut, source):
                if self._is_causal and run == (start, stop):
                    yield number, queries, keys, self._of((start, stop), [run]), True
                elif not self._is_causal or run[1] <= start:
                    before.append((keys, run))
            if before:
                seen = slice(before[0][0].start, before[-1][0].stop)
                if sum(keys.stop - keys.start for keys, _ in before) == seen.stop - seen.start:
                    yield number, queries, seen, self._of((start, stop), [run for _, run in before]), False
                else:
                    for keys, run in before:
                        yield number, queries, keys, self._of((start, stop), [run]), False

    def _of(self, queries: tuple[int, int], keys: list[tuple[int, int]]) -> Tensor | None:
        if self._mask is None:
            return None
        mask = self._mask if self._mask.shape[-2] == 1 else self._mask[..., queries[0] : queries[1], :]
        return mask if mask.shape[-1] == 1 else torch.cat([mask[..., start:stop] for start, stop in keys], -1)


def _places(cut: Cut, rank: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Yield where each run of a rank lies in its part, and the run."""
    begin = 0
    for start, stop in cut.runs[rank]:
        yield slice(begin, begin + stop - start), (start, stop)
        begin += stop - start


def _round(axis: Axis, cut: Cut, mine: tuple[Tensor, Tensor]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (rank, its tensors) for every rank, beginning with this one; the next ones travel while these are used."""
    here: tuple[Tensor, ...] = tuple(each.contiguous() for each in mine)
    for step in range(axis.size):
        source = (axis.rank - step) % axis.size
        if step == axis.size - 1:
            yield source, here
            return
        following = tuple(each.new_empty(shape) for each, shape in zip(here, _lengths_of((source - 1) % axis.size, cut, mine), strict=True))
        work = _exchange(axis, here, following)
        yield source, here
        if work is not None:
            work.wait()
        here = following


def _pass_on(axis: Axis, sent: tuple[Tensor, ...], shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    received = tuple(each.new_empty(shape) for each, shape in zip(sent, shapes, strict=True))
    work = _exchange(axis, sent, received, tag=2)
    if work is not None:
        work.wait()
    return received


def _exchange(axis: Axis, sent: tuple[Tensor, ...], received: tuple[Tensor, ...], tag: int = 0) -> Work | None:
    axis.note("send", sum(each.nbytes for each in sent))
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sends = [(each, after, tag + number) for number, each in enumerate(sent)]
    return axis.comm.exchange(sends, [(each, before, tag + number) for number, each in enumerate(received)], async_op=True)


def _lengths_of(rank: int, cut: Cut, mine: tuple[Tensor, Tensor]) -> list[torch.Size]:
    """Return the shapes of another rank's keys and values."""
    return [torch.Size((*each.shape[:2], cut.lengths[rank], *each.shape[3:])) for each in mine]
