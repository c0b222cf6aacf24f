"""Piece: a parameter that an optimizer holds, and which elements of which named tensor it is.

Sharded optimizers hold 1-dimensional pieces in place of the model's parameters; other layouts, and other ranks, cut elsewhere. A parameter
of the model itself is the piece that begins at 0 and has the whole shape, or that of the local tensor where axes of the mesh shard it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ringfold.collectives.errors import CheckpointError, ConfigError
from ringfold.parallel.placement import Local
from ringfold.runtime.checkpoint.part import Stretch, TensorPart
from torch import Tensor, nn

Named = Iterable["tuple[str, nn.Parameter | Piece]"]


@dataclass(frozen=True)
class Piece(Stretch):
    """Elements `start` to `start + parameter.numel()` of a flattened tensor; 1-dimensional, or all of it in its own shape.

    of: the tensor's shape, or the local tensor that it is.

    Raises:
        ConfigError: there are no such elements, or the parameter has another form.
    """

    parameter: nn.Parameter
    start: int
    of: tuple[int, ...] | Local

    def __post_init__(self) -> None:
        form, local = tuple(self.parameter.shape), self.local.shape
        if (form != local or self.start != 0) and (len(form) != 1 or not 0 <= self.start <= self.stop <= prod(local)):
            raise ConfigError(f"a parameter of shape {form} is not a piece of {self.of} that begins at element {self.start}")

    @property
    def stop(self) -> int:
        """The index behind the last element."""
        return self.start + self.parameter.numel()

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor in its own shape."""
        return tuple(self.parameter.shape) == self.of

    def part(self, key: str, value: Tensor) -> Tensor | TensorPart:
        """Return the entry `key` of this piece's optimizer state as a checkpoint saves it: as a part if it has a value for each element.

        Raises:
            CheckpointError: axes of the mesh shard the parameter, and the entry has several values that are not for an element each.
        """
        if self.is_whole:
            return value
        if is_elementwise(key, tuple(value.shape), tuple(self.parameter.shape)):
            return TensorPart(value.detach().reshape(-1), self.of, self.start)
        if isinstance(self.of, Local) and value.numel() > 1:
            raise CheckpointError(
                f"the optimizer keeps {key} of shape {tuple(value.shape)} for {self.of}, which is not a value for each element: what ranks have of "
                "it cannot be put together. Use an elementwise optimizer (SGD, AdamW, ...) where the layout has tp."
            )
        return value


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
