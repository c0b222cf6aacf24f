"""The simulator and the proof of promises, shown one fault of each kind: what it is called, and on which rank and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
from ringfold.collectives.algorithms import build, direct, ring
from ringfold.collectives.promise import verify
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, ScheduleError, Step
from ringfold.collectives.simulator import simulate

from tests.harness.schedules import SUBJECTS


def block(buffer: Buffer, chunk: int = 0, segment: int = 0) -> Block:
    return Block(buffer, chunk, segment)


IN, OUT, SLOT = block(Buffer.INPUT), block(Buffer.OUTPUT), block(Buffer.SCRATCH)
FENCE = Step(Kind.FENCE)


def of(op: str, *steps_of_ranks: list[Step], chunks: int = 1, root: int = -1) -> list[Schedule]:
    """One hand-written schedule a rank."""
    size = len(steps_of_ranks)
    return [Schedule(op, "ring", rank, size, chunks, 1, tuple(s), scratch_chunks=2, root=root) for rank, s in enumerate(steps_of_ranks)]


def refuses(schedules: list[Schedule], *texts: str, check: Callable[..., object] = simulate) -> None:
    with pytest.raises(ScheduleError) as caught:
        check(*((schedules[0].op,) if check is verify else ()), schedules, 10)
    for text in texts:
        assert text in str(caught.value)


def without(schedule: Schedule, *dropped: int) -> Schedule:
    return replace(schedule, steps=tuple(step for index, step in enumerate(schedule.steps) if index not in dropped))


def test_a_deadlock_says_where_each_rank_is_stuck() -> None:
    def wait_then_send(peer: int) -> list[Step]:
        return [Step(Kind.RECV, peer, dst=SLOT), FENCE, Step(Kind.SEND, peer, src=OUT)]

    refuses(
        of("all_reduce", wait_then_send(1), wait_then_send(0)),
        "all_reduce (ring) of 2 ranks",
        "deadlock",
        "rank 0 is at step 0 (RECV from 1 into SCRATCH slot 0 segment 0): rank 1 is not ready to send",
        "rank 0 is at step 2 (SEND to 1 of OUTPUT chunk 0 segment 0): waits for its steps [1]",
        "rank 1 is at step 0 (RECV from 0",
    )


def test_sends_that_only_a_buffer_would_save_are_a_deadlock() -> None:
    # Each rank sends before it receives into the same block: legal only because the two are different queues ...
    def send_then_receive(peer: int) -> list[Step]:
        return [Step(Kind.SEND, peer, src=OUT), Step(Kind.RECV, peer, dst=SLOT)]

    simulate(of("all_reduce", send_then_receive(1), send_then_receive(0)), 10)

    # ... and with a fence between them it is not.
    def fenced(peer: int) -> list[Step]:
        send, receive = send_then_receive(peer)
        return [send, FENCE, receive]

    refuses(of("all_reduce", fenced(1), fenced(0)), "deadlock", "rank 1 is at step 0 (SEND to 0")


def test_an_unmatched_send_and_an_unmatched_receive_are_named() -> None:
    refuses(of("all_reduce", [Step(Kind.SEND, 1, src=OUT)], []), "rank 0 is at step 0 (SEND to 1", "rank 1 never receives it")
    refuses(of("all_reduce", [Step(Kind.RECV, 1, dst=OUT)], []), "rank 0 is at step 0 (RECV from 1", "rank 1 never sends it")


def test_a_sender_and_a_receiver_must_mean_the_same_block() -> None:
    refuses(
        of("all_reduce", [Step(Kind.SEND, 1, src=block(Buffer.OUTPUT, 1))], [Step(Kind.RECV, 0, dst=OUT)], chunks=2),
        "rank 1, step 0 (RECV from 0 into OUTPUT chunk 0 segment 0): the blocks do not match: step 0 of rank 0 is SEND to 1 of OUTPUT chunk 1",
    )
    refuses(of("all_reduce", [Step(Kind.SEND, 1)], [Step(Kind.RECV, 0, dst=OUT)]), "one side has no block")
    refuses(of("all_reduce", [Step(Kind.EXPOSE, 1)], [Step(Kind.RECV, 0, dst=OUT)]), "meets step 0 of rank 0 (EXPOSE to 1)")


def test_a_slot_has_the_shape_of_its_chunk() -> None:
    third = block(Buffer.SCRATCH, 1)
    refuses(of("all_reduce", [Step(Kind.COPY, src=OUT, dst=third)], [], chunks=2), "src and dst are blocks of different shape")
    simulate(of("all_reduce", [Step(Kind.COPY, src=OUT, dst=third)], [], chunks=1), 10)


def test_a_contribution_may_not_be_folded_twice() -> None:
    fold = Step(Kind.REDUCE, src=SLOT, dst=OUT)
    steps = [Step(Kind.RECV, 1, dst=SLOT), fold, fold]
    refuses(of("all_reduce", steps, [Step(Kind.SEND, 0, src=OUT)]), "rank 0, step 2", "folds the contribution of rank 1 twice")


def test_nothing_is_folded_into_a_block_that_was_final() -> None:
    steps = [Step(Kind.RECV_REDUCE, 1, src=OUT, dst=OUT, final=True), Step(Kind.RECV_REDUCE, 2, src=OUT, dst=OUT, final=True)]
    refuses(of("all_reduce", steps, *[[Step(Kind.SEND, 0, src=OUT)]] * 2), "rank 0, step 1", "already final")


def test_a_result_must_be_marked_final_and_hold_everyone() -> None:
    schedules = [ring.reduce_scatter(rank, 3, 1) for rank in range(3)]
    last = replace(schedules[1], steps=(*schedules[1].steps[:-1], replace(schedules[1].steps[-1], final=False)))
    refuses([schedules[0], last, schedules[2]], "rank 1", "not final", check=verify)
    refuses(of("reduce_scatter", *([Step(Kind.COPY, src=block(Buffer.INPUT, r), dst=block(Buffer.OUTPUT, r))] for r in range(2)), chunks=2),
            "rank 0 ends with chunk 0", "made of rank 0, expected ranks 0, 1", check=verify)  # fmt: skip
    refuses(of("broadcast", [], [], root=0), "rank 1 ends with chunk 0 segment 0 of OUTPUT unwritten", check=verify)


@pytest.mark.parametrize("op", ["reduce_scatter", "all_gather", "gather", "scatter", "reduce", "all_to_all"])
def test_input_must_not_be_modified_where_it_is_not_the_output_too(op: str) -> None:
    own, elsewhere = block(Buffer.INPUT, 1), block(Buffer.OUTPUT if op == "all_to_all" else Buffer.SCRATCH, 1)
    there_and_back = [Step(Kind.COPY, src=own, dst=elsewhere), Step(Kind.COPY, src=elsewhere, dst=own)]
    schedules = of(op, [], there_and_back, chunks=2, root=0 if op == "reduce" else 1)
    refuses(schedules, "rank 1, step 1", "modifies INPUT chunk 1 segment 0 of rank 1: INPUT must not be modified")


def test_only_the_root_has_the_output_of_a_reduce_or_gather_and_the_input_of_a_scatter() -> None:
    for op in ("reduce", "gather"):
        refuses(of(op, [], [Step(Kind.RECV, 0, dst=OUT)], chunks=2, root=0), "does not exist: only rank 0, the root, has OUTPUT")
    refuses(of("scatter", [], [Step(Kind.SEND, 0, src=IN)], chunks=2, root=0), "does not exist: only rank 0, the root, has INPUT")


def test_pieces_of_an_all_to_all_must_end_where_they_were_meant_to() -> None:
    send = Step(Kind.SEND, 1, src=block(Buffer.INPUT, 1))
    simulate(of("all_to_all", [send], [Step(Kind.RECV, 0, dst=OUT)], chunks=2), [1, 2, 3, 4])
    refuses(of("all_to_all", [send], [Step(Kind.RECV, 0, dst=block(Buffer.OUTPUT, 1))], chunks=2), "the blocks do not match")
    refuses(of("all_to_all", [replace(send, src=IN)], [Step(Kind.RECV, 0, dst=OUT)], chunks=2), "the blocks do not match")
    refuses(of("all_to_all", [Step(Kind.COPY, src=IN, dst=block(Buffer.SCRATCH))], [], chunks=2), "have no common lengths to cut SCRATCH by")
    pull = [Step(Kind.ATTACH, 0), FENCE, Step(Kind.PULL, 0, dst=block(Buffer.OUTPUT, 1))]
    refuses(of("all_to_all", [Step(Kind.EXPOSE, 1)], pull, chunks=2), "rank 0 does not expose what belongs there")


def test_what_follows_for_unregistered_memory_may_not_write_into_a_peers_vector() -> None:
    for op in ("all_reduce", "reduce"):
        schedules = registered(op)
        body = [replace(s, steps=s.steps[len(s.prelude) :], fallback=None) for s in schedules]
        broken = [replace(schedule, fallback=fallback) for schedule, fallback in zip(schedules, body, strict=True)]
        refuses(broken, "writes into the vector of a peer, which may lie outside registered memory", check=verify)


def test_scratch_and_output_must_be_written_before_they_are_read() -> None:
    refuses(of("all_reduce", [Step(Kind.REDUCE, src=SLOT, dst=OUT)], []), "reads SCRATCH slot 0 segment 0 of rank 0, which was never written")
    refuses(of("broadcast", [Step(Kind.RECV, 1, dst=OUT)], [Step(Kind.SEND, 0, src=OUT)], root=0), "rank 1, step 0", "never written")


def test_ranks_that_fold_in_different_orders_are_found() -> None:
    schedules = [direct.all_reduce_one_shot(rank, 3, 1) for rank in range(3)]
    steps = list(schedules[2].steps)
    first, second = (index for index, step in enumerate(steps) if step.kind is Kind.REDUCE)
    # Rank 2 starts from its own vector: 2 + 0 + 1 instead of 0 + 1 + 2.
    own, slot0, slot1 = OUT, SLOT, block(Buffer.SCRATCH, 1)
    steps[first : second + 2] = [Step(Kind.REDUCE, src=slot0, dst=own), Step(Kind.REDUCE, src=slot1, dst=own, final=True)]
    refuses([*schedules[:2], replace(schedules[2], steps=tuple(steps))], "rank 2", "((2, 0), 1)", "((0, 1), 2)", check=verify)


def registered(op: str, size: int = 3) -> list[Schedule]:
    return [build(op, "direct", "registered", rank, size, segments=1, root=0) for rank in range(size)]


EXPOSING = sorted({subject.op for subject in SUBJECTS if subject.variant == "registered"})


@pytest.mark.parametrize("op", EXPOSING)
def test_a_rank_may_not_touch_a_vector_before_its_rank_has_come(op: str) -> None:
    schedules = registered(op)
    visitor = 0 if op == "gather" else 1  # root 0 alone reads what is gathered
    fence = next(index for index, step in enumerate(schedules[visitor].steps) if step.kind is Kind.FENCE)
    schedules[visitor] = without(schedules[visitor], fence)
    refuses(schedules, f"rank {visitor}", "does not wait for the ATTACH to rank")


@pytest.mark.parametrize("op", EXPOSING)
def test_a_rank_may_not_leave_while_others_still_use_its_vector(op: str) -> None:
    schedules = registered(op)
    visitor = 0 if op == "gather" else 1
    fence = max(index for index, step in enumerate(schedules[visitor].steps) if step.kind is Kind.FENCE)
    schedules[visitor] = without(schedules[visitor], fence)
    refuses(schedules, f"rank {visitor}", "touches the vector of rank", "before it ends")


def test_ranks_that_write_the_same_exposed_block_or_read_what_another_writes_race() -> None:
    schedules = registered("all_reduce")
    steps = schedules[1].steps
    fold = next(index for index, step in enumerate(steps) if step.kind is Kind.FOLD)

    def instead(step: Step) -> list[Schedule]:
        return [schedules[0], replace(schedules[1], steps=(*steps[:fold], step, *steps[fold + 1 :]), scratch_chunks=1), schedules[2]]

    refuses(instead(replace(steps[fold], dst=block(Buffer.OUTPUT, 2))), "races with step 5 of rank 2 (FOLD into OUTPUT chunk 2")
    refuses(instead(Step(Kind.COPY, src=OUT, dst=SLOT)), "races with step 5 of rank", "on OUTPUT chunk 0 segment 0 of rank 1")


@dataclass(frozen=True)
class Forgetful(Schedule):
    """A schedule that has forgotten that one step waits for another."""

    forgotten: tuple[int, int] = (-1, -1)

    def dependencies(self) -> tuple[tuple[int, ...], ...]:
        later, lost = self.forgotten
        known = Schedule.dependencies(self)
        return tuple(tuple(i for i in needed if (index, i) != (later, lost)) for index, needed in enumerate(known))


@pytest.mark.parametrize("make", [ring.all_reduce, ring.reduce_scatter, direct.all_reduce, direct.all_reduce_one_shot])
def test_every_single_dependency_on_a_write_is_needed_and_its_loss_is_found(make: Callable[[int, int, int], Schedule]) -> None:
    # Those of a write on a read are not all needed: what arrives may have been sent only after the peer had what was read.
    size, tried = 4, 0
    schedules = [make(rank, size, 2) for rank in range(size)]
    missed = []
    for rank, schedule in enumerate(schedules):
        values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
        for later, needed in enumerate(schedule.dependencies()):
            for earlier in needed:
                if schedule.steps[earlier].dst is None:
                    continue
                tried += 1
                forgetful = Forgetful(**values, forgotten=(later, earlier))
                try:
                    verify(schedule.op, [forgetful if other is schedule else other for other in schedules], 10)
                except ScheduleError:
                    continue
                missed.append(f"rank {rank}: {later} ({schedule.steps[later]}) after {earlier} ({schedule.steps[earlier]})")
    assert tried >= 4 * size
    assert not missed, "\n".join(missed)


def test_a_barrier_that_lets_someone_leave_early_is_found() -> None:
    schedules = [direct.barrier(rank, 4) for rank in range(4)]
    refuses([without(s, 2) for s in schedules], "barrier", "may leave before rank", check=verify)
    refuses(of("barrier", [Step(Kind.SEND, 1)], [Step(Kind.RECV, 0)]), "rank 0 may leave before rank 1 has come", check=verify)


def test_all_ranks_must_hear_of_the_same_vectors_and_have_a_fallback_in_the_same_order() -> None:
    schedules = registered("all_reduce", 4)
    refuses([schedules[0], replace(schedules[1], fallback=None), *schedules[2:]], "only 3 of 4 ranks have a fallback", check=verify)
    one_sided = registered("broadcast")
    told = replace(one_sided[1], steps=(Step(Kind.EXPOSE, 2), *one_sided[1].steps))
    hears = replace(one_sided[2], steps=(Step(Kind.ATTACH, 1), *one_sided[2].steps))
    refuses([one_sided[0], told, hears], "hear of different vectors: [{0}, {0, 1}, {0, 1}]", check=verify)
    early = replace(schedules[1], steps=(Step(Kind.COPY, src=OUT, dst=OUT), *schedules[1].steps))
    refuses([schedules[0], early, *schedules[2:]], "rank 1 must EXPOSE and ATTACH, and nothing else", check=verify)
    other_order = [replace(schedule, fallback=ring.all_reduce(rank, 4, 1)) for rank, schedule in enumerate(schedules)]
    refuses(other_order, "the fallback folds in another order", check=verify)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step(Kind.SEND, 2, src=OUT), "the peer must be another rank below 2"),
        (Step(Kind.SEND, 0, src=OUT), "the peer must be another rank below 2"),
        (Step(Kind.COPY, src=OUT), "a COPY needs a dst"),
        (Step(Kind.RECV, 1, src=OUT, dst=OUT), "a RECV has no src"),
        (Step(Kind.FENCE, 1), "a FENCE has no peer"),
        (Step(Kind.SEND, 1, src=OUT, final=True), "only a fold can be final"),
        (Step(Kind.REDUCE, src=SLOT, dst=OUT, spread=True), "only a FOLD spread"),
        (Step(Kind.SEND, 1, src=block(Buffer.OUTPUT, 1)), "OUTPUT chunk 1 segment 0 does not exist: there are 1 chunks of 1 segments"),
        (Step(Kind.SEND, 1, src=block(Buffer.OUTPUT, 0, 1)), "OUTPUT chunk 0 segment 1 does not exist"),
        (Step(Kind.RECV, 1, dst=block(Buffer.SCRATCH, 2)), "SCRATCH slot 2 segment 0 does not exist: there are 2 chunks"),
    ],
)
def test_a_malformed_step_is_refused(step: Step, text: str) -> None:
    refuses(of("all_reduce", [step], []), f"rank 0, step 0 ({step})", text)


def test_ranks_must_hold_their_own_chunk_only_where_the_buffer_is_short() -> None:
    refuses(of("reduce_scatter", [Step(Kind.RECV, 1, dst=block(Buffer.OUTPUT, 1))], [], chunks=2), "OUTPUT holds chunk 0 only")
    refuses(of("all_gather", [Step(Kind.SEND, 1, src=block(Buffer.INPUT, 1))], [], chunks=2), "INPUT holds chunk 0 only")


def test_schedules_of_different_operations_or_shapes_do_not_fit_together() -> None:
    refuses([ring.all_reduce(0, 2, 1), ring.all_reduce(1, 2, 2)], "schedule 1 has segments 2, expected 1")
    refuses([ring.all_reduce(0, 2, 1), ring.all_reduce(0, 2, 1)], "schedule 1 has rank 0, expected 1")
    with pytest.raises(ScheduleError, match="asked to verify all_gather"):
        verify("all_gather", [ring.all_reduce(rank, 2, 1) for rank in range(2)], 10)


def test_a_result_counts_the_elements_each_rank_sent_also_of_uneven_chunks() -> None:
    schedules = [ring.all_gather(rank, 3, 2) for rank in range(3)]
    assert verify("all_gather", schedules, [5, 0, 7]).sent == (5 + 7, 5, 7)
    assert verify("all_gather", schedules, 10).sent == (4 + 2, 4 + 4, 2 + 4)
