"""Schedules as data: how a vector is cut, what waits for what, and the bytes that the executor loads."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.algorithms import BUILDERS, build, direct, direct_registered, ring
from ringfold.collectives.errors import RingfoldError
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, ScheduleError, Step, block_lengths, partition

from tests.harness.schedules import SUBJECTS, Subject


def out(chunk: int, segment: int = 0) -> Block:
    return Block(Buffer.OUTPUT, chunk, segment)


def dependencies(*steps: Step) -> tuple[tuple[int, ...], ...]:
    return Schedule("all_reduce", "ring", 0, 4, 4, 1, steps, scratch_chunks=2).dependencies()


@given(count=st.integers(0, 100_000), parts=st.integers(1, 600), align=st.sampled_from([1, 8, 16, 32, 64]))
def test_partition_covers_every_element_once_in_aligned_parts_of_which_only_the_tail_is_short(count: int, parts: int, align: int) -> None:
    offsets = partition(count, parts, align)
    assert len(offsets) == parts + 1
    assert (offsets[0], offsets[-1]) == (0, count)
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    assert min(lengths) >= 0
    assert lengths == sorted(lengths, reverse=True)
    assert all(offset % align == 0 for offset in offsets if offset < count)
    full = lengths[0]
    assert all(length in (full, 0) for length in lengths if length != count % full) if full else count == 0
    assert full < -(-count // parts) + align


def test_partition_rounds_up_so_that_the_last_parts_may_be_empty() -> None:
    assert partition(100, 3, 16) == [0, 48, 96, 100]
    assert partition(17, 4, 16) == [0, 16, 17, 17, 17]
    assert partition(0, 2, 16) == [0, 0, 0]


@pytest.mark.parametrize(("count", "parts", "align"), [(-1, 2, 1), (10, 0, 1), (10, 2, 0)])
def test_partition_refuses_what_cannot_be_cut(count: int, parts: int, align: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        partition(count, parts, align)


@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=9), segments=st.integers(1, 9), align=st.sampled_from([1, 16]))
def test_explicit_chunks_keep_their_lengths_when_cut_into_segments(lengths: list[int], segments: int, align: int) -> None:
    blocks = block_lengths(lengths, len(lengths), segments, align)
    assert [sum(of_chunk) for of_chunk in blocks] == lengths
    assert all(len(of_chunk) == segments for of_chunk in blocks)


def test_explicit_chunks_must_be_one_for_each() -> None:
    with pytest.raises(ValueError, match="2 chunk lengths for 3 chunks"):
        block_lengths([1, 2], 3, 1, 1)


def test_steps_on_different_blocks_wait_for_nothing() -> None:
    assert dependencies(Step(Kind.SEND, 1, src=out(0)), Step(Kind.RECV, 2, dst=out(1)), Step(Kind.RECV, 3, dst=out(2))) == ((), (), ())


def test_a_read_waits_for_the_last_write_and_a_write_for_the_reads_since() -> None:
    assert dependencies(
        Step(Kind.RECV, 1, dst=out(0)),
        Step(Kind.SEND, 2, src=out(0)),
        Step(Kind.SEND, 3, src=out(0)),
        Step(Kind.RECV, 2, dst=out(0)),
        Step(Kind.SEND, 1, src=out(0)),
    ) == ((), (0,), (0,), (1, 2), (3,))


def test_two_reads_of_a_block_do_not_wait_for_each_other() -> None:
    assert dependencies(Step(Kind.SEND, 1, src=out(0)), Step(Kind.SEND, 2, src=out(0))) == ((), ())


def test_the_order_of_a_queue_is_implied_and_not_listed() -> None:
    folds = [Step(Kind.RECV_REDUCE, 1, src=out(0), dst=out(0)), Step(Kind.RECV_REDUCE, 1, src=out(0), dst=out(0))]
    assert dependencies(*folds) == ((), ())


def test_of_several_conflicts_in_one_queue_the_last_is_listed() -> None:
    assert dependencies(
        Step(Kind.SEND, 1, src=out(0)), Step(Kind.SEND, 1, src=out(0)), Step(Kind.RECV, 1, dst=out(0))
    ) == ((), (), (1,))  # fmt: skip


def test_input_and_output_count_as_the_same_memory_and_scratch_does_not() -> None:
    own, slot = Block(Buffer.INPUT, 0, 0), Block(Buffer.SCRATCH, 0, 0)
    assert dependencies(Step(Kind.SEND, 1, src=own), Step(Kind.RECV, 1, dst=out(0)), Step(Kind.RECV, 2, dst=slot)) == ((), (0,), ())


def test_input_and_output_of_an_all_to_all_are_different_memory() -> None:
    steps = (Step(Kind.SEND, 1, src=Block(Buffer.INPUT, 1, 0)), Step(Kind.RECV, 1, dst=out(1)))
    assert Schedule("all_to_all", "direct", 0, 2, 2, 1, steps).dependencies() == ((), ())


def test_a_local_fold_reads_what_it_writes() -> None:
    slot = Block(Buffer.SCRATCH, 1, 0)
    assert dependencies(Step(Kind.RECV, 1, dst=slot), Step(Kind.RECV, 2, dst=out(0)), Step(Kind.REDUCE, src=slot, dst=out(0))) == (
        (),
        (),
        (0, 1),
    )


def test_a_fence_waits_for_the_end_of_every_queue_and_every_queue_for_the_fence() -> None:
    fence = Step(Kind.FENCE)
    assert dependencies(
        Step(Kind.EXPOSE, 1),
        Step(Kind.EXPOSE, 1),
        Step(Kind.ATTACH, 1),
        fence,
        Step(Kind.SEND, 1),
        Step(Kind.SEND, 1),
        Step(Kind.FOLD, dst=out(0)),
        fence,
        Step(Kind.RECV, 1),
    ) == ((), (), (), (1, 2), (3,), (), (), (5,), (7,))


@pytest.mark.parametrize("key", BUILDERS, ids=" ".join)
def test_dependencies_point_backwards_to_other_queues_and_name_each_queue_once(key: tuple[str, str, str]) -> None:
    for size in (1, 2, 5):
        for rank in range(size):
            schedule = build(*key, rank=rank, size=size, segments=3, root=0)
            for index, needed in enumerate(schedule.dependencies()):
                queues = [schedule.steps[earlier].queue for earlier in needed]
                assert all(earlier < index for earlier in needed)
                assert len(set(queues)) == len(queues)
                assert schedule.steps[index].queue not in queues


@pytest.mark.parametrize("subject", [subject for subject in SUBJECTS if subject.variant == "registered"], ids=str)
def test_a_fallback_waits_for_the_same_alone_as_behind_the_prelude(subject: Subject) -> None:
    for size in (2, 4):
        for schedule in subject.schedules(size, segments=2, root=1):
            assert schedule.fallback is not None
            start = len(schedule.prelude)
            behind = [tuple(earlier - start for earlier in needed if earlier >= start) for needed in schedule.continued.dependencies()[start:]]
            assert behind == list(schedule.fallback.dependencies())


def decode(data: bytes) -> tuple[list[Schedule], list[list[tuple[int, ...]]]]:
    """Read compiled schedules back, in the words of the format's description, sharing nothing with the writer."""
    schedules, every_need, at = [], [], 0
    more = True
    while more:
        magic, chunks, segments, scratch, n_steps, _, _, _, more = struct.unpack_from("<9I", data, at)
        assert magic == 0x52465343
        at += 36
        steps, needs = [], []
        for _ in range(n_steps):
            kind, final, spread, zero, peer, s_buffer, s_zero, s_chunk, s_segment, d_buffer, d_zero, d_chunk, d_segment, n_needed = (
                struct.unpack_from("<BBBBiBBHHBBHHH", data, at)
            )
            at += 22
            assert (zero, s_zero, d_zero) == (0, 0, 0)
            needs.append(struct.unpack_from(f"<{n_needed}I", data, at))
            at += 4 * n_needed
            src = None if s_buffer == 255 else Block(Buffer(s_buffer), s_chunk, s_segment)
            dst = None if d_buffer == 255 else Block(Buffer(d_buffer), d_chunk, d_segment)
            steps.append(Step(Kind(kind), peer, src, dst, bool(final), bool(spread)))
        schedules.append(Schedule("", "", 0, 0, chunks, segments, tuple(steps), scratch))
        every_need.append(needs)
    assert at == len(data)
    return schedules, every_need


