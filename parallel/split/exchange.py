"""What ranks of an axis tell each other in forward and in backward; every one of these pairs is its own transpose.

               forward                          backward                        of a tensor
    share      nothing                          sum over ranks                  that all have and of which each uses a part
    part       nothing: a rank takes its own    gather                          that all have
    total      sum over ranks                   nothing                         of which each has a term
    whole      gather                           nothing: a rank takes its own   that is split, and all of which each uses alike
    lend       gather                           sum over ranks, its own         that is split, and which each uses for something of its own
    turn       all to all: split elsewhere      all to all: as it was           that is split, for what needs all along that dimension
    first      nothing                          nothing but on rank 0           whose gradient is a sum over ranks, which each uses alike

A tensor that all have has the same gradient on all. The names f and g of Megatron-LM (Shoeybi et al., arXiv:1909.08053) are share and total.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from torch import Tensor

__all__ = ["first", "gathered", "highest", "lend", "part", "share", "total", "turn", "turn_back", "whole"]


def share(tensor: Tensor, axis: Axis) -> Tensor:
    return _exchanged(tensor, _same, _sum, axis) if tensor.requires_grad else tensor


def part(tensor: Tensor, cut: Cut) -> Tensor:
    return _exchanged(tensor, _own, gathered, cut) if tensor.requires_grad else cut.take(tensor)


def total(tensor: Tensor, axis: Axis) -> Tensor:
    return _exchanged(tensor, _sum, _same, axis)  # not in place: selective recomputation keeps the terms


def whole(tensor: Tensor, cut: Cut) -> Tensor:
    return _exchanged(tensor, gathered, _own, cut)


def lend(tensor: Tensor, cut: Cut) -> Tensor:
    return _exchanged(tensor, gathered, _own_of_sum, cut)


def turn(tensor: Tensor, cut: Cut, dim: int) -> Tensor:
    """Return all along the cut's dimension of this rank's share of `dim`, which the ranks divide."""
    return _exchanged(tensor, _turned, _turned_back, (cut, dim))


def turn_back(tensor: Tensor, cut: Cut, dim: int) -> Tensor:
    """Undo `turn`."""
    return _exchanged(tensor, _turned_back, _turned, (cut, dim))


def first(tensor: Tensor, axis: Axis) -> Tensor:
    return _exchanged(tensor, _same, _on_rank_0, axis) if tensor.requires_grad else tensor


def highest(tensor: Tensor, axis: Axis) -> Tensor:
    """Return the elementwise maximum over ranks; it has no gradient."""
    found = tensor.detach().clone(memory_format=torch.contiguous_format)
    axis.comm.all_reduce(found, "max")
    axis.note("all_reduce", found.nbytes)
    return found


def gathered(tensor: Tensor, cut: Cut) -> Tensor:
    """Return the whole of what ranks hold; not for autograd."""
    shapes = [list(tensor.shape) for _ in cut.lengths]
    for shape, length in zip(shapes, cut.lengths, strict=True):
        shape[cut.dim] = cut.outer * length
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = tensor.new_empty(sum(sizes))
    cut.axis.comm.all_gather(flat, tensor.contiguous().view(-1), counts=sizes)
    cut.axis.note("all_gather", flat.nbytes)
    return cut.join([values.view(shape) for values, shape in zip(flat.split(sizes), shapes, strict=True)])


def _same(tensor: Tensor, _: Axis) -> Tensor:
    return tensor


def _on_rank_0(tensor: Tensor, axis: Axis) -> Tensor:
    return tensor if axis.rank == 0 else torch.zeros_like(tensor)


def _own(tensor: Tensor, cut: Cut) -> Tensor:
    return cut.take(tensor).contiguous()


def _own_of_sum(tensor: Tensor, cut: Cut) -> Tensor:
    parts = [cut.take(tensor, rank) for rank in range(cut.axis.size)]
    output = tensor.new_empty(parts[cut.axis.rank].shape)
    vector = torch.cat([values.reshape(-1) for values in parts])
    cut.axis.comm.reduce_scatter(output.view(-1), vector, counts=[values.numel() for values in parts])
    cut.axis.note("reduce_scatter", vector.nbytes)
    return output


def _turned(tensor: Tensor, where: tuple[Cut, int]) -> Tensor:
    cut, dim = where
    blocks = [block.reshape(-1) for block in tensor.chunk(cut.axis.size, dim)]
    shapes = [list(tensor.shape) for _ in blocks]
    for shape, length in zip(shapes, cut.lengths, strict=True):
        shape[dim] //= cut.axis.size
        shape[cut.dim] = cut.outer * length
    received = _all_to_all(blocks, [math.prod(shape) for shape in shapes], cut)
    return cut.join([values.view(shape) for values, shape in zip(received, shapes, strict=True)])


def _turned_back(tensor: Tensor, where: tuple[Cut, int]) -> Tensor:
    cut, dim = where
    parts = [cut.take(tensor, rank) for rank in range(cut.axis.size)]
    mine = parts[cut.axis.rank].shape
    received = _all_to_all([values.reshape(-1) for values in parts], [mine.numel()] * cut.axis.size, cut)
    return torch.cat([values.view(mine) for values in received], dim)


def _all_to_all(sent: list[Tensor], counts: list[int], cut: Cut) -> list[Tensor]:
    received = sent[0].new_empty(sum(counts))
    cut.axis.comm.all_to_all(received, torch.cat(sent), input_counts=[values.numel() for values in sent], output_counts=counts)
    cut.axis.note("all_to_all", received.nbytes)
    return list(received.split(counts))


def _sum(tensor: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks in new memory."""
    found = axis.comm.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if tensor.is_cpu else torch.empty_like(tensor)
    found.copy_(tensor)
    axis.comm.all_reduce(found)
    axis.note("all_reduce", found.nbytes)
    return found


Half = Callable[[Tensor, Any], Tensor]


def _exchanged(tensor: Tensor, forward: Half, backward: Half, where: object) -> Tensor:
    return _Exchange.apply(tensor, forward, backward, where)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """One line of the table above."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Half, backward: Half, where: object) -> Tensor:
        ctx.half, ctx.where = backward, where
        found = forward(tensor, where)
        return found.view_as(found) if found is tensor else found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.half(grad, ctx.where), None, None, None
