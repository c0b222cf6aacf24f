"""Operations on CUDA tensors are in stream order, hold no memory, and end when a peer is lost."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from ringfold.collectives.errors import CollectiveTimeout, PeerLost

from tests.faults.test_peer_lost import assert_survivors_name
from tests.harness import run_ranks, spawn_ranks

pytestmark = pytest.mark.gpu

SLOW_CYCLES = 200_000_000  # about a tenth of a second


def check_order(world: Any) -> list[float]:
    """The input is written late on the current stream; the result is read on it, without a word to the CPU."""
    tensor = torch.zeros(1 << 20, device="cuda")
    world.all_reduce(tensor)  # whatever happens at the first operation only
    torch.cuda.synchronize()
    began = time.perf_counter()
    issued = []
    for number in range(4):
        torch.cuda._sleep(SLOW_CYCLES)
        tensor.fill_(world.rank + number)
        work = world.all_reduce(tensor, async_op=True)
        beside = torch.ones(1000, device="cuda").sum()  # what does not need it goes on
        work.wait()
        doubled = tensor * 2
        issued.append(time.perf_counter() - began)
        expected = 2.0 * (sum(range(world.size)) + number * world.size)
        assert doubled.eq(expected).all(), number
        assert beside == 1000
        assert work.done()
        began = time.perf_counter()
    return issued[1:]  # a kernel that is used for the first time is loaded, which waits


def test_operations_wait_for_the_stream_and_the_stream_for_them_but_not_the_cpu() -> None:
    for issued in run_ranks(2, check_order):
        assert max(issued) < 0.05, f"issuing took {issued} s although the GPU was busy for longer"


def check_overlap(world: Any) -> float:
    """Return how long a slow kernel and many operations beside it took, in units of the kernel alone."""
    tensors = [torch.ones(1 << 16, device="cuda") for _ in range(20)]
    side = torch.cuda.Stream()
    for tensor in tensors:
        world.all_reduce(tensor)
    torch.cuda.synchronize()
    works = []
    began = time.perf_counter()
    torch.cuda._sleep(SLOW_CYCLES)
    with torch.cuda.stream(side):
        works = [world.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
    side.synchronize()
    beside = time.perf_counter() - began
    torch.cuda.synchronize()
    return beside / (time.perf_counter() - began)


def test_operations_on_one_stream_do_not_wait_for_another() -> None:
    run_ranks(2, check_overlap)


def check_memory(world: Any, times: int) -> list[int]:
    used = []
    for number in range(times):
        comm = world.subgroup(range(world.size), f"again {number}")
        tensor = torch.ones(3_000_000, device="cuda")
        comm.all_reduce(tensor)
        assert tensor.eq(world.size).all()
        comm.close()
        del tensor
        torch.cuda.empty_cache()
        world.barrier()
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    return used


@pytest.mark.quiet  # it looks at the memory of the whole GPU
def test_a_closed_communicator_gives_its_memory_back() -> None:
    for used in run_ranks(2, check_memory, 8):
        assert used[-1] <= max(used[:3]), f"bytes of the GPU in use after each communicator: {used}"


def die(world: Any, how: str) -> None:
    tensor = torch.ones(1 << 18, device="cuda")
    world.all_reduce(tensor)
    torch.cuda.synchronize()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait":
        for _ in range(50):
            world.all_reduce(tensor, async_op=True).wait()
            torch.cuda.synchronize()
    else:  # the CPU waits for the GPU, which waits for the dead
        world.all_reduce(tensor)
        torch.cuda.synchronize()
        world.all_reduce(tensor)


@pytest.mark.parametrize("how", ["wait", "synchronize"])
def test_survivors_name_the_dead_rank_and_no_stream_waits_for_it(how: str) -> None:
    with spawn_ranks(3, die, how) as ranks:
        outcomes = ranks.wait(60)
    assert_survivors_name(outcomes, 1, outcomes[1].exited_ns)


def reduce_twice(world: Any, tensor: torch.Tensor) -> None:
    for _ in range(2):
        world.all_reduce(tensor)
        torch.cuda.synchronize()


def check_timeout(world: Any) -> str:
    tensor = torch.ones(1000, device="cuda")
    world.all_reduce(tensor)
    torch.cuda.synchronize()
    world.timeout_s = 1.0
    if world.rank == 1:
        time.sleep(2.5)
        return ""
    began = time.monotonic()
    with pytest.raises((CollectiveTimeout, PeerLost)) as caught:
        reduce_twice(world, tensor)
    assert time.monotonic() - began < 2.4
    return str(caught.value)


def test_an_operation_that_a_peer_does_not_issue_times_out_and_frees_the_stream() -> None:
    with spawn_ranks(2, check_timeout) as ranks:
        outcomes = ranks.wait(60)
    assert outcomes[0].returned, str(outcomes[0])
    assert "all_reduce" in outcomes[0].value
    assert "rank 1" in outcomes[0].value
