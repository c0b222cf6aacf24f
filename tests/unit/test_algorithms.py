"""Every algorithm, proven for 1 to 17 ranks, and every kind of damage to one, caught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from ringfold.collectives.algorithms import BUILDERS, build, direct, ring
from ringfold.collectives.cost import SHM
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.promise import verify
from ringfold.collectives.schedule import FULL_BUFFERS, LOCAL_QUEUE, REDUCING, Buffer, Kind, Schedule, ScheduleError, block_lengths
from ringfold.collectives.simulator import Order, SimulationResult, simulate

Key = tuple[str, str, str]
each_algorithm = pytest.mark.parametrize("key", BUILDERS, ids=" ".join)
FOLDING = [key for key in BUILDERS if key[0] in ("all_reduce", "reduce_scatter")]
MAX_SIZE = 17


def schedules_of(key: Key, size: int, segments: int, root: int = 0) -> list[Schedule]:
    return [build(*key, rank=rank, size=size, segments=segments, root=root) for rank in range(size)]


def cases(key: Key, size: int) -> Iterator[list[Schedule]]:
    """All schedules worth telling apart: several segment counts (6 is more than the ring keeps in flight), every root."""
    several = (1, 2, 3, 6) if size <= 5 else (1, 3) if size <= 9 else (1 + size % 3,)
    for segments in several if key[0] != "barrier" else (1,):
        for root in range(size) if key[0] == "broadcast" and segments != 2 else [0]:
            yield schedules_of(key, size, segments, root)


@each_algorithm
def test_schedules_keep_their_promise_for_1_to_17_ranks_any_segments_and_every_root(key: Key) -> None:
    for size in range(1, MAX_SIZE + 1):
        for schedules in cases(key, size):
            verify(key[0], schedules, count=1000)


def uneven(size: int) -> list[int]:
    return [(7 * chunk) % 5 * (chunk != size // 2) for chunk in range(size)]


def counts(key: Key, size: int) -> list[int | list[int]]:
    even: list[int | list[int]] = [0, 1, 3, size - 1, size, size + 1, 1000]
    if key[0] in ("reduce_scatter", "all_gather"):
        even += [uneven(size), [0] * (size - 1) + [11]]
    return even


@pytest.mark.parametrize("key", [key for key in BUILDERS if key[0] != "barrier"], ids=" ".join)
def test_every_element_of_small_large_and_uneven_vectors_is_right(key: Key) -> None:
    for size in range(1, MAX_SIZE + 1):
        segments = 1 + size % 3
        schedules = schedules_of(key, size, segments, root=size // 2)
        in_place = size % 2 == 0
        result = simulate(schedules, 0, in_place=in_place)
        for count in counts(key, size):
            align = 16 if count == 1000 else 1
            replay(schedules, result, block_lengths(count, schedules[0].chunks, segments, align), in_place)


def replay(schedules: Sequence[Schedule], result: SimulationResult, lengths: list[list[int]], in_place: bool) -> None:
    """Run a simulated execution again on vectors of random 64-bit integers, whose sums wrap and so are exact, and check every element."""
    first, size = schedules[0], len(schedules)
    op, chunks = first.op, len(lengths)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).tolist()
    offsets = [starts[chunk * first.segments] for chunk in range(chunks + 1)]
    longest = max((offsets[c + 1] - offsets[c] for c in range(chunks)), default=0)
    random = np.random.default_rng(size)

    def vector(full: bool, rank: int) -> np.ndarray:
        return random.integers(0, 1 << 63, offsets[-1] if full else offsets[rank + 1] - offsets[rank], dtype=np.uint64)

    in_full, out_full = FULL_BUFFERS[op]
    given = [vector(in_full, rank) for rank in range(size)]
    memory = []
    for rank, schedule in enumerate(schedules):
        source, target = given[rank].copy(), vector(out_full, rank)
        own = slice(offsets[rank], offsets[rank + 1]) if chunks == size else slice(None)
        if op in ("all_reduce", "broadcast"):
            target = source
        elif in_place and op == "reduce_scatter":
            target = source[own]
        elif in_place:
            target[own] = source
            source = target[own]
        memory.append([source, target, random.integers(0, 1 << 63, (schedule.scratch_chunks, longest), dtype=np.uint64)])

    def at(rank: int, block: tuple[Buffer, int, int]) -> np.ndarray:
        buffer, chunk, segment = block
        shape = chunk % chunks if buffer is Buffer.SCRATCH else chunk
        start = starts[shape * first.segments + segment] - offsets[shape]
        end = start + lengths[shape][segment]
        if buffer is Buffer.SCRATCH:
            return memory[rank][buffer][chunk][start:end]
        base = offsets[chunk] if (in_full, out_full)[buffer] else 0
        return memory[rank][buffer][base + start : base + end]

    exposed = Buffer.INPUT if op in ("reduce_scatter", "all_gather") else Buffer.OUTPUT
    for rank, index, sender, sending in result.trace:
        step = schedules[rank].steps[index]
        if step.dst is None:
            continue
        dst = (step.dst.buffer, step.dst.chunk, step.dst.segment)
        target = at(rank, dst)
        src = None if step.src is None else at(rank, (step.src.buffer, step.src.chunk, step.src.segment))
        if sender >= 0:
            block = schedules[sender].steps[sending].src
            assert block is not None
            incoming = at(sender, (block.buffer, block.chunk, block.segment))
            assert incoming.size == target.size
            target[:] = incoming if src is None else src + incoming
        elif step.kind is Kind.COPY:
            target[:] = src
        elif step.kind is Kind.REDUCE:
            target += src
        elif step.kind is Kind.PULL:
            target[:] = at(step.peer, (exposed, *dst[1:]))
        else:
            operands = [at(other, (exposed, *dst[1:])) for other in range(size)]
            total = np.add.reduce(operands)
            for place in operands if step.spread else [target]:
                place[:] = total

    for rank, (source, target, _) in enumerate(memory):
        own = slice(offsets[rank], offsets[rank + 1]) if chunks == size else slice(None)
        if op == "all_gather":
            expected = np.concatenate(given)
        elif op == "broadcast":
            expected = given[first.root]
        else:
            expected = np.add.reduce(given)[own if op == "reduce_scatter" else slice(None)]
        np.testing.assert_array_equal(target, expected, err_msg=f"{op} rank {rank} of {size}, {lengths}")
        if op == "reduce_scatter":
            kept = np.ones(source.size, dtype=bool)
            kept[own] = not in_place
            np.testing.assert_array_equal(source[kept], given[rank][kept])


def mutations(schedules: list[Schedule], rank: int) -> Iterator[tuple[str, Schedule]]:
    """All the ways to damage one step of one rank, each of which changes what the operation does."""
    schedule = schedules[rank]
    steps, needed = schedule.steps, schedule.dependencies()

    def damaged(name: str, index: int, *instead: object) -> tuple[str, Schedule]:
        return f"{name} at step {index} ({steps[index]})", replace(schedule, steps=(*steps[:index], *instead, *steps[index + 1 :]))

    for index, step in enumerate(steps):
        yield damaged("dropped", index)
        if step.kind in REDUCING:
            yield damaged("doubled", index, step, step)
        if step.final:
            yield damaged("not final", index, replace(step, final=False))
        if step.spread:
            yield damaged("not spread", index, replace(step, spread=False))
        if step.peer >= 0:
            others = [peer for peer in range(schedule.size) if peer not in (rank, step.peer)]
            for peer in others:
                yield damaged("another peer", index, replace(step, peer=peer))
        for name in ("src", "dst"):
            block = getattr(step, name)
            if block is None:
                continue
            if schedule.chunks > 1:
                yield damaged(f"wrong chunk in {name}", index, replace(step, **{name: replace(block, chunk=(block.chunk + 1) % schedule.chunks)}))
            yield damaged(f"wrong segment in {name}", index, replace(step, **{name: replace(block, segment=1 - block.segment)}))
        # Neighbours may change places unless one waits for the other or both use the same channel.
        if index and steps[index - 1] != step:
            before = steps[index - 1]
            same_channel = before.queue == step.queue != LOCAL_QUEUE
            if same_channel or index - 1 in needed[index]:
                swapped = (*steps[: index - 1], step, before, *steps[index + 1 :])
                yield f"steps {index - 1} ({before}) and {index} ({step}) swapped", replace(schedule, steps=swapped)


@each_algorithm
def test_every_mutation_of_every_step_is_caught(key: Key) -> None:
    size = 8 if key[0] == "barrier" else 4  # with 8 ranks a barrier needs all of its fences
    schedules = schedules_of(key, size, segments=2, root=1)
    survivors, tried = [], 0
    for rank in (0, 2, size - 1):
        for name, damaged in mutations(schedules, rank):
            tried += 1
            damaged_ones = [damaged if other.rank == rank else other for other in schedules]
            if key in FOLDING and key[2] == "exchange":
                # Alone it may fold in any order; as the fallback of the registered variant, in rank order only.
                registered = schedules_of((*key[:2], "registered"), size, segments=2)
                damaged_ones = [replace(one, fallback=other) for one, other in zip(registered, damaged_ones, strict=True)]
            try:
                verify(key[0], damaged_ones, count=100)
            except ScheduleError:
                continue
            survivors.append(f"rank {rank}: {name}")
    assert tried >= 20
    assert not survivors, f"{len(survivors)} of {tried} mutations pass:\n" + "\n".join(survivors)


def normal(order: Order) -> object:
    """An order of folds without regard to which operand is left and which right: floating-point addition commutes exactly."""
    return frozenset(normal(operand) for operand in order) if isinstance(order, tuple) else order


@pytest.mark.parametrize("key", [key for key in FOLDING if key[1] == "direct"], ids=" ".join)
def test_direct_folds_in_rank_order_whatever_the_variant(key: Key) -> None:
    for size in (2, 3, 5, 8):
        in_rank_order: Order = 0
        for rank in range(1, size):
            in_rank_order = (in_rank_order, rank)
        result = simulate(schedules_of(key, size, segments=2), 100)
        assert {normal(contents.order) for cells in result.outputs for contents in cells.values()} == {normal(in_rank_order)}


@each_algorithm
def test_cost_counts_the_steps_and_bytes_that_the_simulator_sees(key: Key) -> None:
    op, algorithm, variant = key
    for size in range(1, 10):
        count = 64 * size
        result = simulate(schedules_of(key, size, segments=1), count)
        cost = ring.cost(op, size, count, 1, SHM) if algorithm == "ring" else direct.cost(op, variant, size, count, 1, SHM)
        assert cost.steps == result.rounds, (size, cost)
        assert cost.wire_nbytes == (max(result.sent) if op != "barrier" else 0), (size, cost)


def test_ring_sends_the_least_possible_number_of_elements_and_the_same_from_every_rank() -> None:
    for size in range(2, 10):
        assert set(simulate(schedules_of(("all_reduce", "ring", "pipelined"), size, 4), 120 * size).sent) == {2 * 120 * (size - 1)}


def test_one_rank_has_nothing_to_do_but_to_copy_what_is_not_in_place() -> None:
    for key in BUILDERS:
        kinds = {step.kind for step in schedules_of(key, 1, segments=2)[0].steps}
        assert kinds == ({Kind.COPY} if key[0] in ("reduce_scatter", "all_gather") else set()), key


def test_an_unknown_algorithm_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match="did you mean 'all_reduce ring pipelined'"):
        build("all_reduce", "ring", "pipeline", 0, 2)
