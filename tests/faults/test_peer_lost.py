"""kill -9 of one rank: every other rank ends within two seconds with PeerLost naming the dead one, and nothing is left behind.

Death is seen as the end of file on a link, so whatever inherits the link's descriptor would hide it, as DataLoader's forked workers would.
"""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.harness import Outcome, Ranks, spawn_ranks

NOTICE_S = 2.0
VICTIM = 1

every_transport = pytest.mark.parametrize("transport", ["shm", "tcp"])


def assert_survivors_name(outcomes: list[Outcome], victim: int, killed_ns: int) -> None:
    assert outcomes[victim].exit_status == -signal.SIGKILL, str(outcomes[victim])
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.kind == "PeerLost", str(outcome)
        assert re.search(rf"rank {victim}\b", outcome.message), f"rank {victim} is not named: {outcome.message}"
        assert outcome.exit_status not in (0, None), "a lost peer must not look like success"
        late_s = (outcome.exited_ns - killed_ns) / 1e9
        assert late_s < NOTICE_S, f"rank {outcome.rank} ended {late_s:.2f} s after the kill"


def kill_when_ready(ranks: Ranks, victim: int = VICTIM, size: int = 3) -> tuple[list[Outcome], int]:
    for rank in range(size):
        ranks.wait_for_line(rank, "ready")
    killed_ns = ranks.kill(victim)
    return ranks.wait(20), killed_ns


# At a chosen place: the victim kills itself between two steps, the others are in the middle of the next.


def die_at(world: Any, operation: str, count: int, at_round: int) -> None:
    tensor, gathered = torch.ones(count), torch.ones(count * world.size)
    for number in range(at_round + 1):
        if number == at_round and world.rank == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        if operation == "all_reduce":
            world.all_reduce(tensor)
        elif operation == "registered":
            world.all_reduce(world.empty(count).fill_(1.0))
        elif operation == "all_gather":
            world.all_gather(gathered, tensor)
        elif operation == "broadcast":
            world.broadcast(tensor, 0)
            world.barrier()  # a root needs nobody to send a small message, a barrier does
        elif operation == "barrier":
            world.barrier()
        elif operation == "async":
            works = [world.all_reduce(tensor.clone(), async_op=True) for _ in range(5)]
            for work in works:
                work.wait()


@pytest.mark.usefixtures("leaks")
@every_transport
@pytest.mark.parametrize("operation", ["all_reduce", "registered", "all_gather", "broadcast", "barrier", "async"])
def test_survivors_name_the_dead_rank_whatever_they_were_doing(operation: str, transport: str) -> None:
    for count, at_round in ((3, 0), (200_003, 7)):
        with spawn_ranks(3, die_at, operation, count, at_round, transport=transport) as ranks:
            outcomes = ranks.wait(20)
        assert_survivors_name(outcomes, VICTIM, outcomes[VICTIM].exited_ns)
        assert not any(outcome.orphans for outcome in outcomes)


# At any moment: the test kills from outside.


def reduce_for_ever(world: Any) -> None:
    tensor, registered = torch.zeros(300_001), world.empty(300_001).zero_()
    world.all_reduce(tensor)
    print("ready")
    while True:
        world.all_reduce(tensor)
        work = world.all_reduce(registered, async_op=True)
        world.all_reduce(tensor[:3])
        work.wait()


@pytest.mark.usefixtures("leaks")
@every_transport
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_kill_in_the_middle_of_anything_is_noticed(victim: int, transport: str) -> None:
    with spawn_ranks(3, reduce_for_ever, transport=transport) as ranks:
        outcomes, killed_ns = kill_when_ready(ranks, victim)
    assert_survivors_name(outcomes, victim, killed_ns)


def compute_between(world: Any) -> None:
    """Python is busy elsewhere when the peer dies: the error comes with the next operation."""
    tensor = torch.zeros(3)
    world.all_reduce(tensor)
    print("ready")
    if world.rank == VICTIM:
        signal.pause()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        torch.randn(1000).sort()
    world.all_reduce(tensor)


@every_transport
def test_a_rank_that_was_computing_learns_it_at_its_next_operation(transport: str) -> None:
    with spawn_ranks(3, compute_between, transport=transport) as ranks:
        outcomes, killed_ns = kill_when_ready(ranks)
    assert_survivors_name(outcomes, VICTIM, killed_ns)


