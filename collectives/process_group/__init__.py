"""The torch.distributed backend `ringfold`: what is written for torch's process groups runs over our communicators.

    import ringfold.collectives.process_group   # registers it
    torch.distributed.init_process_group("ringfold")

    bootstrap.py    from the rank, size and Store that torch hands over to a job that the ranks can join
    group.py        a ProcessGroup that serves every operation of torch with one of a Communicator
    work.py         what an operation returns, and the threads that complete futures
    staging.py      lists of tensors as one vector, in place where they lie in a row
    sparse.py       the sum of sparse tensors
    uncompiled.py   keeps torch.compile away from all of it

A group that torch makes of some ranks of the world is a subgroup of the world's communicator. A ringfold group serves all devices by itself:
"cpu:ringfold,cuda:nccl" is not possible, for torch lets Python replace a whole process group only. CUDA tensors go as a communicator's do.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from ringfold.collectives.communicator import world as join_world
from ringfold.collectives.process_group.bootstrap import find_job
from ringfold.collectives.process_group.group import Closable, ProcessGroup
from ringfold.collectives.process_group.work import Threads

__all__ = ["BACKEND", "ProcessGroup"]

BACKEND = "ringfold"


def _create(options: Any, _: object) -> ProcessGroup:
    """Make the group that torch asks for; called by its members only.

    options: torch's _DistributedBackendOptions. Without ranks it is the default group.
    """
    default = dist.group.WORLD
    timeout_s = options.timeout.total_seconds()
    if isinstance(default, ProcessGroup) and options.global_ranks_in_group:
        communicator = default.communicator.subgroup(options.global_ranks_in_group, f"group {options.group_id}")
        communicator.timeout_s = timeout_s
        return ProcessGroup(options.store, communicator, default.threads)
    job, server = find_job(options.store, options.group_rank, options.group_size, timeout_s, is_world=not options.global_ranks_in_group)
    try:
        communicator = join_world(job)
    except BaseException:
        if server is not None:
            server.close()
        raise
    threads = Threads(f"ringfold-futures-{job.rank}")
    owned: list[Closable] = [threads] if server is None else [server, threads]
    return ProcessGroup(options.store, communicator, threads, owned)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
