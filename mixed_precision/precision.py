"""Precision: what a layout's fp32, bf16, fp16, fp8 or fp64 means in dtypes.

fp32 is what a layout means when it names nothing: parameters and batches keep the dtypes they have. fp64 makes both float64, for checking
numbers. The others need master weights, and fp16 and fp8 a loss scaler, which this version does not have: they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ringfold.collectives.errors import PrecisionError, nearest

__all__ = ["Precision"]

NOT_BUILT = ("bf16", "fp16", "fp8")


@dataclass(frozen=True)
class Precision:
    """The dtypes of a training run; `cast` is what floating parameters and batch tensors become, None leaves them as they are."""

    name: str
    cast: torch.dtype | None

    @classmethod
    def named(cls, name: str) -> Precision:
        """Return the precision of that name.

        Raises: PrecisionError if there is none, or if it is not built yet.
        """
        if name in BUILT:
            return BUILT[name]
        if name in NOT_BUILT:
            raise PrecisionError(f"precision {name} is not built yet. Use {' or '.join(BUILT)}.")
        meant = nearest(name, (*BUILT, *NOT_BUILT))
        raise PrecisionError(f"unknown precision {name!r}, expected {' or '.join(BUILT)}" + (f"; did you mean {meant!r}?" if meant else "."))


BUILT = {"fp32": Precision("fp32", None), "fp64": Precision("fp64", torch.float64)}
