"""The random state, the autocast and what else was in force when the forward of a block ran."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Surroundings"]


class Surroundings:
    """The random state of the CPU and of `devices`, and autocast, as they are now; `also` makes a context for the rest."""

    def __init__(self, devices: Iterable[torch.device], also: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        self._also = also
        self._devices = [device for device in devices if device.type != "cpu"]
        self._cpu = torch.get_rng_state()
        self._states = self._device_states()
        kinds = dict.fromkeys(["cpu", *(device.type for device in self._devices)])
        self._casts = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds if torch.amp.is_autocast_available(kind)
        ]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Be in these surroundings for a while; random numbers go on afterwards where they were."""
        cpu, states = torch.get_rng_state(), self._device_states()
        self._set(self._cpu, self._states)
        try:
            with self._also(), contextlib.ExitStack() as stack:
                for kind, enabled, dtype in self._casts:
                    # Without its cache, which would outlive this run if backward itself is called under autocast.
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
                yield
        finally:
            self._set(cpu, states)

    def _device_states(self) -> list[Tensor]:
        return [torch.get_device_module(device.type).get_rng_state(device) for device in self._devices]

    def _set(self, cpu: Tensor, states: list[Tensor]) -> None:
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, states, strict=True):
            torch.get_device_module(device.type).set_rng_state(state, device)
