"""Every operation that is measured: its share of the bus, what each rank puts in, and what must come out.

*Bytes* are those of the whole vector, as nccl-tests counts: what all_gather's output, reduce_scatter's input and all_to_all's input hold on each
rank, what gather's output and scatter's input hold at the root. The factor from algorithm to bus bandwidth is nccl-tests' (doc/PERFORMANCE.md):
the share of the vector that has to cross some rank's link in any algorithm.

Reductions get ones and twos in random places, exact in every dtype and reduction for up to 8 ranks; moves get random integers below 100. So
results are compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "MOST_RANKS_OF_PROD", "OPERATIONS", "REDUCTIONS", "Case", "Operation"]

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8")
REDUCTIONS = ("sum", "avg", "min", "max", "prod")
MOST_RANKS_OF_PROD = 8  # 2^4 x 1^4 is at most 16; int8 would still hold 2^6
ROOT = 0


@dataclass(frozen=True)
class Case:
    """One size of one operation as one rank sees it."""

    rank: int
    size: int
    count: int
    dtype: torch.dtype
    reduction: str

    def vector(self, rank: int) -> Tensor:
        """Return what `rank` holds before an operation that moves."""
        numbers = torch.randint(0, 100, (self.count,), generator=torch.Generator().manual_seed(self.count * 64 + rank), dtype=torch.uint8)
        return numbers.to(self.dtype)

    def term(self, rank: int) -> Tensor:
        """Return what `rank` holds before a reduction: ones and twos; ranks of the same parity hold the same."""
        pattern = torch.randint(0, 2, (self.count,), generator=torch.Generator().manual_seed(self.count), dtype=torch.uint8)
        return (1 + (pattern + rank) % 2).to(self.dtype)

    def reduced(self) -> Tensor:
        even, odd = self.term(0), self.term(1)
        if self.size == 1:
            return even
        if self.reduction in ("min", "max"):
            return torch.minimum(even, odd) if self.reduction == "min" else torch.maximum(even, odd)
        if self.reduction == "prod":
            return even ** ((self.size + 1) // 2) * odd ** (self.size // 2)
        total = even.to(torch.int64) * ((self.size + 1) // 2) + odd.to(torch.int64) * (self.size // 2)
        if self.reduction == "avg":
            if not self.dtype.is_floating_point:
                return (total // self.size).to(self.dtype)
            return (total.to(torch.promote_types(self.dtype, torch.float32)) / self.size).to(self.dtype)
        return total.to(self.dtype)

    def piece(self, whole: Tensor, rank: int) -> Tensor:
        """Return `rank`'s part of a whole vector, whose count is a multiple of the number of ranks."""
        return whole.view(self.size, -1)[rank]


Values = Callable[[Case], Tensor | None]


@dataclass(frozen=True)
class Operation:
    """How to measure one operation.

    `bind(side, output, input, case)` returns the call to time, with the tensors bound. An operation in place has one tensor, given as both.
    `expected` is None where a rank gets nothing.
    """

    bus_factor: Callable[[int], float]
    input: Values
    expected: Values
    bind: Callable[[Any, Any, Any, Case], Callable[[], Any]]
    reduces: bool = False
    in_place: bool = False
    splits: bool = False  # the vector has one piece for each rank
    moves: bool = True  # False: no data at all


def _share(size: int) -> float:
    return (size - 1) / size


def _pieces(case: Case, at: Callable[[int], int]) -> Tensor:
    return torch.cat([case.piece(case.vector(rank), at(rank)) for rank in range(case.size)])


OPERATIONS = {
    "all_reduce": Operation(
        lambda size: 2 * _share(size),
        input=lambda case: case.term(case.rank),
        expected=lambda case: case.reduced(),
        bind=lambda side, output, _, case: side.all_reduce(output, case.reduction),
        reduces=True,
        in_place=True,
    ),
    "reduce_scatter": Operation(
        _share,
        input=lambda case: case.term(case.rank),
        expected=lambda case: case.piece(case.reduced(), case.rank),
        bind=lambda side, output, input, case: side.reduce_scatter(output, input, case.reduction),
        reduces=True,
        splits=True,
    ),
    "all_gather": Operation(
        _share,
        input=lambda case: case.piece(case.vector(case.rank), case.rank),
        expected=lambda case: _pieces(case, lambda rank: rank),
        bind=lambda side, output, input, _: side.all_gather(output, input),
        splits=True,
    ),
    "broadcast": Operation(
        lambda _: 1.0,
        input=lambda case: case.vector(case.rank),
        expected=lambda case: case.vector(ROOT),
        bind=lambda side, output, _, __: side.broadcast(output, ROOT),
        in_place=True,
    ),
    "reduce": Operation(
        lambda _: 1.0,
        input=lambda case: case.term(case.rank),
        expected=lambda case: case.reduced() if case.rank == ROOT else None,
        bind=lambda side, output, _, case: side.reduce(output, ROOT, case.reduction),
        reduces=True,
        in_place=True,
    ),
    "gather": Operation(
        _share,
        input=lambda case: case.piece(case.vector(case.rank), case.rank),
        expected=lambda case: _pieces(case, lambda rank: rank) if case.rank == ROOT else None,
        bind=lambda side, output, input, _: side.gather(output, input, ROOT),
        splits=True,
    ),
    "scatter": Operation(
        _share,
        input=lambda case: case.vector(ROOT) if case.rank == ROOT else None,
        expected=lambda case: case.piece(case.vector(ROOT), case.rank),
        bind=lambda side, output, input, _: side.scatter(output, input, ROOT),
        splits=True,
    ),
    "all_to_all": Operation(
        _share,
        input=lambda case: case.vector(case.rank),
        expected=lambda case: _pieces(case, lambda _: case.rank),
        bind=lambda side, output, input, _: side.all_to_all(output, input),
        splits=True,
    ),
    "send_recv": Operation(
        lambda _: 1.0,
        input=lambda case: case.vector(case.rank),
        expected=lambda case: case.vector((case.rank - 1) % case.size),
        bind=lambda side, output, input, case: side.send_recv(output, input, (case.rank + 1) % case.size, (case.rank - 1) % case.size),
    ),
    "barrier": Operation(
        lambda _: 0.0,
        input=lambda _: None,
        expected=lambda _: None,
        bind=lambda side, *_: side.barrier(),
        moves=False,
    ),
}
