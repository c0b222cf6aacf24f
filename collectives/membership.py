"""One rank's place in one generation of a job: who the others are, a link to each, and how to make more connections.

Whoever calls a rank of another host tries the addresses that it has published in turn (`interfaces.order`), and stays with the one that
answers. A membership watches nobody: a link's end of file, or the kernel's word that its other host is silent, says that a rank is gone.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from ringfold.collectives import interfaces
from ringfold.collectives.connect import LOOPBACK, Listener, call, join_address
from ringfold.collectives.environment import INTERFACE, Job, generation_prefix
from ringfold.collectives.errors import AuthenticationError, CommunicationError, ConnectError
from ringfold.collectives.store import Store, StoreServer

# How long an address of several may take to answer before the next is tried: a lost packet of the call is sent again after 1 s.
_PATIENCE_S = 2.5


@dataclass(frozen=True)
class Member:
    """What a rank publishes about itself, for the others to reach it and to see that they were told the same."""

    rank: int
    world_size: int
    transport: str
    streams: int
    host: str
    network: str
    hostname: str
    pid: int
    addresses: list[str]  # with their networks, the one that leads to the store first
    port: int
    unix: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.hostname}, pid {self.pid})"


@dataclass
class Membership:
    """One rank's place in one generation, and its connections.

    host_of: a host id for each rank; equal ids mean that shared memory and unix sockets reach.
    links: a connected, authenticated, blocking socket for each other rank. Whoever takes one over detaches it; `close` closes the rest.
    store: None if world_size is 1.
    """

    rank: int
    world_size: int
    generation: str
    job: Job
    store: Store | None
    host_of: list[str]
    hostnames: list[str]
    pids: list[int]
    links: dict[int, socket.socket] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list, repr=False)
    # TCP addresses of each other rank; the one that has answered, once one has.
    routes: dict[int, list[str]] = field(default_factory=dict, repr=False)
    secret: bytes = field(default=b"", repr=False)
    listener: Listener | None = field(default=None, repr=False)
    server: StoreServer | None = field(default=None, repr=False)

    def describe(self, rank: int) -> str:
        """Return a rank as messages name it: "rank 1 (node-a, pid 4121)"."""
        return f"rank {rank} ({self.hostnames[rank]}, pid {self.pids[rank]})"

    def connect(self, purpose: str, members: list[int]) -> dict[int, socket.socket]:
        """Make one more TCP connection to every other of these ranks; the sockets are the caller's.

        All of them call it with the same purpose, which must be new in this generation.
        Raises: ConnectError, naming the ranks that did not do so in time.
        """
        peers = [rank for rank in members if rank != self.rank]
        if not peers:
            return {}
        if self.listener is None:
            raise ConnectError(f"rank {self.rank} was to connect for {purpose!r} after its membership of {self.generation} was closed")
        return connect_all(self, self.listener, purpose, {peer: self.routes[peer] for peer in peers}, time.monotonic() + self.job.timeout_s)

    def connect_streams(self, purpose: str, members: list[int]) -> dict[int, list[socket.socket]]:
        """Make `job.streams` more TCP connections to every other of these ranks, one where no wire is between them; in one order at both ends.

        Raises: as `connect`.
        """
        if not self.members:
            return {}
        network = self.members[self.rank].network
        streams: dict[int, list[socket.socket]] = {}
        with ExitStack() as undo:
            for number in range(self.job.streams):
                wanted = [rank for rank in members if number == 0 or self.members[rank].network != network]
                for peer, sock in self.connect(f"{purpose} {number}", wanted).items():
                    streams.setdefault(peer, []).append(undo.enter_context(sock))
            undo.pop_all()
        return streams

    def close(self) -> None:
        """Close every connection that is still ours and end every thread. May be called again."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        for sock in self.links.values():
            sock.close()
        if self.store is not None:
            if self.rank == 0 and self.server is None:
                with suppress(CommunicationError):  # the launcher and its store may have gone first
                    self.store.delete(generation_prefix(self.generation))
            self.store.close()
        if self.server is not None:
            self.server.close()
            self.server = None

    def close_descriptors(self) -> None:
        """In a forked child: close what it has inherited, without a word to anybody, so that peers see the parent's end when it comes."""
        for sock in self.links.values():
            sock.close()
        if self.listener is not None:
            self.listener.close_descriptors()
        if self.store is not None:
            self.store.close()
        if self.server is not None:
            self.server.close_descriptors()
        self.listener = self.store = self.server = None


def routes_to(own: Member, peer: Member, ours: list[interfaces.Address], chosen: list[interfaces.Address] | None) -> list[str]:
    """Return the addresses at which to call a rank, the likeliest to work first."""
    if peer.network == own.network:
        return [join_address(LOOPBACK, peer.port)]
    try:
        theirs = [ipaddress.ip_interface(address) for address in peer.addresses]
    except (TypeError, ValueError):
        raise CommunicationError(f"{peer} is at {peer.addresses}, expected addresses such as 10.0.0.7/24") from None
    return [join_address(host, peer.port) for host in interfaces.order(theirs, ours, chosen)]


def connect_all(
    membership: Membership, listener: Listener, purpose: str, addresses: dict[int, list[str]], deadline: float
) -> dict[int, socket.socket]:
    """Call every lower rank, wait for every higher one.

    Raises: ConnectError, naming the ranks that could not be reached or did not call.
    """
    rank = membership.rank
    with ExitStack() as undo:
        connected: dict[int, socket.socket] = {}
        for peer in sorted(peer for peer in addresses if peer < rank):
            try:
                connected[peer] = undo.enter_context(_call_rank(membership, purpose, peer, addresses[peer], deadline))
            except ConnectError as error:
                reason = f"rank {rank} did not reach {membership.describe(peer)} for {purpose!r} of {membership.generation}: {error}"
                raise ConnectError(reason) from None
        try:
            connected.update(listener.collect(purpose, (peer for peer in addresses if peer > rank), deadline))
        except ConnectError as error:
            reason = f"{error} of {membership.generation} within {membership.job.timeout_s:.1f} s: did they end, or not call it?"
            raise ConnectError(reason) from None
        undo.pop_all()
    return connected


def _call_rank(membership: Membership, purpose: str, peer: int, addresses: list[str], deadline: float) -> socket.socket:
    """Call a rank at its addresses in turn, with ever more patience, until one answers; it is the one for every later call.

    Raises: ConnectError, if none did before the deadline, or all refused at once.
    """
    if not addresses:
        theirs = ", ".join(membership.members[peer].addresses)
        raise ConnectError(f"there is no route from this host to it: it is at {theirs or 'no address'}; see {INTERFACE}")
    patience_s = _PATIENCE_S if len(addresses) > 1 else float("inf")
    while True:
        reasons: list[CommunicationError] = []
        began = time.monotonic()
        for address in addresses:
            try:
                sock = call(address, membership.secret, membership.generation, purpose, membership.rank, peer, deadline, patience_s)
            except (ConnectError, AuthenticationError) as error:
                reasons.append(error)
                continue
            if sock.family != socket.AF_UNIX:
                membership.routes[peer] = [address]
            return sock
        if time.monotonic() >= deadline or time.monotonic() - began < patience_s:
            raise reasons[0] if len(reasons) == 1 else ConnectError("; ".join(map(str, reasons)))
        patience_s *= 2
