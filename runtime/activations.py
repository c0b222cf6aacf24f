"""Activations: the bytes that a forward leaves for backward, counted by looking at every operation of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["activations_nbytes"]


class _Made(TorchDispatchMode):
    """Notes the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def alive_nbytes(self) -> int:
        return sum(nbytes for storage, nbytes in self._storages.values() if not storage.expired())

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output


def activations_nbytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that are alive when `forward` has run and were not before; random state and buffers are then as they were.

    What it returns is alive then: let that be a loss.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), _Made() as made:
        output = forward()
        nbytes: int = made.alive_nbytes
        del output
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return nbytes
