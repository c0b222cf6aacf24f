"""Requests of MPI as an operation drives them: its own collectives, and messages; of any length, though an MPI count is a C int.

Tensors are given to MPI by address, and are the caller's to keep until a request is complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from ringfold.collectives.fold import divide
from ringfold.collectives.transport import Request
from torch import Tensor

__all__ = ["LIMIT", "Mismatch", "Native", "PointToPoint", "Receive", "Requests", "Send", "pieces"]

# Elements of one MPI call: their counts and displacements are C ints, except in MPI 4.
LIMIT = 1 << 30

TRUTH = {"sum": "LOR", "max": "LOR", "bor": "LOR", "prod": "LAND", "min": "LAND", "band": "LAND", "bxor": "LXOR"}
NUMBERS = {"sum": "SUM", "avg": "SUM", "prod": "PROD", "min": "MIN", "max": "MAX", "band": "BAND", "bor": "BOR", "bxor": "BXOR"}
TYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.float16: "UINT16_T",
    torch.bfloat16: "UINT16_T",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint8: "UINT8_T",
    torch.bool: "C_BOOL",
}


class Mismatch(Exception):
    """A message of another size than was expected; becomes a CollectiveMismatch."""


def pieces(count: int, limit: int) -> list[tuple[int, int]]:
    """Cut `count` elements into pieces of at most `limit`: (begin, length) of each, and one empty piece of nothing."""
    return [(begin, min(limit, count - begin)) for begin in range(0, count, limit)] or [(0, 0)]


def _buffer(MPI: Any, tensor: Tensor | None, begin: int = 0, count: int | None = None) -> list[Any]:
    """Return elements of a flat tensor as MPI takes them, by address; the caller keeps the tensor."""
    if tensor is None:
        return [None, 0, MPI.BYTE]
    width = tensor.element_size()
    count = tensor.numel() - begin if count is None else count
    memory = MPI.buffer.fromaddress(tensor.data_ptr() + begin * width if count else 0, count * width)
    return [memory, count, getattr(MPI, TYPES[tensor.dtype])]


class Requests:
    """Some MPI requests; complete when all are."""

    steps = 1
    waiting_for = -1

    def __init__(self, requests: list[Any]) -> None:
        self._requests = requests

    @property
    def finished(self) -> bool:
        return not self._requests

    @property
    def steps_done(self) -> int:
        return int(self.finished)

    def advance(self) -> bool:
        before = len(self._requests)
        while self._requests and self._requests[0].Test():
            del self._requests[0]
        return len(self._requests) < before


class Send(Requests):
    """One message to one peer, as few sends as its length allows."""

    def __init__(self, MPI: Any, comm: Any, tensor: Tensor, peer: int, tag: int) -> None:
        super().__init__([comm.Isend(_buffer(MPI, tensor, *piece), peer, tag) for piece in pieces(tensor.numel(), LIMIT)])
        self.waiting_for = peer

    def test(self) -> bool:
        self.advance()
        return self.finished


class Receive:
    """One message from one peer, or from whoever sends first (-1), who is known when it is finished."""

    def __init__(self, MPI: Any, comm: Any, tensor: Tensor, peer: int, tag: int) -> None:
        self._MPI, self._comm, self._tensor, self._tag = MPI, comm, tensor, tag
        self.waiting_for = peer
        self._pieces = pieces(tensor.numel(), LIMIT)
        self.steps, self.steps_done = len(self._pieces), 0
        self._requests = self._post(self._pieces if peer >= 0 else self._pieces[:1])

    @property
    def finished(self) -> bool:
        return self.steps_done == self.steps

    def advance(self) -> bool:
        before = self.steps_done
        status = self._MPI.Status()
        while not self.finished and self._requests[self.steps_done].Test(status):
            self._check(status, *self._pieces[self.steps_done])
            self.steps_done += 1
            if self.waiting_for < 0:
                self.waiting_for = status.Get_source()
                self._requests += self._post(self._pieces[1:])
        return self.steps_done > before

    def test(self) -> bool:
        self.advance()
        return self.finished

    def _post(self, some: Sequence[tuple[int, int]]) -> list[Any]:
        source = self.waiting_for if self.waiting_for >= 0 else self._MPI.ANY_SOURCE
        return [self._comm.Irecv(_buffer(self._MPI, self._tensor, *piece), source, self._tag) for piece in some]

    def _check(self, status: Any, _begin: int, count: int) -> None:
        width = self._tensor.element_size()
        arrived = status.Get_count(self._MPI.BYTE)
        if arrived != count * width:
            raise Mismatch(
                f"rank {status.Get_source()} of this axis sent {arrived} bytes where {count * width} were expected: both ends of a message "
                "need the same dtype and count, and every rank must issue the same operations in the same order"
            )


class PointToPoint:
    """The messages of schedules."""

    def __init__(self, MPI: Any, comm: Any) -> None:
        self._MPI = MPI
        self.comm = comm

    def isend(self, tensor: Tensor, peer: int, tag: int) -> Send:
        return Send(self._MPI, self.comm, tensor, peer, tag)

    def irecv(self, tensor: Tensor, peer: int, tag: int) -> Receive:
        return Receive(self._MPI, self.comm, tensor, peer, tag)


class Native(Requests):
    """One of MPI's own collectives, or several over the pieces of a long vector."""

    def __init__(self, MPI: Any, comm: Any, request: Request, rank: int) -> None:
        self._MPI, self._comm, self._request, self._rank = MPI, comm, request, rank
        self._input = None if request.input is None else request.input.detach()
        self._output = None if request.output is None else request.output.detach()
        names = TRUTH if request.dtype is torch.bool else NUMBERS
        self._op = getattr(MPI, names[request.reduction])
        super().__init__(getattr(self, f"_{request.op}")())

    def advance(self) -> bool:
        moved = super().advance()
        if self.finished and self._request.reduction == "avg" and self._output is not None:
            divide(self._output, self._comm.size)
        return moved

    def _pieces(self) -> list[tuple[int, int]]:
        return pieces(self._request.count, LIMIT)

    def _at(self, tensor: Tensor | None, begin: int = 0, count: int | None = None) -> list[Any]:
        return _buffer(self._MPI, tensor, begin, count)

    def _in_pieces(self, tensor: Tensor | None, counts: tuple[int, ...] | None) -> list[Any] | None:
        """Return a tensor that has a piece for each rank; the counts are equal where none are given."""
        if tensor is None:
            return None
        lengths = list(counts or [tensor.numel() // self._comm.size] * self._comm.size)
        memory, _, kind = self._at(tensor)
        return [memory, (lengths, [0, *itertools.accumulate(lengths)][:-1]), kind]

    def _apart(self, source: Tensor, target: Tensor | None) -> Tensor:
        """Return the source in memory that is not the target's: MPI wants no overlap."""
        if target is None or not _overlap(source, target):
            return source
        return source.clone()

    def _all_reduce(self) -> list[Any]:
        return [self._comm.Iallreduce(self._MPI.IN_PLACE, self._at(self._output, *piece), self._op) for piece in self._pieces()]

    def _broadcast(self) -> list[Any]:
        return [self._comm.Ibcast(self._at(self._output, *piece), self._request.root) for piece in self._pieces()]

    def _reduce(self) -> list[Any]:
        root = self._request.root
        if self._rank == root:
            return [self._comm.Ireduce(self._MPI.IN_PLACE, self._at(self._output, *piece), self._op, root) for piece in self._pieces()]
        return [self._comm.Ireduce(self._at(self._input, *piece), None, self._op, root) for piece in self._pieces()]

    def _reduce_scatter(self) -> list[Any]:
        assert self._input is not None
        self._input = self._apart(self._input, self._output)
        counts = list(self._request.input_counts or [self._input.numel() // self._comm.size] * self._comm.size)
        return [self._comm.Ireduce_scatter(self._at(self._input), self._at(self._output), counts, self._op)]

    def _all_gather(self) -> list[Any]:
        everyone = self._in_pieces(self._output, self._request.output_counts)
        return [self._comm.Iallgatherv(self._own(self._input, self._output, everyone), everyone)]

    def _gather(self) -> list[Any]:
        everyone = self._in_pieces(self._output, self._request.output_counts)
        return [self._comm.Igatherv(self._own(self._input, self._output, everyone), everyone, self._request.root)]

    def _scatter(self) -> list[Any]:
        everyone = self._in_pieces(self._input, self._request.input_counts)
        return [self._comm.Iscatterv(everyone, self._own(self._output, self._input, everyone), self._request.root)]

    def _own(self, own: Tensor | None, whole: Tensor | None, everyone: list[Any] | None) -> Any:
        """Return this rank's piece, which may lie where it belongs in the whole already."""
        assert own is not None
        if whole is not None and everyone is not None and own.numel() > 0 and _overlap(own, whole):
            begin = everyone[1][1][self._rank]
            if own.data_ptr() == whole.data_ptr() + begin * whole.element_size():
                return self._MPI.IN_PLACE
        return self._at(own)

    def _all_to_all(self) -> list[Any]:
        sent = self._in_pieces(self._input, self._request.input_counts)
        return [self._comm.Ialltoallv(sent, self._in_pieces(self._output, self._request.output_counts))]

    def _barrier(self) -> list[Any]:
        return [self._comm.Ibarrier()]


def _overlap(one: Tensor, other: Tensor) -> bool:
    def end(tensor: Tensor) -> int:
        return tensor.data_ptr() + tensor.numel() * tensor.element_size()

    return one.data_ptr() < end(other) and other.data_ptr() < end(one)
