"""What each collective operation promises, and the proof that a set of schedules keeps it.

all_reduce: every rank ends with the fold of all contributions in every chunk, folded in the same order everywhere, so in the same bits.
reduce: so does the root, all in one order. reduce_scatter: rank r ends with the fold of chunk r. all_gather: chunk r everywhere is rank r's;
gather: at the root. broadcast: all have the root's vector; scatter: rank r its chunk r. all_to_all: chunk s at rank r is what s had for r.
barrier: nobody leaves before everybody has come. Where INPUT is not also OUTPUT, it is as it was.

A schedule and its fallback fold in the same order, so that the bits of a result do not depend on where its memory lies.

simulator.py runs the schedules and finds what is wrong whatever the operation: deadlocks, races, mismatched blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfold.collectives.codes import FOLDING
from ringfold.collectives.schedule import Kind, Schedule, ScheduleError, Step
from ringfold.collectives.simulator import Order, SimulationResult, ranks_text, simulate, title
from ringfold.collectives.vectors import Vectors

__all__ = ["verify"]

# Operations in which the caller may let a rank's chunk of INPUT and OUTPUT be the same memory.
MAY_BE_IN_PLACE = ("reduce_scatter", "all_gather", "gather", "scatter")


def verify(op: str, schedules: Sequence[Schedule], count: int | Sequence[int], align: int = 1) -> SimulationResult:
    """Prove that the schedules, and their fallbacks, do what `op` promises, whether or not input and output are the same memory.

    Returns the simulation of the schedules themselves.

    Raises:
        ScheduleError: as `simulate`; or the operation's promise is broken, on which rank and in which block.
    """
    if any(schedule.op != op for schedule in schedules):
        raise ScheduleError(f"asked to verify {op}, but the schedules are for {sorted({schedule.op for schedule in schedules})}")
    result = _verify(op, schedules, count, align, read_only=False)
    fallbacks = [schedule.fallback for schedule in schedules if schedule.fallback is not None]
    if fallbacks:
        _check_same_answers(schedules)
        if len(fallbacks) != len(schedules):
            raise ScheduleError(f"{title(schedules)}: only {len(fallbacks)} of {len(schedules)} ranks have a fallback")
        other = _verify(op, [schedule.continued for schedule in schedules], count, align, read_only=True)
        if op in FOLDING and _orders(result) != _orders(other):
            raise ScheduleError(f"{title(schedules)}: the fallback folds in another order, so registered memory would change the bits of the result")
    return result


def _verify(op: str, schedules: Sequence[Schedule], count: int | Sequence[int], align: int, *, read_only: bool) -> SimulationResult:
    for in_place in (True, False) if op in MAY_BE_IN_PLACE else (False,):
        result = simulate(schedules, count, align, in_place=in_place, read_only=read_only)
        if op != "barrier":
            _check_promise(op, schedules, result)
    return result


def _check_promise(op: str, schedules: Sequence[Schedule], result: SimulationResult) -> None:
    first = schedules[0]
    everyone = (1 << first.size) - 1
    orders: dict[tuple[int, int], tuple[int, Order]] = {}
    for rank, cells in enumerate(result.outputs):
        for chunk, segment in Vectors(first, in_place=False).outputs(rank):
            where = f"{title(schedules)}: rank {rank} ends with chunk {chunk} segment {segment} of OUTPUT"
            contents = cells.get((chunk, segment))
            wanted = everyone if op in FOLDING else 1 << (first.root if op in ("broadcast", "scatter") else chunk)
            if contents is None:
                raise ScheduleError(f"{where} unwritten")
            if contents.ranks != wanted:
                raise ScheduleError(f"{where} made of {ranks_text(contents.ranks)}, expected {ranks_text(wanted)}")
            if op in FOLDING and first.size > 1 and not contents.final:
                raise ScheduleError(f"{where} folded but not final: an average would not be divided")
            first_order = orders.setdefault((chunk, segment), (rank, contents.order))
            if contents.order != first_order[1]:
                raise ScheduleError(
                    f"{where} folded in the order {contents.order}, rank {first_order[0]} in the order {first_order[1]}:"
                    " floating-point results would differ between ranks"
                )


def _check_same_answers(schedules: Sequence[Schedule]) -> None:
    """See that all ranks hear of the same vectors before their first fence: they must decide alike whether to use the fallback."""
    heard = []
    for schedule in schedules:
        *prelude, last = schedule.prelude or (Step(Kind.COPY),)
        telling = (Kind.EXPOSE, Kind.ATTACH)
        late = any(step.kind in telling for step in schedule.steps[len(schedule.prelude) :])
        if late or last.kind is not Kind.FENCE or any(step.kind not in telling for step in prelude):
            raise ScheduleError(f"{title(schedules)}: rank {schedule.rank} must EXPOSE and ATTACH, and nothing else, before its first FENCE")
        heard.append({schedule.rank if step.kind is Kind.EXPOSE else step.peer for step in prelude})
    if any(ranks != heard[0] for ranks in heard):
        raise ScheduleError(f"{title(schedules)}: before their first FENCE the ranks hear of different vectors: {heard}")


def _orders(result: SimulationResult) -> set[object]:
    """Return the fold orders, without regard to which operand of a fold is left and which right: a + b and b + a are the same bits."""

    def normal(order: Order) -> object:
        return frozenset(normal(operand) for operand in order) if isinstance(order, tuple) else order

    return {normal(contents.order) for cells in result.outputs for contents in cells.values()}
