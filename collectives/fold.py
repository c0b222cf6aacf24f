"""Elementwise folds with torch operations, for transports in Python libraries: the same results as csrc/reduce, on any device.

f16 and bf16 are widened to f32 and rounded once a fold, integers wrap, min and max keep a NaN, sum and prod of truth values are "or" and "and".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["HALF", "divide", "fold"]

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


def divide(tensor: Tensor, divisor: int) -> None:
    """Divide in place; integers truncate toward zero."""
    torch.div(tensor, divisor, rounding_mode=None if tensor.is_floating_point() else "trunc", out=tensor)
