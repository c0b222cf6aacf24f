"""Every collective, for real: each dtype, reduction, count, algorithm, transport and kind of memory, on 1 to 8 processes.

Integers must be exact, floats within the bound of any fold order (tests/harness/compare.py derives it), and the bits the same on all ranks.
One forked world runs a whole matrix of cases; a failure names its case.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ringfold.collectives import communicator
from ringfold.collectives.errors import CommunicationError
from ringfold.collectives.schedule import Kind, Schedule, Step
from torch import Tensor

from tests.harness import run_ranks
from tests.harness.compare import FLOATS, INTEGERS, assert_bitwise_equal, assert_fold, bits, fold_bound, reference

DTYPES = (*FLOATS, *INTEGERS)
REDUCTIONS = ("sum", "avg", "min", "max", "prod")
ALGORITHMS = (None, "ring", "direct")
every_world = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (1, 2, 3, 4, 5, 8)])
some_worlds = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (2, 3)])


def counts_for(size: int, reduction: str = "sum") -> list[int]:
    """Return the counts to try; reductions differ in arithmetic only, so all but sum take two."""
    return sorted({0, 1, 3, size - 1, size, size + 1, 1000} if reduction == "sum" else {size + 1, 1000})


def kinds_of_memory(transport: str) -> tuple[bool, ...]:
    """Over tcp registered memory is memory like any other."""
    return (False, True) if transport == "shm" else (False,)


def random_values(dtype: torch.dtype, *shape: int, seed: int = 0, narrow: bool = False) -> Tensor:
    """Return the same random tensor on every rank: integers of the whole range (they wrap), floats of mixed sign and size.

    `narrow`: magnitudes in [1/2, 2), so that a product of eight stays finite and normal in every dtype.
    """
    generator = torch.Generator().manual_seed(1000 * seed + DTYPES.index(dtype))
    if dtype in INTEGERS:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    if narrow:
        return (torch.sign(values) * torch.exp2(2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1)).to(dtype)
    return (values * torch.exp2(torch.randint(-4, 5, shape, generator=generator).double())).to(dtype)


class Memory:
    """Tensors to communicate from: ordinary ones and registered ones, cut out of two large ones for each dtype."""

    def __init__(self, world: Any, count: int) -> None:
        self.pools = {
            (dtype, registered): world.empty(count, dtype=dtype) if registered else torch.empty(count, dtype=dtype)
            for dtype in DTYPES
            for registered in (False, True)
        }

    def of(self, values: Tensor, registered: bool, offset: int = 0) -> Tensor:
        """Return memory that holds `values`, `offset` elements behind the pool's aligned beginning."""
        tensor = self.pools[values.dtype, registered][offset : offset + values.numel()]
        return tensor.copy_(values)


