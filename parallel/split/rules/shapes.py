"""Functions that move dimensions, join or divide them: cuts move with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from ringfold.parallel.split.cut import Cut, regroup, with_length
from ringfold.parallel.split.rules.agreement import agree
from ringfold.parallel.split.rules.pointwise import functions
from ringfold.parallel.split.tensor import NO_RULE, Split, joined, local_of, made, rule, undivided
from torch import Tensor

__all__ = ["reshaped"]


def reshaped(tensor: Tensor, shape: Sequence[int], why: str) -> Tensor:
    """View a tensor in another shape; over an axis whose cut no new dimension can take up it is gathered."""
    if not isinstance(tensor, Split):
        return tensor.reshape(tuple(shape))
    cuts: list[Cut] = []
    for cut in tensor.cuts:
        found = regroup(cut, tensor.shape, shape)
        if found is None or any(found.dim == other.dim for other in cuts):
            return reshaped(joined(tensor, cut.axis, why), shape, why)
        cuts.append(found)
    local = local_of(tensor).reshape(with_length(shape, cuts))
    return made(local, shape, cuts, tensor.terms)


@rule(*functions("view reshape view_as reshape_as"))
def _view(func: Any, input: Tensor, *shape: Any, **kwargs: Any) -> Any:
    name = func.__name__
    if not isinstance(input, Split) or (shape and isinstance(shape[0], torch.dtype)) or "dtype" in kwargs:
        return NO_RULE
    wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape or kwargs.get("shape") or kwargs.get("size") or kwargs["other"]
    wanted = list(wanted.shape if isinstance(wanted, Tensor) else wanted)
    if -1 in wanted:
        rest = -math.prod(wanted)
        wanted[wanted.index(-1)] = input.numel() // rest if rest else 0
    if math.prod(wanted) != input.numel():
        raise RuntimeError(f"shape '{list(wanted)}' is invalid for input of size {input.numel()}")
    return reshaped(input, wanted, name)


@rule(*functions("flatten"))
def _flatten(func: Any, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if input.dim() == 0:
        return NO_RULE
    start, end = start_dim % input.dim(), end_dim % input.dim()
    return reshaped(input, (*input.shape[:start], math.prod(input.shape[start : end + 1]), *input.shape[end + 1 :]), func.__name__)


@rule(*functions("unflatten"))
def _unflatten(func: Any, input: Tensor, dim: int, sizes: Sequence[int]) -> Any:
    dim, sizes = dim % input.dim(), list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = input.shape[dim] // -math.prod(sizes)
    return reshaped(input, (*input.shape[:dim], *sizes, *input.shape[dim + 1 :]), func.__name__)


@rule(*functions("squeeze"))
def _squeeze(func: Any, input: Tensor, dim: int | Sequence[int] | None = None) -> Any:
    dims = range(input.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    chosen = {each % input.dim() for each in dims} if input.dim() else set()
    return reshaped(input, [length for d, length in enumerate(input.shape) if length != 1 or d not in chosen], func.__name__)


@rule(*functions("unsqueeze"))
def _unsqueeze(func: Any, input: Tensor, dim: int) -> Any:
    dim %= input.dim() + 1
    return reshaped(input, (*input.shape[:dim], 1, *input.shape[dim:]), func.__name__)


@rule(*functions("transpose swapaxes swapdims"))
def _transpose(func: Any, input: Tensor, dim0: int, dim1: int) -> Any:  # noqa: ARG001
    order = list(range(input.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, order)


@rule(*functions("t"))
def _t(func: Any, input: Tensor) -> Any:  # noqa: ARG001
    return _permuted(input, list(range(input.dim()))[::-1])


@rule(*functions("permute"))
def _permute(func: Any, input: Tensor, *dims: Any) -> Any:  # noqa: ARG001
    wanted = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return _permuted(input, [dim % input.dim() for dim in wanted])


@rule(*functions("movedim moveaxis"))
def _movedim(func: Any, input: Tensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Any:  # noqa: ARG001
    count = input.dim()
    origins = [dim % count for dim in ([source] if isinstance(source, int) else source)]
    goals = [dim % count for dim in ([destination] if isinstance(destination, int) else destination)]
    order = [dim for dim in range(count) if dim not in origins]
    for goal, origin in sorted(zip(goals, origins, strict=True)):
        order.insert(goal, origin)
    return _permuted(input, order)


def _permuted(input: Tensor, order: Sequence[int]) -> Any:
    if not isinstance(input, Split):
        return NO_RULE
    cuts = [cut.at(order.index(cut.dim)) for cut in input.cuts]
    return made(local_of(input).permute(*order), [input.shape[dim] for dim in order], cuts, input.terms)


@rule(*functions("expand expand_as broadcast_to"))
def _expand(func: Any, input: Tensor, *shape: Any) -> Any:  # noqa: ARG001
    if not isinstance(input, Split):
        return NO_RULE
    wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    wanted = list(wanted.shape if isinstance(wanted, Tensor) else wanted)
    offset = len(wanted) - input.dim()
    wanted = [input.shape[dim - offset] if length == -1 else length for dim, length in enumerate(wanted)]
    if any(input.shape[cut.dim] != wanted[cut.dim + offset] for cut in input.cuts):
        return NO_RULE  # a length of 1 that is divided: one rank has it all
    cuts = [cut.at(cut.dim + offset) for cut in input.cuts]
    return made(local_of(input).expand(with_length(wanted, cuts)), wanted, cuts, input.terms)


@rule(*functions("repeat_interleave"))
def _repeat_interleave(func: Any, input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or not isinstance(repeats, int) or dim is None or kwargs:
        return NO_RULE
    dim %= input.dim()
    copies = input.unsqueeze(dim + 1).expand(*input.shape[: dim + 1], repeats, *input.shape[dim + 1 :])
    return reshaped(copies, (*input.shape[:dim], input.shape[dim] * repeats, *input.shape[dim + 1 :]), func.__name__)


@rule(*functions("cat concat concatenate"))
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:  # noqa: ARG001
    if kwargs or not all(isinstance(one, Tensor) for one in tensors):
        return NO_RULE
    tensors = [one for one in tensors if one.shape != (0,)] or tensors  # those count for nothing, whatever the others' dimensions
    dim %= tensors[0].dim()
    whole = [undivided(one, [dim], "cat") for one in tensors]  # parts of what is put together would lie elsewhere
    labels = [[(dim, place) if d == dim else d for d in range(one.dim())] for place, one in enumerate(whole)]
    found = agree(whole, labels, "cat")
    shape = list(whole[0].shape)
    shape[dim] = sum(one.shape[dim] for one in whole)
    return made(torch.cat(found.locals, dim), shape, found.cuts(range(len(shape))), found.terms)


@rule(*functions("stack"))
def _stack(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:  # noqa: ARG001
    return torch.cat([one.unsqueeze(dim) for one in tensors], dim)


@rule(*functions("narrow"))
def _narrow(func: Any, input: Tensor, dim: int, start: Any, length: int) -> Any:
    if not isinstance(input, Split) or isinstance(start, Tensor):
        return NO_RULE
    return ranged(input, dim % input.dim(), start % input.shape[dim] if start < 0 else start, length, func.__name__)


def ranged(input: Tensor, dim: int, start: int, length: int, why: str) -> Tensor:
    """Return a range of one dimension."""
    if not isinstance(input, Split):
        return input.narrow(dim, start, length)
    cut = next((cut for cut in input.cuts if cut.dim == dim), None)
    shape = [length if d == dim else whole for d, whole in enumerate(input.shape)]
    if cut is None:
        return made(local_of(input).narrow(dim, start, length), shape, input.cuts, input.terms)
    found = cut.within(start, start + length)
    if found is None:
        return ranged(joined(input, cut.axis, why), dim, start, length, why)
    part, begin = found
    local = local_of(input).narrow(dim, begin, part.local_length)
    return made(local, shape, [part if other is cut else other for other in input.cuts], input.terms)


@rule(*functions("split tensor_split split_with_sizes"))
def _split(func: Any, input: Tensor, sizes: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or kwargs.keys() - {"split_size", "split_size_or_sections", "split_sizes"} or func.__name__ == "tensor_split":
        return NO_RULE
    sizes = sizes if sizes is not None else next(iter(kwargs.values()))
    dim %= input.dim()
    if isinstance(sizes, int):
        sizes = [min(sizes, input.shape[dim] - start) for start in range(0, input.shape[dim], sizes)] if sizes else [0]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return tuple(ranged(input, dim, start, size, "split") for start, size in zip(starts, sizes, strict=True))


@rule(*functions("chunk"))
def _chunk(func: Any, input: Tensor, chunks: int, dim: int = 0) -> Any:  # noqa: ARG001
    return torch.split(input, max(1, -(-input.shape[dim] // chunks)), dim)


@rule(*functions("unbind"), Tensor.__iter__)
def _unbind(func: Any, input: Tensor, dim: int = 0) -> Any:
    found = tuple(selected(input, dim % input.dim(), place, "unbind") for place in range(input.shape[dim]))
    return iter(found) if func is Tensor.__iter__ else found


@rule(*functions("select"))
def _select(func: Any, input: Tensor, dim: int, index: int) -> Any:
    return selected(input, dim % input.dim(), index % input.shape[dim] if index < 0 else index, func.__name__)


def selected(input: Tensor, dim: int, index: int, why: str) -> Tensor:
    """Return one entry along a dimension."""
    if not isinstance(input, Split):
        return input.select(dim, index)
    cut = next((cut for cut in input.cuts if cut.dim == dim), None)
    if cut is not None:
        return selected(joined(input, cut.axis, why), dim, index, why)
    cuts: list[Cut] = [replace(cut, dim=cut.dim - (cut.dim > dim)) for cut in input.cuts]
    shape = [length for d, length in enumerate(input.shape) if d != dim]
    return made(local_of(input).select(dim, index), shape, cuts, input.terms)
