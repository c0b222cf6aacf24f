"""Every collective, for real: each dtype, reduction, count, algorithm, transport and kind of memory, on 1 to 8 processes.

Integers must be exact, floats within the bound of any fold order (tests/harness/compare.py derives it), and the bits the same on all ranks.
One forked world runs a whole matrix of cases; a failure names its case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ringfold.collectives import issue
from ringfold.collectives.errors import CommunicationError
from ringfold.collectives.schedule import Kind, Schedule, Step
from torch import Tensor

from tests.harness import run_ranks
from tests.harness.cases import ALGORITHMS, DTYPES, Memory, Verdicts, assert_same_bits, counts_for, finish, folds, kinds_of_memory, random_values
from tests.harness.compare import FLOATS, INTEGERS, assert_bitwise_equal, assert_fold, fold_bound, reference

every_world = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (1, 2, 3, 4, 5, 8)])
some_worlds = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (2, 3)])


# all_reduce


def check_all_reduce(world: Any) -> dict[str, int]:
    verdicts, memory = Verdicts(), Memory(world, 1001)
    for dtype, reduction, inputs, expected, bound in folds(world.size, 1000):
        for i, count in enumerate(counts_for(world.size, reduction)):
            part = slice(1000 - count, None)
            for algorithm in ALGORITHMS:
                for registered in kinds_of_memory(world.transport):
                    case = f"all_reduce {dtype} {reduction} x {count}, {algorithm}, registered={registered}"
                    tensor = memory.of(inputs[world.rank, part], registered, offset=i % 2)
                    asynchronous = i % 5 == 2
                    finish(world.all_reduce(tensor, reduction, async_op=asynchronous, algorithm=algorithm), asynchronous)
                    verdicts.fold(case, tensor, expected[part], None if bound is None else bound[part])
    return verdicts.checksums


@every_world
def test_all_reduce_is_right_and_the_same_on_every_rank(size: int, transport: str) -> None:
    assert_same_bits(run_ranks(size, check_all_reduce, transport=transport), at_least=7 * (4 + 4 * 2) * 3)


def check_special_values(world: Any) -> None:
    nan, inf = float("nan"), float("inf")
    for dtype in FLOATS:
        for algorithm in ALGORITHMS:
            values = torch.tensor([[nan, 1, 2], [inf, 1, 1], [-inf, 0, 0], [-0.0, -0.0, -0.0], [1, nan, 1]], dtype=dtype)
            for reduction, expected in {
                "sum": [nan, inf, -inf, -0.0, nan],
                "min": [nan, 1, -inf, -0.0, nan],
                "max": [nan, inf, 0, -0.0, nan],
                "prod": [nan, inf, nan, -0.0, nan],
            }.items():
                tensor = values[:, world.rank].clone()
                world.all_reduce(tensor, reduction, algorithm=algorithm)
                wanted = torch.tensor(expected, dtype=dtype)
                same = (tensor == wanted) | (tensor.isnan() & wanted.isnan())
                assert same.all(), f"{dtype} {reduction} {algorithm}: {tensor.tolist()} instead of {expected}"
                assert torch.signbit(tensor[3]), f"{dtype} {reduction} {algorithm}: -0.0 became 0.0"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_nan_infinity_and_minus_zero_survive_a_fold(transport: str) -> None:
    run_ranks(3, check_special_values, transport=transport)


def check_large(world: Any, count: int) -> dict[str, int]:
    """Small whole numbers: every partial sum is exact in every dtype (136 is the largest), so the result must be."""
    verdicts = Verdicts()
    base = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(count))
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        total = (world.size * base + world.size * (world.size - 1) // 2).to(dtype)
        own = (base + world.rank).to(dtype)
        for registered in kinds_of_memory(world.transport):
            tensor = world.empty(count, dtype=dtype) if registered else torch.empty(count, dtype=dtype)
            for algorithm in ALGORITHMS:
                case = f"all_reduce {dtype} x {count}, {algorithm}, registered={registered}"
                tensor.copy_(own)
                world.all_reduce(tensor, algorithm=algorithm)
                verdicts.exact(case, tensor, total)
                for root in {0, world.size - 1}:
                    tensor.copy_(own)
                    world.broadcast(tensor, root, algorithm=algorithm)
                    verdicts.exact(f"broadcast {case} from {root}", tensor, (base + root).to(dtype))
    return verdicts.checksums


@pytest.mark.parametrize(("size", "transport", "count"), [(n, t, 300_001) for t in ("shm", "tcp") for n in (2, 3, 5)])
def test_a_large_vector_of_odd_length_is_exact(size: int, transport: str, count: int) -> None:
    assert_same_bits(run_ranks(size, check_large, count, transport=transport), at_least=3 * 3 * 3)


def check_very_large(world: Any) -> None:
    count = 3_000_017
    base = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(3)).to(torch.float32)
    expected = world.size * base + world.size * (world.size - 1) // 2
    for registered in kinds_of_memory(world.transport):
        tensor = world.empty(count) if registered else torch.empty(count)
        for algorithm in ALGORITHMS:
            tensor.copy_(base + world.rank)
            world.all_reduce(tensor, algorithm=algorithm)
            assert torch.equal(tensor, expected), f"{algorithm}, registered={registered}"


@pytest.mark.parametrize(("size", "transport"), [(2, "shm"), (4, "shm"), (2, "tcp"), (4, "tcp")])
def test_three_million_floats_are_exact(size: int, transport: str) -> None:
    run_ranks(size, check_very_large, transport=transport)


def check_partly_registered(world: Any) -> dict[str, int]:
    verdicts, count = Verdicts(), 70_001
    inputs = random_values(torch.float32, world.size, count)
    expected, bound = reference("sum", inputs), fold_bound("sum", inputs)
    for who in range(world.size):
        tensor = world.empty(count) if world.rank == who else torch.empty(count)
        tensor.copy_(inputs[world.rank])
        world.all_reduce(tensor, algorithm="direct")
        verdicts.fold(f"only rank {who} registered", tensor, expected, bound)
    # Moved out of the pool without a word: an ordinary tensor from then on.
    tensor = world.empty(count)
    assert world.is_registered(tensor)
    assert world.is_registered(tensor[7:12])
    moved = copy.deepcopy(tensor) if world.rank == 0 else tensor
    assert world.is_registered(moved) == (world.rank != 0)
    moved.copy_(inputs[world.rank])
    world.all_reduce(moved, algorithm="direct")
    verdicts.fold("rank 0 moved its tensor out of the pool", moved, expected, bound)
    return verdicts.checksums


@some_worlds
def test_ranks_may_disagree_about_registered_memory(size: int, transport: str) -> None:
    assert_same_bits(run_ranks(size, check_partly_registered, transport=transport), at_least=size + 1)


# The tests above can fail: a schedule with one wrong step is not survived.


def mutate(schedule: Schedule, mutation: str) -> Schedule:
    """Return an all_reduce's schedule with its last fold changed."""
    if schedule.op != "all_reduce":
        return schedule
    steps = list(schedule.steps)
    at = max(i for i, step in enumerate(steps) if step.kind is Kind.RECV_REDUCE)
    if mutation == "drop a fold":
        steps[at] = replace(steps[at], kind=Kind.RECV, src=None, final=False)
    elif mutation == "fold twice":
        steps.insert(at + 1, Step(Kind.REDUCE, src=steps[at].dst, dst=steps[at].dst))
    elif mutation == "drop a step":
        del steps[at]
    elif mutation == "swap a peer":
        steps[at] = replace(steps[at], peer=2 if steps[at].peer == 0 else 0)
    elif mutation == "swap a chunk":
        assert steps[at].dst is not None
        block = replace(steps[at].dst, chunk=(steps[at].dst.chunk + 1) % schedule.size)
        steps[at] = replace(steps[at], src=block, dst=block)
    return replace(schedule, steps=tuple(steps))


