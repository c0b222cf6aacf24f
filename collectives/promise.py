"""What each collective operation promises, and the proof that a set of schedules keeps it.

all_reduce: every rank ends with the fold of all contributions in every chunk, folded in the same order everywhere, so in the same bits.
reduce_scatter: rank r ends with the fold of chunk r, and INPUT is as it was. all_gather: chunk r everywhere is rank r's. broadcast: all
have the root's vector. barrier: nobody leaves before everybody has come. A schedule and its fallback fold in the same order, so that the
bits of a result do not depend on where its memory lies.

simulator.py runs the schedules and finds what is wrong whatever the operation: deadlocks, races, mismatched blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfold.collectives.schedule import Kind, Schedule, ScheduleError
from ringfold.collectives.simulator import Order, SimulationResult, ranks_text, simulate, title

__all__ = ["verify"]


def verify(op: str, schedules: Sequence[Schedule], count: int | Sequence[int], align: int = 1) -> SimulationResult:
    """Prove that the schedules, and their fallbacks, do what `op` promises, whether or not input and output are the same memory.

    Returns the simulation of the schedules themselves.

    Raises:
        ScheduleError: as `simulate`; or the operation's promise is broken, on which rank and in which block.
    """
    if any(schedule.op != op for schedule in schedules):
        raise ScheduleError(f"asked to verify {op}, but the schedules are for {sorted({schedule.op for schedule in schedules})}")
    shared = op in ("reduce_scatter", "all_gather")
    for in_place in (True, False) if shared else (False,):
        result = simulate(schedules, count, align, in_place=in_place)
        _check_promise(op, schedules, result)
    fallbacks = [schedule.fallback for schedule in schedules if schedule.fallback is not None]
    if fallbacks:
        _check_same_answers(schedules)
        if len(fallbacks) != len(schedules):
            raise ScheduleError(f"{title(schedules)}: only {len(fallbacks)} of {len(schedules)} ranks have a fallback")
        other = verify(op, fallbacks, count, align)
        if op in ("all_reduce", "reduce_scatter") and _orders(result) != _orders(other):
            raise ScheduleError(f"{title(schedules)}: the fallback folds in another order, so registered memory would change the bits of the result")
    return result


def _check_promise(op: str, schedules: Sequence[Schedule], result: SimulationResult) -> None:
    size, everyone = len(schedules), (1 << len(schedules)) - 1
    if op == "barrier":
        return
    for rank, cells in enumerate(result.outputs):
        for chunk in [rank] if op == "reduce_scatter" else range(schedules[0].chunks):
            for segment in range(schedules[0].segments):
                where = f"{title(schedules)}: rank {rank} ends with chunk {chunk} segment {segment} of OUTPUT"
                contents = cells.get((chunk, segment))
                wanted = {"all_gather": 1 << chunk, "broadcast": 1 << max(schedules[0].root, 0)}.get(op, everyone)
                if contents is None:
                    raise ScheduleError(f"{where} unwritten")
                if contents.ranks != wanted:
                    raise ScheduleError(f"{where} made of {ranks_text(contents.ranks)}, expected {ranks_text(wanted)}")
                if wanted == everyone and size > 1 and not contents.final:
                    raise ScheduleError(f"{where} folded but not final: an average would not be divided")
                if op == "all_reduce" and contents.order != result.outputs[0][chunk, segment].order:
                    raise ScheduleError(
                        f"{where} folded in the order {contents.order}, rank 0 in the order {result.outputs[0][chunk, segment].order}:"
                        " floating-point results would differ between ranks"
                    )


def _check_same_answers(schedules: Sequence[Schedule]) -> None:
    """See that all ranks hear of the same vectors before their first fence: they must decide alike whether to use the fallback."""
    heard = []
    for schedule in schedules:
        kinds = [step.kind for step in schedule.steps]
        prelude = schedule.steps[: kinds.index(Kind.FENCE)] if Kind.FENCE in kinds else schedule.steps
        others = [step for step in prelude if step.kind not in (Kind.EXPOSE, Kind.ATTACH)]
        if others or len(prelude) == len(kinds) or {Kind.EXPOSE, Kind.ATTACH} & set(kinds[len(prelude) :]):
            raise ScheduleError(f"{title(schedules)}: rank {schedule.rank} must EXPOSE and ATTACH, and nothing else, before its first FENCE")
        heard.append({schedule.rank if step.kind is Kind.EXPOSE else step.peer for step in prelude})
    if any(ranks != heard[0] for ranks in heard):
        raise ScheduleError(f"{title(schedules)}: before their first FENCE the ranks hear of different vectors: {heard}")


def _orders(result: SimulationResult) -> set[object]:
    """Return the fold orders, without regard to which operand of a fold is left and which right: a + b and b + a are the same bits."""

    def normal(order: Order) -> object:
        return frozenset(normal(operand) for operand in order) if isinstance(order, tuple) else order

    return {normal(contents.order) for cells in result.outputs for contents in cells.values()}
