"""What a communicator says when it is used wrongly, when ranks disagree, and when somebody does not come. Each error names who and what."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest
import torch
from ringfold.collectives.errors import CollectiveMismatch, CollectiveTimeout, CommunicationError, ConfigError, PeerLost

from tests.harness import Outcome, run_ranks, spawn_ranks

every_transport = pytest.mark.parametrize("transport", ["shm", "tcp"])


def outcomes_of(size: int, function: Any, *args: Any, transport: str, collective_timeout_s: float = 30.0) -> list[Outcome]:
    with spawn_ranks(size, function, *args, transport=transport, collective_timeout_s=collective_timeout_s) as ranks:
        return ranks.wait(60)


def message_of(call: Any, *kinds: type[Exception]) -> str:
    """Call, expect one of `kinds`, return its message."""
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError(f"expected {' or '.join(kind.__name__ for kind in kinds)}")


# Ranks that disagree


def issue_different(world: Any, case: str) -> None:
    tensor = torch.zeros(1000)
    if world.rank == 1:
        if case == "operation":
            world.broadcast(tensor, 0)
        elif case == "count":
            world.all_reduce(torch.zeros(1001))
        elif case == "dtype":
            world.all_reduce(torch.zeros(1000, dtype=torch.int32))
        elif case == "reduction":
            world.all_reduce(tensor, "max")
        elif case == "root":
            world.broadcast(tensor, 1)
            world.barrier()
    elif case == "root":
        world.broadcast(tensor, 0)  # two roots only send: the first receive is where it shows
        world.barrier()
    else:
        world.all_reduce(tensor)


MISMATCHES = {
    "operation": ("all_reduce", "broadcast"),
    "count": ("1000", "1001"),
    "dtype": ("float32", "int32"),
    "reduction": ("sum", "max"),
    "root": ("broadcast", "barrier"),
}


@every_transport
@pytest.mark.parametrize("case", list(MISMATCHES))
def test_a_mismatch_is_found_at_once_and_names_both_operations(case: str, transport: str) -> None:
    started = time.monotonic()
    outcomes = outcomes_of(2, issue_different, case, transport=transport)
    assert time.monotonic() - started < 10  # and not the operation's 30 s
    assert {outcome.kind for outcome in outcomes} <= {"CollectiveMismatch", "PeerLost"}, "\n".join(map(str, outcomes))
    told = [outcome for outcome in outcomes if outcome.kind == "CollectiveMismatch"]
    assert told, "\n".join(map(str, outcomes))
    for outcome in told:
        for seen in MISMATCHES[case]:
            assert seen in outcome.message, f"{seen!r} is not in: {outcome.message}"
        assert re.search(r"rank 0|rank 1", outcome.message), outcome.message


def mismatch_then_again(world: Any) -> str:
    other = world.split(0, name="other")
    message_of(lambda: issue_different(world, "count"), CollectiveMismatch, PeerLost, CommunicationError)
    started = time.monotonic()
    message = message_of(lambda: world.all_reduce(torch.zeros(3)), CommunicationError)
    assert time.monotonic() - started < 1
    message_of(lambda: other.barrier() or world.barrier(), CommunicationError)
    return message


@every_transport
def test_a_dead_communicator_raises_its_first_error_at_once(transport: str) -> None:
    for outcome in outcomes_of(2, mismatch_then_again, transport=transport):
        assert outcome.returned, str(outcome)


# Somebody does not come


def stay_away(world: Any, transport_wait_s: float) -> str:
    """Rank 1 issues one operation less; it stays alive until everybody has given up."""
    world.all_reduce(torch.zeros(3))
    if world.rank == 1:
        deadline = time.monotonic() + transport_wait_s
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return ""
    started = time.monotonic()
    message = message_of(lambda: world.all_gather(torch.zeros(15), torch.zeros(5)), CollectiveTimeout)
    assert 0.4 < time.monotonic() - started < 1.1
    return message


@every_transport
def test_a_timeout_names_who_is_missing_and_its_last_operation(transport: str) -> None:
    outcomes = outcomes_of(3, stay_away, 1.2, transport=transport, collective_timeout_s=0.5)
    for outcome in outcomes:
        assert outcome.returned, str(outcome)
        if outcome.rank != 1:
            assert "all_gather" in outcome.value
            assert "0.5 s" in outcome.value
            if transport == "shm":  # read from its shared page, which another host does not have
                assert "all_reduce" in outcome.value, f"the last operation of rank 1 is missing: {outcome.value}"
    assert any("rank 1" in outcome.value for outcome in outcomes)


def receive_in_vain(world: Any) -> str:
    message = ""
    if world.rank == 0:
        message = message_of(lambda: world.recv(torch.zeros(3), 1), CollectiveTimeout)
    else:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            time.sleep(0.01)
    return message


@every_transport
def test_a_receive_times_out_and_names_the_sender(transport: str) -> None:
    first, second = outcomes_of(2, receive_in_vain, transport=transport, collective_timeout_s=0.5)
    assert first.returned, str(first)
    assert "recv" in first.value
    assert "rank 1" in first.value
    assert second.returned, str(second)


# Arguments that cannot work: refused before anything is sent


BAD_CALLS = {
    "a dtype that cannot be folded": (lambda world: world.all_reduce(torch.zeros(3, dtype=torch.float8_e5m2)), "float8_e5m2"),
    "a product of complex numbers": (lambda world: world.all_reduce(torch.zeros(3, dtype=torch.complex64), "prod"), "complex64"),
    "the bits of floating-point numbers": (lambda world: world.all_reduce(torch.zeros(3), "bxor"), "float32"),
    "an average of truth values": (lambda world: world.all_reduce(torch.zeros(3, dtype=torch.bool), "avg"), "bool"),
    "a fraction of integers": (lambda world: world.all_reduce(torch.zeros(3, dtype=torch.int32), scale=0.5), "int32"),
    "counts of one side only": (lambda world: world.all_to_all(torch.zeros(4), torch.zeros(4), input_counts=[2, 2]), "both"),
    "a root without its tensor": (lambda world: world.scatter(torch.zeros(2), None, world.rank), "None"),
    "a negative tag": (lambda world: world.send(torch.zeros(2), (world.rank + 1) % 2, -1), "tag -1"),
    "another device": (lambda world: world.all_reduce(torch.zeros(3, device="meta")), "meta"),
    "a sparse tensor": (lambda world: world.all_reduce(torch.eye(3).to_sparse()), "sparse"),
    "a reduction nobody knows": (lambda world: world.all_reduce(torch.zeros(3), "summ"), "sum"),
    "an algorithm nobody knows": (lambda world: world.all_reduce(torch.zeros(3), algorithm="rign"), "ring"),
    "a root that is no rank": (lambda world: world.broadcast(torch.zeros(3), 2), "2"),
    "a negative root": (lambda world: world.broadcast(torch.zeros(3), -1), "-1"),
    "a peer that is no rank": (lambda world: world.send(torch.zeros(3), 2), "2"),
    "itself as a peer": (lambda world: world.send(torch.zeros(3), world.rank), "itself|own|self"),
    "an input that the ranks do not divide": (lambda world: world.reduce_scatter(torch.zeros(3), torch.zeros(7)), "7"),
    "an output too small for its chunk": (lambda world: world.reduce_scatter(torch.zeros(3), torch.zeros(8)), "8.*3"),
    "an output too small for all chunks": (lambda world: world.all_gather(torch.zeros(5), torch.zeros(3)), "6"),
    "different dtypes": (lambda world: world.all_gather(torch.zeros(6), torch.zeros(3, dtype=torch.float64)), "float64"),
    "too few counts": (lambda world: world.all_gather(torch.zeros(3), torch.zeros(3), counts=[3]), "counts|2"),
    "negative counts": (lambda world: world.all_gather(torch.zeros(3), torch.zeros(4), counts=[4, -1]), "-1"),
    "counts that do not add up": (lambda world: world.all_gather(torch.zeros(9), torch.zeros(4), counts=[4, 4]), "9"),
    "a subgroup without this rank": (lambda world: world.subgroup([1 - world.rank], name="other"), "rank"),
    "a subgroup with a rank twice": (lambda world: world.subgroup([0, 1, 1], name="twice"), "1"),
}


def call_badly(world: Any) -> dict[str, str]:
    messages = {}
    for name, (call, _) in BAD_CALLS.items():
        try:
            messages[name] = message_of(lambda call=call: call(world), ConfigError)
        except Exception as error:
            messages[name] = f"WRONG: {type(error).__name__}: {error}"
        # Nothing was sent: the next operation is not out of step, although ranks may have made different mistakes.
        if world.rank == 0:
            message_of(lambda: world.broadcast(torch.zeros(3), 99), ConfigError)
        tensor = torch.ones(3)
        world.all_reduce(tensor)
        assert tensor.tolist() == [2.0] * 3
    return messages


@every_transport
def test_bad_arguments_are_config_errors_before_anything_is_sent(transport: str) -> None:
    for rank, messages in enumerate(run_ranks(2, call_badly, transport=transport)):
        problems = [
            f"{name}: {messages[name]}"
            for name, (_, wanted) in BAD_CALLS.items()
            if messages[name].startswith("WRONG") or not re.search(wanted, messages[name])
        ]
        assert not problems, f"rank {rank}:\n" + "\n".join(problems)


def call_badly_alone(world: Any) -> None:
    """A world of one does nothing, but is no more tolerant: the script must not learn of its mistake at -n 2."""
    for name in ("a product of complex numbers", "a dtype that cannot be folded", "a reduction nobody knows"):
        message_of(lambda name=name: BAD_CALLS[name][0](world), ConfigError)


def test_a_world_of_one_checks_its_arguments_too() -> None:
    run_ranks(1, call_badly_alone)


# Twice


def wait_and_close_twice(world: Any) -> None:
    tensor = torch.ones(50_001)
    work = world.all_reduce(tensor, async_op=True)
    for _ in range(3):
        work.wait()
        assert work.done()
    assert torch.equal(tensor, torch.full_like(tensor, world.size))
    part = world.split(0, name="part")
    part.barrier()
    part.close()
    part.close()
    assert "part" in message_of(lambda: part.barrier(), CommunicationError, ConfigError)
    world.barrier()
    world.close()
    world.close()
    message_of(lambda: world.barrier(), CommunicationError, ConfigError)


@pytest.mark.parametrize(("size", "transport"), [(1, "shm"), (3, "shm"), (3, "tcp")])
def test_waiting_and_closing_twice_is_harmless(size: int, transport: str) -> None:
    run_ranks(size, wait_and_close_twice, transport=transport)


def close_with_work_in_flight(world: Any) -> str:
    """A communicator that is closed under an operation ends that operation with an error; no thread hangs in wait()."""
    if world.rank == 1:
        world.recv(torch.zeros(1), 0)  # until rank 0 has closed
        return ""
    part_messages: list[str] = []
    work = world.recv(torch.zeros(3), 1, async_op=True)
    waiting = threading.Thread(target=lambda: part_messages.append(message_of(work.wait, CommunicationError)))
    waiting.start()
    world.close()
    waiting.join(5)
    assert not waiting.is_alive()
    return part_messages[0]


@every_transport
def test_closing_a_world_ends_its_waiters(transport: str) -> None:
    first, second = outcomes_of(2, close_with_work_in_flight, transport=transport)
    assert first.returned, str(first)
    assert second.kind == "PeerLost", str(second)
    assert "rank 0" in second.message


def do_nothing(world: Any) -> int:
    return int(world.size)


@every_transport
def test_ranks_that_leave_at_once_do_not_break_the_start_of_slower_ones(transport: str) -> None:
    for _ in range(5):
        assert run_ranks(6, do_nothing, transport=transport) == [6] * 6


def raise_an_error(world: Any) -> None:
    if world.rank == 1:
        raise ZeroDivisionError("the user's mistake")
    world.all_reduce(torch.zeros(100_003))


@every_transport
def test_the_users_error_is_the_one_reported(transport: str) -> None:
    with pytest.raises(ZeroDivisionError, match="the user's mistake") as caught:
        run_ranks(3, raise_an_error, transport=transport)
    assert "PeerLost" in "\n".join(caught.value.__notes__)
