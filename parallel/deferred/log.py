"""Log: the operations that a model's values come from, by the storages that they read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["START", "GaveUp", "Log", "Operation", "Origin", "View"]

# Where a generator's state comes from: None, from its last draw; the index of an operation, from that one's draw; a state that the function set.
Origin = Tensor | int | None
START = -1  # the state in which recording found torch's own generator


class GaveUp(Exception):
    """What the function does cannot be written down."""


@dataclass(frozen=True)
class View:
    """A fake tensor, by what it shows of its storage."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class Operation:
    call: Callable[..., Any]
    args: tuple[Any, ...]  # with View for fake tensors
    kwargs: dict[str, Any]
    outputs: list[View | None]  # for each tensor among its results its view, where it made that tensor's storage
    reads: set[int]  # storages
    overwrites: set[int]
    generator: torch.Generator | None = None  # that it draws from
    origin: Origin = None  # of the generator's state
    state: Tensor | None = None  # of the generator when it draws, once prepared


@dataclass(eq=False)
class Log:
    operations: list[Operation] = field(default_factory=list)
    writers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by storage, indices of operations
    nbytes: list[int] = field(default_factory=list)  # by storage

    def sources(self, storage: int) -> list[int]:
        """Return the indices of the operations that a storage's values come from.

        Raises:
            GaveUp: nothing has written it.
        """
        found: set[int] = set()
        asked = {(storage, len(self.operations))}
        waiting = list(asked)
        while waiting:
            place, before = waiting.pop()
            writers = [index for index in self.writers[place] if index < before]
            if not writers and self.nbytes[place]:
                raise GaveUp("memory that was never written is read, or is a parameter")
            for index in reversed(writers):
                found.add(index)
                for other in self.operations[index].reads:
                    if other != place and (other, index) not in asked:
                        asked.add((other, index))
                        waiting.append((other, index))
                if place in self.operations[index].overwrites:
                    break
        return sorted(found)
