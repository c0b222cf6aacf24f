"""What the rule of attention hands on: to torch's function, or to whoever knows how queries of one rank see keys of another (`Axis.attend`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Attention", "Options"]

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Options:
    """What scaled_dot_product_attention is given beside queries, keys and values."""

    mask: Tensor | None
    dropout: float
    is_causal: bool
    scale: float | None

    def call(self, function: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(query, key, value, self.mask, self.dropout, self.is_causal, scale=self.scale)
