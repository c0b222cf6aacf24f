"""From what torch hands to a backend (a Store, a rank, a size) to a Job that the ranks can join.

    under `ringfold run`           the launcher's job: its store, its secret
    RINGFOLD_SECRET on all ranks   rank 0 serves a store for this group and publishes its address through torch's
    one host                       rank 0 publishes a name; its store's address and a fresh secret go by handoff (collectives/handoff.py)

Torch's Store is not authenticated: whoever reaches its port reads and writes it. So no secret goes through it, only the name and the address of
a store that admits who holds the secret. A liar there can keep ranks from meeting, not enter the job.

Keys are numbered by rounds, for torch may hand over a store in which the keys of a destroyed group still stand: the n-th `size` ranks that
arrive are round n, and none of the next can arrive before those have all met.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
from dataclasses import replace

import torch.distributed as dist
from ringfold.collectives.connect import join_address, name_ranks, split_address
from ringfold.collectives.environment import MIN_SECRET_NBYTES, RANK, SECRET, STORE, TRANSPORT, Job
from ringfold.collectives.errors import ConfigError, ConnectError
from ringfold.collectives.rendezvous import host_identity
from ringfold.collectives.store import StoreServer
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

__all__ = ["find_job"]


def find_job(store: Store, rank: int, size: int, timeout_s: float, *, is_world: bool) -> tuple[Job, StoreServer | None]:
    """Agree with the other ranks of the group on a job; where it needs a store of its own, rank 0 gets the server, and closes it.

    Raises:
        ConfigError: the ranks are on several hosts, and some have no RINGFOLD_SECRET.
        ConnectError: some ranks did not come before the timeout.
    """
    if is_world and os.environ.get(RANK):
        launched = Job.from_environment()
        if (launched.rank, launched.world_size) == (rank, size):
            return replace(launched, timeout_s=timeout_s), None
    transport = Job.from_environment({TRANSPORT: os.environ.get(TRANSPORT, "")}).transport
    job = Job(rank=rank, world_size=size, local_rank=rank, local_size=size, source="torchrun", transport=transport, timeout_s=timeout_s)
    if size == 1:
        return job, None
    key = f"ringfold/{(store.add('ringfold/arrived', 1) - 1) // size}"
    store.set(f"{key}/host/{rank}", json.dumps([host_identity(), bool(os.environ.get(SECRET))]))
    server, plan = _plan(store, key, size, timeout_s) if rank == 0 else (None, None)
    try:
        if plan is not None:
            store.set(f"{key}/plan", json.dumps(plan))
        else:
            plan = json.loads(_get(store, f"{key}/plan", 0, rank, timeout_s))
        if "error" in plan:
            raise ConfigError(plan["error"])
        job = replace(job, job_id=plan["job"])
        if "store" in plan:  # the address is rank 0's, as that of a launcher's store: nobody serves another there
            job = replace(job, source="ringfold", store=plan["store"], secret=os.environ[SECRET].encode())
    except BaseException:
        if server is not None:
            server.close()
        raise
    return job, server


def _plan(store: Store, key: str, size: int, timeout_s: float) -> tuple[StoreServer | None, dict[str, str]]:
    """Decide, as rank 0, how the ranks are to meet."""
    records = [json.loads(_get(store, f"{key}/host/{rank}", rank, 0, timeout_s)) for rank in range(size)]
    without = [rank for rank, (_, has_secret) in enumerate(records) if not has_secret]
    plan = {"job": f"torch-{secrets.token_hex(8)}"}
    if not without:
        if len(os.environ[SECRET].encode()) < MIN_SECRET_NBYTES:
            return None, {"error": f"{SECRET} has {len(os.environ[SECRET].encode())} bytes, expected at least {MIN_SECRET_NBYTES} random ones"}
        server, plan["store"] = _serve(store, os.environ[SECRET].encode())
        return server, plan
    elsewhere = [rank for rank, (host, _) in enumerate(records) if host != records[0][0]]
    if elsewhere:
        return None, {
            "error": f"{name_ranks(elsewhere)} of {size} share no host with rank 0, and {name_ranks(without)} have no {SECRET}: set it, to the "
            "same random text everywhere. It does not go through torch's store, which anybody on the network can read"
        }
    return None, plan


def _get(store: Store, key: str, of: int, rank: int, timeout_s: float) -> bytes:
    try:
        return bytes(store.get(key))
    except dist.DistError as error:
        raise ConnectError(
            f"rank {of} did not arrive: rank {rank} waited for its {key!r} in torch's store up to {timeout_s:.1f} s ({error})"
        ) from None


def _serve(store: Store, secret: bytes) -> tuple[StoreServer, str]:
    """Serve a store where every rank can reach it: at RINGFOLD_STORE, else beside torch's own."""
    # Under our launcher that is where its own store listens.
    if (address := os.environ.get(STORE)) and RANK not in os.environ:
        return StoreServer(secret, *split_address(address)), address
    host = _own_host(store)
    server = StoreServer(secret, "::" if ":" in host else "0.0.0.0")
    return server, join_address(host, split_address(server.address)[1])


def _own_host(store: Store) -> str:
    """Return the name or address by which those who reach torch's store reach this host too."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return socket.gethostname()
    family, _, _, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: it only picks the interface
        mine = str(probe.getsockname()[0])
    # The store is on this host if the way there begins where it ends; then its name is as good for the others as it was for torch.
    is_here = mine == address[0] or ipaddress.ip_address(mine).is_loopback
    return store.host if is_here else mine
