"""Functions of each element by itself: every rank does its part."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ringfold.parallel.split.rules.agreement import agree, labels_of, like
from ringfold.parallel.split.tensor import NO_RULE, Split, local_of, made, rule, written
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["POINTWISE", "functions", "pointwise"]

POINTWISE = """
    abs absolute neg negative positive sign sgn exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan sinh
    cosh tanh asinh acosh atanh arctan erf erfc erfinv lgamma digamma sigmoid logit floor ceil round trunc frac
    relu relu6 gelu silu mish selu celu elu leaky_relu hardtanh hardswish hardsigmoid softplus softsign softshrink hardshrink tanhshrink logsigmoid
    threshold clamp clip clamp_min clamp_max nan_to_num
    add sub subtract rsub mul multiply div divide true_divide floor_divide fmod remainder pow float_power atan2 arctan2 maximum minimum fmax fmin
    hypot lerp addcmul addcdiv where masked_fill logaddexp xlogy ldexp
    eq ne lt le gt ge greater greater_equal less less_equal not_equal isclose isnan isinf isfinite isposinf isneginf
    logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __floordiv__ __rfloordiv__ __mod__ __rmod__
    __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __rand__ __ror__ __rxor__
    clone detach contiguous zeros_like ones_like empty_like full_like alias conj real resolve_conj resolve_neg fill
"""
CONVERSIONS = "to type type_as float double half bfloat16 long int short char byte bool cpu cuda pin_memory"
IN_PLACE = """
    abs_ neg_ exp_ log_ sqrt_ rsqrt_ square_ reciprocal_ sin_ cos_ tanh_ erf_ sigmoid_ floor_ ceil_ round_ trunc_ relu_ relu6_ selu_ celu_ elu_
    leaky_relu_ hardtanh_ threshold_ clamp_ clamp_min_ clamp_max_ nan_to_num_ add_ sub_ mul_ div_ pow_ fmod_ remainder_ floor_divide_ true_divide_
    lerp_ addcmul_ addcdiv_ masked_fill_ zero_ fill_ copy_ detach_ logical_and_ logical_or_ logical_not_ logical_xor_
    __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
"""
NONZERO = (torch.where, Tensor.where)  # what they are with a condition alone
SPACES = (torch, Tensor, F, torch.special)


def functions(names: str) -> list[Any]:
    """Return torch's functions of these names, wherever they are."""
    return [found for name in names.split() for space in SPACES if callable(found := getattr(space, name, None))]


@rule(*functions(POINTWISE))
def pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("out") is not None or kwargs.get("inplace") or (func in NONZERO and len(args) == 1):
        return NO_RULE
    first = args[0] if args else None
    if isinstance(first, Split) and not kwargs and not any(isinstance(arg, Tensor) for arg in args[1:]):
        return made(func(local_of(first), *args[1:]), first.shape, first.cuts, first.terms)
    leaves, spec = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    operands: list[Tensor] = [leaves[place] for place in places]
    shape = torch.broadcast_shapes(*(one.shape for one in operands))
    found = agree(operands, [labels_of(one.shape, shape) for one in operands], func.__name__)
    for place, local in zip(places, found.locals, strict=True):
        leaves[place] = local
    args, kwargs = tree_unflatten(leaves, spec)
    return made(func(*args, **kwargs), shape, found.cuts(range(len(shape))), found.terms)


@rule(*functions(CONVERSIONS))
def _converted(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(local_of(tensor), *map(_local, args), **{key: _local(value) for key, value in kwargs.items()})
    return made(result, tensor.shape, tensor.cuts, tensor.terms) if isinstance(tensor, Split) and isinstance(result, Tensor) else result


@rule(*functions(IN_PLACE))
def _in_place(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Write this rank's part: operands are divided as what they are written to is."""
    if not isinstance(tensor, Split):
        return NO_RULE

    def placed(value: Any) -> Any:
        return local_of(like(value, tensor, labels_of(value.shape, tensor.shape), func.__name__)) if isinstance(value, Tensor) else value

    func(local_of(tensor), *map(placed, args), **{key: placed(value) for key, value in kwargs.items()})
    return written(tensor)


def _local(value: Any) -> Any:
    return local_of(value) if isinstance(value, Tensor) else value
