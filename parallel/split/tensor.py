"""Split: a tensor of which this rank holds a part, and which has the shape of the whole.

A model's own code goes on with it as with any tensor. Each of torch's functions that it is given to follows a rule (rules/): it is done on the parts,
and ranks tell each other what they must; where there is no rule, it is done on the whole, which is gathered for it. What comes out is right either
way, and an `Axis` counts what was gathered.

    local        this rank's part, an ordinary tensor; autograd sees only this one
    cuts         how dimensions are divided, at most one for each axis
    terms        axes over which the tensor is not divided, and over which its gradient is the sum of what ranks have, as that of a parameter
                 whose users are divided. An ordinary tensor has the same gradient on every rank.

The rules work in front of autograd, not behind it as those of DTensor do: a backward pass costs no Python, and a forward some 8 us an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.split import exchange
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = [
    "NO_RULE",
    "RULES",
    "Rule",
    "Split",
    "cuts_of",
    "gathered",
    "joined",
    "local_of",
    "made",
    "plainly",
    "rule",
    "undivided",
    "without_terms",
    "written",
]

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
NO_RULE = object()  # what a rule returns for a case that it does not know

plainly = torch._C.DisableTorchFunctionSubclass


class Split(Tensor):
    """See above; `made` makes one."""

    local: Tensor
    cuts: tuple[Cut, ...]
    terms: frozenset[Axis]

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], cuts: tuple[Cut, ...], terms: frozenset[Axis]) -> Split:
        self: Split = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        self.local, self.cuts, self.terms = local, cuts, terms
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        where = ", ".join(f"dim {cut.dim} over {cut.axis.name}" for cut in self.cuts)
        return f"Split({list(self.shape)}, {where or 'whole'}, local={self.local!r})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = RULES.get(func)
        if found is not None:
            result = found(func, *args, **(kwargs or {}))
            if result is not NO_RULE:
                return result
        return _on_the_whole(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:  # type: ignore[override]
        raise ConfigError(
            f"{func} was called on a tensor that is split over ranks, past what torch lets rules see (an operator of C++?). "
            "Keep the module around it whole, with a plan that does not name it."
        )


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Make a function `(func, *args, **kwargs)` the rule of these."""

    def register(found: Rule) -> Rule:
        for function in functions:
            RULES[function] = found
        return found

    return register


def made(local: Tensor, shape: Sequence[int], cuts: Iterable[Cut], terms: frozenset[Axis] = frozenset()) -> Tensor:
    """Return the tensor of `shape` of which this rank holds `local`; an ordinary one if that is all."""
    cuts = tuple(cuts)
    return Split(local, shape, cuts, terms) if cuts or terms else local


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds.

    Raises:
        ConfigError: the tensor came out of an autograd.Function, which does not know of parts.
    """
    if not isinstance(tensor, Split):
        return tensor
    with plainly():
        lost = tensor.grad_fn
    if lost is not None:
        raise ConfigError(
            f"a tensor that is split over ranks went through {lost.name()}, a torch.autograd.Function of its own, past what torch lets rules see. "
            "Keep the module around it whole, with a plan that does not name it."
        )
    return tensor.local


def cuts_of(tensor: Any) -> tuple[Cut, ...]:
    return tensor.cuts if isinstance(tensor, Split) else ()


def joined(tensor: Tensor, axis: Axis, why: str) -> Tensor:
    """Return a tensor that is not divided over `axis`, gathered if it is; counted there as `why`."""
    if not isinstance(tensor, Split):
        return tensor
    for cut in tensor.cuts:
        if cut.axis is axis:
            axis.gathered[why] += 1
            left = tuple(other for other in tensor.cuts if other is not cut)
            return made(exchange.whole(local_of(tensor), cut), tensor.shape, left, tensor.terms)
    return tensor


def undivided(tensor: Tensor, dims: Collection[int], why: str) -> Tensor:
    """Return a tensor none of whose `dims` is divided: over other axes it stays as it is."""
    for cut in cuts_of(tensor):
        if cut.dim in dims:
            tensor = joined(tensor, cut.axis, why)
    return tensor


def gathered(tensor: Tensor, why: str) -> Tensor:
    """Return the whole tensor, an ordinary one."""
    for cut in cuts_of(tensor):
        tensor = joined(tensor, cut.axis, why)
    return without_terms(tensor)


def without_terms(tensor: Tensor, axes: Iterable[Axis] | None = None) -> Tensor:
    """Return the tensor with the same gradient on all ranks of `axes`, all by default."""
    if not isinstance(tensor, Split):
        return tensor
    local, left = local_of(tensor), tensor.terms
    for axis in left if axes is None else left.intersection(axes):
        local = exchange.first(local, axis)
        left -= {axis}
    return made(local, tensor.shape, tensor.cuts, left)


ALONE = 2  # the tensor, and the object that is asked
IN_PLACE = {
    f"__i{name}__" for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"]
} | {"__setitem__"}


def _on_the_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    changed = args[0] if args and (name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))) else None
    if isinstance(changed, Split):
        return _changed_on_the_whole(name, func, changed, args[1:], kwargs)
    args, kwargs = tree_map(lambda value: gathered(value, name) if isinstance(value, Split) else value, (args, kwargs))
    return func(*args, **kwargs)


def _changed_on_the_whole(name: str, func: Any, target: Split, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change a copy of the whole, and let the tensor be its part of that: right as long as nobody else looks at the same memory."""
    if torch._C._storage_Use_Count(target.local.untyped_storage()._cdata) > ALONE:
        raise ConfigError(
            f"{name} changes a tensor of {list(target.shape)} in place, which is split over ranks and has views, and no rule says how. "
            "Make a new tensor of it, or keep the module whole, with a plan that does not name it."
        )
    whole = gathered(target, name).clone()
    rest, kwargs = tree_map(lambda value: gathered(value, name) if isinstance(value, Split) else value, (rest, kwargs))
    func(whole, *rest, **kwargs)
    for cut in target.cuts:
        whole = exchange.part(whole, cut)
    target.local, target.terms = whole.clone(), frozenset()  # alone in its memory
    return written(target)


def written(target: Split) -> Split:
    """Return a tensor whose part was written in place, and which has a gradient from now on if that part has."""
    with plainly():
        target.requires_grad_(target.local.requires_grad)
    return target
