"""TensorPart: the contiguous piece of a larger tensor that this rank saves, or wants when it loads.

A state tree holds one wherever another layout's tree holds the whole tensor. Only memory order counts: `start` is the index of the first
element in the row-major tensor of `shape`. The pieces that ranks save of one tensor cover it; copies of a piece are saved once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from ringfold.collectives.errors import ConfigError


@dataclass(frozen=True)
class TensorPart:
    """Elements `start` to `start + values.numel()` of the flattened tensor `shape`; `values` is 1-dimensional.

    Raises:
        ConfigError: there are no such elements, or `values` has more dimensions.
    """

    values: torch.Tensor
    shape: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or not 0 <= self.start <= self.stop <= prod(self.shape):
            raise ConfigError(f"values of shape {tuple(self.values.shape)} are no part of a tensor of {self.shape} that begins at {self.start}")

    @property
    def stop(self) -> int:
        """The index behind the last element."""
        return self.start + self.values.numel()
