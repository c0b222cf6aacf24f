"""Quantised: a matrix of 8 bits a value with one scale, and the product of two.

    e4m3   3 bits of mantissa, up to 448       inputs and weights, which need precision
    e5m2   2 bits, up to 57344                 gradients, which need range

A value stands for itself times the scale, which is a power of two: scaling loses nothing, and what 8 bits stand for is a bfloat16. So where the
hardware has no product of 8 bits, that of bfloat16 computes the same but for the order of its sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["E4M3", "E5M2", "Quantised", "amax", "product", "scale_for"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST, GREATEST = 2.0**-100, 2.0**100  # within them every value times its scale is a normal number of bfloat16
MULTIPLE = 16  # of the depth of a product of 8 bits, in elements
MANTISSA = (1 << 23) - 1  # of a float32


class Quantised(NamedTuple):
    """`values` [m, k] in 8 bits, and `scale`, a float32 without dims."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantised:
        """Round a matrix; what is beyond the dtype's range gets its largest value, and NaN stays NaN."""
        limit = torch.finfo(dtype).max
        return cls((matrix / scale).clamp_(-limit, limit).to(dtype), scale)

    def t(self) -> Quantised:
        """Return the transpose, in the same memory."""
        return Quantised(self.values.t(), self.scale)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return what the values stand for, which is exact in bfloat16 and wider."""
        return self.values.to(dtype) * self.scale


def amax(tensor: Tensor) -> Tensor:
    """Return the largest magnitude as a float32 without dims: 0 of nothing, NaN if there is one."""
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).float()


def scale_for(largest: Tensor, limit: float | Tensor) -> Tensor:
    """Return the least powers of two, of those that are used, by which magnitudes up to `largest` (float32) come down to `limit`."""
    bits = (largest / limit).view(torch.int32)
    return ((bits + MANTISSA) & ~MANTISSA).view(torch.float32).clamp_(LEAST, GREATEST)


def product(a: Quantised, b: Quantised, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False) -> Tensor:
    """Return a @ b.T + bias as `dtype` [m, n], of a [m, k] and b [n, k].

    fast: the hardware may add up in fewer bits than float32 has, which is for forward.
    """
    if not (a.values.numel() and b.values.numel() and is_native(a.values.device)):
        return F.linear(a.dequantised(dtype), b.dequantised(dtype), bias)
    left, right = a.values.contiguous(), b.values.contiguous()
    if lacking := -left.shape[1] % MULTIPLE:
        left, right = _padded(left, lacking), _padded(right, lacking)
    return torch._scaled_mm(left, right.t(), scale_a=a.scale, scale_b=b.scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def is_native(device: torch.device) -> bool:
    """Say whether a device multiplies in 8 bits: NVIDIA's do from compute capability 8.9 on."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def _padded(matrix: Tensor, columns: int) -> Tensor:
    return F.pad(matrix.view(torch.uint8), (0, columns)).view(matrix.dtype)  # zero is all bits zero
