"""Products: matmul, linear and what else sums over a dimension that two operands share.

x [.., k] split in k, W [j, k] split in k      each rank has a term of the result: total            (row-parallel)
x [.., k], W [j, k] split in j                 the result is split in j, the gradient of x summed    (column-parallel)
x [t, k] split in t, W [j, k]                  the result is split in t, the gradient of W summed    (data- and context-parallel)
x [t, k] split in t, W [j, k] split in j       x is gathered, its gradient summed and split          (sequence- into column-parallel)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ringfold.parallel.split import exchange
from ringfold.parallel.split.rules.agreement import agree, labels_of
from ringfold.parallel.split.tensor import NO_RULE, made, rule
from torch import Tensor

__all__ = ["contract"]

ROW, INNER, COLUMN = "row", "inner", "column"


def contract(func: Any, operands: Sequence[Tensor], labels: Sequence[Sequence[object]], out: Sequence[object], shape: Sequence[int]) -> Tensor:
    """Return `func` of the operands, of `shape`: what is not among the labels of `out` is summed over."""
    found = agree(operands, labels, func.__name__)
    result: Tensor = func(*found.locals)
    for label, cut in found.divided.items():
        if label not in out:
            result = exchange.total(result, cut.axis)
    return made(result, shape, found.cuts(out), found.terms)


@rule(F.linear)
def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    batch = list(range(input.dim() - 1))
    shape = (*input.shape[:-1], *weight.shape[:-1])
    labels = [*batch, INNER], [COLUMN, INNER][-weight.dim() :]
    product = contract(F.linear, [input, weight], labels, [*batch, COLUMN][: len(shape)], shape)
    return product if bias is None else product + bias


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.mv, Tensor.mv, torch.dot, Tensor.dot)
def _matmul(func: Any, input: Tensor, other: Tensor) -> Tensor:  # noqa: ARG001
    if input.dim() == 0 or other.dim() == 0:
        return NO_RULE  # type: ignore[return-value]  # torch says what is wrong
    left, right = ([ROW, INNER] if input.dim() > 1 else [INNER]), ([INNER, COLUMN] if other.dim() > 1 else [INNER])
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    shape = (*batch, *input.shape[-2:-1], *(other.shape[-1:] if other.dim() > 1 else ()))
    labels = [[*labels_of(other.shape[:-2], batch), *right], [*labels_of(input.shape[:-2], batch), *left]]
    out = [*range(len(batch)), *(one for one in (*left, *right) if one != INNER)]
    return contract(matmul, [other, input], labels, out, shape)  # of rows and columns, both divided, rows stay: those of scores are queries


def matmul(other: Tensor, input: Tensor) -> Tensor:
    return torch.matmul(input, other)


@rule(Tensor.__rmatmul__)
def _rmatmul(func: Any, input: Tensor, other: Tensor) -> Tensor:  # noqa: ARG001
    return torch.matmul(other, input)


@rule(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
def _addmm(func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:  # noqa: ARG001
    product = torch.matmul(mat1, mat2)
    return (product if alpha == 1 else product * alpha) + (input if beta == 1 else input * beta)


@rule(torch.einsum, torch.functional.einsum)
def _einsum(func: Any, equation: Any, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "." in equation or not all(isinstance(one, Tensor) for one in operands):
        return NO_RULE  # type: ignore[return-value]
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    labels = [list(names) for names in inputs.split(",")]
    if not arrow or any(len(set(names)) < len(names) or len(names) != one.dim() for names, one in zip(labels, operands, strict=False)):
        return NO_RULE  # type: ignore[return-value]
    lengths = {name: length for names, one in zip(labels, operands, strict=True) for name, length in zip(names, one.shape, strict=True)}

    def einsum(*locals: Tensor) -> Tensor:
        result: Tensor = func(equation, *locals)
        return result

    return contract(einsum, operands, labels, list(out), [lengths[name] for name in out])
