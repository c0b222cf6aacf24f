"""ringfold, in memory from `comm.empty` (registered) or any other (unregistered)."""

from __future__ import annotations

import ringfold as rf
import torch
from ringfold.benchmarks.sides.side import Call, Place, Side
from torch import Tensor

__all__ = ["Ringfold"]


class Ringfold(Side):
    def __init__(self, place: Place) -> None:  # noqa: ARG002
        self.comm = rf.init().world
        self.rank, self.size = self.comm.rank, self.comm.size
        self.registered = False
        self.algorithm: str | None = None

    def choose(self, memory: str, algorithm: str) -> None:
        self.registered = memory == "registered"
        self.algorithm = None if algorithm == "auto" else algorithm

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.comm.empty(count, dtype=dtype) if self.registered else super().empty(count, dtype)

    def version(self) -> str:
        return rf.__version__

    def close(self) -> None:
        rf.shutdown()

    def all_reduce(self, tensor: Tensor, reduction: str) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.all_reduce(tensor, reduction, algorithm=algorithm)

    def reduce_scatter(self, output: Tensor, input: Tensor, reduction: str) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.reduce_scatter(output, input, reduction, algorithm=algorithm)

    def all_gather(self, output: Tensor, input: Tensor) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.all_gather(output, input, algorithm=algorithm)

    def broadcast(self, tensor: Tensor, root: int) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.broadcast(tensor, root, algorithm=algorithm)

    def reduce(self, tensor: Tensor, root: int, reduction: str) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.reduce(tensor, root, reduction, algorithm=algorithm)

    def gather(self, output: Tensor | None, input: Tensor, root: int) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.gather(output, input, root, algorithm=algorithm)

    def scatter(self, output: Tensor, input: Tensor | None, root: int) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.scatter(output, input, root, algorithm=algorithm)

    def all_to_all(self, output: Tensor, input: Tensor) -> Call:
        comm, algorithm = self.comm, self.algorithm
        return lambda: comm.all_to_all(output, input, algorithm=algorithm)

    def send_recv(self, output: Tensor, input: Tensor, to: int, source: int) -> Call:
        comm = self.comm

        def call() -> None:
            sent = comm.send(input, to, async_op=True)
            comm.recv(output, source)
            assert sent is not None
            sent.wait()

        return call

    def barrier(self) -> Call:
        return self.comm.barrier
