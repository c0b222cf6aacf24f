"""Scales: the scales of the quantised tensors of a model, from what their largest magnitudes (amax) were in the last steps.

    seen      [n, 3]            amax of the step so far: of each Linear's input, weight and gradient, over its calls and microbatches
    history   [steps, n, 3]     the maxima of all ranks, the newest last; 0 where a tensor was not seen, or was not finite
    known     [n, 3]            the scales that follow, the same on every rank; 0 where there is no history

All amaxes are reduced as one tensor, once a step. A maximum is the same whatever the order and however often a tensor is seen, so a block that is
recomputed changes nothing. A tensor without a known scale (in the first step; always, if scaling is not delayed) gets that of its own amax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.mixed_precision.fp8 import Fp8
from ringfold.mixed_precision.quantised import E4M3, E5M2, Quantised, amax, scale_for
from torch import Tensor

__all__ = ["Gauge", "Gauges", "Scales"]

DTYPES = (E4M3, E4M3, E5M2)


class Gauge:
    """Quantises one tensor of a Linear as `dtype`; `seen` and `known` are its elements of those tensors."""

    def __init__(self, dtype: torch.dtype, seen: Tensor, known: Tensor) -> None:
        self._dtype = dtype
        self._limit = torch.finfo(dtype).max
        self._seen = seen
        self._known = known

    def quantise(self, matrix: Tensor, *, record: bool) -> Quantised:
        """Return the matrix in 8 bits, and with `record` take note of its amax.

        One value that is not finite makes every value NaN, so that it shows in the loss instead of being rounded to the largest number.
        """
        largest = amax(matrix)
        if record:
            torch.maximum(self._seen, largest, out=self._seen)
        scale = torch.where(self._known > 0, self._known, scale_for(largest, self._limit))
        return Quantised.of(matrix, scale.masked_fill_(~largest.isfinite(), math.nan), self._dtype)


class Gauges(NamedTuple):
    """Those of one Linear."""

    input: Gauge
    weight: Gauge
    grad: Gauge


class Scales:
    """The scales of Linears of these names, on the device that they compute on."""

    def __init__(self, names: Sequence[str], device: torch.device, settings: Fp8) -> None:
        self._names = list(names)
        self._is_delayed = settings.scaling == "delayed"
        self._margin = 2.0**settings.margin
        self._limits = torch.tensor([torch.finfo(dtype).max for dtype in DTYPES], device=device)
        self._seen = torch.zeros(len(names), 3, device=device)
        self._known = torch.zeros(len(names), 3, device=device)
        self._history = torch.zeros(settings.history, len(names), 3, device=device)

    def gauges(self, name: str) -> Gauges:
        """Return the gauges of a Linear."""
        row = self._names.index(name)
        return Gauges(*(Gauge(*one) for one in zip(DTYPES, self._seen[row].unbind(), self._known[row].unbind(), strict=True)))

    @property
    def sent_nbytes(self) -> int:
        """The bytes of amaxes that are reduced over ranks once a step."""
        return self._seen.nbytes if self._is_delayed else 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forget the amaxes that are recorded inside."""
        before = self._seen.clone()
        try:
            yield
        finally:
            self._seen.copy_(before)

    def finish_step(self, comm: Communicator) -> None:
        """Take the amaxes of all ranks into the history, and the scales of the next step from it; collective."""
        if not self._is_delayed:
            return
        self._seen.nan_to_num_(nan=math.inf, posinf=math.inf)  # a maximum need not say anything of NaN
        comm.all_reduce(self._seen, "max")
        self._seen.masked_fill_(self._seen.isinf(), 0.0)
        self._history = torch.cat([self._history[1:], self._seen[None]])
        self._seen.zero_()
        self._follow()

    def state_dict(self) -> dict[str, Any] | None:
        """Return the history by the names of the Linears; None if there is none to keep."""
        return {"linears": self._names, "history": self._history.clone()} if self._is_delayed else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, of another length or of other Linears as far as it serves."""
        if not self._is_delayed:
            return
        saved = state["history"].to(self._history.device)[-len(self._history) :]
        self._history.zero_()
        for row, name in enumerate(state["linears"]):
            if name in self._names:
                self._history[len(self._history) - len(saved) :, self._names.index(name)] = saved[:, row]
        self._follow()

    def _follow(self) -> None:
        largest = self._history.amax(0)
        self._known.copy_(torch.where(largest > 0, scale_for(largest, self._limits) * self._margin, 0.0))
