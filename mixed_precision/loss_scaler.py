"""LossScaler: keep fp16 gradients out of the range where they are rounded to zero, without letting them overflow.

The loss is multiplied by `scale` before backward, and gradients are divided by it before they are used. A step with a gradient that is not
finite is skipped and halves the scale; a number of good steps in a row doubles it (Micikevicius et al., arXiv:1710.03740). The scale is a
power of two, so that multiplying and dividing loses nothing. It knows no tensors and no ranks: all must be told the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ringfold.collectives.errors import ConfigError, PrecisionError

__all__ = ["LossScaler"]

GREATEST = 2.0**24
LEAST = 2.0**-14  # below it even a loss of 1 is no longer a normal number in fp16


class LossScaler:
    """The scale of the loss of the next step; `skipped` counts the steps that were skipped.

    After `patience` skips in a row training is taken to have failed.

    Raises:
        ConfigError: the initial scale is no power of two, or a count is below 1.
    """

    def __init__(self, initial: float = 2.0**16, growth_interval: int = 2000, patience: int = 30) -> None:
        if not LEAST <= initial <= GREATEST or float(initial).hex().split("p")[0] != "0x1.0000000000000":
            raise ConfigError(f"loss scale: initial is {initial}, expected a power of two from {LEAST} to {GREATEST}.")
        if growth_interval < 1 or patience < 1:
            raise ConfigError(f"loss scale: growth_interval {growth_interval} and patience {patience} must be 1 or more.")
        self.scale = float(initial)
        self.skipped = 0
        self._growth_interval = growth_interval
        self._patience = patience
        self._good = 0  # steps since the scale changed
        self._bad = 0  # skips in a row

    def update(self, found_inf: bool, culprit: Callable[[], str]) -> None:
        """Take note of a step: it was skipped, or it was good. `culprit` names a parameter whose gradient is not finite, when that is asked.

        Raises:
            PrecisionError: as many steps in a row as `patience` were skipped.
        """
        if not found_inf:
            self._good, self._bad = self._good + 1, 0
            if self._good >= self._growth_interval:
                self.scale, self._good = min(GREATEST, self.scale * 2.0), 0
            return
        self.skipped += 1
        self._good, self._bad = 0, self._bad + 1
        if self._bad >= self._patience:
            raise PrecisionError(
                f"fp16: {self._bad} train steps in a row had gradients that are not finite, the first of them that of {culprit()}; the loss scale "
                f"is down to {self.scale:g}. The model diverges, or its activations do not fit fp16: lower the learning rate, look at that "
                "module, or use bf16."
            )
        self.scale = max(LEAST, self.scale / 2.0)

    def state_dict(self) -> dict[str, float | int]:
        """Return everything as plain numbers."""
        return {"scale": self.scale, "skipped": self.skipped, "good": self._good, "bad": self._bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.scale, self.skipped = float(state["scale"]), int(state["skipped"])
        self._good, self._bad = int(state["good"]), int(state["bad"])
