"""Horovod for torch, over MPI. Names are fixed, as in training, so its cache of responses serves every call after the first."""

from __future__ import annotations

from typing import Any

import horovod  # type: ignore[import-not-found,unused-ignore]
import horovod.torch as hvd  # type: ignore[import-not-found,unused-ignore]
from ringfold.benchmarks.sides.side import Call, Place, Side
from torch import Tensor

__all__ = ["Horovod"]


class Horovod(Side):
    def __init__(self, place: Place) -> None:  # noqa: ARG002
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.reductions: dict[str, Any] = {"sum": hvd.Sum, "avg": hvd.Average, "min": hvd.Min, "max": hvd.Max, "prod": hvd.Product}

    def version(self) -> str:
        return f"Horovod {horovod.__version__}"

    def close(self) -> None:
        hvd.shutdown()

    def all_reduce(self, tensor: Tensor, reduction: str) -> Call:
        code, name = self.reductions[reduction], f"all_reduce {tensor.dtype} {tensor.numel()} {reduction}"
        return lambda: hvd.allreduce_(tensor, op=code, name=name)

    def all_gather(self, output: Tensor, input: Tensor) -> Call:
        name = f"all_gather {output.dtype} {output.numel()}"
        return lambda: hvd.allgather(input, name=name)

    def broadcast(self, tensor: Tensor, root: int) -> Call:
        name = f"broadcast {tensor.dtype} {tensor.numel()}"
        return lambda: hvd.broadcast_(tensor, root, name=name)

    def all_to_all(self, output: Tensor, input: Tensor) -> Call:
        name = f"all_to_all {output.dtype} {output.numel()}"
        return lambda: hvd.alltoall(input, name=name)

    def barrier(self) -> Call:
        barrier: Call = hvd.barrier
        return barrier
