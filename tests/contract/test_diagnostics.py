"""What is said when ranks diverge or are lost: both call sites, both stacks, the last operations of the living and the dead, counters."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives.environment import CHECK_ORDER, FLIGHT_DIR
from ringfold.collectives.errors import CollectiveMismatch, CollectiveTimeout, PeerLost

from tests.harness import run_ranks, spawn_ranks

every_transport = pytest.mark.parametrize("transport", ["shm", "tcp"])
HERE = Path(__file__).name


def agree_for_a_while(world: Any) -> None:
    for count in (3, 0, 1000):
        world.all_reduce(torch.ones(count))
        world.all_gather(torch.empty(count * world.size), torch.ones(count), async_op=True).wait()


def broadcast_early(world: Any) -> None:
    world.broadcast(torch.zeros(1000), 0)


def reduce_late(world: Any) -> None:
    world.all_reduce(torch.zeros(1000))


def diverge(world: Any) -> tuple[float, str]:
    agree_for_a_while(world)
    began = time.monotonic()
    with pytest.raises(CollectiveMismatch) as caught:
        (broadcast_early if world.rank == 1 else reduce_late)(world)
    return time.monotonic() - began, str(caught.value)


@every_transport
def test_check_order_reports_the_first_divergence_within_a_second_with_both_stacks(transport: str) -> None:
    results = run_ranks(3, diverge, transport=transport, env={CHECK_ORDER: "1"})
    for seconds, text in results:
        assert seconds < 1
        assert "diverge at their collective #6" in text
        assert f"rank 1: broadcast (float32 x 1000, root 0) at tests/contract/{HERE}" in text
        assert f"ranks 0, 2: all_reduce (float32 x 1000, sum) at tests/contract/{HERE}" in text
        # The stacks name the way there, innermost last.
        for name in ("in diverge", "in broadcast_early", "in reduce_late"):
            assert name in text
    assert len({text for _, text in results}) == 1


@every_transport
def test_without_it_the_mismatch_names_both_call_sites(transport: str) -> None:
    told = [text for seconds, text in run_ranks(2, diverge, transport=transport)]
    for text in told:
        assert "in broadcast_early" in text
        assert "in reduce_late" in text


def cross(world: Any) -> tuple[float, str]:
    first, second = world.split(0, name="first"), world.split(0, name="second")
    began = time.monotonic()
    with pytest.raises(CollectiveMismatch) as caught:
        (first if world.rank else second).all_reduce(torch.zeros(3))
    took = time.monotonic() - began
    world.barrier()  # a rank that has left is seen to have left, whatever it did before
    return took, str(caught.value)


def test_check_order_sees_ranks_that_wait_for_each_other_in_different_communicators() -> None:
    for rank, (seconds, text) in enumerate(run_ranks(2, cross, env={CHECK_ORDER: "1"})):
        assert seconds < 1
        assert f"about to issue all_reduce (float32 x 3, sum) on axis {('second', 'first')[rank]}" in text
        assert f"on axis {('first', 'second')[rank]} at tests/contract/{HERE}" in text


def lose_rank_2(world: Any) -> str:
    for count in range(5):
        world.all_reduce(torch.ones(count + 1))
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLost) as caught:
        world.barrier()
    return str(caught.value)


def test_the_last_operations_of_the_dead_rank_are_written_down_too(tmp_path: Path) -> None:
    with spawn_ranks(3, lose_rank_2, env={FLIGHT_DIR: str(tmp_path)}) as ranks:
        outcomes = ranks.wait(30)
    assert all(str(tmp_path) in outcome.value for outcome in outcomes[:2])
    for rank in range(3):
        flight = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (flight["rank"], flight["pid"]) == (rank, outcomes[rank].pid)
        assert "rank 2" in flight["why"]
        done = [operation for operation in flight["operations"] if operation["state"] == "done"]
        assert [operation["count"] for operation in done] == [1, 2, 3, 4, 5]
        assert {operation["axis"] for operation in done} == {"world"}
        assert all(f"{HERE}" in operation["site"] and "lose_rank_2" in operation["site"] for operation in done)
        assert flight["counters"]["all_reduce"]["calls"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.json", "rank1.json", "rank2.json"]


def time_out(world: Any) -> str:
    world.barrier()
    if world.rank == 1:
        time.sleep(1.0)
        return ""
    with pytest.raises(CollectiveTimeout) as caught:
        world.all_reduce(torch.zeros(7))
    return str(caught.value)


@every_transport
def test_a_timeout_names_the_call_sites_of_who_waits_and_of_who_is_missing(transport: str) -> None:
    with spawn_ranks(2, time_out, transport=transport, collective_timeout_s=0.5) as ranks:
        text = ranks.wait(30)[0].value
    assert f"all_reduce #1 (float32 x 7, sum, {'direct' if transport == 'shm' else ''}"[:30] in text
    assert f"tests/contract/{HERE}" in text
    if transport == "shm":
        assert "whose last operation was barrier #0 (done) at tests/contract/" in text


def count(world: Any) -> dict[str, Any]:
    for _ in range(4):
        world.all_reduce(torch.zeros(1000))
    world.broadcast(torch.zeros(10, dtype=torch.int64))
    return world.counters


def test_counters_tell_calls_bytes_and_time_while_running() -> None:
    for counters in run_ranks(2, count):
        assert (counters["all_reduce"].calls, counters["all_reduce"].nbytes) == (4, 16_000)
        assert (counters["broadcast"].calls, counters["broadcast"].nbytes) == (1, 80)
        assert 0 < counters["all_reduce"].seconds < 5
        assert counters["all_reduce"].seconds_waited <= counters["all_reduce"].seconds + 1
        assert "gather" not in counters
