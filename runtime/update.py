"""Update: what a train step makes of its gradients.

norm      every rank holds the whole gradient after the sum, or adds the squares of all pieces
skip      with a scaled loss, where the gradient is not finite: on all ranks alike
clip      by the norm, as torch.nn.utils.clip_grad_norm_
step      of the optimizer, on the parameters or on this rank's pieces
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ringfold.collectives.communicator import Communicator
from ringfold.mixed_precision.loss_scaler import LossScaler
from ringfold.parallel.tensor.tensor_parallel import TensorParallel
from ringfold.parallel.zero.sharding import Sharding
from ringfold.runtime import exact, gradients
from torch import nn
from torch.optim import Optimizer

__all__ = ["Update"]


class Update:
    """Steps of `optimizer` on the summed gradients of `module`, whose norm is bounded by `clip_norm`; collective.

    tensor: has divided parameters over "tp". is_exact: the norm has the same bits at any width. scaler: of a loss that is multiplied.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        optimizer: Optimizer,
        sharding: Sharding | None,
        tensor: TensorParallel | None,
        *,
        clip_norm: float | None,
        scaler: LossScaler | None,
        is_exact: bool,
    ) -> None:
        self.scaler = scaler
        self._module = module
        self._parameters = list(module.parameters())
        self._comm = comm
        self._optimizer = optimizer
        self._sharding = sharding
        self._tensor = tensor
        self._clip_norm = clip_norm
        self._is_exact = is_exact
        self._norm: float | None = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Run a train step inside, without the gradients of the last one; what it has begun ends with it, however that ends.

        Raises: ConfigError: the last one has changed a part of the parameters.
        """
        self._forget()
        if self._sharding is None:
            yield
            return
        self._sharding.require_whole()
        try:
            yield
        except BaseException:
            self._sharding.abandon()
            raise

    def begin_beside(self) -> None:
        """Begin to step as gradients are summed, where that needs nothing of all of them."""
        if self._sharding is not None and self._clip_norm is None and self.scaler is None:
            self._sharding.begin_beside()

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        if self._sharding is not None:
            self._sharding.gradients.drop()
        self._norm = None

    def step(self, factor: float) -> bool:
        """Step on the gradients times `factor`; at most one pass writes them, and none where there is nothing to change.

        Return whether the step was taken: with a scaled loss, if the gradient is finite.

        Raises: PrecisionError: too many steps in a row were not.
        """
        if self.scaler is not None:
            factor /= self.scaler.scale
        squares = self._squares()
        if squares is not None:
            self._norm = math.sqrt(squares) * factor
        if self.scaler is not None and self._norm is not None:  # the same on all ranks, and so is what follows
            self.scaler.update(not math.isfinite(self._norm), self._not_finite)
            if not math.isfinite(self._norm):
                return False
        if self._clip_norm is not None and self._norm is not None:
            clip = self._clip_norm / (self._norm + 1e-6)
            if not clip >= 1.0:
                factor *= clip
        if self._sharding is not None:
            self._sharding.step(self._optimizer, factor)
            return True
        if factor != 1.0:
            gradients.scale(self._parameters, factor)
        self._optimizer.step()
        return True

    @property
    def norm(self) -> float:
        """The norm of the last step's gradient before clipping."""
        if self._norm is None:
            self._norm = math.sqrt(gradients.squared_norm(gradients.values(self._parameters)))
        return self._norm

    def _squares(self) -> float | None:
        """Return the square of the norm, if anybody needs it."""
        if self._is_exact:
            assert self._sharding is not None  # narrows the type: exact sums are sharded
            mine = self._sharding.gradient_tensors()
            return exact.squared_norm(mine, sum(parameter.numel() for parameter in self._parameters), self._sharding.all_reduce)
        if self._tensor is None:
            return None if self._sharding is None and self._clip_norm is None else self._squares_of(self._parameters)
        of_parts = [parameter for parameter in self._parameters if self._tensor.is_divided(parameter)]
        of_all = [parameter for parameter in self._parameters if not self._tensor.is_divided(parameter)]
        return self._squares_of(of_all) + self._tensor.sum_of_parts(self._squares_of(of_parts))

    def _squares_of(self, parameters: list[nn.Parameter]) -> float:
        """Return the square of the norm of what the ranks that share the state of these parameters have of their gradients."""
        if self._sharding is None:
            return gradients.squared_norm(gradients.values(parameters))
        return self._sharding.sum_over_shards(gradients.squared_norm(self._sharding.gradient_tensors(parameters)))

    def _not_finite(self) -> str:
        """Return the name of the first parameter whose gradient is not finite; collective."""
        assert self._sharding is not None  # narrows the type: where the loss is scaled, masters are
        of = self._sharding.gradients.of
        mine = {name for name, piece, _, _ in self._sharding.named_pieces() if (grad := of(piece)) is not None and not grad.isfinite().all()}
        found = set().union(*self._comm.all_gather_object(sorted(mine)))
        return next((name for name, _ in self._module.named_parameters() if name in found), "no parameter")
