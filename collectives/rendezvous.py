"""From a `Job` (what a launcher said) to a `Membership`: who is in this generation, where, and an authenticated link to each.

    1. meet      reach the store: the launcher's; or rank 0's own, at an address that all were given (several hosts), that rank 0
                 hands out on its host (`handoff.py`), or that it broadcasts over MPI (several hosts, `mpi_handoff.py`)
    2. publish   every rank sets one record under its number and reads everybody else's
    3. link      every pair connects: over a unix socket on one host, else over TCP, by the first of the other's addresses that answers

A generation is one join: the job's id and how often this process has joined it, so joining and closing may be repeated, and what is
late from one generation cannot enter the next. Every wait ends at one deadline, with the names of the ranks that did not arrive.
It does not restart anything and does not watch anybody: from here on a link's end of file says that a rank died.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfold.collectives import interfaces
from ringfold.collectives.connect import LOOPBACK, Listener, join_address, keep_watch, name_ranks, split_address
from ringfold.collectives.conversation import pack_record, unpack_record
from ringfold.collectives.environment import STORE, TIMEOUT_S, Job, claim_key, member_key, open_key
from ringfold.collectives.errors import AuthenticationError, ConfigError, ConnectError
from ringfold.collectives.handoff import FIRST_PAUSE_S, LONGEST_PAUSE_S, Handoff, receive_handoff
from ringfold.collectives.membership import Member, Membership, connect_all, routes_to
from ringfold.collectives.mpi_handoff import meet_over_mpi
from ringfold.collectives.store import Store, StoreServer

__all__ = ["Membership", "host_identity", "join"]

_LINK = "link"
_joins: Counter[tuple[str, int]] = Counter()  # how often this process has joined a job as a rank


def host_identity() -> str:
    """Return an id that two processes share if and only if they share memory and unix sockets: the boot and three namespaces."""
    return _identity("uts", "net", "ipc")


def _identity(*namespaces: str) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in namespaces)])


def join(job: Job) -> Membership:
    """Meet the other ranks of the job and connect to each of them; with world_size 1 nothing is opened.

    Raises: ConnectError, naming the ranks that did not arrive in `job.timeout_s`. AuthenticationError, if this process does not hold
    the job's secret. ConfigError, if ranks were told different things, or this one an interface that its host does not have.
    """
    if not 0 <= job.rank < job.world_size:
        raise ConfigError(f"rank is {job.rank}, expected 0 to {job.world_size - 1} (world_size is {job.world_size})")
    _joins[job.job_id, job.rank] += 1
    generation = f"{job.job_id}/{_joins[job.job_id, job.rank]}"
    if job.world_size == 1:
        return Membership(0, 1, generation, job, None, [host_identity()], [socket.gethostname()], [os.getpid()])
    chosen = interfaces.choose(job.interface) if job.interface is not None else None
    deadline = time.monotonic() + job.timeout_s
    with ExitStack() as undo:
        meeting = _meet(job, generation, deadline, undo)
        # On the loopback only if nobody can be elsewhere.
        alone = job.local_size == job.world_size and ipaddress.ip_address(meeting.store.local_host).is_loopback
        ours = [] if alone else interfaces.local_addresses()
        listener = Listener(meeting.secret, generation, job.rank, everywhere=not alone)
        undo.callback(listener.close)
        published = [f"{LOOPBACK}/8"] if alone else _published(ours if chosen is None else chosen, meeting.store.local_host)
        members = _exchange(job, generation, meeting, listener, published, deadline)
        if meeting.handoff is not None:
            meeting.handoff.close()
        _check(job, members)
        membership = Membership(
            job.rank,
            job.world_size,
            generation,
            job,
            meeting.store,
            [member.host for member in members],
            [member.hostname for member in members],
            [member.pid for member in members],
            members=members,
            routes={peer.rank: routes_to(members[job.rank], peer, ours, chosen) for peer in members if peer.rank != job.rank},
            secret=meeting.secret,
            listener=listener,
            server=meeting.server,
        )
        over_unix = {peer.rank: [peer.unix] for peer in members if peer.host == members[job.rank].host and job.transport != "tcp"}
        addresses = {peer: over_unix.get(peer, routes) for peer, routes in membership.routes.items()}
        membership.links.update(connect_all(membership, listener, _LINK, addresses, deadline))
        for link in membership.links.values():
            if link.family != socket.AF_UNIX:
                keep_watch(link)
        undo.pop_all()
    return membership


@dataclass(frozen=True)
class _Meeting:
    """The store that all ranks have reached, and what rank 0 serves for that."""

    store: Store
    secret: bytes
    server: StoreServer | None = None
    handoff: Handoff | None = None


def _meet(job: Job, generation: str, deadline: float, undo: ExitStack) -> _Meeting:
    if job.store is not None and job.secret is not None:
        if job.source == "ringfold":
            store = undo.enter_context(_reach(job, job.store, job.secret, deadline))
            return _Meeting(store, job.secret)
        if job.rank > 0:
            store = undo.enter_context(_find(job, job.store, job.secret, generation, deadline))
            return _Meeting(store, job.secret)
        server = undo.enter_context(_serve(job, job.store, job.secret))
        store = undo.enter_context(_reach(job, job.store, job.secret, deadline))
        store.set(open_key(generation), b"")
        return _Meeting(store, job.secret, server)
    if job.local_size < job.world_size:
        return _Meeting(*meet_over_mpi(job, deadline, undo))
    if job.rank > 0:
        told = receive_handoff(generation, deadline)
        if told is None:
            raise _missing(job, [0], [])
        return _Meeting(undo.enter_context(_reach(job, *told, deadline)), told[1])
    secret = secrets.token_bytes(32)
    server = undo.enter_context(StoreServer(secret))
    handoff = Handoff(generation, server.address, secret, deadline)
    undo.callback(handoff.close)
    return _Meeting(undo.enter_context(_reach(job, server.address, secret, deadline)), secret, server, handoff)


def _reach(job: Job, address: str, secret: bytes, deadline: float) -> Store:
    try:
        return Store(address, secret, max(0.001, deadline - time.monotonic()))
    except AuthenticationError as error:
        raise AuthenticationError(f"rank {job.rank} of {job.job_id} does not hold the job's secret: {error}") from None
    except ConnectError as error:
        raise ConnectError(f"rank {job.rank} of {job.job_id} did not reach the store: {error}") from None


def _find(job: Job, address: str, secret: bytes, generation: str, deadline: float) -> Store:
    """Reach the store that rank 0 opens for this generation; at the same address the one of the last may still be closing."""
    reason = ""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            store = _reach(job, address, secret, deadline)
            try:
                if store.get(open_key(generation), max(0.0, deadline - time.monotonic())) is not None:
                    return store
            except BaseException:
                store.close()
                raise
            store.close()
            reason = f"the store at {address} serves another generation than {generation}"
        except ConnectError as error:
            reason = str(error)
        if time.monotonic() + pause_s >= deadline:
            raise ConnectError(f"{_missing(job, [0], [])}\n  Last attempt: {reason}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _serve(job: Job, address: str, secret: bytes) -> StoreServer:
    host, port = split_address(address)
    if job.local_size < job.world_size:
        host = "::" if ":" in host else "0.0.0.0"  # what the host calls itself is often its loopback, which the others do not reach
    try:
        return StoreServer(secret, host, port)
    except OSError as error:
        raise ConnectError(
            f"rank 0 of {job.job_id} cannot serve its store at {join_address(host, port)}: {error.strerror}. "
            f"Set {STORE}=HOST:PORT to a free port on rank 0's host, for every worker."
        ) from None


def _published(addresses: list[interfaces.Address], store_side: str) -> list[str]:
    """Return what others are told: first the address that leads to the store, since by that way they have met already."""
    return [str(address.host) for address in sorted(addresses, key=lambda address: str(address.host.ip) != store_side)]


def _exchange(job: Job, generation: str, meeting: _Meeting, listener: Listener, addresses: list[str], deadline: float) -> list[Member]:
    """Publish where this rank is, and read where the others are, in rank order."""
    store = meeting.store
    own = Member(
        job.rank,
        job.world_size,
        job.transport,
        job.streams,
        host_identity(),
        _identity("net"),
        socket.gethostname(),
        os.getpid(),
        addresses,
        listener.port,
        listener.unix_address,
    )
    if store.add(claim_key(generation, job.rank), 1) > 1:
        raise ConfigError(f"{own} is the second process that says it is rank {job.rank} of {generation}: give every worker a rank of its own")
    store.set(member_key(generation, job.rank), pack_record(vars(own)))
    members: list[Member] = []
    for peer in range(job.world_size):
        if peer == job.rank:
            members.append(own)
            continue
        try:
            record = store.get(member_key(generation, peer), max(0.0, deadline - time.monotonic()))
        except ConnectError as error:
            raise ConnectError(f"rank {job.rank} of {generation} was waiting for rank {peer} when it lost the store: {error}") from None
        if record is None:
            raise _give_up(job, generation, meeting, members)
        members.append(_read_member(record))
        if members[-1].world_size != job.world_size:  # some of those that we would wait for may not exist
            _check(job, members)
    return members


def _read_member(record: bytes) -> Member:
    fields = unpack_record(record)
    if "given_up" in fields:
        raise ConnectError(fields["given_up"])
    numbers, texts = ("rank", "world_size", "streams", "pid", "port"), ("transport", "host", "network", "hostname", "unix")
    expected: dict[str, Any] = dict.fromkeys(numbers, int) | dict.fromkeys(texts, str) | {"addresses": list}
    fields = unpack_record(record, **expected)
    return Member(**{key: fields[key] for key in expected})


def _give_up(job: Job, generation: str, meeting: _Meeting, arrived: list[Member]) -> ConnectError:
    """Find out who is missing, and tell everybody who waits for them, so that all ranks end with the same names."""
    store = meeting.store
    missing = [len(arrived)]  # at least: rank 0 may give up at the same moment, and its store ends with it
    try:
        records = [store.get(member_key(generation, peer), 0.0) for peer in range(job.world_size)]
    except ConnectError:
        records = []
    for record in records:
        if record is not None and "given_up" in unpack_record(record):  # somebody else was a moment earlier
            return ConnectError(unpack_record(record)["given_up"])
    missing = [peer for peer, record in enumerate(records) if record is None] or missing
    error = _missing(job, missing, arrived, meeting.server.refused if meeting.server else 0)
    with suppress(ConnectError):
        for peer in missing:
            store.set(member_key(generation, peer), pack_record({"given_up": str(error)}))
    return error


def _missing(job: Job, missing: list[int], arrived: list[Member], refused: int = 0) -> ConnectError:
    lines = [f"{name_ranks(missing)} of {job.world_size} did not arrive: rank {job.rank} of {job.job_id} gave up after {job.timeout_s:.1f} s"]
    if refused:
        lines.append(f"refused because they did not hold the job's secret: {refused} connections")
    if arrived:
        lines.append("arrived: " + ", ".join(map(str, arrived)))
    lines.append(f"Check that every worker was started and reached init(), or raise {TIMEOUT_S}.")
    return ConnectError("\n  ".join(lines))


def _check(job: Job, members: list[Member]) -> None:
    """Compare what the ranks were told, and whether they can reach each other with it."""
    problems = []
    for name, own in (("world_size", job.world_size), ("transport", job.transport), ("streams", job.streams)):
        differing = [f"{member} has {getattr(member, name)}" for member in members if getattr(member, name) != own]
        if differing:
            problems.append(f"{name} is {own} on rank {job.rank}, but {', '.join(differing)}")
    elsewhere = ", ".join(str(member) for member in members if member.host != members[0].host)
    if elsewhere and job.transport == "shm":
        problems.append(f"transport shm needs one host, but {elsewhere} shares no memory with {members[0]}: use auto or tcp")
    if problems:
        raise ConfigError(f"the ranks of {job.job_id} do not fit together:\n  " + "\n  ".join(problems))
