"""Attention to some of the keys, and how such parts are put together (as FlashAttention does with blocks; Dao et al., arXiv:2205.14135).

    out = sum_j exp(lse_j - lse) out_j,   lse = log sum_j exp(lse_j)

The gradient of a part follows from the whole's `out` and `lse`: no weight is ever formed but those of the part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attend", "attend_backward", "merged"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of [B, H, T, E] over the keys given; lse is [B, H, T], in float32 at least, and -inf where no key may be seen.

    mask: what is added to scores, or True where a key may be seen, as torch has it; causal: the first query sees the first key, and so on.
    """
    key, value = _for_each_head(key, query), _for_each_head(value, query)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    if _has_flash(query, value):
        out, lse = _flash(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        if mask is not None:
            nothing = (mask == -math.inf).all(-1)
            lse = lse.masked_fill(nothing.expand_as(lse), -math.inf)  # which the function calls 0
        return out, lse
    scores = _scores(query, key, mask, is_causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - _finite(lse).unsqueeze(-1)).exp()
    return (weights.to(value.dtype) @ value), lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the keys given; `grad`, `out` and `lse` are of attention to all keys."""
    groups = query.shape[1] // key.shape[1]
    keys, values = _for_each_head(key, query), _for_each_head(value, query)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    if _has_flash(query, value):
        lse = _finite(lse).transpose(1, 2).contiguous().transpose(1, 2)  # the strides that the function gives and takes
        found = _flash_backward(grad, query, keys, values, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
        of_query, of_keys, of_values = found
    else:
        weights = (_scores(query, keys, mask, is_causal, scale) - _finite(lse).unsqueeze(-1)).exp()
        of_values = weights.to(grad.dtype).mT @ grad
        delta = (grad * out).sum(-1, keepdim=True, dtype=weights.dtype)
        of_scores = (weights * ((grad @ values.mT) - delta) * scale).to(query.dtype)
        of_query, of_keys = of_scores @ keys, of_scores.mT @ query
    return of_query, _of_groups(of_keys, groups), _of_groups(of_values, groups)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and query.numel() > 0


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put (out, lse) of several parts of the keys together."""
    if len(parts) == 1:
        return parts[0]
    every = torch.stack([lse for _, lse in parts])
    lse = every.logsumexp(0)
    shares = (every - _finite(lse)).exp().unsqueeze(-1)
    total = sum((share * out for share, (out, _) in zip(shares, parts, strict=True)), torch.zeros((), dtype=lse.dtype, device=lse.device))
    return total.to(parts[0][0].dtype), lse


def _for_each_head(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor if tensor.shape[1] == query.shape[1] else tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _of_groups(grad: Tensor, groups: int) -> Tensor:
    return grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(wide) * scale
    if mask is not None:
        scores = scores + mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def _finite(lse: Tensor) -> Tensor:
    """Queries that see nothing have weights of zero: exp(-inf - 0)."""
    return lse.masked_fill(lse == -math.inf, 0.0)
