"""TensorPart: the contiguous piece of a larger tensor that this rank saves, or wants when it loads.

A state tree holds one wherever another layout's tree holds the whole tensor. Only memory order counts: `start` is the index of the first
element in the row-major tensor of `shape`. The pieces that ranks save of one tensor cover it; copies of a piece are saved once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorPart:
    """Elements `start` to `start + values.numel()` of the flattened tensor `shape`; `values` is 1-dimensional."""

    values: torch.Tensor
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """The index behind the last element."""
        return self.start + self.values.numel()
