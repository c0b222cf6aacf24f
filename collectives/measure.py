"""What the links of a job cost: alpha and beta of each class, measured between ranks that such a link joins, the same numbers on every rank.

A job on several hosts has two classes of links: near ones, inside a host, and far ones, between hosts. One pair stands for each class, the
first that there is: a network whose links differ is taken for what its first two hosts see. The two ranks use a communicator of their own,
so what is measured is what collectives use, with all its streams: a barrier of two ranks is one step, and an all_gather sends as much as it
receives.
"""

from __future__ import annotations

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

# What this process has measured, by what identifies the processes of the job.
_known: dict[tuple[object, ...], tuple[Link, Link]] = {}


def measure_links(world: Communicator) -> tuple[Link, Link]:
    """Return the links inside a host and between hosts of a job on several hosts; collective over all its ranks, a few milliseconds.

    Where no two ranks share a host, or all do, the class that there is none of is as in cost.py. The same processes are measured once.

    Raises: CommunicationError.
    """
    membership = world.session.membership
    hosts = membership.host_of
    near, far = SHM if membership.job.transport != "tcp" else TCP, TCP
    if len(set(hosts)) == 1:
        return near, far
    key = (membership.job.transport, membership.job.streams, *hosts, *membership.pids)
    # Every rank must take the same way, also where a measurement has failed on some of them.
    is_known = torch.tensor([int(key in _known)], device=CPU)
    world.all_reduce(is_known, "min")
    if bool(is_known):
        return _known[key]
    numbers = torch.zeros(2, 2, dtype=torch.float64, device=CPU)
    for row, name in enumerate(("near", "far")):
        pair = _first_pair(hosts, is_near=name == "near")
        if pair is not None and world.rank in pair:
            measured = _alpha_beta(world, pair, f"measure {name}")
            if world.rank == pair[0]:
                numbers[row] = torch.tensor(measured, dtype=torch.float64, device=CPU)
    world.all_reduce(numbers)  # of each row all ranks but one have zeros, so the sum is exact
    _known[key] = _as_measured(near, numbers[0]), _as_measured(far, numbers[1])
    return _known[key]


def _first_pair(hosts: list[str], *, is_near: bool) -> tuple[int, int] | None:
    """Return the first rank that has another on its host (elsewhere), and that other."""
    for first, host in enumerate(hosts):
        for second in range(first + 1, len(hosts)):
            if (hosts[second] == host) == is_near:
                return first, second
    return None


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
    alpha_s, beta_s_per_byte = numbers.tolist()
    return replace(link, alpha_s=alpha_s, beta_s_per_byte=beta_s_per_byte) if alpha_s > 0 else link
