"""Synchronised BatchNorm: the statistics of the whole batch, however its rows are spread over the ranks.

With n_r rows times positions on rank r, mean_r and M_r = sum (x - mean_r)^2 of its own, and N = sum n_r:

    mean = sum n_r mean_r / N        M = sum M_r + n_r (mean_r - mean)^2        (Chan, Golub, LeVeque 1979)
    dx = w / s * (dy - sum(dy) / N - xhat * sum(dy * xhat) / N),   s = sqrt(M / N + eps),  xhat = (x - mean) / s

The sums of dx run over all ranks; the gradients of weight and bias stay those of the rank and are reduced with all others. Merging is
in float64 and in rank order, so all ranks hold the same bits. A rank with no rows takes part with n_r = 0, in forward and in backward:
every rank must run both. Cost: one all_gather of 2C + 1 float64 forward, one all_reduce of 2C backward.
A block that is recomputed keeps the statistics of its first run: the all_gather is not issued again.
Evaluation, also with `track_running_stats=False`, does not communicate. Second derivatives are not supported.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.recompute.replay import once
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batch_norm(module: nn.Module, comm: Communicator) -> None:
    """Make every BatchNorm in `module` normalise with the statistics of all ranks of `comm`, in place.

    Modules, parameters, hooks and names stay the same objects. A copy (deepcopy, pickle) normalises by itself. A subclass with a forward
    of its own is left alone, with a warning.
    """
    for name, child in module.named_modules():
        if isinstance(child, _Synchronised):
            child.communicator = comm
        elif type(child) in _SYNCHRONISED:
            child.__class__ = _SYNCHRONISED[type(child)]
            child.communicator = comm  # type: ignore[assignment]
        elif isinstance(child, _BatchNorm):
            warnings.warn(f'"{name}" is a {type(child).__name__}: its statistics stay those of each rank alone', stacklevel=2)


def desynchronise_batch_norm(module: nn.Module) -> None:
    """Undo `synchronise_batch_norm`: make every such BatchNorm in `module` what it was, in place."""
    originals = {synchronised: original for original, synchronised in _SYNCHRONISED.items()}
    for child in module.modules():
        if isinstance(child, _Synchronised):
            child.__dict__.pop("communicator", None)
            child.__class__ = originals[type(child)]  # type: ignore[assignment]


class _Synchronised(_BatchNorm):
    """What the synchronised classes have in common; without a communicator they are what they were."""

    communicator: Communicator | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        comm = self.communicator
        if comm is None or comm.size == 1 or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        momentum = self._count_batch()
        count, mean, squares = once(_global_statistics, input.detach(), comm)
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got 1 on all {comm.size} ranks together")
        if count and self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((squares / (count - 1)).to(self.running_var.dtype), momentum)
        variance = squares / max(count, 1)
        output: torch.Tensor = _Normalise.apply(input, self.weight, self.bias, mean, variance, count, self.eps, comm)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "communicator"}

    def _count_batch(self) -> float:
        """Count this batch if there are running statistics, and return its weight in them."""
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return self.momentum or 0.0


class SynchronisedBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """BatchNorm1d with the statistics of all ranks."""


class SynchronisedBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all ranks."""


class SynchronisedBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """BatchNorm3d with the statistics of all ranks."""


class SynchronisedBatchNorm(_Synchronised, nn.SyncBatchNorm):
    """torch's SyncBatchNorm, over a Communicator in place of a process group."""


_SYNCHRONISED: dict[type[_BatchNorm], type[_Synchronised]] = {
    nn.BatchNorm1d: SynchronisedBatchNorm1d,
    nn.BatchNorm2d: SynchronisedBatchNorm2d,
    nn.BatchNorm3d: SynchronisedBatchNorm3d,
    nn.SyncBatchNorm: SynchronisedBatchNorm,
}


def _global_statistics(x: torch.Tensor, comm: Communicator) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return (values per channel, mean, sum of squared deviations) over all ranks; the tensors are float64 of shape (C,)."""
    channels = x.shape[1]
    count = x.numel() // channels if channels else 0
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if count:
        variance, mean = torch.var_mean(_wide(x), dim=_all_but_channels(x), correction=0)
        mine[0] = count
        mine[1 : channels + 1] = mean
        mine[channels + 1 :] = variance.double() * count
    gathered = mine.new_empty(comm.size * mine.numel())
    comm.all_gather(gathered, mine)
    of_rank = gathered.view(comm.size, -1)
    counts, means, squares = of_rank[:, :1], of_rank[:, 1 : channels + 1], of_rank[:, channels + 1 :]
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    return int(total), mean, (squares + counts * (means - mean) ** 2).sum(0)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        count: int,
        eps: float,
        comm: Communicator,
    ) -> torch.Tensor:
        kind = _wide(x[:0]).dtype
        inverse = (variance + eps).rsqrt().to(kind)
        ctx.save_for_backward(x, weight, mean.to(kind), inverse)
        ctx.count, ctx.comm = count, comm
        wide_weight, wide_bias = (None if t is None else _wide(t) for t in (weight, bias))
        return F.batch_norm(_wide(x), mean.to(kind), variance.to(kind), wide_weight, wide_bias, training=False, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        dims, shape = _all_but_channels(x), (1, -1) + (1,) * (x.dim() - 2)
        dy_wide = _wide(dy)
        xhat = (_wide(x) - mean.view(shape)) * inverse.view(shape)
        sum_dy, sum_dy_xhat = dy_wide.sum(dims), (dy_wide * xhat).sum(dims)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([sum_dy.double(), sum_dy_xhat.double()])
            ctx.comm.all_reduce(sums)
            mean_dy, mean_dy_xhat = (sums / max(ctx.count, 1)).to(dy_wide.dtype).unbind()
            scale = inverse if weight is None else inverse * weight
            dx = ((dy_wide - mean_dy.view(shape) - xhat * mean_dy_xhat.view(shape)) * scale.view(shape)).to(x.dtype)
        dweight = sum_dy_xhat.to(weight.dtype) if weight is not None else None
        dbias = sum_dy.to(weight.dtype) if weight is not None else None
        return dx, dweight, dbias, None, None, None, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in the precision in which it is summed: float32 for half precision, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _all_but_channels(x: torch.Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]
