"""torch.distributed over gloo, on loopback. It has no average: there it is a sum and a division, both timed."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from ringfold.benchmarks.sides.side import Call, Place, Side
from torch import Tensor
from torch._C._distributed_c10d import FileStore

__all__ = ["Gloo"]

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "prod": dist.ReduceOp.PRODUCT}


class Gloo(Side):
    def __init__(self, place: Place) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: else gloo resolves the host's name, which may lead anywhere
        self.rank, self.size = int(os.environ["RANK"]), place.size
        store = FileStore(str(place.folder / "gloo"), self.size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=60))
        dist.barrier()  # the pairs connect now, while the store's file is there

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def close(self) -> None:
        dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor, reduction: str) -> Call:
        code = _REDUCTIONS[reduction]
        return self.averaged(lambda: dist.all_reduce(tensor, code), tensor, reduction)

    def reduce_scatter(self, output: Tensor, input: Tensor, reduction: str) -> Call:
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        code = _REDUCTIONS[reduction]
        return self.averaged(lambda: dist.reduce_scatter_tensor(output, input, code), output, reduction)

    def all_gather(self, output: Tensor, input: Tensor) -> Call:
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        return lambda: dist.all_gather_into_tensor(output, input)

    def broadcast(self, tensor: Tensor, root: int) -> Call:
        return lambda: dist.broadcast(tensor, root)

    def reduce(self, tensor: Tensor, root: int, reduction: str) -> Call:
        code = _REDUCTIONS[reduction]
        call: Call = lambda: dist.reduce(tensor, root, code)  # noqa: E731
        return self.averaged(call, tensor, reduction) if self.rank == root else call

    def gather(self, output: Tensor | None, input: Tensor, root: int) -> Call:
        pieces = list(output.chunk(self.size)) if output is not None else None
        return lambda: dist.gather(input, pieces, root)

    def scatter(self, output: Tensor, input: Tensor | None, root: int) -> Call:
        pieces = list(input.chunk(self.size)) if input is not None else None
        return lambda: dist.scatter(output, pieces, root)

    def all_to_all(self, output: Tensor, input: Tensor) -> Call:
        return lambda: dist.all_to_all_single(output, input)

    def send_recv(self, output: Tensor, input: Tensor, to: int, source: int) -> Call:
        def call() -> None:
            sent = dist.isend(input, to)
            dist.recv(output, source)
            assert sent is not None
            sent.wait()

        return call

    def barrier(self) -> Call:
        return dist.barrier
