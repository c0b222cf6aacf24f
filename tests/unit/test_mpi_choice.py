"""MPI's own collectives, or a schedule over its messages: the same answer on every rank, which must not depend on anything that only one knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.mpi_choice import ADVANTAGE, LARGE_NBYTES, Folds, is_native
from ringfold.collectives.transport import Request

SLOW, FAST = Folds(ADVANTAGE * 1.01, 1.0, "ring"), Folds(ADVANTAGE * 0.99, 1.0, "ring")
LARGE = LARGE_NBYTES // 4


def request(
    op: str = "all_reduce", reduction: str = "sum", dtype: torch.dtype = torch.float32, count: int = LARGE, algorithm: str | None = None
) -> Request:
    return Request(op, reduction, dtype, count, None, None, algorithm=algorithm)


def test_only_large_folds_leave_mpi_and_only_if_ours_were_clearly_faster() -> None:
    for op in ("all_reduce", "reduce_scatter", "reduce"):
        assert not is_native(request(op), SLOW)
        assert is_native(request(op), FAST)
        assert is_native(request(op), None)
        assert is_native(request(op, count=LARGE - 1), SLOW)
    assert is_native(request("all_gather"), SLOW)


def test_an_algorithm_that_was_asked_for_is_taken() -> None:
    assert is_native(request(algorithm="native"), SLOW)
    assert not is_native(request(algorithm="ring"), FAST)


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        (request(dtype=torch.bfloat16), "cannot add torch.bfloat16"),
        (request(reduction="max"), "max may lose a NaN"),
        (request(dtype=torch.int8), "may saturate"),
        (request("all_gather", count=1 << 31), "more than the"),
    ],
)
def test_what_would_break_a_promise_is_never_mpis_own(subject: Request, words: str) -> None:
    assert not is_native(subject, FAST)
    with pytest.raises(ConfigError, match=words):
        is_native(replace(subject, algorithm="native"), FAST)


def test_pieces_of_which_each_rank_knows_its_own_lengths_only_are_sent_by_us() -> None:
    uneven = Request("all_to_all", "sum", torch.float32, 10, None, None, input_counts=(4, 6), output_counts=(4, 4))
    assert not is_native(uneven, FAST)
