"""Fp8: how a layout's `fp8` chooses the scales by which tensors are brought into the range of 8 bits.

    delayed   from the largest magnitudes of the last steps: known before the tensor is, and the same on every rank
    current   from the largest magnitude of the tensor itself

(Micikevicius et al., arXiv:2209.05433; delayed scaling is that of NVIDIA's Transformer Engine.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ringfold.collectives.errors import ConfigError, nearest

__all__ = ["Fp8"]

SCALINGS = ("delayed", "current")


@dataclass(frozen=True)
class Fp8:
    """The settings of fp8.

    scaling: "delayed" or "current". history: the number of steps whose largest magnitude delayed scaling takes. margin: the powers of two
    that it leaves above, for tensors that grow.

    Raises:
        ConfigError: a value is out of its range.
    """

    scaling: str = "delayed"
    history: int = 16
    margin: int = 1

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            meant = nearest(self.scaling, SCALINGS)
            expected = " or ".join(map(repr, SCALINGS))
            raise ConfigError(f"Fp8: scaling is {self.scaling!r}, expected {expected}" + (f"; did you mean {meant!r}?" if meant else "."))
        if self.history < 1:
            raise ConfigError(f"Fp8: history is {self.history}, expected 1 step or more.")
        if not 0 <= self.margin <= 8:
            raise ConfigError(f"Fp8: margin is {self.margin}, expected 0 to 8 powers of two.")
