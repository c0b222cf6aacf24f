"""ZeRO: DataParallel whose optimizer state, gradients and parameters lie in shards, for the user's own loop.

model = ZeRO(Net(), mesh["dp"], stage=2)
optimizer = model.optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=3e-4))
loss(model(x), y).backward()                 gradients are reduce-scattered while backward runs
model.clip_grad_norm_(1.0)                   the norm of the whole gradient
optimizer.step(); optimizer.zero_grad()      on this rank's pieces; every rank then has all parameters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.data_parallel import DataParallel
from ringfold.parallel.reducer import GradientReducer
from ringfold.parallel.zero.sharding import Sharding
from torch import nn
from torch.optim import Optimizer

__all__ = ["ZeRO"]


class ZeRO(DataParallel):
    """Train `module` on the ranks of `comm`, each of which holds 1/N of the optimizer state, of the gradients (stage 2), of the parameters (3).

    `group_size`: shard inside so many ranks, replicate between. `blocks`: patterns of the modules that stage 3 gathers one at a time (by
    default the children of containers). Gradients are averages over ranks, as in DataParallel, and are found at the optimizer's parameters,
    not at the model's. Under stages 2 and 3 a backward inside `no_sync()` is reduced as any other; under stage 3 all ranks call the model
    equally often, and see its parameters whole only inside `whole_parameters()`. Everything else is DataParallel's.

    Raises:
        ConfigError: as DataParallel; a stage that is not 1, 2 or 3.
    """

    sharding: Sharding | None

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        stage: int = 2,
        group_size: int | None = None,
        blocks: Sequence[str] | None = None,
        bucket_mb: float = 25.0,
        sync_batch_norm: bool = True,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ConfigError(f"ZeRO: stage is {stage}, expected 1, 2 or 3 (stage 0 is DataParallel).")
        if group_size is not None and (group_size < 1 or comm.size % group_size):
            raise ConfigError(f"ZeRO: group_size is {group_size}, expected a divisor of the {comm.size} ranks.")
        self._stage, self._group_size, self._blocks = stage, group_size, blocks
        super().__init__(module, comm, bucket_mb=bucket_mb, sync_batch_norm=sync_batch_norm)

    def optimizer(self, factory: Callable[[list[nn.Parameter]], Optimizer]) -> Optimizer:
        """Return what `factory` makes of the model's parameters, with this rank's pieces in their places; collective in its `step()`.

        Raises:
            ConfigError: it is not elementwise.
        """
        sharding = self._required()
        made = factory(list(self.module.parameters()))
        sharding.cut(made)
        return made

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale all gradients so that their norm together is at most `max_norm`, and return what it was; collective."""
        sharding = self._required()
        grads = [piece.grad for piece in sharding.pieces if piece.grad is not None]
        squares = sum(float(torch.linalg.vector_norm(grad, dtype=torch.float64)) ** 2 for grad in grads)
        norm = float(sharding.sum_over_shards(squares) ** 0.5)
        factor = max_norm / (norm + 1e-6)
        if grads and not factor >= 1.0:
            torch._foreach_mul_(grads, factor)
        return norm

    def grad(self, name: str) -> torch.Tensor | None:
        """Return a parameter's whole gradient, in new memory, or None if no rank used it; collective."""
        return self._required().grad(self.module.get_parameter(name))

    def whole_parameters(self, *, write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which every rank has all parameters; with `write` what is changed inside, alike on all ranks, stays; collective."""
        return nullcontext() if self.sharding is None else self.sharding.everything(write)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of `.module`, under its own names; under stage 3 it is collective, and parameters are copies."""
        with self.whole_parameters():
            state = super().state_dict(*args, **kwargs)
            if self._stage == 3 and self.sharding is not None:
                state = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state of `.module`; every rank loads the same."""
        with self.whole_parameters(write=True):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def close(self) -> None:
        super().close()
        if self.sharding is not None:
            self.sharding.close()
            self.sharding = None

    def _required(self) -> Sharding:
        if self.sharding is None:
            raise ConfigError("ZeRO: this model is closed, or a copy, and is sharded no longer.")
        return self.sharding

    def _make_reducer(self, comm: Communicator, bucket_mb: float) -> GradientReducer[Any]:
        self.sharding = Sharding(self.module, comm, self._stage, averaged=True, group_size=self._group_size, bucket_mb=bucket_mb, blocks=self._blocks)
        return self.sharding.gradients

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "sharding": None}
