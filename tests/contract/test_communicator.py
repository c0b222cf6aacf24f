"""Communicators: barriers, messages, Python values, parts of the world, and what a communicator says about itself."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from ringfold.collectives.codes import OPERATIONS
from ringfold.collectives.page import State

from tests.harness import run_ranks
from tests.harness.cases import DTYPES, finish, random_values
from tests.harness.compare import assert_bitwise_equal

every_world = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (1, 2, 3, 4, 5, 8)])
some_worlds = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (2, 3)])


def check_barrier(world: Any) -> list[tuple[int, int]]:
    times = []
    for i in range(50):
        if i % world.size == world.rank:
            torch.randn(20_000).sort()  # arrive later than the others
        entered = time.monotonic_ns()
        finish(world.barrier(async_op=i % 2 == 0), i % 2 == 0)
        times.append((entered, time.monotonic_ns()))
    return times


@every_world
def test_nobody_leaves_a_barrier_before_everybody_has_entered(size: int, transport: str) -> None:
    for round_ in zip(*run_ranks(size, check_barrier, transport=transport), strict=True):
        assert max(entered for entered, _ in round_) <= min(left for _, left in round_)


def check_send_and_recv(world: Any) -> int:
    messages = 0
    for dtype in DTYPES:
        for count in (0, 1, 3, 1000):
            inputs = random_values(dtype, world.size, world.size, count)
            for src in range(world.size):
                for dst in range(world.size):
                    if src == dst:
                        continue
                    if world.rank == src:
                        world.send(inputs[src, dst], dst)
                    if world.rank == dst:
                        tensor = torch.zeros(count, dtype=dtype)
                        world.recv(tensor, src)
                        assert_bitwise_equal(tensor, inputs[src, dst], f"{dtype} x {count} from {src} to {dst}")
                        messages += 1
    return messages


@every_world
def test_send_and_recv_between_every_pair(size: int, transport: str) -> None:
    assert run_ranks(size, check_send_and_recv, transport=transport) == [7 * 4 * (size - 1)] * size


def check_exchange(world: Any) -> None:
    """Everybody sends three large messages to everybody at once: far more than rings and socket buffers hold."""
    count, peers = 400_001, [peer for peer in range(world.size) if peer != world.rank]
    inputs = random_values(torch.float32, world.size, count)
    for receives_first in (True, False):
        received = {peer: [torch.zeros(count) for _ in range(3)] for peer in peers}
        sends = lambda: [world.send(inputs[world.rank] + i, peer, async_op=True) for i in range(3) for peer in peers]  # noqa: E731
        works = [] if receives_first else sends()
        works += [world.recv(received[peer][i], peer, async_op=True) for peer in reversed(peers) for i in range(3)]
        works += sends() if receives_first else []
        # A collective between them neither waits for them nor disturbs them.
        tensor = torch.full((5,), float(world.rank))
        world.all_reduce(tensor)
        assert tensor[0] == world.size * (world.size - 1) / 2
        for work in reversed(works):
            work.wait()
        for peer in peers:
            for i in range(3):
                assert torch.equal(received[peer][i], inputs[peer] + i), f"message {i} from {peer} to {world.rank}"


@some_worlds
def test_large_messages_cross_in_both_directions_in_order(size: int, transport: str) -> None:
    run_ranks(size, check_exchange, transport=transport)


def check_objects(world: Any) -> None:
    for root in range(world.size):
        sent = {"root": root, "text": "ß" * 70_000} if world.rank == root else None
        assert world.broadcast_object(sent, root) == {"root": root, "text": "ß" * 70_000}
    gathered = world.all_gather_object(("x" * 1000 * world.rank, None))
    assert gathered == [("x" * 1000 * rank, None) for rank in range(world.size)]


@pytest.mark.parametrize("size", [1, 3])
def test_objects_travel(size: int) -> None:
    run_ranks(size, check_objects)


# Communicators of some of the ranks


def check_split(world: Any) -> list[tuple[int, ...]]:
    seen = []
    odd = world.split(world.rank % 2, name="parity")
    backwards = world.split(0, key=-world.rank, name="backwards")
    few = world.split(0 if world.rank < 2 else None, name="few")
    again = odd.split(0 if odd.rank == 0 else 1)
    assert odd.members == tuple(range(world.rank % 2, world.size, 2))
    assert backwards.members == tuple(reversed(range(world.size)))
    assert (few is None) == (world.rank >= 2)
    for comm in (odd, backwards, few, again):
        if comm is None:
            continue
        assert comm.members[comm.rank] == world.rank
        assert comm.size == len(comm.members)
        tensor = torch.tensor([float(world.rank), 1.0])
        comm.all_reduce(tensor)
        assert tensor.tolist() == [sum(comm.members), comm.size]
        tensor = torch.full((3,), float(world.rank))
        comm.broadcast(tensor, comm.size - 1)
        assert tensor[0] == comm.members[-1]
        seen.append(comm.members)
        comm.close()
    world.barrier()
    return seen


@pytest.mark.parametrize(("size", "transport"), [(1, "shm"), (4, "shm"), (5, "tcp")])
def test_split_gives_each_colour_its_own_communicator(size: int, transport: str) -> None:
    run_ranks(size, check_split, transport=transport)


def check_subgroup(world: Any) -> None:
    members = [3, 1]
    if world.rank in members:
        pair = world.subgroup(members, name="pair")
        assert (pair.members, pair.rank) == ((3, 1), members.index(world.rank))
        gathered = torch.empty(2, dtype=torch.int64)
        pair.all_gather(gathered, torch.tensor([world.rank]))
        assert gathered.tolist() == members
        pair.close()
    world.barrier()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_only_its_members_make_a_subgroup(transport: str) -> None:
    run_ranks(4, check_subgroup, transport=transport)


def check_explain(world: Any) -> str:
    small, large = world.explain("all_reduce", 4), world.explain("all_reduce", 64 << 20)
    assert small != large
    return str(large)


def test_explain_names_the_algorithm_and_is_the_same_everywhere() -> None:
    texts = run_ranks(3, check_explain)
    assert len(set(texts)) == 1
    assert "ring" in texts[0]
    assert "direct" in texts[0]


def check_wait_is_counted(world: Any) -> float:
    before = world.seconds_waited
    tensor = torch.zeros(1)
    if world.rank == 0:
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            pass
    world.all_reduce(tensor)
    return float(world.seconds_waited - before)


@pytest.mark.quiet
def test_seconds_waited_is_the_time_spent_waiting_for_others() -> None:
    late, punctual = run_ranks(2, check_wait_is_counted)
    assert punctual >= 0.1
    assert late < 0.1


def record_operations(world: Any) -> list[tuple[str, int, int, str]]:
    pair = world.subgroup([0, 1], "pair") if world.rank < 2 else None
    tensor = torch.ones(7)
    for _ in range(3):
        world.all_reduce(tensor)
    if pair is not None:
        pair.all_reduce(tensor[:5])
    world.broadcast(tensor[:6], 0)
    names = {code: name for name, code in OPERATIONS.items()}
    state = world.page.read()
    assert state.state is State.RUNNING
    assert state.pid == os.getpid()
    assert state.heartbeat_ns >= state.started_ns - 10**9
    return [(names[r.op], r.seq, r.count, r.state.name) for r in world.page.operations()]


def test_the_page_holds_the_operations_of_all_communicators_in_the_order_of_their_issue() -> None:
    reduced = [("all_reduce", number, 7, "DONE") for number in range(3)]
    last = [("broadcast", 3, 6, "DONE")]
    in_pair, alone = [*reduced, ("all_reduce", 0, 5, "DONE"), *last], [*reduced, *last]
    assert run_ranks(3, record_operations) == [in_pair, in_pair, alone]
