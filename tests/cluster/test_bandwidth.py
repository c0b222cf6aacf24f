"""How much of a wire collectives use.

Bus bandwidth of an all_reduce over n ranks: 2 (n - 1) / n times its bytes, over its time; with two ranks that is what each sends. A cap of R
by tbf counts whole frames, so at most 1448 / 1514 = 95.6 % of R can be payload, less the acknowledgements of the other direction;
and 128 KiB pass at once when the shaper has been idle, 0.4 % of 32 MiB.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.cluster.hosts import BURST_NBYTES, FRAME_NBYTES, PAYLOAD_NBYTES, Hosts
from tests.cluster.test_collectives import values_of

pytestmark = pytest.mark.quiet

MIB = 1024 * 1024


def bus_bandwidths(world: Any, nbytes: int, times: int, enough: float) -> list[float]:
    """Return the bytes a second of up to so many all_reduces, or to the first that is enough; checks the sums."""
    tensor = torch.empty(nbytes // 4)
    found: list[float] = []
    while len(found) < times and max(found, default=0.0) < enough:
        tensor.fill_(world.rank + 1.0)
        world.barrier()
        began = time.perf_counter()
        world.all_reduce(tensor)
        seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        assert bool((tensor == world.size * (world.size + 1) / 2).all())
        world.all_reduce(seconds, "max")  # it is over when all have it
        found.append(2 * (world.size - 1) / world.size * nbytes / float(seconds))
    return found


def plain_sockets(world: Any, address: str) -> list[socket.socket]:
    """Return a socket to send by and one to receive by, of the two ranks; the first listens at `address`."""
    if world.rank == 0:
        listener = socket.create_server((address, 0))
        world.broadcast_object(listener.getsockname()[1])
        with listener:
            return [listener.accept()[0] for _ in range(2)]
    port = world.broadcast_object(None)
    return [socket.create_connection((address, port), timeout=30) for _ in range(2)][::-1]


def bus_bandwidths_beside_plain_sockets(world: Any, nbytes: int, times: int, address: str) -> list[tuple[float, float]]:
    """Return the bytes a second of all_reduces, each with those of plain sockets that carry as much both ways just before."""
    with ExitStack() as stack:
        send, receive = (stack.enter_context(sock) for sock in plain_sockets(world, address))
        payload, place = bytes(nbytes), bytearray(nbytes)

        def take() -> None:
            got = 0
            while got < nbytes:
                got += receive.recv_into(memoryview(place)[got:])

        found = []
        for _ in range(times):
            world.barrier()
            began = time.perf_counter()
            taking = threading.Thread(target=take)
            taking.start()
            send.sendall(payload)
            taking.join(30)
            seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            world.all_reduce(seconds, "max")
            found.append((bus_bandwidths(world, nbytes, 1, float("inf"))[0], nbytes / float(seconds)))
        return found


@pytest.mark.parametrize("streams", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_all_reduce_over_a_gigabit_is_nearly_as_fast_as_plain_sockets_at_the_same_time(hosts: Hosts, streams: int) -> None:
    # Plain sockets do no arithmetic, so a machine that is slow just now slows us more: the test beside holds the bar where nothing else runs.
    for host in range(2):
        hosts.cap(host, "1gbit")
    env = {"RINGFOLD_STREAMS": str(streams)}
    with hosts.spawn([0, 1], bus_bandwidths_beside_plain_sockets, 16 * MIB, 6, hosts.address(0), env=env) as ranks:
        found = values_of(ranks.wait(60))[0]
    shares = [ours / theirs for ours, theirs in found]
    assert max(shares) >= 0.85, f"bus bandwidth in units of what plain sockets had: {[round(each, 3) for each in shares]}"


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("size_mib", [16, 32, 64])
def test_all_reduce_uses_nine_tenths_of_a_gigabit(hosts: Hosts, size_mib: int, streams: int) -> None:
    cap = 1e9 / 8
    for host in range(2):
        hosts.cap(host, "1gbit")
    # The best of several: a disturbance of this machine is not the transport's.
    with hosts.spawn([0, 1], bus_bandwidths, size_mib * MIB, 8, 0.9 * cap, env={"RINGFOLD_STREAMS": str(streams)}) as ranks:
        found = values_of(ranks.wait(60))[0]
    assert max(found) >= 0.9 * cap, f"bus bandwidth in units of the cap: {[round(each / cap, 3) for each in found]}"
    assert max(found) <= (PAYLOAD_NBYTES / FRAME_NBYTES) * cap / (1 - BURST_NBYTES / (size_mib * MIB)), "the cap did not hold"


def cap_each_flow(hosts: Hosts, rate: str, classes: int = 128) -> None:
    """Give every TCP connection that host 1 makes to host 0 a bandwidth of its own in each direction, by its port, which the kernel chooses even."""
    for host, port_at in ((0, 22), (1, 20)):  # the destination's in the IPv4 packets of host 0, the source's in those of host 1
        lines = ["qdisc replace dev eth0 root handle 1: htb default 1"]
        for number in range(classes):
            flow, ports = f"1:{number + 1:x}", f"{2 * number:#x} {2 * (classes - 1):#x}"
            lines += [
                f"class add dev eth0 parent 1: classid {flow} htb rate {rate} burst 32kb cburst 32kb",
                f"filter add dev eth0 parent 1: protocol ip prio 1 u32 match u16 {ports} at {port_at} flowid {flow}",
            ]
        hosts.run(host, "sh", "-c", "echo '" + "\n".join(lines) + "' | tc -batch -")


def test_several_streams_are_not_held_to_the_bandwidth_of_one_flow(hosts: Hosts) -> None:
    cap_each_flow(hosts, "50mbit")
    nbytes, flow = 2 * MIB, 50e6 / 8
    found = {}
    for streams in (1, 4):
        with hosts.spawn([0, 1], bus_bandwidths, nbytes, 2, float("inf"), env={"RINGFOLD_STREAMS": str(streams)}) as ranks:
            found[streams] = max(values_of(ranks.wait(60))[0])
    assert found[1] < 1.1 * flow
    # Of four flows in 128 classes three share one with a probability of 4 / 128 ** 2. Two that do have half the rate each: twice one flow's in all.
    assert found[4] > 1.3 * found[1], f"bus bandwidth in units of a flow's: {found[1] / flow:.2f}, {found[4] / flow:.2f}"
