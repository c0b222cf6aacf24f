"""The oracle: one process of plain PyTorch in float64, and the global batches on which a layout is held to it.

Batches are cut so that the mistakes of data parallelism show: their rows are no multiple of dp, one has fewer rows than there are ranks,
and where targets can be ignored each row has another number of valid ones, down to none. Steps are clipped AdamW, so that a wrong
gradient norm shows too. Nothing of Engine, of its loss rule or of its communication is used to get the numbers; only rows are cut by the
same function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.batch import Batch
from ringfold.runtime.loss import TorchLoss, loss_rule
from ringfold.runtime.rows import row_range, take_rows
from torch import Tensor, nn

__all__ = ["Step", "build", "make_optimizer", "shape_batches", "train_plainly"]

STEPS = 3
LEARNING_RATE = 1e-3
# A gradient that is zero but for rounding (a bias before a normalisation) is about 1e-17. Adam divides it by itself plus this, which
# keeps its part of a weight below 1e-14; with Adam's usual 1e-8 two right runs would differ by 1e-10.
EPSILON = 1e-6


@dataclass
class Step:
    """The numbers of one train step; `grads` are those after clipping, None where a parameter has none, `norm` is before it."""

    rows: int
    loss: float
    norm: float
    grads: dict[str, Tensor | None]
    weights: dict[str, Tensor]
    wrong_losses: dict[str, float] = field(default_factory=dict)  # what well-known mistakes would make of the loss


def build(model_fn: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """Return the model in float64, with every dropout off: its random numbers are no layout's business."""
    model = copy.deepcopy(model_fn) if isinstance(model_fn, nn.Module) else model_fn()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"verify: model_fn returned {type(model).__name__}, expected a torch.nn.Module.")
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            part.dropout = 0.0
    return model.double().train()


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of the oracle and of the ranks."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LEARNING_RATE, eps=EPSILON)


def shape_batches(model: nn.Module, batch: Any, loss: Callable[..., Any], size: int) -> list[Batch]:
    """Cut three global batches in float64 out of one, the second of fewer rows than ranks, but of two if one row is too few for the model.

    Raises: ConfigError if it has too few rows for `size` ranks.
    """
    whole = Batch.of(batch).to(torch.device("cpu"), torch.float64)
    if whole.rows < size + 2:
        raise ConfigError(f"verify: dp{size} needs a batch of {size + 2} rows or more, so that rows can fall unevenly; this one has {whole.rows}.")
    longest = [count for count in range(whole.rows, 0, -1) if size == 1 or count % size]
    few = size - 1 if size > 2 else 1 if _takes(model, _rows(whole, 0, 1)) else 2
    ranges = [(0, longest[0]), (whole.rows - few, whole.rows), (whole.rows - longest[1], whole.rows)]
    return [_with_holes(_rows(whole, start, stop), loss) for start, stop in ranges]


def train_plainly(model: nn.Module, batches: list[Batch], loss: Callable[..., Any], clip_norm: float | None, parts: int) -> tuple[list[Step], float]:
    """Train the model; return the steps and the clip norm: by default half of the first step's norm, so that clipping happens.

    `parts` is the number of pieces, ranks times microbatches, in which the layout sees a batch, for `wrong_losses`.
    """
    optimizer = make_optimizer(list(model.parameters()))
    steps = []
    for batch in batches:
        wrong = _wrong_losses(model, batch, loss, parts)
        optimizer.zero_grad()
        value = _mean(loss, batch.call(model), batch.target)
        value.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([grad.to_dense().double().square().sum() for grad in grads]).sum().sqrt().item()
        clip_norm = clip_norm or norm / 2
        for grad in grads:
            grad.mul_(min(1.0, clip_norm / (norm + 1e-6)))
        optimizer.step()
        steps.append(Step(batch.rows, value.item(), norm, *snapshot(model), wrong))
    assert clip_norm is not None  # narrows the type: there is a first step
    return steps, clip_norm


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Return copies of all gradients and of all weights and buffers, by name, on the CPU."""
    grads = {name: None if p.grad is None else p.grad.detach().to_dense().to("cpu", copy=True) for name, p in model.named_parameters()}
    return grads, {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_repeatable(model: nn.Module, batch: Batch, loss: Callable[..., Any]) -> None:
    """Refuse a model or a loss that gives two different losses on the same batch."""
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            values.append(_mean(loss, batch.call(copy.deepcopy(model)), batch.target).item())
    if values[0] != values[1] and values[0] == values[0]:
        raise ConfigError(
            f"verify: the same batch gave the losses {values[0]:.17g} and {values[1]:.17g}: the model or the loss draws random numbers, which no two "
            "layouts draw alike. Turn that off in model_fn (dropout as a function: its probability)."
        )


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    inputs, target = take_rows((batch.inputs, batch.target), start, stop)
    return Batch(inputs, target, stop - start)


def _with_holes(batch: Batch, loss: Callable[..., Any]) -> Batch:
    """Ignore targets where the loss is known to allow it: none in row 0, all in row 3, and so on."""
    rule = loss_rule(loss)
    target = batch.target
    if not isinstance(rule, TorchLoss) or rule.ignore_index is None or not isinstance(target, Tensor) or target.is_floating_point():
        return batch
    share = (torch.arange(batch.rows, device="cpu") % 4 / 3.0).view(-1, *[1] * (target.dim() - 1))
    drawn = torch.rand(target.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return Batch(batch.inputs, target.masked_fill((drawn < share).to(target.device), rule.ignore_index), batch.rows)


def _mean(loss: Callable[..., Any], output: Any, target: Any) -> Tensor:
    """Return what the user's loss means on all rows at once."""
    if isinstance(loss, nn.GaussianNLLLoss) and isinstance(output, tuple | list):
        value: Any = loss(output[0], target, output[1])
    else:
        value = loss(output, target)
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    means = [part[0] / part[1] if isinstance(part, tuple | list) else part for part in parts]
    return torch.stack([mean.reshape(()) for mean in means]).sum()


@torch.no_grad()
def _takes(model: nn.Module, batch: Batch) -> bool:
    """Tell whether a model can be called with so few rows: BatchNorm refuses a single value per channel."""
    try:
        batch.call(copy.deepcopy(model))
    except Exception:  # whatever a user's model raises
        return False
    return True


@torch.no_grad()
def _wrong_losses(model: nn.Module, batch: Batch, loss: Callable[..., Any], parts: int) -> dict[str, float]:
    pieces = [piece for piece in (_rows(batch, *row_range(batch.rows, i, parts)) for i in range(parts)) if piece.rows]
    if not all(_takes(model, piece) for piece in pieces):
        return {}  # nor could a layout that makes such a mistake
    frozen = copy.deepcopy(model)
    means = [(piece.rows, _mean(loss, piece.call(frozen), piece.target).item()) for piece in pieces]
    return {
        "the mean of each rank's rows, weighted by rows: this loss is a mean over something else (valid targets?). Return a pair (total, count)": sum(
            rows * mean for rows, mean in means
        )
        / batch.rows,
        "the mean of the ranks' own means: each divides by its local count": sum(mean for _, mean in means) / len(means),
    }
