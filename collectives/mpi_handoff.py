"""How the workers of several hosts get the address and the secret of rank 0's store if nobody gave them: rank 0 broadcasts both over MPI.

Whoever is in MPI_COMM_WORLD has been admitted by its launcher, so a secret that is fresh in every generation can be told there. Rank 0
names all addresses of its host; which of them reaches it depends on who asks, so each tries those to which it has a route, and knows
rank 0 by the secret.
"""

from __future__ import annotations

import ipaddress
import secrets
import time
from contextlib import ExitStack

from ringfold.collectives import interfaces
from ringfold.collectives.connect import LOOPBACK, join_address, split_address
from ringfold.collectives.conversation import pack_record, unpack_record
from ringfold.collectives.environment import SECRET, STORE, Job
from ringfold.collectives.errors import CommunicationError, ConfigError, ConnectError
from ringfold.collectives.mpi_process import mpi
from ringfold.collectives.store import Store, StoreServer

__all__ = ["meet_over_mpi"]

# For one of several addresses, most of which answer at once or never.
TRY_S = 3.0


def meet_over_mpi(job: Job, deadline: float, undo: ExitStack) -> tuple[Store, bytes, StoreServer | None]:
    """Return the store that rank 0 serves, reached, the job's secret and, on rank 0, the server; collective over all ranks.

    Raises: ConfigError: there is no MPI here, or its ranks are not the job's. ConnectError: no address of rank 0's host leads to it.
    """
    process = mpi()
    try:
        process.initialise(_remaining(deadline))
        world = process.MPI.COMM_WORLD
        if (world.size, world.rank) != (job.world_size, job.rank):
            raise ConfigError(
                f"this process is rank {world.rank} of {world.size} of MPI_COMM_WORLD but rank {job.rank} of {job.world_size} of the job"
            )
    except ConfigError as error:
        raise ConfigError(
            f"{job.local_size} of {job.world_size} workers are on this host, and MPI cannot tell the others how to find it: {error}.\n"
            f"  Set {SECRET} (the same random text everywhere) and {STORE}=HOST:PORT (a free port on rank 0's host)"
        ) from None
    server: StoreServer | None = None
    message: bytes | None = None
    if job.rank == 0:
        secret = secrets.token_bytes(32)
        server = undo.enter_context(StoreServer(secret, "0.0.0.0"))
        message = pack_record(
            {
                "hosts": " ".join(str(address.host) for address in _chosen(job) if address.host.version == 4),
                "port": split_address(server.address)[1],
                "secret": secret.hex(),
            }
        )
    told = unpack_record(process.share(message, _remaining(deadline)), hosts=str, port=int, secret=str)
    secret = bytes.fromhex(told["secret"])
    theirs = [ipaddress.ip_interface(host) for host in told["hosts"].split()]
    ours = interfaces.local_addresses()
    # Those that both hosts have lead back here: so does the loopback, for the ranks beside rank 0.
    hosts = [*interfaces.order(theirs, ours, _chosen(job) if job.interface is not None else None), LOOPBACK]
    addresses = [join_address(host, told["port"]) for host in hosts]
    return undo.enter_context(_reach(job, addresses, secret, deadline)), secret, server


def _reach(job: Job, addresses: list[str], secret: bytes, deadline: float) -> Store:
    reasons = []
    for address in addresses:
        try:
            return Store(address, secret, min(TRY_S, _remaining(deadline)))
        except CommunicationError as error:
            reasons.append(str(error))
    raise ConnectError(f"rank {job.rank} of {job.job_id} did not reach rank 0's store at any of its addresses:\n  " + "\n  ".join(reasons))


def _chosen(job: Job) -> list[interfaces.Address]:
    return interfaces.local_addresses() if job.interface is None else interfaces.choose(job.interface)


def _remaining(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
