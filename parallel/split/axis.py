"""Axis: the ranks over which tensors are split, and what it cost them that an operation could not be done in parts."""

from __future__ import annotations

from collections import Counter

from ringfold.collectives.communicator import Communicator

__all__ = ["Axis"]


class Axis:
    """One axis of the mesh, `comm`; `gathered` counts, by operation, the tensors that were put together for it.

    attention: how queries of one rank see keys of another, "ring" or "ulysses".
    """

    def __init__(self, name: str, comm: Communicator, attention: str = "ring") -> None:
        self.name = name
        self.attention = attention
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.gathered: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"{self.name} {self.rank} of {self.size}"
