"""Quantised: rounding is that of the formats, scales are powers of two that fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ringfold.mixed_precision.quantised import E4M3, E5M2, GREATEST, LEAST, Quantised, amax, scale_for
from torch import Tensor

FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}  # bits of mantissa, least exponent, largest value


def rounded(values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Round by arithmetic in float64: to the nearest multiple of the spacing there, halves to even, no further than the largest value."""
    bits, least, largest = FORMATS[dtype]
    scaled = values.double() / scale
    spacing = torch.exp2(torch.frexp(scaled)[1].double().sub(1).clamp(min=least) - bits)
    return ((scaled / spacing).round() * spacing).clamp(-largest, largest) * scale


def own_scale(values: Tensor, dtype: torch.dtype) -> float:
    return 2.0 ** math.ceil(math.log2(float(values.double().abs().max()) / FORMATS[dtype][2]))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@given(seed=st.integers(0, 2**32 - 1), spread=st.integers(0, 30), exponent=st.integers(-20, 20))
def test_rounding_is_that_of_the_format_and_saturates(dtype: torch.dtype, seed: int, spread: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = (torch.randn(5, 7, generator=generator) * torch.exp2(torch.randint(-spread, spread + 1, (5, 7), generator=generator))).bfloat16()
    for scale in (own_scale(matrix, dtype), 2.0**exponent):
        found = Quantised.of(matrix, torch.tensor(scale), dtype)
        assert found.values.element_size() == 1
        assert torch.equal(found.dequantised(torch.bfloat16).double(), rounded(matrix, scale, dtype))


@given(st.floats(0, 2.0**120, width=32), st.sampled_from([448.0, 57344.0]))
def test_a_scale_is_the_least_power_of_two_that_brings_everything_into_range(largest: float, limit: float) -> None:
    scale = float(scale_for(torch.tensor(largest), limit))
    assert math.frexp(scale)[0] == 0.5
    assert LEAST <= scale <= GREATEST
    near = 1 + 2.0**-23  # of the quotient
    assert largest <= scale * limit * near or scale == GREATEST
    assert largest * near > scale / 2 * limit or scale == LEAST


def test_amax_is_the_largest_magnitude_nothing_has_none_and_nan_shows() -> None:
    assert amax(torch.tensor([[1.0, -3.0], [2.0, 0.5]]).bfloat16()) == 3.0
    assert amax(torch.zeros(0, 16)) == 0.0
    assert amax(torch.tensor([1.0, math.nan])).isnan()
