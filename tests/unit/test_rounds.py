"""The rounds of a schedule: all its steps, once, in an order that it allows; every message meets in one round at both ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from ringfold.collectives.algorithms import build
from ringfold.collectives.interpreter import Execution, Plan
from ringfold.collectives.rounds import rounds
from ringfold.collectives.schedule import Kind, ScheduleError
from torch import Tensor

from tests.unit.test_interpreter import SCHEDULES, Message, pieces_of, plans_of, requests_and_results, roots


@pytest.mark.parametrize("key", SCHEDULES, ids=" ".join)
def test_each_step_is_taken_once_after_all_that_it_depends_on(key: tuple[str, str, str]) -> None:
    for size in (1, 2, 3, 5, 8, 17):
        for root in roots(key[0], size):
            plans = plans_of(key, size, 2, root)
            for plan, of_rank in zip(plans, rounds(plans), strict=True):
                done: set[int] = set()
                for round_ in of_rank:
                    assert all(set(plan.dependencies[step]) <= done for step in round_.messages)
                    done |= set(round_.messages)
                    for step in round_.local:
                        assert set(plan.dependencies[step]) <= done
                        done.add(step)
                assert sum(len(r.messages) + len(r.local) for r in of_rank) == len(done) == len(plan.schedule.steps)


@dataclass
class Group:
    """One rank's messages of a round, as an engine takes them: all at once."""

    rank: int
    sent: dict[tuple[int, int], Tensor]
    received: dict[tuple[int, int], Tensor]

    def isend(self, tensor: Tensor, peer: int, _: int) -> Message:
        assert (self.rank, peer) not in self.sent
        self.sent[self.rank, peer] = tensor
        return Message(tensor, True)

    def irecv(self, tensor: Tensor, peer: int, _: int) -> Message:
        assert (peer, self.rank) not in self.received
        self.received[peer, self.rank] = tensor.fill_(99)
        return Message(tensor, True)


@pytest.mark.parametrize("key", SCHEDULES, ids=" ".join)
def test_an_engine_that_carries_out_one_round_after_the_other_gets_the_right_result(key: tuple[str, str, str]) -> None:
    op = key[0]
    for size in (1, 2, 3, 5):
        for root in roots(op, size):
            plans = plans_of(key, size, 1, root)
            for count in (0, size + 1, 1000):
                values = [torch.arange(count).mul(rank + 1).remainder(50).to(torch.int64) for rank in range(size)]
                cases = requests_and_results(op, values, pieces_of(count, size), root, "sum", False)
                sent: dict[tuple[int, int], Tensor] = {}
                received: dict[tuple[int, int], Tensor] = {}
                groups = [Group(rank, sent, received) for rank in range(size)]
                runs = [Execution(plan, case[0], group, 0) for plan, case, group in zip(plans, cases, groups, strict=True)]
                for of_round in zip(*rounds(plans), strict=True):
                    posted = [[run.post(step) for step in round_.messages] for run, round_ in zip(runs, of_round, strict=True)]
                    assert sent.keys() == received.keys(), "a message waits for one of another round"
                    for way, place in received.items():
                        place.copy_(sent[way])
                    sent.clear()
                    received.clear()
                    for run, messages, round_ in zip(runs, posted, of_round, strict=True):
                        for message in messages:
                            run.complete(message)
                        for step in round_.local:
                            run.run_local(step)
                assert all(run.finished for run in runs)
                for rank, (request, expected) in enumerate(cases):
                    assert expected is None or torch.equal(request.output, expected), (key, size, count, rank)  # type: ignore[arg-type]


def test_schedules_that_do_not_fit_together_are_refused_instead_of_waited_for() -> None:
    plans = [Plan(build("all_reduce", "ring", "pipelined", rank, 3, 1)) for rank in range(3)]
    schedule = plans[1].schedule
    first_send = next(index for index, step in enumerate(schedule.steps) if step.kind is Kind.SEND)
    plans[1] = Plan(replace(schedule, steps=schedule.steps[:first_send] + schedule.steps[first_send + 1 :]))
    with pytest.raises(ScheduleError, match="no message of ranks"):
        rounds(plans)
