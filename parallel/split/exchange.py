"""What ranks of an axis tell each other in forward and in backward; every one of these pairs is its own transpose.

               forward                          backward                        of a tensor
    share      nothing                          sum over ranks                  that all have and of which each uses a part
    part       nothing: a rank takes its own    gather                          that all have
    total      sum over ranks                   nothing                         of which each has a term
    whole      gather                           nothing: a rank takes its own   that is split, and all of which each uses alike
    lend       gather                           sum over ranks, its own         that is split, and which each uses for something of its own
    keep       sum over ranks, its own          gather                          of which each has a term; they end up split
    turn       all to all: split elsewhere      all to all: as it was           that is split, for what needs all along that dimension
    first      nothing                          nothing but on rank 0           whose gradient is a sum over ranks, which each uses alike

A tensor that all have has the same gradient on all. The names f and g of Megatron-LM (Shoeybi et al., arXiv:1909.08053) are share and total.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from torch import Tensor

__all__ = ["first", "gathered", "highest", "keep", "lend", "part", "share", "total", "turn", "turn_back", "whole"]


def share(tensor: Tensor, axis: Axis) -> Tensor:
    return _Share.apply(tensor, axis) if tensor.requires_grad else tensor  # type: ignore[no-any-return]


def part(tensor: Tensor, cut: Cut) -> Tensor:
    return _Part.apply(tensor, cut) if tensor.requires_grad else cut.take(tensor)  # type: ignore[no-any-return]


def total(tensor: Tensor, axis: Axis) -> Tensor:
    return _Total.apply(tensor, axis)  # type: ignore[no-any-return]


def whole(tensor: Tensor, cut: Cut) -> Tensor:
    return _Whole.apply(tensor, cut)  # type: ignore[no-any-return]


def lend(tensor: Tensor, cut: Cut) -> Tensor:
    return _Lend.apply(tensor, cut)  # type: ignore[no-any-return]


def keep(tensor: Tensor, cut: Cut) -> Tensor:
    return _Keep.apply(tensor, cut)  # type: ignore[no-any-return]


def turn(tensor: Tensor, cut: Cut, dim: int) -> Tensor:
    """Return all along the cut's dimension of this rank's share of `dim`, which the ranks divide."""
    return _Turn.apply(tensor, cut, dim)  # type: ignore[no-any-return]


def turn_back(tensor: Tensor, cut: Cut, dim: int) -> Tensor:
    """Undo `turn`."""
    return _TurnBack.apply(tensor, cut, dim)  # type: ignore[no-any-return]


def first(tensor: Tensor, axis: Axis) -> Tensor:
    return _First.apply(tensor, axis) if tensor.requires_grad else tensor  # type: ignore[no-any-return]


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


def _turned(tensor: Tensor, cut: Cut, dim: int) -> Tensor:
    blocks = [block.reshape(-1) for block in tensor.chunk(cut.axis.size, dim)]
    shapes = [list(tensor.shape) for _ in blocks]
    for shape, length in zip(shapes, cut.lengths, strict=True):
        shape[dim] //= cut.axis.size
        shape[cut.dim] = cut.outer * length
    received = _all_to_all(blocks, [math.prod(shape) for shape in shapes], cut)
    return cut.join([values.view(shape) for values, shape in zip(received, shapes, strict=True)])


def _turned_back(tensor: Tensor, cut: Cut, dim: int) -> Tensor:
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


def _sum_and_take(tensor: Tensor, cut: Cut) -> Tensor:
    parts = [cut.take(tensor, rank) for rank in range(cut.axis.size)]
    sizes = [values.numel() for values in parts]
    output = tensor.new_empty(parts[cut.axis.rank].shape)
    vector = torch.cat([values.reshape(-1) for values in parts])
    cut.axis.comm.reduce_scatter(output.view(-1), vector, counts=sizes)
    cut.axis.note("reduce_scatter", vector.nbytes)
    return output


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(grad, ctx.axis), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        found = cut.take(tensor)
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gathered(grad, ctx.cut), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:  # noqa: ARG004
        return _sum(tensor, axis)  # not in place: selective recomputation keeps the terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ARG004
        return grad, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return gathered(tensor, cut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.cut.take(grad).contiguous(), None


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return gathered(tensor, cut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum_and_take(grad, ctx.cut), None


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return _sum_and_take(tensor, cut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gathered(grad, ctx.cut), None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: Cut, dim: int) -> Tensor:
        ctx.cut, ctx.dim = cut, dim
        return _turned(tensor, cut, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _turned_back(grad, ctx.cut, ctx.dim), None, None


class _TurnBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: Cut, dim: int) -> Tensor:
        ctx.cut, ctx.dim = cut, dim
        return _turned_back(tensor, cut, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _turned(grad, ctx.cut, ctx.dim), None, None


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad if ctx.axis.rank == 0 else torch.zeros_like(grad), None
