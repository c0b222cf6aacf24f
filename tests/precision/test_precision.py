"""Precision: the names of a layout that run, and one clear error for any other."""

from __future__ import annotations

import pytest
import torch
from ringfold.collectives.errors import PrecisionError
from ringfold.mixed_precision.precision import Precision
from ringfold.parallel.layout import PRECISIONS


def test_fp32_leaves_dtypes_alone_and_fp64_makes_them_float64() -> None:
    assert Precision.named("fp32").cast is None
    assert Precision.named("fp64").cast is torch.float64


def test_every_precision_of_a_layout_is_built() -> None:
    for name in PRECISIONS:
        assert Precision.named(name).name == name


def test_a_misspelt_precision_gets_the_nearest_name() -> None:
    with pytest.raises(PrecisionError, match=r"unknown precision 'fp46'.*did you mean 'fp"):
        Precision.named("fp46")
