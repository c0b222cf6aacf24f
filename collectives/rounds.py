"""Schedules in rounds, for engines that are given whole groups of messages in stream order and are never asked how far they are.

Every rank knows every rank's schedule, so all work out the same rounds without talking: the messages of a round are those of which both ends may
begin once all earlier rounds are complete, at most one from each rank to each other. An engine that carries out a group of messages as one
(NCCL's ncclGroupStart and End) can then be given one round after the other: in none does a message wait for one of a later round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringfold.collectives.interpreter import Plan
from ringfold.collectives.schedule import LOCAL_QUEUE, ScheduleError

__all__ = ["Round", "rounds"]


@dataclass(frozen=True, slots=True)
class Round:
    """What one rank does in a round: its messages, begun together, and then steps that are none; numbers of steps of its schedule."""

    messages: tuple[int, ...]
    local: tuple[int, ...]


def rounds(plans: Sequence[Plan]) -> list[list[Round]]:
    """Return the rounds of each rank, given the plans of all: as many for each, in some of which it may have nothing to do.

    Raises: ScheduleError, if no message of any rank can pass and some are left.
    """
    states = [_Rank(plan) for plan in plans]
    result: list[list[Round]] = [[] for _ in plans]
    passing: list[list[int]] = [[] for _ in plans]
    while True:
        for state, messages, done in zip(states, passing, result, strict=True):
            done.append(Round(tuple(messages), tuple(state.run_local())))
        if all(state.finished for state in states):
            return result
        passing = _meeting(states)
        if not any(passing):
            stuck = [rank for rank, state in enumerate(states) if not state.finished]
            schedule = plans[0].schedule
            raise ScheduleError(f"{schedule.op} ({schedule.algorithm}) of {schedule.size} ranks: no message of ranks {stuck} can pass any more")


class _Rank:
    """How far one rank is."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._next = dict.fromkeys(plan.queues, 0)
        self._done = [False] * len(plan.schedule.steps)
        self._left = len(self._done)

    @property
    def finished(self) -> bool:
        return not self._left

    def head(self, queue: tuple[str, int]) -> int | None:
        """Return the next step of a queue if it can be taken now."""
        steps = self.plan.queues.get(queue, ())
        place = self._next.get(queue, 0)
        if place == len(steps) or not all(self._done[earlier] for earlier in self.plan.dependencies[steps[place]]):
            return None
        return steps[place]

    def take(self, step: int) -> None:
        self._next[self.plan.schedule.steps[step].queue] += 1
        self._done[step] = True
        self._left -= 1

    def run_local(self) -> list[int]:
        taken = []
        while (step := self.head(LOCAL_QUEUE)) is not None:
            self.take(step)
            taken.append(step)
        return taken


def _meeting(states: Sequence[_Rank]) -> list[list[int]]:
    """Take the messages of which both ends can begin, and return them for each rank in the order of its steps."""
    pairs = []
    for rank, state in enumerate(states):
        for side, peer in state.plan.queues:
            if side == "send":
                ends = state.head(("send", peer)), states[peer].head(("receive", rank))
                pairs += [(rank, ends[0], peer, ends[1])] if None not in ends else []
    passing: list[list[int]] = [[] for _ in states]
    for sender, sent, receiver, received in pairs:
        for rank, step in ((sender, sent), (receiver, received)):
            assert step is not None
            states[rank].take(step)
            passing[rank].append(step)
    return [sorted(messages) for messages in passing]
