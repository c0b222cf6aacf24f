"""Elementwise folds with torch operations, for transports in Python libraries: the same results as csrc/reduce, on any device.

f16 and bf16 are widened to f32 and rounded once a fold, integers wrap, min and max keep a NaN, sum and prod of truth values are "or" and "and".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["HALF", "divide", "fold", "fold_all"]

HALF = frozenset({torch.float16, torch.bfloat16})

FOLDS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "prod": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def fold(out: Tensor, left: Tensor, right: Tensor, reduction: str, divisor: int = 1) -> None:
    """Write `left` op `right`, divided by `divisor`, into `out`, which may be either of them; all of one dtype and shape."""
    if out.dtype in HALF:
        wide = FOLDS[reduction](left.float(), right.float())
        if divisor > 1:
            wide /= divisor
        out.copy_(wide)
        return
    FOLDS[reduction](left, right, out=out)
    if divisor > 1:
        divide(out, divisor)


def fold_all(out: Tensor, parts: Sequence[Tensor], reduction: str, divisor: int = 1) -> None:
    """Write parts[0] op parts[1] op ..., divided by `divisor`, into `out`, which shares no memory with any; f16 and bf16 are rounded once."""
    if out.dtype in HALF:
        wide = parts[0].float()
        for part in parts[1:]:
            wide = FOLDS[reduction](wide, part.float())
        out.copy_(wide / divisor if divisor > 1 else wide)
        return
    if len(parts) == 1:
        out.copy_(parts[0])
    left = parts[0]
    for part in parts[1:]:
        left = FOLDS[reduction](left, part, out=out)
    if divisor > 1:
        divide(out, divisor)


def divide(tensor: Tensor, divisor: int) -> None:
    """Divide in place; integers truncate toward zero."""
    torch.div(tensor, divisor, rounding_mode=None if tensor.is_floating_point() else "trunc", out=tensor)
