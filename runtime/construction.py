"""Construction: the module that an engine trains, from a module or from a function that builds one.

Every rank builds the whole, and takes over rank 0's values. Under zero3 a function is only recorded (parallel/deferred): parameters are then computed
one at a time where they are cut, and no rank ever holds them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.mixed_precision.precision import Precision
from ringfold.parallel.data_parallel import broadcast_state
from ringfold.parallel.deferred.model import Deferred, record
from ringfold.runtime.loss import name_of
from torch import nn

__all__ = ["Built", "construct"]


@dataclass(frozen=True)
class Built:
    """A module with rank 0's buffers, and its parameters unless they are `deferred`; `how` tells people."""

    module: nn.Module
    deferred: Deferred | None
    how: str


def construct(model: nn.Module | Callable[[], Any], comm: Communicator, device: torch.device, precision: Precision, *, in_shards: bool) -> Built:
    """Build a model for the ranks of `comm`; with `in_shards` parameters are left to be computed one by one, if that can be.

    Raises:
        ConfigError: it is no module; or names, shapes or dtypes differ between ranks.
    """
    dtype = None if precision.compute else precision.cast
    deferred, how = None, "on every rank"
    if in_shards and not isinstance(model, nn.Module):
        deferred, how = _deferred(model, comm)
    if deferred is not None:
        deferred.prepare()
        deferred.materialise_buffers()
        module = deferred.module.to(dtype=dtype)
        for part in module.modules():
            part._buffers = {name: None if buffer is None else buffer.to(device) for name, buffer in part._buffers.items()}
    else:
        built = model if isinstance(model, nn.Module) else model()
        if not isinstance(built, nn.Module):
            raise ConfigError(f"model: {name_of(model)} returned {type(built).__name__}, expected a torch.nn.Module.")
        module = built.to(device, dtype)
    broadcast_state(module, comm)
    return Built(module, deferred, how)


def _deferred(function: Callable[[], Any], comm: Communicator) -> tuple[Deferred | None, str]:
    """Record a function on all ranks, or on none."""
    found = record(function)
    reasons: list[str] = comm.all_gather_object(found if isinstance(found, str) else "")
    for rank, reason in enumerate(reasons):
        if reason:
            if isinstance(found, Deferred):
                found.abandon()
            return None, f"whole on every rank, for rank {rank} could not record {name_of(function)}: {reason}"
    return (found, "one parameter at a time") if isinstance(found, Deferred) else (None, "")