def wait_for_each_other(world: Any) -> None:
    """Rank 2 waits for rank 0, which is alive and itself waits for the dead one."""
    tensor = torch.zeros(3)
    world.all_reduce(tensor)
    print("ready")
    if world.rank == VICTIM:
        signal.pause()
    elif world.rank == 0:
        world.recv(tensor, VICTIM)
        world.send(tensor, 2)
    else:
        world.recv(tensor, 0)


@pytest.mark.usefixtures("leaks")
@every_transport
def test_a_rank_that_waits_for_a_waiting_rank_names_the_dead_one(transport: str) -> None:
    with spawn_ranks(3, wait_for_each_other, transport=transport) as ranks:
        outcomes, killed_ns = kill_when_ready(ranks)
    assert_survivors_name(outcomes, VICTIM, killed_ns)


def work_in_parts(world: Any) -> None:
    """Only a communicator that the dead rank is no member of is in use: the whole job is lost all the same."""
    part = world.split(int(world.rank == VICTIM), name="part")
    world.barrier()
    print("ready")
    if world.rank == VICTIM:
        signal.pause()
    while True:
        part.all_reduce(torch.zeros(1001))


@every_transport
def test_a_communicator_without_the_dead_rank_ends_too(transport: str) -> None:
    with spawn_ranks(3, work_in_parts, transport=transport) as ranks:
        outcomes, killed_ns = kill_when_ready(ranks)
    assert_survivors_name(outcomes, VICTIM, killed_ns)


# The dead rank's children live on and hold copies of everything it had open, unless that was closed in them.


class Squares(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index) ** 2])


def train_with_workers(world: Any) -> None:
    tensor = world.empty(1001).zero_()
    world.all_reduce(tensor)
    loader = iter(DataLoader(Squares(), batch_size=10, num_workers=2, multiprocessing_context="fork"))
    for number in range(1_000_000):
        next(loader)
        world.all_reduce(tensor)
        if number == 3:
            print("ready")


@every_transport
def test_data_loader_workers_of_the_dead_rank_do_not_hide_its_death(transport: str) -> None:
    with spawn_ranks(3, train_with_workers, transport=transport) as ranks:
        outcomes, killed_ns = kill_when_ready(ranks)
    assert outcomes[VICTIM].orphans, "the claim needs workers that outlive their rank"
    assert_survivors_name(outcomes, VICTIM, killed_ns)


def fork_and_hold(world: Any) -> None:
    """A child that never ends and never execs: the worst that user code may do."""
    world.all_reduce(torch.zeros(3))
    if world.rank == VICTIM and os.fork() == 0:
        signal.pause()
        os._exit(0)
    world.all_reduce(torch.zeros(3))
    print("ready")
    while True:
        world.all_reduce(torch.zeros(10_001))


@every_transport
def test_a_forked_child_does_not_keep_its_parents_links_open(transport: str) -> None:
    with spawn_ranks(3, fork_and_hold, transport=transport) as ranks:
        outcomes, killed_ns = kill_when_ready(ranks)
    assert len(outcomes[VICTIM].orphans) == 1
    assert_survivors_name(outcomes, VICTIM, killed_ns)


# A rank that is stopped is not dead: it is waited for until the deadline, and named.


@pytest.mark.parametrize("transport", ["shm", pytest.param("tcp", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_a_timeout_and_a_continued_one_is_nothing(transport: str) -> None:
    with spawn_ranks(3, reduce_for_ever, transport=transport, collective_timeout_s=1.0) as ranks:
        for rank in range(3):
            ranks.wait_for_line(rank, "ready")
        ranks.kill(VICTIM, signal.SIGSTOP)
        time.sleep(0.3)
        assert all(ranks.alive(rank) for rank in range(3))
        ranks.kill(VICTIM, signal.SIGCONT)
        time.sleep(0.3)
        assert all(ranks.alive(rank) for rank in range(3))
        ranks.kill(VICTIM, signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while any(ranks.alive(rank) for rank in range(3) if rank != VICTIM) and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks.kill(VICTIM)
        outcomes = ranks.wait(10)
    for outcome in outcomes:
        if outcome.rank != VICTIM:
            assert outcome.kind in ("CollectiveTimeout", "PeerLost"), str(outcome)
    assert any(o.kind == "CollectiveTimeout" and re.search(rf"rank {VICTIM}\b", o.message) for o in outcomes), "\n".join(map(str, outcomes))
