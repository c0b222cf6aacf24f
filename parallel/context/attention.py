"""Attention of a sequence that is divided among ranks: around a ring, by turning heads into sequence and back, or on gathered keys.

ring        keys and values go round: nobody holds all of them at once. Without dropout
ulysses     all to all, so that each rank has some heads of the whole sequence (Jacobs et al., arXiv:2309.14509); the ranks divide the heads
gathered    every rank has all keys and values of its batch for a while: whatever the other two do not do
"""

from __future__ import annotations

from dataclasses import replace

import torch
from ringfold.parallel.context.ring import ring_attention
from ringfold.parallel.split import exchange
from ringfold.parallel.split.attention import Attention, Options
from ringfold.parallel.split.cut import Cut
from torch import Tensor

__all__ = ["over_tokens"]

HEADS, TOKENS = 1, 2


def over_tokens(function: Attention, query: Tensor, key: Tensor, value: Tensor, cut: Cut, options: Options, algorithm: str = "ring") -> Tensor:
    """Return this rank's part of the attention of the whole; `cut` divides dimension -2 of all three, whose leading dimensions are equal.

    function: scaled_dot_product_attention. algorithm: "ring" or "ulysses", where that does it. The mask is that of the whole, broadcast as there.
    """
    if query.dim() == 3:
        return over_tokens(function, query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), cut, options, algorithm).squeeze(0)
    if query.dim() != 4:
        return _gathered(function, query, key, value, cut.at(query.dim() - 2), options)
    cut = cut.at(TOKENS)
    if options.mask is not None:
        options = replace(options, mask=options.mask[(None,) * (4 - options.mask.dim())])
    if algorithm == "ulysses" and query.shape[HEADS] % cut.axis.size == 0:
        return _by_heads(function, query, key, value, cut, options)
    if options.dropout or (options.mask is not None and options.mask.requires_grad):
        return _gathered(function, query, key, value, cut, options)
    scale = options.scale if options.scale is not None else query.shape[-1] ** -0.5
    return ring_attention(query, key, value, cut, options.mask, options.is_causal, scale)


def _by_heads(function: Attention, query: Tensor, key: Tensor, value: Tensor, cut: Cut, options: Options) -> Tensor:
    if key.shape[HEADS] % cut.axis.size:
        key, value = (each.repeat_interleave(query.shape[HEADS] // key.shape[HEADS], HEADS) for each in (key, value))
    mask = options.mask
    if mask is not None and mask.shape[HEADS] > 1:
        mask = mask.chunk(cut.axis.size, HEADS)[cut.axis.rank]
    query, key, value = (exchange.turn(each, cut, HEADS) for each in (query, key, value))
    key, value = (each.repeat_interleave(query.shape[HEADS] // each.shape[HEADS], HEADS) for each in (key, value))
    return exchange.turn_back(replace(options, mask=mask).call(function, query, key, value), cut, HEADS)


def _gathered(function: Attention, query: Tensor, key: Tensor, value: Tensor, cut: Cut, options: Options) -> Tensor:
    key, value = exchange.lend(key, cut), exchange.lend(value, cut)
    if key.dim() == 4:
        key, value = (each.repeat_interleave(query.shape[HEADS] // each.shape[HEADS], HEADS) for each in (key, value))
    mask = options.mask
    if mask is not None and mask.shape[-2] > 1:
        mask = cut.at(mask.dim() - 2).take(mask)
    if options.is_causal:
        places = torch.arange(cut.length, device=query.device)
        seen = cut.at(0).take(places)[:, None] >= places
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    return replace(options, mask=mask, is_causal=False).call(function, query, key, value)