class Verdicts:
    """Checks cases and keeps a checksum of each result's bits, to be compared between ranks."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    def fold(self, case: str, actual: Tensor, expected: Tensor, bound: Tensor | None) -> None:
        assert_fold(actual, expected, bound, case)
        self.checksums[case] = zlib.crc32(bits(actual))

    def exact(self, case: str, actual: Tensor, expected: Tensor) -> None:
        assert_bitwise_equal(actual, expected, case)
        self.checksums[case] = zlib.crc32(bits(actual))


def assert_same_bits(results: list[dict[str, int]], at_least: int) -> None:
    first = results[0]
    assert len(first) >= at_least
    for rank, checksums in enumerate(results):
        assert checksums.keys() == first.keys()
        differing = [case for case in first if checksums[case] != first[case]]
        assert not differing, f"rank {rank} has other bits than rank 0 in {len(differing)} cases, first {differing[0]}"


def folds(size: int, count: int) -> Iterator[tuple[torch.dtype, str, Tensor, Tensor, Tensor | None]]:
    """Yield (dtype, reduction, inputs [size, count], expected, bound) for each pair."""
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            inputs = random_values(dtype, size, count, narrow=reduction == "prod")
            yield dtype, reduction, inputs, reference(reduction, inputs), None if dtype in INTEGERS else fold_bound(reduction, inputs)


def finish(work: Any, asynchronous: bool) -> None:
    """Wait for what an operation returned, which is a Work exactly if it was asked for one."""
    assert (work is not None) == asynchronous
    if work is not None:
        work.wait()
        assert work.done()


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


@pytest.mark.parametrize(("size", "transport", "count"), [(n, t, 300_001) for t in ("shm", "tcp") for n in (2, 3, 5, 8)])
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
        right = communicator.build
        communicator.build = lambda *args, **kwargs: mutate(right(*args, **kwargs), mutation)
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


# broadcast, barrier, send and recv, objects


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


def check_barrier(world: Any) -> list[tuple[int, int]]:
    times = []
    for i in range(50):
        if i % world.size == world.rank:
            torch.randn(20_000).sort()  # arrive later than the others
        entered = time.monotonic_ns()
        finish(world.barrier(async_op=i % 2 == 0), i % 2 == 0)
        times.append((entered, time.monotonic_ns()))
    return times


@every_world
def test_nobody_leaves_a_barrier_before_everybody_has_entered(size: int, transport: str) -> None:
    for round_ in zip(*run_ranks(size, check_barrier, transport=transport), strict=True):
        assert max(entered for entered, _ in round_) <= min(left for _, left in round_)


def check_send_and_recv(world: Any) -> int:
    messages = 0
    for dtype in DTYPES:
        for count in (0, 1, 3, 1000):
            inputs = random_values(dtype, world.size, world.size, count)
            for src in range(world.size):
                for dst in range(world.size):
                    if src == dst:
                        continue
                    if world.rank == src:
                        world.send(inputs[src, dst], dst)
                    if world.rank == dst:
                        tensor = torch.zeros(count, dtype=dtype)
                        world.recv(tensor, src)
                        assert_bitwise_equal(tensor, inputs[src, dst], f"{dtype} x {count} from {src} to {dst}")
                        messages += 1
    return messages


@every_world
def test_send_and_recv_between_every_pair(size: int, transport: str) -> None:
    assert run_ranks(size, check_send_and_recv, transport=transport) == [7 * 4 * (size - 1)] * size


def check_exchange(world: Any) -> None:
    """Everybody sends three large messages to everybody at once: far more than rings and socket buffers hold."""
    count, peers = 400_001, [peer for peer in range(world.size) if peer != world.rank]
    inputs = random_values(torch.float32, world.size, count)
    for receives_first in (True, False):
        received = {peer: [torch.zeros(count) for _ in range(3)] for peer in peers}
        sends = lambda: [world.send(inputs[world.rank] + i, peer, async_op=True) for i in range(3) for peer in peers]  # noqa: E731
        works = [] if receives_first else sends()
        works += [world.recv(received[peer][i], peer, async_op=True) for peer in reversed(peers) for i in range(3)]
        works += sends() if receives_first else []
        # A collective between them neither waits for them nor disturbs them.
        tensor = torch.full((5,), float(world.rank))
        world.all_reduce(tensor)
        assert tensor[0] == world.size * (world.size - 1) / 2
        for work in reversed(works):
            work.wait()
        for peer in peers:
            for i in range(3):
                assert torch.equal(received[peer][i], inputs[peer] + i), f"message {i} from {peer} to {world.rank}"


@some_worlds
def test_large_messages_cross_in_both_directions_in_order(size: int, transport: str) -> None:
    run_ranks(size, check_exchange, transport=transport)


def check_objects(world: Any) -> None:
    for root in range(world.size):
        sent = {"root": root, "text": "ß" * 70_000} if world.rank == root else None
        assert world.broadcast_object(sent, root) == {"root": root, "text": "ß" * 70_000}
    gathered = world.all_gather_object(("x" * 1000 * world.rank, None))
    assert gathered == [("x" * 1000 * rank, None) for rank in range(world.size)]


@pytest.mark.parametrize("size", [1, 3])
def test_objects_travel(size: int) -> None:
    run_ranks(size, check_objects)


# Communicators of some of the ranks


def check_split(world: Any) -> list[tuple[int, ...]]:
    seen = []
    odd = world.split(world.rank % 2, name="parity")
    backwards = world.split(0, key=-world.rank, name="backwards")
    few = world.split(0 if world.rank < 2 else None, name="few")
    again = odd.split(0 if odd.rank == 0 else 1)
    assert odd.members == tuple(range(world.rank % 2, world.size, 2))
    assert backwards.members == tuple(reversed(range(world.size)))
    assert (few is None) == (world.rank >= 2)
    for comm in (odd, backwards, few, again):
        if comm is None:
            continue
        assert comm.members[comm.rank] == world.rank
        assert comm.size == len(comm.members)
        tensor = torch.tensor([float(world.rank), 1.0])
        comm.all_reduce(tensor)
        assert tensor.tolist() == [sum(comm.members), comm.size]
        tensor = torch.full((3,), float(world.rank))
        comm.broadcast(tensor, comm.size - 1)
        assert tensor[0] == comm.members[-1]
        seen.append(comm.members)
        comm.close()
    world.barrier()
    return seen


@pytest.mark.parametrize(("size", "transport"), [(1, "shm"), (4, "shm"), (5, "tcp")])
def test_split_gives_each_colour_its_own_communicator(size: int, transport: str) -> None:
    run_ranks(size, check_split, transport=transport)


def check_subgroup(world: Any) -> None:
    members = [3, 1]
    if world.rank in members:
        pair = world.subgroup(members, name="pair")
        assert (pair.members, pair.rank) == ((3, 1), members.index(world.rank))
        gathered = torch.empty(2, dtype=torch.int64)
        pair.all_gather(gathered, torch.tensor([world.rank]))
        assert gathered.tolist() == members
        pair.close()
    world.barrier()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_only_its_members_make_a_subgroup(transport: str) -> None:
    run_ranks(4, check_subgroup, transport=transport)


def check_explain(world: Any) -> str:
    small, large = world.explain("all_reduce", 4), world.explain("all_reduce", 64 << 20)
    assert small != large
    return str(large)


def test_explain_names_the_algorithm_and_is_the_same_everywhere() -> None:
    texts = run_ranks(3, check_explain)
    assert len(set(texts)) == 1
    assert "ring" in texts[0]
    assert "direct" in texts[0]


def check_wait_is_counted(world: Any) -> float:
    before = world.seconds_waited
    tensor = torch.zeros(1)
    if world.rank == 0:
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            pass
    world.all_reduce(tensor)
    return float(world.seconds_waited - before)


def test_seconds_waited_is_the_time_spent_waiting_for_others() -> None:
    late, punctual = run_ranks(2, check_wait_is_counted)
    assert punctual >= 0.1
    assert late < 0.1
