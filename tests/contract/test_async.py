"""Many operations in flight on several communicators at once: no order between communicators may deadlock, every result must be right.

Four ranks form a 2 x 2 mesh. In each round every rank issues the same operations on its row, its column and the world, in an order of its
own between communicators (inside one the order is the same for all, as a communicator demands), and waits for them in yet another order.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness import run_ranks

ROUNDS = 1000
Check = Callable[[], None]


def issue(comm: Any, operation: str, count: int, salt: int, registered: bool, large: Any) -> tuple[Any, Check]:
    """Issue one asynchronous operation; return its work and what checks its result. Values are small whole numbers, so sums are exact."""
    value = lambda member: float((member * 7 + salt) % 13)  # noqa: E731
    new = large if registered else torch.empty
    own, size = value(comm.members[comm.rank]), comm.size
    values = torch.tensor([value(member) for member in comm.members])

    def expect(tensor: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(tensor, expected):
            raise AssertionError(f"{operation} x {count} on {comm.name} {comm.members}: {tensor[:8].tolist()} not {expected[:8].tolist()}")

    if operation == "all_reduce":
        tensor = new(count).fill_(own)
        return comm.all_reduce(tensor, async_op=True), lambda: expect(tensor, values.sum().expand(count))
    if operation == "max":
        tensor = new(count).fill_(own)
        return comm.all_reduce(tensor, "max", async_op=True), lambda: expect(tensor, values.max().expand(count))
    if operation == "broadcast":
        tensor, root = new(count).fill_(own), salt % size
        return comm.broadcast(tensor, root, async_op=True), lambda: expect(tensor, values[root].expand(count))
    if operation == "all_gather":
        tensor, gathered = new(count).fill_(own), new(count * size)
        return comm.all_gather(gathered, tensor, async_op=True), lambda: expect(gathered, values.repeat_interleave(count))
    if operation == "reduce_scatter":
        tensor, scattered = new(count * size).fill_(own), new(count)
        return comm.reduce_scatter(scattered, tensor, async_op=True), lambda: expect(scattered, values.sum().expand(count))
    return comm.barrier(async_op=True), lambda: None


def check_mesh(world: Any, rounds: int, seed: int) -> int:
    shared, own = random.Random(seed), random.Random(1000 * seed + world.rank)
    row = world.split(world.rank // 2, name="row")
    column = world.split(world.rank % 2, name="column")
    operations = 0
    for number in range(rounds):
        queues: list[list[tuple[Any, str, int, int, bool]]] = []
        for comm in (row, column, world):
            queue = []
            for _ in range(shared.randrange(4)):
                # Mostly latency; sometimes more than channels hold, so that progress needs the others.
                count = shared.choice([0, 1, 3, 17, 1000]) if shared.random() < 0.98 else 100_001
                operation = shared.choice(["all_reduce", "max", "broadcast", "all_gather", "reduce_scatter", "barrier"])
                queue.append((comm, operation, count, shared.randrange(100), shared.random() < 0.3))
            queues.append(queue)
        pending: list[tuple[Any, Check]] = []
        while living := [queue for queue in queues if queue]:
            comm, operation, count, salt, registered = own.choice(living).pop(0)
            pending.append(issue(comm, operation, count, salt, registered, world.empty))
            if own.random() < 0.1:
                own.choice(pending)[0].done()  # asking changes nothing
        own.shuffle(pending)
        for work, check in pending:
            work.wait()
            check()
        operations += len(pending)
        if number % 100 == 0:
            world.barrier()
    row.close()
    column.close()
    return operations


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_overlapping_operations_on_rows_columns_and_world_never_deadlock(transport: str) -> None:
    counts = run_ranks(4, check_mesh, ROUNDS, 1, transport=transport, timeout_s=100)
    assert len(set(counts)) == 1
    assert counts[0] > 3 * ROUNDS


def check_inline_between(world: Any, rounds: int) -> None:
    """While one rank waits inline on its row, work it issued before on the world goes on: the others wait for that first."""
    row = world.split(world.rank // 2, name="row")
    for number in range(rounds):
        background = torch.full((100_003,), float(world.rank))
        work = world.all_reduce(background, async_op=True)
        small = torch.full((3,), float(number))
        if world.rank < 2:
            row.all_reduce(small)
            work.wait()
        else:
            work.wait()
            row.all_reduce(small)
        assert small[0] == 2 * number
        assert torch.equal(background, torch.full((100_003,), 6.0))
    row.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_an_inline_wait_steps_the_other_operations(transport: str) -> None:
    run_ranks(4, check_inline_between, 50, transport=transport)


def check_nobody_waits(world: Any) -> None:
    """The native thread makes progress while Python does something else and never asks."""
    tensor = torch.full((1_000_003,), float(world.rank))
    work = world.all_reduce(tensor, async_op=True)
    finished = threading.Event()
    for _ in range(20_000):
        if work.done():
            finished.set()
            break
        torch.randn(10_000).sort()
    assert finished.is_set()
    assert torch.equal(tensor, torch.full((1_000_003,), 1.0))
    work.wait()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_work_progresses_while_nobody_waits(transport: str) -> None:
    run_ranks(2, check_nobody_waits, transport=transport)


def slow_rounds(world: Any, windows: int) -> list[float]:
    """Return, for each window of 100 rounds, the seconds that its tenth slowest round took."""
    tensor, result = torch.zeros(3), []
    for _ in range(windows):
        seconds = []
        for _ in range(100):
            start = time.perf_counter()
            for work in reversed([world.all_reduce(tensor, async_op=True) for _ in range(3)]):
                work.wait()
            seconds.append(time.perf_counter() - start)
        result.append(sorted(seconds)[-10])
    return result


@pytest.mark.quiet
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_waiter_is_woken_by_its_peer_and_not_by_a_timer(transport: str) -> None:
    """More ranks than cores sleep while they wait; a lost wake-up costs a whole timer period (50 ms) and not a time slice."""
    ranks = max(4, len(os.sched_getaffinity(0)) + 2)
    for windows in run_ranks(ranks, slow_rounds, 3, transport=transport):
        assert min(windows) < 0.025, f"one round in ten takes {min(windows) * 1000:.0f} ms"


def check_dropped_handles(world: Any) -> None:
    """A tensor of an operation in flight lives as long as the operation, whoever forgets it."""
    for number in range(30):
        for count in (5, 50_001):
            world.all_reduce(torch.full((count,), float(number)), async_op=True)
            world.all_reduce(world.empty(count).fill_(1.0), async_op=True)
    tensor = torch.ones(7)
    world.all_reduce(tensor)
    assert tensor.tolist() == [world.size] * 7


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_forgetting_a_work_and_its_tensor_is_safe(transport: str) -> None:
    run_ranks(3, check_dropped_handles, transport=transport)


def check_two_threads(world: Any, rounds: int) -> None:
    """Each thread has a communicator of its own; the threads take no notice of each other."""
    comms = [world.split(0, name=f"thread {i}") for i in range(2)]
    errors: list[BaseException] = []

    def loop(comm: Any, salt: int) -> None:
        try:
            for number in range(rounds):
                tensor = torch.full((1 + (number * salt) % 5000,), float(world.rank + salt))
                comm.all_reduce(tensor)
                assert torch.equal(tensor, torch.full_like(tensor, world.size * (world.size - 1) / 2 + world.size * salt))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(comm, 3 + i)) for i, comm in enumerate(comms)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_two_threads_use_two_communicators(transport: str) -> None:
    run_ranks(3, check_two_threads, 300, transport=transport)