@pytest.mark.parametrize("key", BUILDERS, ids=" ".join)
def test_compiled_bytes_hold_the_schedule_its_dependencies_and_its_fallback(key: tuple[str, str, str]) -> None:
    for rank in range(3):
        schedule = build(*key, rank=rank, size=3, segments=2, root=1)
        wanted = [schedule] if schedule.fallback is None else [schedule, schedule.fallback]
        found, needs = decode(schedule.compile())
        assert [one.steps for one in found] == [one.steps for one in wanted]
        assert [(one.chunks, one.segments, one.scratch_chunks) for one in found] == [(w.chunks, w.segments, w.scratch_chunks) for w in wanted]
        assert [tuple(need) for need in needs] == [w.dependencies() for w in wanted]


def test_the_header_says_which_buffers_hold_all_chunks_and_whether_there_is_a_fallback() -> None:
    def header(schedule: Schedule) -> tuple[int, ...]:
        return struct.unpack_from("<9I", schedule.compile())

    assert header(ring.all_reduce(1, 3, 4)) == (0x52465343, 3, 4, 0, 32, 1, 1, 1, 0)
    assert header(ring.reduce_scatter(1, 3, 1)) == (0x52465343, 3, 1, 3, 4, 1, 1, 0, 0)
    assert header(direct_registered.all_gather(1, 2, 1, "exchange")) == (0x52465343, 2, 1, 0, 8, 2, 0, 1, 1)
    assert header(direct.barrier(0, 1)) == (0x52465343, 1, 1, 0, 0, 2, 1, 1, 0)


