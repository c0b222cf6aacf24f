"""Attention: by heads, which know nothing of each other; and of divided sequences, which do (`Axis.attend`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ringfold.parallel.split.attention import Options
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.rules.agreement import agree, labels_of
from ringfold.parallel.split.rules.randomness import drawn_apart
from ringfold.parallel.split.tensor import NO_RULE, cuts_of, made, rule
from torch import Tensor

__all__: list[str] = []

QUERY, KEY, INNER, WIDTH = "query", "key", "inner", "width"
ROWS, COLUMNS = "rows of the mask", "columns of the mask"


@rule(F.scaled_dot_product_attention)
def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa and query.dim() > 2 and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    tokens = _divided_tokens(query, key, value)
    keys = KEY if tokens is None else QUERY  # one label: divided alike
    operands = [*([] if attn_mask is None else [attn_mask]), value, key, query]  # the query's division is the one that stays
    ends: list[list[object]] = [*([] if attn_mask is None else [_of_mask(attn_mask)]), [keys, WIDTH], [keys, INNER], [QUERY, INNER]]
    labels = [[*labels_of(one.shape[:-2], batch), *end] for one, end in zip(operands, ends, strict=True)]
    along = {QUERY, KEY, INNER, WIDTH, ROWS, COLUMNS}
    if any(own[cut.dim] in along for one, own in zip(operands, labels, strict=True) for cut in _cuts(one, tokens)):
        return NO_RULE
    found = agree(operands, labels, "scaled_dot_product_attention")
    *mask, v, k, q = found.locals
    cuts = found.cuts([*range(len(batch)), QUERY, WIDTH])
    options = Options(mask[0] if mask else None, dropout_p, is_causal, scale)
    with drawn_apart(cuts if dropout_p else (), q.device):
        attend = None if tokens is None else tokens.axis.attend
        result = options.call(func, q, k, v) if attend is None else attend(func, q, k, v, tokens, options)
    return made(result, (*batch, query.shape[-2], value.shape[-1]), cuts, found.terms)


def _divided_tokens(*operands: Tensor) -> Cut | None:
    """Return how queries, keys and values are all divided along the sequence, or None if they are not, or not alike, or nobody attends over them."""
    found = [[cut for cut in cuts_of(one) if cut.dim == one.dim() - 2] for one in operands]
    if not all(found):
        return None
    first = found[0][0]
    return first if first.axis.attend is not None and all(cuts[0].matches(first) for cuts in found) else None


def _cuts(operand: Tensor, tokens: Cut | None) -> list[Cut]:
    return [cut for cut in cuts_of(operand) if tokens is None or cut.axis is not tokens.axis]


def _of_mask(mask: Tensor) -> list[object]:
    lengths = mask.shape[-2:]
    return [label if length > 1 else None for label, length in zip((ROWS, COLUMNS), lengths, strict=True)]


@rule(F.multi_head_attention_forward)
def _multi_head(
    func: Any,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """nn.MultiheadAttention, said in functions that have rules; sequence first, as it calls this function."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None or query.dim() != 3:
        return NO_RULE
    weights = [q_proj_weight, k_proj_weight, v_proj_weight] if use_separate_proj_weight else _thirds(in_proj_weight, query.shape[-1])
    biases = [None] * 3 if in_proj_bias is None else _thirds(in_proj_bias, query.shape[-1])
    targets, rows, width = query.shape
    sources = key.shape[0]

    def heads(tensor: Tensor, weight: Any, bias: Any, length: int) -> Tensor:
        return F.linear(tensor, weight, bias).view(length, rows, num_heads, width // num_heads).permute(1, 2, 0, 3)

    q, k, v = (
        heads(one, weight, bias, length)
        for one, weight, bias, length in zip((query, key, value), weights, biases, (targets, sources, sources), strict=True)
    )
    mask = _joint_mask(attn_mask, key_padding_mask, q.dtype, rows, num_heads)
    causal = is_causal and mask is attn_mask is None
    dropout = dropout_p if training else 0.0
    if not need_weights:
        mixed, scores = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    else:
        logits = torch.matmul(q, k.transpose(-2, -1)) / (width // num_heads) ** 0.5
        scores = F.dropout(torch.softmax(logits if mask is None else logits + mask, -1), dropout)
        mixed = torch.matmul(scores, v)
        scores = scores.mean(1) if average_attn_weights else scores
    return F.linear(mixed.permute(2, 0, 1, 3).reshape(targets, rows, width), out_proj_weight, out_proj_bias), scores


def _thirds(tensor: Tensor | None, length: int) -> list[Tensor]:
    assert tensor is not None  # without separate weights
    return list(tensor.split(length))


def _joint_mask(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, rows: int, heads: int) -> Tensor | None:
    """Return what is added to scores [rows, heads, targets, sources]; True in a mask is what is left out."""

    def added(one: Tensor) -> Tensor:
        return torch.zeros_like(one, dtype=dtype).masked_fill(one, float("-inf")) if one.dtype == torch.bool else one.to(dtype)

    if mask is not None:
        mask = added(mask)
        mask = mask.view(rows, heads, *mask.shape[-2:]) if mask.dim() == 3 else mask
    if padding is not None:
        padding = added(padding)[:, None, None, :]
        return padding if mask is None else mask + padding
    return mask
