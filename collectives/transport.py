"""What moves the bytes of a Communicator's operations: the seam between what an operation means and who carries it out.

Over shared memory and TCP the C++ core does, and Communicator calls it directly, since a small operation must not pay for more than that.
Other transports live in Python libraries (mpi.py, nccl.py): they are given a Request and return a Work. A transport may have collectives of
its own (algorithm "native"); for any other algorithm it runs our Schedule over its point-to-point calls (interpreter.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from ringfold.collectives.work import Work

__all__ = ["Request", "Transport"]


@dataclass(frozen=True, slots=True)
class Request:
    """One operation, checked by the Communicator: names are known, sizes agree, tensors are contiguous and of one supported dtype.

    input, output: flat. In all_reduce and broadcast they are one vector, in place; in reduce the output is the input at `root` and None elsewhere;
    gather's output and scatter's input are None but at `root`.
    input_counts, output_counts: elements of each rank's piece where input, or output, has a piece for each (reduce_scatter, scatter and all_to_all;
    all_gather, gather and all_to_all). The pieces lie one behind the other.
    root: of broadcast, reduce, gather and scatter; else -1. peer and tag: of send and recv; peer -1 receives from anybody.
    """

    op: str
    reduction: str
    dtype: torch.dtype
    count: int
    input: torch.Tensor | None
    output: torch.Tensor | None
    input_counts: tuple[int, ...] | None = None
    output_counts: tuple[int, ...] | None = None
    root: int = -1
    peer: int = -1
    tag: int = 0
    algorithm: str | None = None

    @classmethod
    def of(
        cls,
        op: str,
        reduction: str,
        dtype: torch.dtype,
        count: int,
        input: torch.Tensor | None,
        output: torch.Tensor | None,
        counts: Sequence[int] | None,
        output_counts: Sequence[int] | None,
        root: int,
        algorithm: str | None,
    ) -> Request:
        """Return what a carrier is asked; `counts` are those of the one tensor that has a piece for each rank, or of all_to_all's input."""
        pieces = None if counts is None else tuple(counts)
        return cls(
            op,
            reduction,
            dtype,
            count,
            None if input is None else input.detach().view(-1),
            None if output is None else output.detach().view(-1),
            pieces if op in ("reduce_scatter", "scatter", "all_to_all") else None,
            pieces if op in ("all_gather", "gather") else None if output_counts is None else tuple(output_counts),
            root,
            algorithm=algorithm,
        )


class Transport(Protocol):
    """Carries out the operations of one communicator, in the order in which they are begun."""

    name: str

    def begin(self, request: Request, timeout_s: float, awaited: bool = False) -> Work:
        """Start an operation and return its Work, which keeps the tensors alive; `awaited`: the caller waits for it at once.

        Raises: ConfigError if the transport cannot do it; nothing was sent.
        """

    def close(self) -> None:
        """Free what the transport holds, before the communicator is dropped, which fails what is still in flight; may be called again."""
