"""Axis: the ranks over which tensors are split, and what it cost them that an operation could not be done in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ringfold.collectives.communicator import Communicator
from torch import Tensor

__all__ = ["Axis"]


class Axis:
    """One axis of the mesh, `comm`.

    gathered: by operation that has no rule, how many tensors were put together for it. exchanged: by collective, how many there were and the bytes
    of their vectors; both since `forget`. attend: how queries of one rank see keys of another, where sequences are divided over the axis.
    sums_parameters: what ranks have of a parameter's gradient is summed over the axis, as it is over "dp".
    """

    def __init__(self, name: str, comm: Communicator, attend: Callable[..., Tensor] | None = None, sums_parameters: bool = False) -> None:
        self.name = name
        self.sums_parameters = sums_parameters
        self.attend = attend
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.gathered: Counter[str] = Counter()
        self.exchanged: dict[str, tuple[int, int]] = {}

    def note(self, operation: str, nbytes: int) -> None:
        """Count a collective."""
        count, total = self.exchanged.get(operation, (0, 0))
        self.exchanged[operation] = count + 1, total + nbytes

    def forget(self) -> None:
        """Count from now on."""
        self.gathered.clear()
        self.exchanged.clear()

    def __repr__(self) -> str:
        return f"{self.name} {self.rank} of {self.size}"
