"""What a collective costs: the alpha-beta-gamma model of links, and which link ranks talk over.

A step that waits for a message costs alpha, a byte that a rank sends beta, a byte that it folds gamma. The algorithms say how many of
each they take (their `cost` functions) and select.py compares. The model ranks algorithms; it does not predict a busy machine.

Ranks of one host talk over the near link, each as fast as it can; ranks of different hosts over the far one, which all ranks of a host share.

Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

__all__ = ["SHM", "TCP", "Cost", "Link", "Pair", "Topology", "everyone"]

# The part of alpha that a message costs when nobody waits for it: what its sender and its receiver do, without the way between them.
ISSUE_SHARE = 0.25

Pair = tuple[int, int]  # sender, receiver


@dataclass(frozen=True, slots=True)
class Link:
    """One way for two ranks to talk, in seconds, bytes and seconds per byte.

    alpha_s: from a send to its completed receive, of an empty message. beta_s_per_byte: for a byte sent, while as much is received.
    gamma_s_per_byte: for a byte of one operand folded into another. access_s_per_byte: for a byte read or written in a peer's
    registered memory, read_s_per_byte: for one read in memory of a peer that is not registered (infinite where there is no such way). crowding:
    by how much beta grows with each peer that sends to the same rank at the same time beyond the first. meeting_s: what it costs beyond its steps
    that all ranks must have come before any goes on; where they outnumber the cores, it is time slices.
    """

    name: str
    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float
    access_s_per_byte: float
    read_s_per_byte: float
    crowding: float
    meeting_s: float = 0.0

    def latency_s(self, rounds: float, messages: float) -> float:
        """Return the time of `messages` issued by a rank, of which `rounds` wait one for the other, without that of their bytes."""
        return self.alpha_s * (rounds + ISSUE_SHARE * max(0, messages - rounds))

    def crowded_s_per_byte(self, senders: int) -> float:
        """Return the time of a byte where `senders` at a time send to each receiver."""
        return self.beta_s_per_byte * (1 + self.crowding * (senders - 1))


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation costs the rank that does the most: messages one after the other, bytes it sends, and predicted time."""

    steps: int
    wire_nbytes: int
    seconds: float


# Measured on two cores of an Intel Xeon at 2.5 GHz, 2 ranks, float32 all_reduce, medians: 4 B in 2.1 us over shared memory and 6.9 us over
# loopback give alpha (and a microsecond of Python); 64 MiB in 4.5 ms registered, 13 ms staged and 28 ms over loopback give the rates. A
# read through the kernel takes 1.4 times as long as staging (AMD EPYC, 64 MiB reduce_scatter: 10.4 and 7.3 ms) where ranks share a cache, and less
# where they do not: what is moved without being folded goes by what is measured when the world opens (measure.py).
SHM = Link(
    "shm",
    alpha_s=1e-6,
    beta_s_per_byte=1 / 6e9,
    gamma_s_per_byte=1 / 20e9,
    access_s_per_byte=1 / 12e9,
    read_s_per_byte=1 / 4.2e9,
    crowding=0.0,
)
TCP = Link(
    "tcp",
    alpha_s=6e-6,
    beta_s_per_byte=1 / 2.5e9,
    gamma_s_per_byte=1 / 20e9,
    access_s_per_byte=inf,
    read_s_per_byte=inf,
    crowding=0.05,
)


@dataclass(frozen=True)
class Topology:
    """Which ranks share a host, and the links: what all ranks of a communicator know of each other.

    hosts: the host of each rank, as any number; stored in the order in which they first appear. remote_reads: ranks of one host can read each
    other's memory where it is not registered.
    """

    hosts: tuple[int, ...]
    near: Link = SHM
    far: Link = TCP
    remote_reads: bool = False

    def __post_init__(self) -> None:
        numbers = {host: number for number, host in enumerate(dict.fromkeys(self.hosts))}
        object.__setattr__(self, "hosts", tuple(numbers[host] for host in self.hosts))

    @classmethod
    def on_one_host(cls, size: int, *, remote_reads: bool = False) -> Topology:
        """Return that of `size` ranks on one host."""
        return cls((0,) * size, remote_reads=remote_reads)

    @classmethod
    def over_tcp(cls, size: int) -> Topology:
        """Return that of `size` ranks on a host each."""
        return cls(tuple(range(size)))

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def n_hosts(self) -> int:
        return len(set(self.hosts))

    @property
    def is_hierarchical(self) -> bool:
        """Tell whether there are several hosts, and several ranks on one of them."""
        return 1 < self.n_hosts < self.size

    @property
    def link(self) -> Link:
        """The slowest link that two ranks use."""
        return self.near if self.n_hosts == 1 else self.far

    def __str__(self) -> str:
        if self.is_hierarchical:
            return f"{self.size} ranks of {self.n_hosts} hosts over {self.near.name} and {self.far.name}"
        return f"{self.size} rank{'s' if self.size != 1 else ''} over {self.link.name}"

    def seconds(
        self, pairs: Iterable[Pair] | Mapping[Pair, int], nbytes: float, *, rounds: int, messages: float, folded_nbytes: float = 0.0, senders: int = 1
    ) -> float:
        """Return the time in which all pairs at once pass `nbytes` each, in `messages` of a rank, `rounds` of them one after the other.

        A mapping says how often each pair passes them. What counts is the rank that sends or receives the most on its host, and the host that
        sends or receives the most.
        """
        out: dict[tuple[bool, int], float] = defaultdict(float)
        into: dict[tuple[bool, int], float] = defaultdict(float)
        for (sender, receiver), times in Counter(pairs).items():
            crosses = self.hosts[sender] != self.hosts[receiver]
            out[crosses, self.hosts[sender] if crosses else sender] += times
            into[crosses, self.hosts[receiver] if crosses else receiver] += times
        busiest = {True: 0.0, False: 0.0}
        for (crosses, _), count in (*out.items(), *into.items()):
            busiest[crosses] = max(busiest[crosses], count)
        link = self.far if busiest[True] else self.near
        transfer = max(busiest[True] * self.far.crowded_s_per_byte(senders), busiest[False] * self.near.crowded_s_per_byte(senders))
        return link.latency_s(rounds, messages) + nbytes * transfer + folded_nbytes * link.gamma_s_per_byte


def everyone(size: int) -> Iterable[Pair]:
    """Yield every rank with every other."""
    return ((sender, receiver) for sender in range(size) for receiver in range(size) if sender != receiver)
