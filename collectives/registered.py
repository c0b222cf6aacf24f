"""Tensors in registered memory: the process's pool, from which peers on the host can read and write.

A tensor is in the pool as long as its storage is the one that `empty` gave: deepcopy, pickle and share_memory_ move it out without a word, and then
it is an ordinary tensor. So addresses are looked up at every collective, and nothing is remembered about tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from ringfold.collectives._native import core, pool
from ringfold.collectives.errors import ConfigError

__all__ = ["empty", "is_registered"]

CPU = torch.device("cpu")
# DLPack's (type code, bits). Bool travels as uint8 and is viewed back.
DLPACK = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.bool: (1, 8),
}


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> torch.Tensor:
    """Return an uninitialised contiguous tensor in registered memory; the memory goes back to the pool with its last view.

    On another device than the CPU there is no registered memory, and the tensor is an ordinary one.

    Raises:
        ConfigError: the dtype cannot be reduced.
        OSError: no memory.
    """
    if dtype not in DLPACK:
        raise ConfigError(f"empty: dtype {dtype} cannot be registered; expected one of {', '.join(map(str, DLPACK))}")
    if device.type != CPU.type:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    code, bits = DLPACK[dtype]
    sizes = tuple(map(int, shape))
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(core.allocate(pool, prod(sizes) * bits // 8, code, bits, sizes))
    return tensor.view(dtype) if dtype is torch.bool else tensor


def is_registered(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor's memory lies in the pool."""
    return tensor.is_cpu and bool(core.is_registered(pool, tensor.data_ptr(), tensor.numel() * tensor.element_size()))
