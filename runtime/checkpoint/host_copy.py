"""HostCopy: the tensors that a rank is about to write, as they are now, in memory that is used again by the next save.

The first copy pays for fresh pages; later ones run at the speed of memory. From a GPU the memory is pinned and the copies run together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Files = Mapping[str, Mapping[str, torch.Tensor]]


class HostCopy:
    """Buffers by file and name; it holds one copy of what was taken last, and no more."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def take(self, files: Files) -> dict[str, dict[str, torch.Tensor]]:
        """Return copies of all tensors; what the last `take` returned is overwritten."""
        wanted = {(file, name): tensor.detach() for file, tensors in files.items() for name, tensor in tensors.items()}
        self._buffers = {key: old for key, old in self._buffers.items() if key in wanted and _fits(old, wanted[key])}
        devices = set()
        for key, tensor in wanted.items():
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(tensor, non_blocking=True)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return {file: {name: self._buffers[file, name] for name in tensors} for file, tensors in files.items()}


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (buffer.shape, buffer.dtype, buffer.is_pinned()) == (tensor.shape, tensor.dtype, tensor.is_cuda)
