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
recompute, a tenth of a block's forward or so, while norms and activation functions are half of what is left to keep.

A batched product counts as scores if both sides of its matrices are more than SCORES times as long as the dot products are deep; a layer
that widens by a factor of four is none.

Fused attention with dropout is redone: kept, it would not draw its random numbers again, and all that are drawn after it would be others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

__all__ = ["policy"]

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


def policy(_: SelectiveCheckpointContext, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Say whether the output of an operation is kept."""
    kept = (
        operation in MATRIX
        or (operation in BATCHED and not _is_scores(arguments))
        or (operation in ATTENTION and not _drops(operation, arguments, keywords))
    )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_scores(arguments: tuple[Any, ...]) -> bool:
    left, right = arguments[-2:]  # (B, m, k), (B, k, n)
    return bool(min(left.shape[-2], right.shape[-1]) > SCORES * left.shape[-1])


def _drops(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Return whether an attention drops anything; its arguments are as its schema names them."""
    place = [argument.name for argument in operation._schema.arguments].index("dropout_p")
    return bool(keywords.get("dropout_p", arguments[place] if place < len(arguments) else 0.0))
