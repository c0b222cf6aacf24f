"""CUDA tensors: which way they go, decided together by the ranks of a communicator when the first one comes.

    every rank has a GPU of its own       NCCL (nccl.py)
    all ranks share one GPU               the GPU's own memory, mapped into every process (shared_device.py); NCCL refuses this
    anything else                         copied to host memory and sent as CPU tensors are

Messages (send and recv) always go through host memory: neither of the others has tags, or receives from anybody. So does everything where the
job's transport is set to tcp or mpi. Operations are put on a stream of their own (stream_transport.py): nothing here makes the CPU wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from ringfold.collectives._native import Outcome
from ringfold.collectives.cuda import driver
from ringfold.collectives.cuda.stream_transport import StreamTransport

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["open_transport"]


@dataclass(frozen=True)
class _Place:
    """What a rank says about its GPU."""

    host: str
    gpu: str
    has_driver: bool
    has_nccl: bool


def open_transport(communicator: Communicator, handle: object, fail: Callable[[Outcome], None], device: torch.device) -> StreamTransport | None:
    """Return what carries the communicator's CUDA tensors, None if they go through host memory; every member calls it at the same operation.

    handle: the core's communicator. fail: raises what the outcome of an operation stands for.
    Raises: CommunicationError.
    """
    session = communicator.session
    mine = _Place(session.membership.host_of[session.rank], str(_uuid(device)), driver.is_present(), _has_nccl())
    places = communicator.all_gather_object(mine)
    if session.job.transport in ("tcp", "mpi"):
        return None
    gpus = {(place.host, place.gpu) for place in places}
    if len(gpus) == len(places) and all(place.has_nccl for place in places):
        from ringfold.collectives.cuda.nccl import NcclTransport  # a torch without NCCL cannot load it

        return NcclTransport.open(communicator, handle, fail, device)
    if len(gpus) == 1 and all(place.has_driver for place in places):
        from ringfold.collectives.cuda.shared_device import SharedDeviceTransport

        return SharedDeviceTransport.open(communicator, handle, fail, device)
    return None


def _uuid(device: torch.device) -> object:
    return torch.cuda.get_device_properties(device).uuid


def _has_nccl() -> bool:
    return find_spec("torch.distributed") is not None and torch.distributed.is_available() and torch.distributed.is_nccl_available()
