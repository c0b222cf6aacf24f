"""Functions along dimensions: on the part where those are not divided; sums and means over a divided one are finished between ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ringfold.parallel.split import exchange
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.rules.agreement import agree
from ringfold.parallel.split.rules.pointwise import functions
from ringfold.parallel.split.tensor import NO_RULE, Split, local_of, made, rule, undivided
from torch import Tensor

__all__: list[str] = []

Dims = int | Sequence[int] | None


@rule(*functions("sum"))
def _sum(func: Any, input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or kwargs:
        return NO_RULE
    dims = _dims(dim, input.dim())
    local = func(local_of(input), tuple(dims), keepdim, dtype=dtype) if dims else func(local_of(input), dtype=dtype)
    return _finished(local, input, dims, keepdim)


@rule(*functions("mean"))
def _mean(func: Any, input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or kwargs:
        return NO_RULE
    dims = _dims(dim, input.dim())
    if not any(cut.dim in dims for cut in input.cuts):
        local = func(local_of(input), tuple(dims), keepdim, dtype=dtype) if dims else func(local_of(input), dtype=dtype)
        return _finished(local, input, dims, keepdim)
    return torch.sum(input, dims, keepdim, dtype=dtype) / math.prod(input.shape[d] for d in dims)


@rule(*functions("amax amin max min argmax argmin logsumexp std var norm all any prod median std_mean var_mean"), torch.linalg.vector_norm)
def _reduced(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Done on the part where no divided dimension is reduced."""
    if len(args) > 0 and isinstance(args[0], Tensor):
        return (torch.maximum if func.__name__ == "max" else torch.minimum)(input, args[0]) if func.__name__ in ("max", "min") else NO_RULE
    place = 1 if func.__name__ in ("norm", "vector_norm") else 0
    dim = args[place] if len(args) > place else kwargs.get("dim")
    if not isinstance(input, Split) or dim is None or isinstance(dim, bool):
        return NO_RULE
    dims = _dims(dim, input.dim())
    input = undivided(input, dims, func.__name__)
    if not isinstance(input, Split):
        return func(input, *args, **kwargs)
    result = func(local_of(input), *args, **kwargs)
    one = result if isinstance(result, Tensor) else result[0]
    keepdim = one.dim() == input.dim()
    return (
        _finished(result, input, dims, keepdim) if isinstance(result, Tensor) else type(result)([_finished(r, input, dims, keepdim) for r in result])
    )


@rule(*functions("softmax log_softmax softmin"))
def _softmax(func: Any, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or dim is None:
        return NO_RULE
    input = undivided(input, [dim % input.dim()], func.__name__)
    result = func(local_of(input), dim, *args, **kwargs)
    return made(result, input.shape, input.cuts, input.terms) if isinstance(input, Split) else result


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def _norm(func: Any, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """A weight and a bias are shared by what they are applied to."""
    count = len(normalized_shape)
    names = ("weight", "bias") if "layer" in func.__name__ else ("weight",)
    given = {**dict(zip(names, args, strict=False)), **{key: value for key, value in kwargs.items() if key in names}}
    rest, options = args[len(names) :], {key: value for key, value in kwargs.items() if key not in names}
    weights = [value for value in (given.get(name) for name in names) if value is not None]
    labels = list(range(input.dim()))
    input = undivided(input, labels[-count:], func.__name__)
    found = agree([*weights, input], [*[labels[-count:]] * len(weights), labels], func.__name__)
    if any(label in labels[-count:] for label in found.divided):
        return NO_RULE
    *parts, local = found.locals
    mine = iter(parts)
    ordered = [next(mine) if given.get(name) is not None else None for name in names]
    return made(func(local, normalized_shape, *ordered, *rest, **options), input.shape, found.cuts(labels), found.terms)


def _dims(dim: Dims, count: int) -> list[int]:
    chosen = range(count) if dim is None or (not isinstance(dim, int) and not len(dim)) else [dim] if isinstance(dim, int) else dim
    return sorted({each % count for each in chosen}) if count else []


def _finished(local: Tensor, input: Split, dims: Sequence[int], keepdim: bool) -> Tensor:
    """Return the result of which this rank has `local`, a term of it where a dimension that was summed over is divided."""
    cuts: list[Cut] = []
    for cut in input.cuts:
        if cut.dim in dims:
            local = exchange.total(local, cut.axis)
        else:
            cuts.append(cut if keepdim else cut.at(cut.dim - sum(d < cut.dim for d in dims)))
    shape = [1 if d in dims else length for d, length in enumerate(input.shape) if keepdim or d not in dims]
    return made(local, shape, cuts, input.terms)
