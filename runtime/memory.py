"""Memory: the bytes that a rank keeps between train steps, by purpose, and what the system says.

Counted are storages, each once. What is gone between steps (activations, gradients on their way into a bucket) is not in it, but it is in
the peak that the system has seen. Registered memory is shared with the other ranks of a host, so the process's share of it is what counts:
the proportional set size of Linux.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ringfold.parallel.reducer import GradientReducer
from ringfold.parallel.zero.sharding import Sharding
from torch import Tensor, nn

__all__ = ["account", "predict", "proportional_set_size"]


def account(module: nn.Module, sharding: Sharding | None, reducer: GradientReducer[Any], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return bytes by purpose: parameters, masters, gradients, gradient buffers, gathered blocks, offload, optimizer state, buffers, files, process.

    `offload` is memory through which passes what lies in files; `files` are no memory, and neither is what of the state lies there.
    """
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    if sharding is not None:
        state = [value for value in state if not sharding.lies_in_file(value)]
    if sharding is None:
        own = [p.grad for p in module.parameters() if p.grad is not None]
        found = {
            "parameters": _storages(module.parameters()),
            "masters": 0,
            "gradients": sum(reducer.nbytes_of_each) or _storages(own),
            "gradient buffers": 0,
            "gathered blocks": 0,
            "offload": 0,
            "files": 0,
        }
    else:
        found = sharding.nbytes()
        if sharding.stage < 3:
            found["parameters"] += _storages(p for p in module.parameters() if not p.requires_grad)
    found["optimizer state"] = _storages(state)
    found["buffers"] = _storages(module.buffers())
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    found["process"] = torch.cuda.memory_allocated(device) if device.type == "cuda" else proportional_set_size()
    return found


def predict(parameters: int, stage: int, ranks: int, *, element: int = 4, master: int = 0, state: int = 8) -> dict[str, float]:
    """Return bytes of parameters, masters, gradients and optimizer state by the formulas of ZeRO (arXiv:1910.02054).

    `element` bytes for a parameter and its gradient, `master` for its master copy (0: there is none), `state` for the optimizer's state of one
    element (8: Adam in float32). With masters and several backwards a step gradients take `master` bytes, for they are added in that precision.
    Padding and lent memory are not in it.
    """
    return {
        "parameters": parameters * element / (ranks if stage == 3 else 1),
        "masters": parameters * master / (ranks if stage else 1),
        "gradients": parameters * element / (ranks if stage > 1 or (master and stage) else 1),
        "optimizer state": parameters * state / (ranks if stage else 1),
    }


def proportional_set_size() -> int:
    """Return the bytes of this process, memory that n processes share counted to 1/n."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Pss")


def _storages(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