def reduce_by_a_mutated_schedule(world: Any, mutation: str) -> None:
    if world.rank == 1:
        right = issue.build
        issue.build = lambda *args, **kwargs: mutate(right(*args, **kwargs), mutation)
    inputs = random_values(torch.int32, 3, 1000)
    tensor = inputs[world.rank].clone()
    world.all_reduce(tensor, algorithm="ring")
    assert_fold(tensor, reference("sum", inputs), None, mutation)
    world.barrier()


@pytest.mark.parametrize("mutation", ["drop a fold", "fold twice", "drop a step", "swap a peer", "swap a chunk"])
def test_a_wrong_step_is_never_a_right_result(mutation: str) -> None:
    with pytest.raises((AssertionError, CommunicationError)):
        run_ranks(3, reduce_by_a_mutated_schedule, mutation, timeout_s=3)
    run_ranks(3, reduce_by_a_mutated_schedule, "none", timeout_s=20)


# reduce_scatter and all_gather


def check_reduce_scatter(world: Any) -> int:
    cases, memory, out_memory = 0, Memory(world, 1001 * world.size), Memory(world, 1000)
    for dtype, reduction, inputs, expected, bound in folds(world.size, 1000 * world.size):
        for i, count in enumerate(counts_for(world.size, reduction)):
            own = slice(world.rank * count, (world.rank + 1) * count)
            for algorithm in ALGORITHMS:
                for registered in kinds_of_memory(world.transport):
                    case = f"reduce_scatter {dtype} {reduction} x {count}, {algorithm}, registered={registered}, rank {world.rank}"
                    tensor = memory.of(inputs[world.rank, : world.size * count], registered, offset=i % 2)
                    output = out_memory.of(torch.zeros(count, dtype=dtype), registered)
                    asynchronous = i % 5 == 2
                    finish(world.reduce_scatter(output, tensor, reduction, async_op=asynchronous, algorithm=algorithm), asynchronous)
                    assert_fold(output, expected[own], None if bound is None else bound[own], case)
                    assert torch.equal(tensor, inputs[world.rank, : world.size * count]), f"{case}: the input was changed"
                    cases += 1
    return cases


