"""What the links of a job cost, measured when its world opens; the same numbers on every rank.

On one host it is how a read in a peer's memory compares with sending through a ring: ranks on cores that share a cache send faster, others read up to
four times faster. Folds of three ranks and more do not depend on it (select.py), so that no result does.

A job on several hosts has two classes of links: near ones, inside a host, and far ones, between hosts. One pair stands for each class, the
first that there is: a network whose links differ is taken for what its first two hosts see. The two ranks use a communicator of their own,
so what is measured is what collectives use, with all its streams: a barrier of two ranks is one step, and an all_gather sends as much as it
receives.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from ringfold.collectives.cost import SHM, TCP, Link

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["measure_links"]

CPU = torch.device("cpu")

_BARRIERS = 9
# Sent by each rank at once: long enough to outweigh a step, and 2 ms at 1 Gbit/s. Once unmeasured, for TCP's slow start and for what a shaper
# lets pass after a pause, then twice, of which the faster counts.
_NBYTES = 256 * 1024
# 4 ranks on 2 cores of an Intel Xeon at 2.8 GHz: a broadcast of 16 KiB takes 160 us in registered memory, 11 to 44 down a ring.
MEETING_S = 100e-6

# What this process has measured, by what identifies the processes of the job.
_known: dict[tuple[object, ...], tuple[Link, Link]] = {}


def measure_links(world: Communicator) -> tuple[Link, Link]:
    """Return the links inside a host and between hosts; collective over all ranks of the job, a millisecond on one host, some more on several.

    Where no two ranks share a host, or all do, the class that there is none of is as in cost.py. The same processes are measured once.

    Raises: CommunicationError.
    """
    membership = world.session.membership
    hosts = membership.host_of
    near, far = SHM if membership.job.transport != "tcp" else TCP, TCP
    is_one_host = len(set(hosts)) == 1
    if is_one_host and not (world.transport == "shm" and world.topology.remote_reads):
        return near, far
    key = (membership.job.transport, membership.job.streams, *hosts, *membership.pids)
    everyone = world.subgroup(range(world.size), "measure")  # so that the world's operations are numbered from the user's first
    try:
        # Every rank must take the same way, also where a measurement has failed on some of them.
        agreed = torch.tensor([key in _known, world.session.has_core_each], dtype=torch.uint8, device=CPU)
        everyone.all_reduce(agreed, "min")
        is_known, has_core_each = agreed.tolist()
        if not is_known:
            if is_one_host:
                near = replace(near, read_s_per_byte=near.beta_s_per_byte * _read_ratio(everyone), meeting_s=0.0 if has_core_each else MEETING_S)
            _known[key] = (near, far) if is_one_host else _of_pairs(everyone, near, far)
        return _known[key]
    finally:
        everyone.close()


def _of_pairs(world: Communicator, near: Link, far: Link) -> tuple[Link, Link]:
    """Return the links as one pair of ranks of each class has found them."""
    hosts = world.session.membership.host_of
    numbers = torch.zeros(2, 2, dtype=torch.float64, device=CPU)
    for row, name in enumerate(("near", "far")):
        pair = _first_pair(hosts, is_near=name == "near")
        if pair is not None and world.rank in pair:
            measured = _alpha_beta(world, pair, f"measure {name}")
            if world.rank == pair[0]:
                numbers[row] = torch.tensor(measured, dtype=torch.float64, device=CPU)
    world.all_reduce(numbers)  # of each row all ranks but one have zeros, so the sum is exact
    return _as_measured(near, numbers[0]), _as_measured(far, numbers[1])


def _first_pair(hosts: list[str], *, is_near: bool) -> tuple[int, int] | None:
    """Return the first rank that has another on its host (elsewhere), and that other."""
    for first, host in enumerate(hosts):
        for second in range(first + 1, len(hosts)):
            if (hosts[second] == host) == is_near:
                return first, second
    return None


def _read_ratio(world: Communicator) -> float:
    """Return the time of reading in the peers' memory over that of sending through the rings."""
    piece = _NBYTES // (world.size - 1)
    own, everyone = (torch.zeros(count, dtype=torch.uint8, device=CPU) for count in (piece, world.size * piece))
    took = torch.zeros(2, dtype=torch.float64, device=CPU)
    for row, reads in enumerate((True, False)):
        world.topology = replace(world.topology, remote_reads=reads, near=replace(world.topology.near, read_s_per_byte=0.0))
        seconds = []
        for _ in range(4):
            world.barrier()
            seconds.append(_seconds(lambda: world.all_gather(everyone, own, algorithm="direct")))
        took[row] = min(seconds[1:])
    world.all_reduce(took, "max")
    read_s, sent_s = took.tolist()
    return float(read_s / sent_s)


def _alpha_beta(world: Communicator, ranks: tuple[int, int], name: str) -> tuple[float, float]:
    """Return the seconds of a step and of each further byte; collective over the two ranks."""
    pair = world.subgroup(ranks, name)
    try:
        return _measure(pair)
    finally:
        pair.close()


def _measure(pair: Communicator) -> tuple[float, float]:
    own, both = torch.zeros(_NBYTES, dtype=torch.uint8, device=CPU), torch.zeros(2 * _NBYTES, dtype=torch.uint8, device=CPU)
    step_s = statistics.median(_seconds(pair.barrier) for _ in range(_BARRIERS))
    exchanges_s = []
    for _ in range(3):
        pair.barrier()
        exchanges_s.append(_seconds(lambda: pair.all_gather(both, own)))
    # Who comes late finds everything there, and what it sends fits into the kernel's buffers: only the other sees the time that it took.
    seen_s = torch.tensor([step_s, *exchanges_s[1:]], dtype=torch.float64, device=CPU)
    pair.all_reduce(seen_s, "max")
    alpha_s, *exchanges_s = seen_s.tolist()
    exchange_s = min(exchanges_s)
    return alpha_s, (exchange_s - alpha_s if exchange_s > alpha_s else exchange_s) / _NBYTES


def _seconds(operation: Callable[[], object]) -> float:
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began


def _as_measured(link: Link, numbers: torch.Tensor) -> Link:
    """Return the link with measured numbers, to the nearest powers of two: another algorithm folds in another order, which runs of one job
    should choose alike although no two measurements are."""
    if not numbers[0] > 0:
        return link
    alpha_s, beta_s_per_byte = (2.0 ** round(math.log2(number)) for number in numbers.tolist())
    return replace(link, alpha_s=alpha_s, beta_s_per_byte=beta_s_per_byte)
