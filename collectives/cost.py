"""What a collective costs: the alpha-beta-gamma model of a link, and the time it predicts.

A step that waits for a message costs alpha, a byte that a rank sends beta, a byte that it folds gamma. The algorithms say how many of
each they take (their `cost` functions) and select.py compares. The model ranks algorithms; it does not predict a busy machine.

Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LINKS", "SHM", "TCP", "Cost", "Link"]

# The part of alpha that a message costs when nobody waits for it: what its sender and its receiver do, without the way between them.
ISSUE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Link:
    """One way for two ranks to talk, in seconds, bytes and seconds per byte.

    alpha_s: from a send to its completed receive, of an empty message. beta_s_per_byte: for a byte sent, while as much is received.
    gamma_s_per_byte: for a byte of one operand folded into another. access_s_per_byte: for a byte read or written in a peer's
    registered memory (infinite where there is none). crowding: by how much beta grows with each peer that sends to the same rank
    at the same time beyond the first.
    """

    name: str
    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float
    access_s_per_byte: float
    crowding: float

    def seconds(self, *, rounds: int, messages: int, wire_nbytes: float, folded_nbytes: float = 0.0, senders: int = 1) -> float:
        """Return the time of `messages` sent by a rank, `rounds` of them one after the other, `senders` at a time to each receiver."""
        latency = self.alpha_s * (rounds + ISSUE_SHARE * max(0, messages - rounds))
        return latency + wire_nbytes * self.beta_s_per_byte * (1 + self.crowding * (senders - 1)) + folded_nbytes * self.gamma_s_per_byte


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation costs the rank that does the most: messages one after the other, bytes it sends, and predicted time."""

    steps: int
    wire_nbytes: int
    seconds: float


# Measured on two cores of an Intel Xeon at 2.5 GHz, 2 ranks, float32 all_reduce, medians: 4 B in 2.1 us over shared memory and 6.9 us over
# loopback give alpha (and a microsecond of Python); 64 MiB in 4.5 ms registered, 13 ms staged and 28 ms over loopback give the rates.
SHM = Link("shm", alpha_s=1e-6, beta_s_per_byte=1 / 6e9, gamma_s_per_byte=1 / 20e9, access_s_per_byte=1 / 12e9, crowding=0.0)
TCP = Link("tcp", alpha_s=6e-6, beta_s_per_byte=1 / 2.5e9, gamma_s_per_byte=1 / 20e9, access_s_per_byte=float("inf"), crowding=0.05)

LINKS = {link.name: link for link in (SHM, TCP)}
