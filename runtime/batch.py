"""Batch: what a train step is given, as inputs, target and a number of rows.

A batch is a pair `(inputs, target)`, where inputs are one tensor, a tuple or list (positional arguments of the model) or a mapping
(keywords); or a mapping with `labels`, which are the target, and the rest are keywords. Rows are counted and cut as in rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.rows import row_count, row_range, take_rows
from torch import Tensor, nn

__all__ = ["Batch", "tensors_in"]


@dataclass(frozen=True)
class Batch:
    """Some rows: the model's arguments and the loss's target."""

    inputs: Any
    target: Any
    rows: int

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Read a user's batch.

        Raises: ConfigError if it is neither a pair nor a mapping with labels, or if its parts have different numbers of rows.
        """
        rows = row_count(batch)
        if isinstance(batch, Mapping):
            if "labels" not in batch:
                raise ConfigError(f"batch: a mapping needs the key 'labels', this one has {', '.join(map(repr, batch))}. Or give (inputs, target).")
            return cls({name: value for name, value in batch.items() if name != "labels"}, batch["labels"], rows)
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return cls(batch[0], batch[1], rows)
        seen = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ConfigError(f"batch: expected a pair (inputs, target) or a mapping with labels, got a {seen}. Several inputs are a tuple of their own.")

    def to(self, device: torch.device, cast: torch.dtype | None) -> Batch:
        """Return the batch on a device, floating inputs as `cast` if that is given, floating targets in 32 bits at least: no loss sees fewer."""
        if cast is None and device.type == "cpu":
            return self
        target = None if cast is None else torch.promote_types(cast, torch.float32)
        return Batch(_placed(self.inputs, device, cast), _placed(self.target, device, target), self.rows)

    def microbatches(self, count: int) -> list[Batch]:
        """Return `count` batches of nearly equal numbers of rows, the longer ones first; some may be empty."""
        if count == 1:
            return [self]
        parts = []
        for i in range(count):
            start, stop = row_range(self.rows, i, count)
            inputs, target = take_rows((self.inputs, self.target), start, stop)
            parts.append(Batch(inputs, target, stop - start))
        return parts

    def call(self, module: nn.Module) -> Any:
        """Return the model's output."""
        if isinstance(self.inputs, Mapping):
            return module(**self.inputs)
        if isinstance(self.inputs, tuple | list):
            return module(*self.inputs)
        return module(self.inputs)


def _placed(value: Any, device: torch.device, cast: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, cast if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: _placed(part, device, cast) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_placed(part, device, cast) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_placed(part, device, cast) for part in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of a nested value: containers, and objects that hold tensors as attributes (model outputs)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for part in vars(value).values():
            yield from tensors_in(part)
