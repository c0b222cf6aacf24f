"""What `recompute:selective` keeps: what takes long to compute for each byte that it takes to keep.

    kept      mm, addmm, convolution                   2k flops for each element, k the depth of the products: hundreds to thousands
              bmm, baddbmm of experts, probs @ v       the same
              fused attention without dropout          4s flops for each element of its output, s the sequence length
    redone    bmm of attention scores q @ k            2d flops for each of s x s elements, d the width of a head: 64 to 128
              softmax, dropout, norms, activations, copies, additions: a few flops for each element

Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models") recompute the whole core of attention, scores, softmax,
dropout and the product with the values, since what they keep of it grows with s x s. Two things differ here. A fused attention keeps
nothing of that size: its output is as wide as one layer's, and to redo it costs more than to redo a matmul, so it is kept. And where attention is
written out, its last product is kept too: it is as small as one layer's output, and as expensive. Beyond the paper, everything that
is cheap is redone also outside of attention: on a CPU as on a GPU these operations are bound by memory, and cost a few passes over what they
recompute. (Width 768, sequences of 256, fused attention, one CPU core: 40 % fewer bytes for a fifth of the forward's time.)

A batched product counts as scores if both sides of its matrices are more than SCORES times as long as the dot products are deep; a layer
that widens by a factor of four is none.

Fused attention with dropout is redone: kept, it would not draw its random numbers again, and all that are drawn after it would be others.

torch.utils.checkpoint has contexts for this, which number every operation of both runs. They fail where the second run casts a weight whose
cast the first one found in autocast's cache, and where only the first one computed something (replay.py). Here what is kept is numbered alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ringfold.parallel.recompute.ledger import SavedBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Kept", "OtherCourse", "is_kept"]

SCORES = 4


def _overloads(*names: str) -> frozenset[Any]:
    """Return the default overloads of those operations that this version of torch has."""
    return frozenset(getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name))


MATRIX = _overloads("mm", "addmm", "convolution", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm")
BATCHED = _overloads("bmm", "baddbmm")
ATTENTION = _overloads(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def is_kept(operation: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Say whether the output of an operation is kept."""
    if operation in BATCHED:
        left, right = arguments[-2:]  # (B, m, k), (B, k, n)
        return bool(min(left.shape[-2], right.shape[-1]) <= SCORES * left.shape[-1])
    return operation in MATRIX or (operation in ATTENTION and not _drops(operation, arguments, keywords))


def _drops(operation: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Return whether an attention drops anything; its arguments are as its schema names them."""
    place = [argument.name for argument in operation._schema.arguments].index("dropout_p")
    return bool(keywords.get("dropout_p", arguments[place] if place < len(arguments) else 0.0))


class OtherCourse(Exception):
    """The second run does not come by the operations of the first one."""


@dataclass(frozen=True)
class _Output:
    """What an operation returned, how often each of its tensors had been changed in place then, and how many tensors had been saved before."""

    operation: Any
    value: Any
    versions: list[int]
    place: int

    def detached(self) -> _Output:
        return replace(self, value=_detached(self.value))

    @property
    def is_intact(self) -> bool:
        return self.versions == [tensor._version for tensor in _tensors(self.value)]


class Kept:
    """The outputs that one call of a block keeps."""

    def __init__(self) -> None:
        self._outputs: list[_Output] = []

    @contextlib.contextmanager
    def first_run(self, saved_count: Callable[[], int], kept_bytes: SavedBytes | None) -> Iterator[None]:
        """Keep outputs, and add their bytes to `kept_bytes`. `saved_count` says how many tensors have been saved for backward so far."""
        try:
            with _Keeping(self._outputs, saved_count):
                yield
        except BaseException:
            self._outputs.clear()
            raise
        # The second run ends at the last tensor to be saved: what comes after is not needed. And cut off from the graph, which holds
        # this object, for else neither would ever be freed. A detached tensor counts the changes of its original.
        self._outputs = [output.detached() for output in self._outputs if output.place < saved_count()]
        if kept_bytes is not None:
            for output in self._outputs:
                for tensor in _tensors(output.value):
                    kept_bytes.add(tensor)

    @contextlib.contextmanager
    def second_run(self) -> Iterator[None]:
        """Give the outputs again.

        Raises: OtherCourse, inside.
        """
        with _Returning(self._outputs):
            yield


class _Keeping(TorchDispatchMode):
    def __init__(self, outputs: list[_Output], saved_count: Callable[[], int]) -> None:
        super().__init__()
        self._outputs = outputs
        self._saved_count = saved_count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if is_kept(func, args, kwargs or {}):
            self._outputs.append(_Output(func, value, [tensor._version for tensor in _tensors(value)], self._saved_count()))
        return value


class _Returning(TorchDispatchMode):
    def __init__(self, outputs: list[_Output]) -> None:
        super().__init__()
        self._outputs = iter(outputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_kept(func, args, kwargs or {}):
            output = next(self._outputs, None)
            if output is None or output.operation is not func:
                raise OtherCourse(f"it came to {func}, and in forward to {'nothing more' if output is None else output.operation}")
            if output.is_intact:  # else somebody has changed it in place, which only doing it again undoes
                return _detached(output.value)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _detached(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, value)
