"""When the network or a host fails: who is named, and how soon. docs/failures.md states what these tests hold."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest
import torch
from ringfold.collectives.connect import SILENCE_S

from tests.cluster.hosts import MASTER_PORT, Hosts
from tests.cluster.test_collectives import values_of
from tests.harness import Outcome, Ranks

# The kernel's probes are a second apart, then each rank has to end; the rest is what a busy machine may add.
CUT_NOTICED_S = SILENCE_S + 1.0 + 4.0
DEATH_NOTICED_S = 2.0


def reduce_for_ever(world: Any) -> None:
    tensor = torch.zeros(300_001)
    world.all_reduce(tensor)
    print("ready")
    while True:
        world.all_reduce(tensor)


def wait_for_a_message(world: Any) -> None:
    """Nothing is sent and nothing is computed: only the links could tell."""
    world.barrier()
    print("ready")
    world.recv(torch.zeros(1), (world.rank + 1) % world.size)


def wait_until_ready(ranks: Ranks) -> None:
    for rank in range(len(ranks.pids)):
        ranks.wait_for_line(rank, "ready")


def assert_each_names(outcomes: list[Outcome], expected: list[set[int]], since_ns: int, within_s: float) -> None:
    for outcome, culprits in zip(outcomes, expected, strict=True):
        if not culprits:
            continue
        assert outcome.kind == "PeerLost", str(outcome)
        named = re.search(r"rank (\d+) \(\S+, pid \d+\) (is gone|cannot be reached)", outcome.message)
        assert named is not None, outcome.message
        assert int(named[1]) in culprits, f"rank {outcome.rank} names rank {named[1]}: {outcome.message}"
        late_s = (outcome.exited_ns - since_ns) / 1e9
        assert late_s < within_s, f"rank {outcome.rank} ended {late_s:.2f} s after"


@pytest.mark.parametrize("how", ["cut", pytest.param("unplug", marks=pytest.mark.slow)])
def test_a_cut_cable_is_noticed_by_both_sides_which_name_the_other(hosts: Hosts, how: str) -> None:
    places, another_job = [0, 0, 1, 1], {"MASTER_PORT": str(MASTER_PORT + 10)}
    with hosts.spawn(places, reduce_for_ever) as busy, hosts.spawn(places, wait_for_a_message, env=another_job) as idle:
        wait_until_ready(busy)
        wait_until_ready(idle)
        cut_ns = time.monotonic_ns()
        getattr(hosts, how)(1)
        jobs = [ranks.wait(20) for ranks in (busy, idle)]
    for outcomes in jobs:
        assert_each_names(outcomes, [{2, 3}, {2, 3}, {0, 1}, {0, 1}], cut_ns, CUT_NOTICED_S)
        assert any("cannot be reached" in outcome.message for outcome in outcomes[:2])
        assert any("cannot be reached" in outcome.message for outcome in outcomes[2:])


@pytest.mark.parametrize("hosts", [(3, 1)], indirect=True)
def test_hosts_that_still_reach_each_other_name_the_one_that_they_do_not(hosts: Hosts) -> None:
    with hosts.spawn([0, 1, 2], reduce_for_ever) as ranks:
        wait_until_ready(ranks)
        cut_ns = time.monotonic_ns()
        hosts.cut(1)
        outcomes = ranks.wait(20)
    assert_each_names(outcomes, [{1}, {0, 2}, {1}], cut_ns, CUT_NOTICED_S)


@pytest.mark.parametrize("hosts", [(3, 1)], indirect=True)
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_killed_rank_is_named_by_every_other_at_once(hosts: Hosts, victim: int) -> None:
    with hosts.spawn([0, 1, 1, 2], reduce_for_ever) as ranks:
        wait_until_ready(ranks)
        killed_ns = ranks.kill(victim)
        outcomes = ranks.wait(20)
    assert outcomes[victim].exit_status == -signal.SIGKILL
    assert_each_names(outcomes, [set() if rank == victim else {victim} for rank in range(4)], killed_ns, DEATH_NOTICED_S)


def reduce_until_told(world: Any) -> int:
    """Reduce until rank 0 has heard SIGUSR2; return how many times."""
    told: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: told.append(number))
    tensor, is_over, rounds = torch.zeros(100_003), torch.zeros(1), 0
    while not is_over:
        world.all_reduce(tensor)
        is_over[0] = len(told)
        world.broadcast(is_over, 0)
        rounds += 1
        if rounds == 1:
            print("ready")
    return rounds


def test_a_short_outage_is_survived(hosts: Hosts) -> None:
    with hosts.spawn([0, 1], reduce_until_told) as ranks:
        wait_until_ready(ranks)
        hosts.cut(1)
        time.sleep(SILENCE_S / 3)
        hosts.heal(1)
        ranks.kill(0, signal.SIGUSR2)
        rounds = values_of(ranks.wait(30))
    assert rounds[0] == rounds[1] > 1


BUSY_S = 2 * SILENCE_S + 1


def send_to_a_busy_rank(world: Any) -> None:
    tensor = torch.ones(8_000_000)  # more than the kernel's buffers hold
    if world.rank == 0:
        world.send(tensor, 1)
    else:
        time.sleep(BUSY_S)
        world.recv(tensor, 0)
    world.all_reduce(tensor)
    assert bool((tensor == 2).all())


@pytest.mark.slow
def test_a_rank_that_is_long_busy_is_not_taken_for_one_out_of_reach(hosts: Hosts) -> None:
    with hosts.spawn([0, 1], send_to_a_busy_rank) as ranks:
        values_of(ranks.wait(40))


@pytest.mark.slow
def test_a_stopped_rank_on_another_host_is_not_taken_for_one_out_of_reach(hosts: Hosts) -> None:
    with hosts.spawn([0, 1], reduce_until_told) as ranks:
        wait_until_ready(ranks)
        ranks.kill(1, signal.SIGSTOP)
        time.sleep(BUSY_S)
        ranks.kill(1, signal.SIGCONT)
        ranks.kill(0, signal.SIGUSR2)
        values_of(ranks.wait(30))
