"""Activation offload: what blocks keep from forward to backward waits in host memory.

    forward    pack(tensor)   a copy to pinned memory, on a stream of its own: forward goes on meanwhile, and the tensor's memory is free after it
    backward   fetch()        the current stream waits for the copy and brings it back; the CPU waits for nothing

It costs two transfers over the bus, and pays where a block computes for longer than they take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ringfold.collectives.errors import ConfigError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["HostOffload"]

# Smaller ones stay: a copy of that size takes as long to launch as to make (about 5 us at 25 GB/s).
SMALLEST_NBYTES = 1 << 17


@dataclass(frozen=True)
class _Moved:
    """A tensor in host memory; `copied` is when it has arrived there."""

    host: Tensor
    device: torch.device
    copied: torch.cuda.Event | None

    def fetch(self) -> Tensor:
        """Return the tensor on its device."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        return self.host.to(self.device, non_blocking=True)


class HostOffload:
    """Moves tensors of one device to host memory and back. Tensors of less than `smallest_nbytes` stay where they are."""

    def __init__(self, device: torch.device, smallest_nbytes: int = SMALLEST_NBYTES) -> None:
        self._device = device
        self._smallest_nbytes = smallest_nbytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @classmethod
    def of_gpu(cls, device: torch.device) -> HostOffload:
        """Return the offload of a GPU.

        Raises: ConfigError: `device` is none.
        """
        if device.type != "cuda":
            raise ConfigError(
                f"offload_activations: the model is on the {device.type}, where activations are in host memory anyway. "
                "Leave it out; to keep fewer of them, put recompute into the layout."
            )
        return cls(device)

    def hooks(self, block: nn.Module) -> saved_tensors_hooks:
        """Return a context in which autograd keeps what it saves in host memory, but for the parameters and buffers of `block`."""
        stay = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}

        def pack(tensor: Tensor) -> Tensor | _Moved:
            is_own = tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in stay
            return tensor.detach() if is_own else self.pack(tensor)

        return saved_tensors_hooks(pack, _fetched)

    def pack(self, tensor: Tensor) -> Tensor | _Moved:
        """Begin to move a tensor; what stays is returned detached, for an operation that held its own output would never be freed."""
        if tensor.device != self._device or tensor.layout is not torch.strided or tensor.nbytes < self._smallest_nbytes:
            return tensor.detach()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            return _Moved(host.copy_(tensor.detach()), self._device, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(self._stream)
            return _Moved(host, self._device, self._stream.record_event())


def _fetched(packed: Tensor | _Moved) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.fetch()
