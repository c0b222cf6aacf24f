"""The object forms of the operations: any Python value, pickled, as bytes. Only authenticated members of the job can send what is unpickled here."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["Objects"]

CPU = torch.device("cpu")  # whatever the script has made the default


class Objects:
    """What Communicator inherits; each method is collective, or a message, as its tensor form is, and raises what that raises."""

    def all_gather_object(self: Communicator, value: Any) -> list[Any]:  # type: ignore[misc]
        """Return the values of all ranks, in rank order."""
        mine = _bytes(value)
        counts = self._sizes(mine)
        everyone = torch.empty(sum(counts), dtype=torch.uint8, device=CPU)
        self.all_gather(everyone, mine, counts=counts)
        return [_value(piece) for piece in everyone.split(counts)]

    def broadcast_object(self: Communicator, value: Any, src: int = 0) -> Any:  # type: ignore[misc]
        """Return rank `src`'s value on every rank; on `src` itself the very object."""
        self._check_peer("broadcast_object", src)
        content = _bytes(value) if self.rank == src else torch.empty(0, dtype=torch.uint8, device=CPU)
        size = torch.tensor([content.numel()], device=CPU)
        self.broadcast(size, src)
        if self.rank != src:
            content = torch.empty(int(size), dtype=torch.uint8, device=CPU)
        self.broadcast(content, src)
        return value if self.rank == src else _value(content)

    def gather_object(self: Communicator, value: Any, dst: int = 0) -> list[Any] | None:  # type: ignore[misc]
        """Return the values of all ranks, in rank order, on rank `dst`; None elsewhere."""
        self._check_peer("gather_object", dst)
        mine = _bytes(value)
        counts = self._sizes(mine)
        everyone = torch.empty(sum(counts), dtype=torch.uint8, device=CPU) if self.rank == dst else None
        self.gather(everyone, mine, dst, counts=counts)
        return None if everyone is None else [_value(piece) for piece in everyone.split(counts)]

    def scatter_object(self: Communicator, values: Sequence[Any] | None, src: int = 0) -> Any:  # type: ignore[misc]
        """Return the value that rank `src` has for this rank; `values` is one for each rank there, and ignored elsewhere."""
        self._check_peer("scatter_object", src)
        if self.rank == src:
            self._check_one_each("scatter_object", values)
        pieces = [_bytes(value) for value in values or ()] if self.rank == src else []
        sizes = torch.tensor([piece.numel() for piece in pieces] or [0] * self.size, device=CPU)
        self.broadcast(sizes, src)
        counts = sizes.tolist()
        mine = torch.empty(counts[self.rank], dtype=torch.uint8, device=CPU)
        self.scatter(mine, torch.cat(pieces) if pieces else None, src, counts=counts)
        return _value(mine)

    def all_to_all_object(self: Communicator, values: Sequence[Any]) -> list[Any]:  # type: ignore[misc]
        """Return what each rank has for this rank, in rank order; `values` is one for each rank."""
        self._check_one_each("all_to_all_object", values)
        pieces = [_bytes(value) for value in values]
        sent = torch.tensor([piece.numel() for piece in pieces], device=CPU)
        received = torch.empty_like(sent)
        self.all_to_all(received, sent)
        counts = received.tolist()
        arrived = torch.empty(sum(counts), dtype=torch.uint8, device=CPU)
        self.all_to_all(arrived, torch.cat(pieces), output_counts=counts, input_counts=sent.tolist())
        return [_value(piece) for piece in arrived.split(counts)]

    def send_object(self: Communicator, value: Any, dst: int, tag: int = 0) -> None:  # type: ignore[misc]
        """Send a value to rank `dst`, whose next recv_object from this rank with this tag takes it."""
        content = _bytes(value)
        self.send(torch.tensor([content.numel()], device=CPU), dst, tag)
        self.send(content, dst, tag)

    def recv_object(self: Communicator, src: int | None = None, tag: int = 0) -> Any:  # type: ignore[misc]
        """Return what rank `src`, or with None any rank, sends with this tag next."""
        size = torch.empty(1, dtype=torch.int64, device=CPU)
        work = self.recv(size, src, tag, async_op=True)
        assert work is not None
        work.wait()
        content = torch.empty(int(size), dtype=torch.uint8, device=CPU)
        self.recv(content, work.source, tag)
        return _value(content)

    def _sizes(self: Communicator, mine: torch.Tensor) -> list[int]:  # type: ignore[misc]
        sizes = torch.zeros(self.size, dtype=torch.int64, device=CPU)
        self.all_gather(sizes, torch.tensor([mine.numel()], device=CPU))
        return list(sizes.tolist())


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _value(content: torch.Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())