@every_world
def test_reduce_scatter_gives_each_rank_its_chunk_and_leaves_the_input(size: int, transport: str) -> None:
    assert min(run_ranks(size, check_reduce_scatter, transport=transport)) >= 7 * (4 + 4 * 2) * 3


def check_all_gather(world: Any) -> dict[str, int]:
    verdicts, memory, out_memory = Verdicts(), Memory(world, 1001), Memory(world, 1001 * world.size)
    for dtype in DTYPES:
        inputs = random_values(dtype, world.size, 1000)
        for i, count in enumerate(counts_for(world.size)):
            expected = inputs[:, :count].flatten()
            for algorithm in ALGORITHMS:
                for registered in kinds_of_memory(world.transport):
                    for in_place in (False, True):
                        case = f"all_gather {dtype} x {count}, {algorithm}, registered={registered}, in_place={in_place}"
                        output = out_memory.of(torch.zeros_like(expected), registered, offset=i % 2)
                        tensor = memory.of(inputs[world.rank, :count], registered)
                        if in_place:
                            tensor = output[world.rank * count : (world.rank + 1) * count].copy_(tensor)
                        asynchronous = i % 5 == 2
                        finish(world.all_gather(output, tensor, async_op=asynchronous, algorithm=algorithm), asynchronous)
                        verdicts.exact(case, output, expected)
    return verdicts.checksums


@every_world
def test_all_gather_puts_every_chunk_in_rank_order(size: int, transport: str) -> None:
    assert_same_bits(run_ranks(size, check_all_gather, transport=transport), at_least=7 * 4 * 3 * 2)


def uneven_counts(size: int) -> list[list[int]]:
    return [
        [(7 * rank + 3) % 11 for rank in range(size)],
        [0] * (size - 1) + [13],
        [5] + [0] * (size - 1),
        [1 + 1000 * (rank % 2) for rank in range(size)],
        [0] * size,
    ]


def check_uneven(world: Any) -> int:
    cases = 0
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for counts in [*uneven_counts(world.size), [9_001 + 64 * rank for rank in range(world.size)]]:
            total, start = sum(counts), sum(counts[: world.rank])
            own = slice(start, start + counts[world.rank])
            inputs = random_values(dtype, world.size, total)
            expected = reference("sum", inputs)
            bound = None if dtype in INTEGERS else fold_bound("sum", inputs)
            for algorithm in ALGORITHMS:
                for registered in kinds_of_memory(world.transport):
                    new: Callable[..., Tensor] = world.empty if registered else torch.empty
                    case = f"{dtype}, counts {counts}, {algorithm}, registered={registered}, rank {world.rank}"
                    tensor = new(total, dtype=dtype).copy_(inputs[world.rank])
                    output = new(counts[world.rank], dtype=dtype)
                    world.reduce_scatter(output, tensor, counts=counts, algorithm=algorithm)
                    assert_fold(output, expected[own], None if bound is None else bound[own], f"reduce_scatter {case}")
                    tensor.zero_()
                    output.copy_(inputs[0, own])
                    world.all_gather(tensor, output, counts=counts, algorithm=algorithm)
                    assert_bitwise_equal(tensor, inputs[0], f"all_gather {case}")
                    cases += 2
    return cases


@every_world
def test_uneven_counts_and_ranks_without_any(size: int, transport: str) -> None:
    assert min(run_ranks(size, check_uneven, transport=transport)) >= 3 * 6 * 3 * 2


# broadcast


def check_broadcast(world: Any) -> dict[str, int]:
    verdicts, memory = Verdicts(), Memory(world, 1001)
    for dtype in DTYPES:
        inputs = random_values(dtype, world.size, 1000)
        for i, count in enumerate(counts_for(world.size)):
            for root in range(world.size):
                for algorithm in ALGORITHMS if dtype is torch.float32 else (None,):
                    for registered in kinds_of_memory(world.transport):
                        tensor = memory.of(inputs[world.rank, :count], registered, offset=i % 2)
                        asynchronous = i % 5 == 2
                        finish(world.broadcast(tensor, root, async_op=asynchronous, algorithm=algorithm), asynchronous)
                        case = f"broadcast {dtype} x {count} from {root}, {algorithm}, registered={registered}"
                        verdicts.exact(case, tensor, inputs[root, :count])
    return verdicts.checksums


@every_world
def test_broadcast_works_from_every_root(size: int, transport: str) -> None:
    assert_same_bits(run_ranks(size, check_broadcast, transport=transport), at_least=(6 + 3) * 4 * size)
