"""ModelState: a model's values and gradients under their own names, wherever they lie.

    replicated        in the module's own parameters
    zero1, zero2      there too; the optimizer has pieces of them
    zero3             in shards: the module's parameters are whole only while they are used
    bf16, fp16        in float32 masters: the module's parameters are rounded from them
    tp                in parts, each of which lies as one of the above

`parts` is what this rank saves and what it wants back: whole tensors, its part under tp, or its pieces where what is trained is in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.placement import Local
from ringfold.parallel.zero.sharding import Sharding
from ringfold.runtime import checkpoint
from ringfold.runtime.division import Division
from torch import Tensor, nn

__all__ = ["ModelState"]


class ModelState:
    """The state of `module` on rank `rank`; `sharding` is None where every rank holds all of its part. Methods are collective."""

    def __init__(self, module: nn.Module, sharding: Sharding | None, division: Division, rank: int) -> None:
        self._module = module
        self._sharding = sharding
        self._division = division
        self._tensor = division.tensor
        self._rank = rank
        self.shards_parameters = sharding is not None and sharding.stage == 3
        self._has_masters = sharding is not None and sharding.has_masters
        self._locals = self._find_locals()
        self._in_parts = self.shards_parameters or self._has_masters or bool(self._locals)

    @contextmanager
    def everything(self, write: bool = False) -> Iterator[None]:
        """Return a context in which the module has all its parameters; with `write` what is changed inside stays."""
        with ExitStack() as stack:
            if self._sharding is not None:  # a part is whole before it can be put together with others
                stack.enter_context(self._sharding.everything(write))
            stack.enter_context(self._division.everything(write))
            yield

    def grad(self, name: str) -> Tensor | None:
        """Return a copy of a parameter's whole gradient, or None if no rank used it.

        Raises: ConfigError if there is no parameter of that name.
        """
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        if name not in parameters:
            raise ConfigError(f"grad: the model has no parameter {name!r}. It has {', '.join(parameters)}.")
        parameter = parameters[name]
        grad = parameter.grad if self._sharding is None else self._sharding.grad(parameter)
        grad = grad if grad is None or self._sharding is not None else grad.detach().clone()
        return grad if grad is None or self._tensor is None else self._tensor.whole(parameter, grad)

    def whole(self) -> dict[str, Any]:
        """Return the full state on rank 0, and an empty dict elsewhere; copies where what is trained is in pieces.

        Raises: ConfigError: a step has changed a part of the parameters, and failed.
        """
        if self._sharding is not None:
            self._sharding.require_whole()
        if self._sharding is not None and self._has_masters:
            trained = {name: self._trained(self._sharding, p) for name, p in self._module.named_parameters(remove_duplicate=False)}
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
            part = (lambda _, value: value) if self._tensor is None else self._tensor.part
            self._sharding.assign({parameter: part(parameter, state[name]) for name, parameter in self._module.named_parameters()})

    def _trained(self, sharding: Sharding, parameter: nn.Parameter) -> Tensor:
        value = sharding.value(parameter)
        return value if self._tensor is None else self._tensor.whole(parameter, value)

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
        found.restore(self._all_parts() if self._in_parts else self._module, optimizer, self.pieces(), cast=True)
        if self._sharding is not None:
            self._sharding.settle()

    def pieces(self) -> list[tuple[str, checkpoint.Piece]]:
        """Return what the optimizer steps on here, with the names of the parameters."""
        parameters = dict(self._module.named_parameters())
        cut = [] if self._sharding is None else self._sharding.named_pieces()
        kept = [] if self.shards_parameters else [(name, p) for name, p in parameters.items() if self._sharding is None or not p.requires_grad]
        return [
            *((name, checkpoint.Piece(parameter, 0, self._of(parameter, parameter.shape))) for name, parameter in kept),
            *((name, checkpoint.Piece(piece, start, self._of(parameters[name], shape))) for name, piece, start, shape in cut),
        ]

    def _all_parts(self) -> dict[str, Any]:
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        cut = [] if self._sharding is None else self._sharding.named_pieces()
        mine = {id(parameters[name]): (piece, start) for name, piece, start, _ in cut}
        found = self._module.state_dict()
        for name, value in found.items():
            parameter = parameters.get(name)
            if parameter is None:
                continue
            if self._sharding is not None and (self.shards_parameters or (self._has_masters and parameter.requires_grad)):
                nothing = torch.empty(0, dtype=self._sharding.trained_dtype(parameter), device=value.device)
                piece, start = mine.get(id(parameter), (nothing, 0))
                found[name] = checkpoint.TensorPart(piece.detach(), self._of(parameter, value.shape), start)
            elif id(parameter) in self._locals:
                found[name] = checkpoint.TensorPart(value.view(-1), self._locals[id(parameter)], 0)
        return found

    def _of(self, parameter: nn.Parameter, shape: torch.Size) -> tuple[int, ...] | Local:
        return self._locals.get(id(parameter), tuple(shape))

    def _find_locals(self) -> dict[int, Local]:
        """Return what this rank has of the parameters that are divided, by id."""
        if self._tensor is None:
            return {}
        axis, parameters = self._tensor.axis, dict(self._module.named_parameters())
        placements = self._tensor.placements().items()
        return {id(parameters[name]): placement.at({axis.name: axis.rank}, {axis.name: axis.size}) for name, placement in placements}
