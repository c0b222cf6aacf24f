"""The buffers that a block changes in its forward: the running statistics of BatchNorm, the vectors of spectral normalisation.

The second run must find them as the first one did, and must not change them once more. It works on copies, which stand in the modules
for that while; the real buffers are not touched, so nothing that autograd saved of them is overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ringfold.collectives.errors import ConfigError
from torch import Tensor, nn

__all__ = ["BufferCopies", "Buffers"]

# Copied before every call although they may never change: the running statistics of 4,096 channels, and no causal mask of any size.
SMALL_NBYTES = 1 << 15


@dataclass(frozen=True)
class _Held:
    """A buffer before a call; `twin` is its copy, None if it is not expected to change."""

    module: nn.Module
    name: str
    buffer: Tensor
    version: int
    twin: Tensor | None

    @property
    def has_changed(self) -> bool:
        """By its value where that is known: torch's own BatchNorm does not count its changes in the version. A GPU is waited for then."""
        now = self.module._buffers.get(self.name)
        if now is not self.buffer or self.buffer._version != self.version:
            return True
        return self.twin is not None and not torch.equal(self.twin, self.buffer)


class Buffers:
    """The buffers of one block. Small ones are copied before every call, large ones only if the first call changed them."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block = block
        self._name = name
        self._changing: set[tuple[int, str]] | None = None  # the large ones that change, by id of the module and name

    def copy(self) -> BufferCopies:
        """Return the buffers as they are now; to be called before forward."""
        held = []
        twins: dict[int, Tensor] = {}  # a buffer of two modules stays one
        for module in self._block.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in twins and self._may_change(module, name, buffer):
                        twins[id(buffer)] = buffer.detach().clone()
                    held.append(_Held(module, name, buffer, buffer._version, twins.get(id(buffer))))
        return BufferCopies(self, held)

    def learn(self, held: list[_Held]) -> list[_Held]:
        """Return those that the second run needs, after a call.

        Raises: ConfigError: a large one has changed that the first call had left alone, so that there is no copy.
        """
        large = [each for each in held if each.buffer.nbytes > SMALL_NBYTES]
        if self._changing is None:
            self._changing = {(id(each.module), each.name) for each in large if each.has_changed}
        lost = [path for each in large if each.twin is None and each.has_changed for path in self._paths(each)]
        if lost:
            raise ConfigError(
                f"recompute: {', '.join(lost)} changed in forward now, but not at the block's first call, so its value before is not known. "
                "Change it outside of the block, or leave the block out with Engine(blocks=[...])."
            )
        return [each for each in held if self._may_change(each.module, each.name, each.buffer)]

    def _may_change(self, module: nn.Module, name: str, buffer: Tensor) -> bool:
        return self._changing is None or buffer.nbytes <= SMALL_NBYTES or (id(module), name) in self._changing

    def _paths(self, held: _Held) -> list[str]:
        return [f"{self._name}.{path}.{held.name}".replace("..", ".") for path, module in self._block.named_modules() if module is held.module]


class BufferCopies:
    """The buffers of a block as they were before one call of it."""

    def __init__(self, buffers: Buffers, held: list[_Held]) -> None:
        self._buffers = buffers
        self._held = held

    def finish(self) -> None:
        """Let go of what the second run does not need; to be called after forward.

        Raises: ConfigError, as `Buffers.learn`.
        """
        self._held = self._buffers.learn(self._held)

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the copies stand in the modules for a while, fresh ones each time."""
        fresh: dict[int, Tensor] = {}
        present = [each.module._buffers.get(each.name) for each in self._held]
        for each in self._held:
            if each.twin is not None:
                each.module._buffers[each.name] = fresh.setdefault(id(each.twin), each.twin.clone())
        try:
            yield
        finally:
            for each, buffer in zip(self._held, present, strict=True):
                each.module._buffers[each.name] = buffer
