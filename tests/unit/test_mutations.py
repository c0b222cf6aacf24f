"""Every kind of damage to one step of any algorithm, caught by the proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.promise import verify
from ringfold.collectives.schedule import LOCAL_QUEUE, REDUCING, Buffer, Kind, Schedule, ScheduleError, Step

from tests.harness.schedules import SUBJECTS, Subject


def mutations(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """All the ways to damage one step, each of which changes what the operation does."""
    steps, needed = schedule.steps, schedule.dependencies()

    def damaged(name: str, index: int, *instead: Step) -> tuple[str, Schedule]:
        return f"{name} at step {index} ({steps[index]})", replace(schedule, steps=(*steps[:index], *instead, *steps[index + 1 :]))

    for index, step in enumerate(steps):
        yield damaged("dropped", index)
        # A FOLD into SCRATCH may be repeated: it does not read what it writes.
        if step.kind in REDUCING and not (step.kind is Kind.FOLD and step.dst is not None and step.dst.buffer is Buffer.SCRATCH):
            yield damaged("doubled", index, step, step)
        if step.final:
            yield damaged("not final", index, replace(step, final=False))
        if step.spread:
            yield damaged("not spread", index, replace(step, spread=False))
        if step.peer >= 0:
            others = [peer for peer in range(schedule.size) if peer not in (schedule.rank, step.peer)]
            for peer in others:
                yield damaged("another peer", index, replace(step, peer=peer))
        for name in ("src", "dst"):
            block = getattr(step, name)
            if block is None:
                continue
            if schedule.chunks > 1:
                yield damaged(f"wrong chunk in {name}", index, replace(step, **{name: replace(block, chunk=(block.chunk + 1) % schedule.chunks)}))
            yield damaged(f"wrong segment in {name}", index, replace(step, **{name: replace(block, segment=1 - block.segment)}))
        # Neighbours may change places unless one waits for the other or both use the same channel; two folds into one block make another order
        # of folds, which is as good where none is prescribed.
        free = step.kind is Kind.RECV_REDUCE is steps[index - 1].kind and step.src == step.dst == steps[index - 1].dst == steps[index - 1].src
        if index and steps[index - 1] != step and not (free and schedule.algorithm != "direct"):
            before = steps[index - 1]
            same_channel = before.queue == step.queue != LOCAL_QUEUE
            if same_channel or index - 1 in needed[index]:
                swapped = (*steps[: index - 1], step, before, *steps[index + 1 :])
                yield f"steps {index - 1} ({before}) and {index} ({step}) swapped", replace(schedule, steps=swapped)


def all_mutations(subject: Subject, schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """The mutations of a schedule, and of a fallback that must fold as it does."""
    if subject.fallback == "exchange":  # otherwise the schedule itself is another subject's, too
        yield from mutations(schedule)
    if schedule.fallback is not None and subject.op in FOLDING:
        for name, damaged in mutations(schedule.fallback):
            yield f"fallback: {name}", replace(schedule, fallback=damaged)


# The exchange alone may fold in any order; as the fallback of the registered variant, in rank order only. Fallbacks of operations that fold
# nothing are subjects of their own, or the same steps again.
MUTATED = [s for s in SUBJECTS if (s.variant != "exchange" and s.op in FOLDING) or (s.fallback == "exchange" and s.op not in FOLDING)]


@pytest.mark.parametrize("subject", MUTATED, ids=str)
def test_every_mutation_of_every_step_is_caught(subject: Subject) -> None:
    size = 8 if subject.op == "barrier" else 4  # with 8 ranks a barrier needs all of its fences
    schedules = subject.schedules(size, segments=2, root=1)
    survivors, tried = [], 0
    for rank in (0, 1, size - 1):
        for name, damaged in all_mutations(subject, schedules[rank]):
            tried += 1
            try:
                verify(subject.op, [damaged if schedule.rank == rank else schedule for schedule in schedules], count=100)
            except ScheduleError:
                continue
            survivors.append(f"rank {rank}: {name}")
    assert tried >= 20
    assert not survivors, f"{len(survivors)} of {tried} mutations pass:\n" + "\n".join(survivors)
