"""Indexing: basic indices are done on the part where they leave a divided dimension alone, or take one range of it; others on the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ringfold.parallel.split.rules.pointwise import functions
from ringfold.parallel.split.rules.shapes import ranged, selected
from ringfold.parallel.split.tensor import NO_RULE, Split, local_of, made, rule, undivided
from torch import Tensor

__all__: list[str] = []


@rule(Tensor.__getitem__)
def _getitem(func: Any, input: Tensor, index: Any) -> Any:  # noqa: ARG001
    if not isinstance(input, Split):
        return NO_RULE
    items = _spelled_out(index, input.dim())
    if items is None:
        return _picked(input, list(index) if isinstance(index, tuple) else [index])
    dim = 0
    result: Tensor = input
    for item in items:
        if item is None:
            result, dim = result.unsqueeze(dim), dim + 1
        elif isinstance(item, int):
            length = result.shape[dim]
            if not -length <= item < length:
                raise IndexError(f"index {item} is out of bounds for dimension {dim} with size {length}")
            result = selected(result, dim, item % length, "[]")
        else:
            start, stop, _ = item.indices(result.shape[dim])
            if (start, stop) != (0, result.shape[dim]):
                result = ranged(result, dim, start, max(0, stop - start), "[]")
            dim += 1
    return result


def _picked(input: Split, items: list[Any]) -> Any:
    """Pick by one tensor of indices, or a mask, beside nothing but full slices, where what it picks from is not divided."""
    places = [place for place, item in enumerate(items) if isinstance(item, Tensor)]
    rest = [item for item in items if not isinstance(item, Tensor)]
    if len(places) != 1 or any(item is not Ellipsis and item != slice(None) for item in rest) or isinstance(items[places[0]], Split):
        return NO_RULE
    index = items[places[0]]
    taken = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    dim = places[0]
    if Ellipsis in items and items.index(Ellipsis) < dim:
        dim += input.dim() - (len(items) - 1) - taken
    if any(dim <= cut.dim < dim + taken for cut in input.cuts):
        return NO_RULE
    result: Tensor = local_of(input)[(*[slice(None)] * dim, index)]
    shift = result.dim() - input.dim()
    cuts = [cut if cut.dim < dim else cut.at(cut.dim + shift) for cut in input.cuts]
    shape = list(result.shape)
    for cut in cuts:
        shape[cut.dim] = cut.length
    return made(result, shape, cuts, input.terms)


@rule(Tensor.__setitem__)
def _setitem(func: Any, input: Tensor, index: Any, value: Any) -> Any:
    items = _spelled_out(index, input.dim())
    if not isinstance(input, Split) or items is None or None in items or isinstance(value, Split) or input.terms:
        return NO_RULE
    for cut in input.cuts:
        item = items[cut.dim]
        if isinstance(item, int) or item.indices(input.shape[cut.dim])[:2] != (0, input.shape[cut.dim]):
            return NO_RULE
    return func(local_of(input), index, value)


@rule(*functions("cumsum cumprod logcumsumexp flip sort argsort topk"))
def _along_dim(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Done on the part where the dimension along which it is done is not divided."""
    where = {"topk": 1, "flip": 0}.get(func.__name__, 0)
    dims = args[where] if len(args) > where else kwargs.get("dim", kwargs.get("dims", -1 if func.__name__ in ("sort", "argsort", "topk") else None))
    if not isinstance(input, Split) or dims is None or isinstance(dims, bool):
        return NO_RULE
    along = {dim % input.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    input = undivided(input, along, func.__name__)
    result = func(local_of(input), *args, **kwargs)
    if not isinstance(input, Split):
        return result
    if isinstance(result, Tensor):
        return _like(result, input, along)
    return type(result)([_like(one, input, along) for one in result])


@rule(*functions("triu tril"))
def _triangle(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    input = undivided(input, (input.dim() - 2, input.dim() - 1), func.__name__)
    result = func(local_of(input), *args, **kwargs)
    return made(result, input.shape, input.cuts, input.terms) if isinstance(input, Split) else result


@rule(torch.nn.functional.pad)
def _pad(func: Any, input: Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    touched = {input.dim() - 1 - place // 2 for place, count in enumerate(pad) if count}
    input = undivided(input, touched, "pad")
    result = func(local_of(input), pad, *args, **kwargs)
    return _like(result, input, touched) if isinstance(input, Split) else result


def _like(result: Tensor, input: Split, changed: set[int]) -> Tensor:
    """Return the whole of which `result` is a part divided as `input` is; only lengths of `changed` dimensions differ."""
    shape = [result.shape[dim] if dim in changed else length for dim, length in enumerate(input.shape)]
    return made(result, shape, input.cuts, input.terms)


def _spelled_out(index: Any, count: int) -> list[Any] | None:
    """Return an int, a slice of step 1 or None for each dimension, and None if there is anything else in the index."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is Ellipsis or type(item) is int or (isinstance(item, slice) and item.step in (None, 1))) for item in items):
        return None
    given = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    return [*items[:place], *[slice(None)] * (count - given), *items[place + 1 :]]