def test_the_compiled_format_does_not_change() -> None:
    header = "4353465202000000010000000000000004000000010000000100000001000000" + "00000000"
    send = "01000000" + "01000000" + "010001000000" + "ff0000000000" + "0000"
    fold = "03010000" + "01000000" + "010000000000" + "010000000000" + "0000"
    send_on = "01000000" + "01000000" + "010000000000" + "ff0000000000" + "0100" + "01000000"
    receive = "02000000" + "01000000" + "ff0000000000" + "010001000000" + "0100" + "00000000"
    assert ring.all_reduce(0, 2, 1).compile().hex() == header + send + fold + send_on + receive


def test_a_schedule_whose_numbers_do_not_fit_is_refused_by_name() -> None:
    schedule = ring.broadcast(1, 2, 0, 3)
    far = replace(schedule, segments=70_000, steps=(Step(Kind.RECV, 0, dst=out(0, 65_536)),))
    with pytest.raises(ScheduleError, match=r"broadcast \(ring\) for 2 ranks .* 70000 segments is too large to compile on rank 1") as caught:
        far.compile()
    assert isinstance(caught.value, RingfoldError)


def test_a_step_reads_as_a_sentence() -> None:
    step = Step(Kind.RECV_REDUCE, 2, src=Block(Buffer.INPUT, 1, 0), dst=Block(Buffer.SCRATCH, 1, 0), final=True)
    assert str(step) == "RECV_REDUCE from 2 of INPUT chunk 1 segment 0 into SCRATCH slot 1 segment 0 final"
