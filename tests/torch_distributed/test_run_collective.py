"""What NCCL is asked to do for a request is right: the same calls on torch's gloo give what one process computes. The job's store serves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ringfold.collectives.cuda.nccl import JobStore, run_collective, why_not_native
from ringfold.collectives.transport import Request

from tests.harness import run_ranks
from tests.harness.cases import EVERY_DTYPE, random_values
from tests.harness.compare import FLOATS, assert_bitwise_equal, assert_fold, fold_bound, reference


def check(world: Any) -> int:
    store = JobStore(world.session.membership.store, "gloo/", 20.0)
    group: Any = dist.ProcessGroupGloo(store, world.rank, world.size)
    size, rank, cases = world.size, world.rank, 0
    for dtype in EVERY_DTYPE:
        for reduction in ("sum", "avg", "prod", "min", "max"):
            inputs = random_values(dtype, size, 7 * size, narrow=reduction == "prod")
            vector = inputs[rank].clone()
            if dtype is torch.bool and reduction == "avg":
                continue
            expected, bound = reference(reduction, inputs), fold_bound(reduction, inputs) if dtype in FLOATS else None
            request = Request("all_reduce", reduction, dtype, vector.numel(), vector, vector)
            if why_not_native(request) is not None:
                continue
            run_collective(group, request, rank, size)
            assert_fold(vector, expected, bound, f"all_reduce {dtype} {reduction}")
            vector = inputs[rank].clone()
            root = cases % size
            run_collective(group, Request("reduce", reduction, dtype, 7 * size, vector, vector if rank == root else None, root=root), rank, size)
            if rank == root:
                assert_fold(vector, expected, bound, f"reduce {dtype} {reduction} to {root}")
            else:
                assert_bitwise_equal(vector, inputs[rank], "reduce left the others alone")
            output = torch.zeros(7, dtype=dtype)
            own = slice(7 * rank, 7 * rank + 7)
            run_collective(group, Request("reduce_scatter", reduction, dtype, 7 * size, inputs[rank].clone(), output), rank, size)
            assert_fold(output, expected[own], None if bound is None else bound[own], f"reduce_scatter {dtype} {reduction}")
            cases += 1
        values = random_values(dtype, 10)
        for root in range(size):
            tensor = values.clone() if rank == root else torch.zeros_like(values)
            run_collective(group, Request("broadcast", "sum", dtype, 10, tensor, tensor, root=root), rank, size)
            assert_bitwise_equal(tensor, values, f"broadcast {dtype} from {root}")
        for in_place in (False, True):
            whole = torch.zeros(4 * size, dtype=dtype)
            vector = random_values(dtype, 4 * size, seed=1)
            own = whole[4 * rank : 4 * rank + 4] if in_place else torch.zeros(4, dtype=dtype)
            own.copy_(vector[4 * rank : 4 * rank + 4])
            run_collective(group, Request("all_gather", "sum", dtype, 4 * size, own, whole), rank, size)
            assert_bitwise_equal(whole, vector, f"all_gather {dtype}")
    return cases


def test_what_is_asked_of_torch_for_a_request_is_what_the_request_means() -> None:
    assert min(run_ranks(3, check)) >= 25


@pytest.mark.parametrize(
    ("op", "reduction", "dtype", "why"),
    [
        ("all_reduce", "min", torch.float32, "NaN"),
        ("reduce", "bxor", torch.int32, "no bxor"),
        ("reduce_scatter", "sum", torch.int16, "16-bit"),
        ("all_reduce", "bxor", torch.bool, "truth values"),
        ("all_reduce", "bor", torch.bool, None),
        ("all_gather", "sum", torch.int16, None),
        ("all_reduce", "avg", torch.bfloat16, None),
    ],
)
def test_nccl_is_not_asked_for_what_it_cannot_do_as_promised(op: str, reduction: str, dtype: torch.dtype, why: str | None) -> None:
    found = why_not_native(Request(op, reduction, dtype, 1, None, None))
    assert found is None if why is None else found is not None and why in found
