"""Precision: what a layout's fp32, bf16, fp16, fp8 or fp64 means in dtypes.

fp32   parameters and batches keep the dtypes they have: what a layout means when it names nothing
fp64   both become float64, for checking numbers
bf16   the model computes in bf16, and trains float32 masters of its parameters
fp16   the same in fp16, with a scaled loss
fp8    bf16, in which the Linears of blocks multiply in 8 bits (linears.py)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ringfold.collectives.errors import PrecisionError, nearest

__all__ = ["Precision"]


@dataclass(frozen=True)
class Precision:
    """The dtypes of a training run.

    `cast` is what floating batch tensors become, and in fp64 the parameters that are trained, too; `compute` what parameters are computed
    with if that is not what is trained. None leaves them as they are.
    """

    name: str
    cast: torch.dtype | None
    compute: torch.dtype | None = None
    scales_loss: bool = False
    quantises: bool = False

    @classmethod
    def named(cls, name: str) -> Precision:
        """Return the precision of that name.

        Raises: PrecisionError if there is none.
        """
        if name in BUILT:
            return BUILT[name]
        meant = nearest(name, BUILT)
        raise PrecisionError(f"unknown precision {name!r}, expected {' or '.join(BUILT)}" + (f"; did you mean {meant!r}?" if meant else "."))


BUILT = {
    "fp32": Precision("fp32", None),
    "fp64": Precision("fp64", torch.float64),
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16),
    "fp16": Precision("fp16", torch.float16, torch.float16, scales_loss=True),
    "fp8": Precision("fp8", torch.bfloat16, torch.bfloat16, quantises=True),
}
