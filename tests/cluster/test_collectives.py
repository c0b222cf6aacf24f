"""Ranks on several hosts: every operation is right over links of both kinds, whichever ranks share a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ringfold.collectives.measure import measure_links

from tests.cluster.hosts import Hosts
from tests.harness import Outcome

PLACES = pytest.mark.parametrize(
    ("hosts", "places"),
    [((2, 1), [0, 1]), ((2, 1), [0, 0, 1, 1]), ((2, 1), [1, 0, 1, 0]), ((3, 1), [0, 0, 1, 2])],
    indirect=["hosts"],
    ids=["1+1", "2+2", "interleaved", "2+1+1"],
)


def values_of(outcomes: list[Outcome]) -> list[Any]:
    assert not any(outcome.failed for outcome in outcomes), "\n".join(str(outcome) for outcome in outcomes if outcome.failed)
    return [outcome.value for outcome in outcomes]


def everything(world: Any, streams: int) -> list[bool]:
    """Check each operation with numbers whose sums are exact; return who is near."""
    assert world.session.job.streams == streams
    rank, size = world.rank, world.size
    # Up to a few megabytes: several segments, each cut into stripes of which the last is short.
    for count in (0, 1, 3, 1000, 400_003):
        for dtype in (torch.float32, torch.int64):
            numbers = torch.arange(count).remainder(101).to(dtype)
            total = numbers * size + sum(range(size))
            for algorithm in (None, "ring", "direct", *(["hierarchical"] if world.topology.is_hierarchical else [])):
                ordinary = numbers + rank
                world.all_reduce(ordinary, algorithm=algorithm)
                assert torch.equal(ordinary, total)
                registered = world.empty(count, dtype=dtype).copy_(numbers + rank)
                world.all_reduce(registered, algorithm=algorithm)
                assert torch.equal(registered, total)
            for root in range(size):
                tensor = numbers + rank
                world.broadcast(tensor, root)
                assert torch.equal(tensor, numbers + root)
    counts = [100_003 * r + (0 if r == 1 else 7) for r in range(size)]
    pieces = [torch.arange(c, dtype=torch.float64) + 1000 * r for r, c in enumerate(counts)]
    whole = torch.cat(pieces)
    gathered = torch.empty_like(whole)
    world.all_gather(gathered, pieces[rank], counts=counts)
    assert torch.equal(gathered, whole)
    scattered = torch.empty_like(pieces[rank])
    world.reduce_scatter(scattered, whole + rank, counts=counts)
    assert torch.equal(scattered, pieces[rank] * size + sum(range(size)))
    sent, received = torch.full((300_001,), float(rank)), torch.empty(300_001)
    work = world.send(sent, (rank + 1) % size, async_op=True)
    world.recv(received, (rank - 1) % size)
    work.wait()
    assert torch.equal(received, torch.full((300_001,), float((rank - 1) % size)))
    assert world.all_gather_object({"rank": rank, "padding": "x" * (1000 * rank)}) == [{"rank": r, "padding": "x" * (1000 * r)} for r in range(size)]
    row = world.split(rank % 2, name="parity")
    tensor = torch.ones(5)
    row.all_reduce(tensor)
    assert tensor.tolist() == [float(row.size)] * 5
    row.close()
    world.barrier()
    return list(world.session.near)


@PLACES
@pytest.mark.parametrize("streams", [1, 4])
def test_operations_are_right_over_shared_memory_and_tcp_together(hosts: Hosts, places: list[int], streams: int) -> None:
    with hosts.spawn(places, everything, streams, env={"RINGFOLD_STREAMS": str(streams)}) as ranks:
        near = values_of(ranks.wait(60))
    assert near == [[place == own and r != rank for r, place in enumerate(places)] for rank, own in enumerate(places)]


def measure_again(world: Any) -> Any:
    row = world.split(0, name="row")
    return world.session.links, measure_links(world), (world.topology.near, world.topology.far), (row.topology.near, row.topology.far)


@pytest.mark.parametrize("hosts", [(3, 1)], indirect=True)
def test_measured_links_are_the_same_numbers_on_every_rank_and_tell_a_slow_network(hosts: Hosts) -> None:
    for host in range(3):
        hosts.cap(host, "100mbit")
    with hosts.spawn([0, 1, 1, 2], measure_again) as ranks:
        first, *others = values_of(ranks.wait(60))
    assert all(other == first for other in others)
    assert all(links == first[0] for links in first)
    near, far = first[0]
    assert (near.name, far.name) == ("shm", "tcp")
    # 1448 of 1514 bytes are payload, so 100 Mbit/s are 84 ns a byte. A pause before the exchange lets the shaper pass half of its 256 KiB at once.
    assert 40e-9 < far.beta_s_per_byte < 400e-9
    assert 0 < near.beta_s_per_byte < far.beta_s_per_byte
    assert far.alpha_s > 0
    assert near.alpha_s > 0
