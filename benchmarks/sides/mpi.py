"""An MPI library through mpi4py, whose calls on buffers add about a microsecond. MPI has no average: there it is a sum and a division, both timed."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI  # type: ignore[import-not-found,unused-ignore]
from ringfold.benchmarks.sides.side import Call, Place, Side, Unsupported
from torch import Tensor

__all__ = ["Mpi"]

_TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
}
_REDUCTIONS = {"sum": MPI.SUM, "avg": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "prod": MPI.PROD}


def _buffer(tensor: Tensor) -> list[Any]:
    """Return mpi4py's form of a tensor: memory and type. What only moves is bytes, so any dtype will do."""
    return [tensor.view(torch.uint8).numpy(), _TYPES.get(tensor.dtype, MPI.BYTE)]


def _terms(tensor: Tensor) -> list[Any]:
    if tensor.dtype not in _TYPES:
        raise Unsupported(f"MPI reduces no {tensor.dtype}")
    return _buffer(tensor)


class Mpi(Side):
    def __init__(self, place: Place) -> None:  # noqa: ARG002
        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size

    def version(self) -> str:
        name, numbers = MPI.get_vendor()
        return f"{name} {'.'.join(map(str, numbers))}"

    def close(self) -> None:
        MPI.Finalize()

    def all_reduce(self, tensor: Tensor, reduction: str) -> Call:
        world, place, buffer, code = self.world, MPI.IN_PLACE, _terms(tensor), _REDUCTIONS[reduction]
        return self.averaged(lambda: world.Allreduce(place, buffer, code), tensor, reduction)

    def reduce_scatter(self, output: Tensor, input: Tensor, reduction: str) -> Call:
        world, mine, all_terms, code = self.world, _terms(output), _terms(input), _REDUCTIONS[reduction]
        return self.averaged(lambda: world.Reduce_scatter_block(all_terms, mine, code), output, reduction)

    def all_gather(self, output: Tensor, input: Tensor) -> Call:
        world, mine, everything = self.world, _buffer(input), _buffer(output)
        return lambda: world.Allgather(mine, everything)

    def broadcast(self, tensor: Tensor, root: int) -> Call:
        world, buffer = self.world, _buffer(tensor)
        return lambda: world.Bcast(buffer, root)

    def reduce(self, tensor: Tensor, root: int, reduction: str) -> Call:
        world, buffer, code = self.world, _terms(tensor), _REDUCTIONS[reduction]
        if self.rank != root:
            return lambda: world.Reduce(buffer, None, code, root)
        place = MPI.IN_PLACE
        return self.averaged(lambda: world.Reduce(place, buffer, code, root), tensor, reduction)

    def gather(self, output: Tensor | None, input: Tensor, root: int) -> Call:
        world, mine, everything = self.world, _buffer(input), _buffer(output) if output is not None else None
        return lambda: world.Gather(mine, everything, root)

    def scatter(self, output: Tensor, input: Tensor | None, root: int) -> Call:
        world, mine, everything = self.world, _buffer(output), _buffer(input) if input is not None else None
        return lambda: world.Scatter(everything, mine, root)

    def all_to_all(self, output: Tensor, input: Tensor) -> Call:
        world, received, sent = self.world, _buffer(output), _buffer(input)
        return lambda: world.Alltoall(sent, received)

    def send_recv(self, output: Tensor, input: Tensor, to: int, source: int) -> Call:
        world, received, sent = self.world, _buffer(output), _buffer(input)
        return lambda: world.Sendrecv(sent, to, recvbuf=received, source=source)

    def barrier(self) -> Call:
        barrier: Call = self.world.Barrier
        return barrier
