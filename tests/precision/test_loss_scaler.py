"""LossScaler: halved once a skipped step, doubled after good ones, always a power of two, and an end to hopeless runs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.errors import ConfigError, PrecisionError
from ringfold.mixed_precision.loss_scaler import GREATEST, LEAST, LossScaler


def nobody() -> str:
    raise AssertionError("the culprit is asked for only at the end")


def test_a_skip_halves_the_scale_once_and_good_steps_in_a_row_double_it() -> None:
    scaler = LossScaler(initial=2.0**10, growth_interval=3)
    scales = []
    for found in (False, False, True, False, False, False, False, True, True):
        scaler.update(found, nobody)
        scales.append(math.log2(scaler.scale))
    assert scales == [10, 10, 9, 9, 9, 10, 10, 9, 8]
    assert scaler.skipped == 3


@given(st.lists(st.booleans(), max_size=200))
def test_the_scale_stays_a_power_of_two_within_its_bounds_and_state_goes_on_where_it_was(found: list[bool]) -> None:
    scaler, other = LossScaler(growth_interval=2, patience=1000), LossScaler(growth_interval=2, patience=1000)
    for step in found:
        scaler.update(step, nobody)
        assert LEAST <= scaler.scale <= GREATEST
        assert math.log2(scaler.scale).is_integer()
        other.load_state_dict(scaler.state_dict())
        assert vars(other) == vars(scaler)


def test_too_many_skips_in_a_row_are_an_error_that_names_the_parameter() -> None:
    scaler = LossScaler(patience=3)
    for found in (True, True, False, True, True):
        scaler.update(found, nobody)
    with pytest.raises(
        PrecisionError, match=r"3 train steps in a row .* first of them that of blocks\.1\.up\.weight; the loss scale is down to 4096"
    ):
        scaler.update(True, lambda: "blocks.1.up.weight")


@pytest.mark.parametrize("options", [{"initial": 3.0}, {"initial": 0.0}, {"initial": math.inf}, {"growth_interval": 0}, {"patience": 0}])
def test_options_that_cannot_work_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="loss scale"):
        LossScaler(**options)  # type: ignore[arg-type]
