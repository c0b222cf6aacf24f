"""Thousands of random operations on four ranks: every operation, dtype, kind of memory and communicator, waited for in any order, against numpy.

Hypothesis draws the operations, and prints how to draw them again when one fails; all values follow from the numbers it drew, so every rank
can compute every other's. Ranks issue in one order, as they must, and wait in orders of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.harness import run_ranks
from tests.harness.cases import EVERY_DTYPE, here, random_values
from tests.harness.compare import FLOATS, assert_bitwise_equal, assert_fold, fold_bound

SIZE = 4
# Members of each communicator, in its order.
GROUPS = {"world": (0, 1, 2, 3), "left": (0, 1), "right": (3, 2), "odd": (1, 3), "three": (2, 0, 3)}
UFUNCS = {
    "sum": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "prod": np.multiply,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all", "ring", "barrier")


@dataclass(frozen=True)
class Draw:
    """One operation: numbers that hypothesis drew."""

    op: str
    group: str
    dtype: int
    reduction: str
    count: int
    root: int
    kind_of_memory: int  # ordinary, registered, with gaps
    asynchronous: bool
    uneven: bool
    seed: int


draws = st.builds(
    Draw,
    op=st.sampled_from(OPERATIONS),
    group=st.sampled_from(list(GROUPS)),
    dtype=st.integers(0, len(EVERY_DTYPE) - 1),
    reduction=st.sampled_from([*UFUNCS, "avg"]),
    count=st.one_of(st.integers(0, 40), st.sampled_from([1000, 4097, 70_001])),
    root=st.integers(0, 3),
    kind_of_memory=st.integers(0, 2),
    asynchronous=st.booleans(),
    uneven=st.booleans(),
    seed=st.integers(0, 2**16),
)


def place(world: Any, values: Tensor, kind: int) -> Tensor:
    """Return memory with these values: ordinary, registered, or every second element of a longer vector."""
    if kind == 1 and torch.get_default_device().type == "cpu":
        return world.empty(values.shape, dtype=values.dtype).copy_(values)
    return torch.zeros(2 * values.numel(), dtype=values.dtype)[::2].copy_(values) if kind == 2 else here(values)


def numpy_fold(reduction: str, inputs: Tensor) -> Tensor:
    """Fold [ranks, count] as numpy does: integers in their own width, floats in double, truth values as such."""
    n = inputs.shape[0]
    if inputs.dtype is torch.bool:
        name = {"sum": "bor", "max": "bor", "prod": "band", "min": "band"}.get(reduction, reduction)
        return torch.from_numpy(np.asarray(UFUNCS[name].reduce(inputs.numpy(), axis=0)))
    wide = inputs.to(torch.float64).numpy() if inputs.dtype in FLOATS else inputs.numpy()
    folded = np.asarray(UFUNCS["sum" if reduction == "avg" else reduction].reduce(wide, axis=0, dtype=wide.dtype))
    if reduction == "avg":
        folded = folded / n if inputs.dtype in FLOATS else np.trunc(folded / n).astype(wide.dtype) if wide.itemsize < 8 else toward_zero(folded, n)
    return torch.from_numpy(folded)


def toward_zero(values: np.ndarray, n: int) -> np.ndarray:
    return np.sign(values) * (np.abs(values) // n)


def issue(world: Any, comm: Any, draw: Draw) -> tuple[Any, Callable[[], None]]:
    """Issue one operation and return its Work or None, and the check of its result."""
    n, rank, dtype, reduction = comm.size, comm.rank, EVERY_DTYPE[draw.dtype], draw.reduction
    if (dtype in FLOATS and reduction in ("band", "bor", "bxor")) or (dtype is torch.bool and reduction == "avg"):
        reduction = "max"
    root, extra = draw.root % n, {"async_op": draw.asynchronous}
    counts = [draw.count * (1 + (draw.seed + r) % 3) // 2 for r in range(n)] if draw.uneven else [draw.count] * n
    given = {"counts": counts} if draw.uneven else {}
    narrow = reduction == "prod" and dtype in FLOATS
    case = f"{draw} on rank {rank} of {comm.name}"

    def place_here(values: Tensor) -> Tensor:
        return place(world, values, draw.kind_of_memory)

    def judge_fold(actual: Tensor, inputs: Tensor, part: slice = slice(None)) -> None:
        bound = fold_bound(reduction, inputs)[part] if dtype in FLOATS else None
        assert_fold(actual, numpy_fold(reduction, inputs)[part], bound, case)

    if draw.op == "barrier":
        return comm.barrier(**extra), lambda: None
    if draw.op in ("all_reduce", "reduce"):
        inputs = random_values(dtype, n, draw.count, seed=draw.seed, narrow=narrow)
        tensor = place_here(inputs[rank])
        if draw.op == "all_reduce":
            return comm.all_reduce(tensor, reduction, **extra), lambda: judge_fold(tensor, inputs)
        untouched = lambda: assert_bitwise_equal(tensor.clone(), inputs[rank], case)  # noqa: E731
        return comm.reduce(tensor, root, reduction, **extra), (lambda: judge_fold(tensor, inputs)) if rank == root else untouched
    whole, start = sum(counts), sum(counts[:rank])
    own = slice(start, start + counts[rank])
    if draw.op == "reduce_scatter":
        inputs = random_values(dtype, n, whole, seed=draw.seed, narrow=narrow)
        output = place_here(torch.zeros(counts[rank], dtype=dtype))
        return comm.reduce_scatter(output, place_here(inputs[rank]), reduction, **given, **extra), lambda: judge_fold(output, inputs, own)
    vector = random_values(dtype, whole, seed=draw.seed)
    if draw.op == "all_gather":
        output = place_here(torch.zeros_like(vector))
        return comm.all_gather(output, place_here(vector[own]), **given, **extra), lambda: assert_bitwise_equal(output.clone(), vector, case)
    if draw.op == "gather":
        into = place_here(torch.zeros_like(vector)) if rank == root else None
        work = comm.gather(into, place_here(vector[own]), root, **given, **extra)
        return work, lambda: None if into is None else assert_bitwise_equal(into.clone(), vector, case)
    if draw.op == "scatter":
        output = place_here(torch.zeros(counts[rank], dtype=dtype))
        source = place_here(vector) if rank == root else None
        return comm.scatter(output, source, root, **given, **extra), lambda: assert_bitwise_equal(output.clone(), vector[own], case)
    if draw.op == "broadcast":
        tensor = place_here(vector if rank == root else torch.zeros_like(vector))
        return comm.broadcast(tensor, root, **extra), lambda: assert_bitwise_equal(tensor.clone(), vector, case)
    if draw.op == "all_to_all":
        lengths = [[draw.count * (1 + (s + 2 * d + draw.seed) % 3) // 2 if draw.uneven else draw.count for d in range(n)] for s in range(n)]
        vectors = [random_values(dtype, sum(lengths[s]), seed=draw.seed + s) for s in range(n)]
        expected = torch.cat([vectors[s].split(lengths[s])[rank] for s in range(n)])
        output = place_here(torch.zeros_like(expected))
        splits = {"input_counts": lengths[rank], "output_counts": [lengths[s][rank] for s in range(n)]} if draw.uneven else {}
        return comm.all_to_all(output, place_here(vectors[rank]), **splits, **extra), lambda: assert_bitwise_equal(output.clone(), expected, case)
    # ring: to the right with a tag, from the left or from anybody (with two ranks that is the same).
    right, left, tag = (rank + 1) % n, (rank - 1) % n, draw.seed % 3
    received = place_here(torch.zeros(draw.count, dtype=dtype))
    sent = place_here(random_values(dtype, draw.count, seed=draw.seed + rank))
    expected = random_values(dtype, draw.count, seed=draw.seed + left)
    work = comm.exchange([(sent, right, tag)], [(received, left, tag)], **extra)
    return work, lambda: assert_bitwise_equal(received.clone(), expected, case)


def run_operations(world: Any, operations: list[Draw]) -> int:
    comms = {name: world if name == "world" else world.subgroup(ranks, name) for name, ranks in GROUPS.items() if world.rank in ranks}
    order, pending, done = random.Random(world.rank), [], 0
    for draw in operations:
        if draw.group not in comms:
            continue
        work, check = issue(world, comms[draw.group], draw)
        assert (work is not None) == draw.asynchronous
        pending.append((work, check))
        while pending and (len(pending) > 8 or order.random() < 0.4):
            finish(*pending.pop(order.randrange(len(pending))))
        done += 1
    order.shuffle(pending)
    for entry in pending:
        finish(*entry)
    for name, comm in comms.items():
        if name != "world":
            comm.close()
    return done


def finish(work: Any, check: Callable[[], None]) -> None:
    if work is not None:
        work.wait()
    check()


def sweep(transport: str, examples: int, operations: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        print_blob=True,
        database=None,
        phases=[Phase.generate],  # a failure names its operation; running hundreds of jobs to find a smaller list tells no more
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(draws, min_size=operations, max_size=operations))
    def run(chosen: list[Draw]) -> None:
        done = run_ranks(SIZE, run_operations, chosen, transport=transport, timeout_s=100)
        assert sum(done) >= operations

    run()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_random_operations_agree_with_numpy(transport: str) -> None:
    sweep(transport, examples=4, operations=100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_ten_thousand_random_operations_agree_with_numpy(transport: str) -> None:
    sweep(transport, examples=50, operations=100)
