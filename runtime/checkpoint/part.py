"""TensorPart: the contiguous piece of a larger tensor that this rank saves, or wants when it loads.

A state tree holds one wherever another layout's tree holds the whole tensor. Only memory order counts: `start` is the index of the first
element in the row-major tensor, which is the whole one, or the local tensor of a Placement where axes of the mesh shard it. The pieces that
ranks save of one tensor cover it; copies of a piece are saved once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.placement import Local, Placement


class Stretch:
    """Elements in a row of the tensor that is, or whose shape is, `of`."""

    of: tuple[int, ...] | Local

    @property
    def local(self) -> Local:
        """The local tensor; where only a shape was given it is the whole one, without a name."""
        return self.of if isinstance(self.of, Local) else local_whole(self.of)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.local.placement.shape


@dataclass(frozen=True)
class TensorPart(Stretch):
    """Elements `start` to `start + values.numel()` of a flattened tensor; `values` is 1-dimensional.

    of: the tensor's shape, or the local tensor that it is.

    Raises:
        ConfigError: there are no such elements, or `values` has more dimensions.
    """

    values: torch.Tensor
    of: tuple[int, ...] | Local
    start: int

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or not 0 <= self.start <= self.stop <= prod(self.local.shape):
            raise ConfigError(f"values of shape {tuple(self.values.shape)} are no part of a tensor of {self.of} that begins at {self.start}")

    @property
    def stop(self) -> int:
        """The index behind the last element."""
        return self.start + self.values.numel()


def local_whole(shape: tuple[int, ...], name: str = "") -> Local:
    """Return what a rank holds that has all of a tensor."""
    return Local(Placement(name, shape))
