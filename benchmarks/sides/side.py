"""What a rank of a side is given, and what a side without its own kinds of memory does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Call", "Place", "Side", "Unsupported"]

Call = Callable[[], object]  # a tensor that it returns is the output: some libraries allocate it themselves


class Unsupported(Exception):
    """The library cannot do this; the message says what."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of a group meet: `folder` exists until all have joined, `max_nbytes` bounds every vector."""

    folder: Path
    size: int
    max_nbytes: int


class Side:
    """A library's ranks; sets `rank` and `size`. `device` is where the tensors of the case are that is prepared."""

    rank: int
    size: int
    device = torch.device("cpu")

    def choose(self, memory: str, algorithm: str) -> None:
        """Use this kind of memory and this algorithm from now on."""

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=self.device)

    def version(self) -> str:
        """Return the library's name and version."""
        raise NotImplementedError

    def averaged(self, call: Call, output: torch.Tensor, reduction: str) -> Call:
        """Return `call`, a sum, followed by the division of its output if the reduction is an average: for libraries without one."""
        if reduction != "avg":
            return call
        size, rounding = self.size, None if output.is_floating_point() else "trunc"

        def then_divide() -> None:
            call()
            output.div_(size, rounding_mode=rounding)

        return then_divide

    def close(self) -> None:
        """Leave; the process ends afterwards."""
