"""ModelState: a model's values and gradients under their own names, wherever they lie.

    replicated        in the module's own parameters
    zero1, zero2      there too; the optimizer has pieces of them
    zero3             in shards: the module's parameters are whole only while they are used
    bf16, fp16        in float32 masters: the module's parameters are rounded from them

`parts` is what this rank saves and what it wants back: whole tensors, or its pieces where what is trained is in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.zero.sharding import Sharding
from ringfold.runtime import checkpoint
from torch import Tensor, nn

__all__ = ["ModelState"]


class ModelState:
    """The state of `module` on rank `rank`; `sharding` is None where every rank holds all of it. Methods are collective."""

    def __init__(self, module: nn.Module, sharding: Sharding | None, rank: int) -> None:
        self._module = module
        self._sharding = sharding
        self._rank = rank
        self.shards_parameters = sharding is not None and sharding.stage == 3
        self._has_masters = sharding is not None and sharding.has_masters
        self._in_pieces = self.shards_parameters or self._has_masters

    def everything(self, write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which the module has all its parameters; with `write` what is changed inside stays."""
        return nullcontext() if self._sharding is None else self._sharding.everything(write)

    def grad(self, name: str) -> Tensor | None:
        """Return a copy of a parameter's whole gradient, or None if no rank used it.

        Raises: ConfigError if there is no parameter of that name.
        """
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        if name not in parameters:
            raise ConfigError(f"grad: the model has no parameter {name!r}. It has {', '.join(parameters)}.")
        if self._sharding is not None:
            return self._sharding.grad(parameters[name])
        grad = parameters[name].grad
        return None if grad is None else grad.detach().clone()

    def whole(self) -> dict[str, Any]:
        """Return the full state on rank 0, and an empty dict elsewhere; copies where what is trained is in pieces."""
        if self._sharding is not None and self._has_masters:
            trained = {name: self._sharding.value(p) for name, p in self._module.named_parameters(remove_duplicate=False)}
            return {name: trained.get(name, value) for name, value in self._module.state_dict().items()} if self._rank == 0 else {}
        with self.everything():
            state = dict(self._module.state_dict()) if self._rank == 0 else {}
            if self.shards_parameters:
                state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a full state, the same on every rank.

        Raises: RuntimeError, as torch's, if names or shapes differ.
        """
        with self.everything(write=True):
            self._module.load_state_dict(state)
        if self._sharding is not None and self._has_masters:
            self._sharding.assign({parameter: state[name] for name, parameter in self._module.named_parameters()})

    def parts(self) -> dict[str, Any]:
        """Return what this rank saves. Buffers are rank 0's, as in the beginning.

        Statistics of a BatchNorm that is not synchronised differ between ranks, and those of one rank belong together.

        Raises: ConfigError: a step has changed a part of the parameters, and failed.
        """
        if self._sharding is not None:
            self._sharding.require_whole()
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in self._all_parts().items() if self._rank == 0 or name in parameters}

    def restore(self, found: checkpoint.Checkpoint, optimizer: torch.optim.Optimizer) -> None:
        """Load a checkpoint into model and optimizer, both or neither.

        Raises: Incompatible, Corrupt, Incomplete, before anything is changed.
        """
        found.restore(self._all_parts() if self._in_pieces else self._module, optimizer, self.pieces(), cast=True)
        if self._sharding is not None:
            self._sharding.settle()

    def pieces(self) -> list[tuple[str, nn.Parameter | checkpoint.Piece]]:
        """Return what the optimizer steps on here, with the names of the parameters."""
        if self._sharding is None:
            return list(self._module.named_parameters())
        kept = [] if self.shards_parameters else [(name, p) for name, p in self._module.named_parameters() if not p.requires_grad]
        return [*kept, *((name, checkpoint.Piece(piece, start, shape)) for name, piece, start, shape in self._sharding.named_pieces())]

    def _all_parts(self) -> dict[str, Any]:
        state = self._module.state_dict()
        if self._sharding is None or not self._in_pieces:
            return state
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        mine = {id(parameters[name]): (piece, start) for name, piece, start, _ in self._sharding.named_pieces()}
        found: dict[str, Any] = {}
        for name, value in state.items():
            parameter = parameters.get(name)
            if parameter is None or not (self.shards_parameters or parameter.requires_grad):
                found[name] = value
                continue
            nothing = torch.empty(0, dtype=self._sharding.trained_dtype(parameter), device=value.device)
            piece, start = mine.get(id(parameter), (nothing, 0))
            found[name] = checkpoint.TensorPart(piece.detach(), tuple(value.shape), start)
        return found
