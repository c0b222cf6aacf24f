"""Piece: a parameter that an optimizer holds, and which elements of which named tensor it is.

Sharded optimizers hold 1-dimensional pieces in place of the model's parameters; other layouts, and other ranks, cut elsewhere. A parameter
of the model itself is the piece that begins at 0 and has the whole shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ringfold.collectives.errors import ConfigError
from ringfold.runtime.checkpoint.part import TensorPart
from torch import Tensor, nn

Named = Iterable["tuple[str, nn.Parameter | Piece]"]


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + parameter.numel()` of the flattened tensor `shape`; 1-dimensional, or the whole in its own shape.

    Raises:
        ConfigError: there are no such elements, or the parameter has another form.
    """

    parameter: nn.Parameter
    start: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        form = tuple(self.parameter.shape)
        whole = form == self.shape and self.start == 0
        if not whole and (len(form) != 1 or not 0 <= self.start <= self.stop <= prod(self.shape)):
            raise ConfigError(f"a parameter of shape {form} is not a piece of {self.shape} that begins at element {self.start}")

    @property
    def stop(self) -> int:
        """The index behind the last element."""
        return self.start + self.parameter.numel()

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor in its own shape."""
        return tuple(self.parameter.shape) == self.shape

    def part(self, key: str, value: Tensor) -> Tensor | TensorPart:
        """Return the entry `key` of this piece's optimizer state as a checkpoint saves it: as a part if it has a value for each element."""
        if self.is_whole or not is_elementwise(key, tuple(value.shape), tuple(self.parameter.shape)):
            return value
        return TensorPart(value.detach().reshape(-1), self.shape, self.start)


def is_elementwise(key: str, form: tuple[int, ...], parameter_form: tuple[int, ...]) -> bool:
    """Whether an entry of optimizer state has one value for each element of its parameter. `step` never has, as torch itself says by its name."""
    return key != "step" and form == parameter_form


def pieces_of(named: Named) -> list[tuple[str, Piece]]:
    """Return pairs of name and piece, each parameter once, under its first name."""
    first: dict[int, tuple[str, Piece]] = {}
    for name, value in named:
        piece = value if isinstance(value, Piece) else Piece(value, 0, tuple(value.shape))
        first.setdefault(id(piece.parameter), (name, piece))
    return list(first.values())
