"""The loss rule: every layout has the gradient of sum(total) / sum(count) over the global batch.

A user's `loss(output, target)` returns a pair `(total, count)`, a scalar (weighted by its rows), or a mapping of named pairs or scalars,
whose means are summed. torch's own mean losses, as functions, `functools.partial`s or modules, are taken apart here: their total is the
same loss with `reduction="sum"`, and their count (elements, rows, valid targets, or the class weights of the valid targets) follows from
the targets alone, so that the global count is known before the first backward and the division is exact.

Not here: how counts travel between ranks and microbatches (`global_mean.py`), and what is done with the gradients (`engine.py`).
A rule is never called without rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from ringfold.collectives.errors import ConfigError
from torch import Tensor, nn

__all__ = ["LossRule", "Signature", "Term", "loss_rule"]

# The terms of a loss in order: each name, and whether the term brings its own count (else the count known ahead is its own).
Signature = tuple[tuple[str, bool], ...]
ONE_TERM: Signature = (("loss", False),)

MODULES: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    nn.NLLLoss: (F.nll_loss, ("weight", "ignore_index")),
    nn.MSELoss: (F.mse_loss, ()),
    nn.L1Loss: (F.l1_loss, ()),
    nn.SmoothL1Loss: (F.smooth_l1_loss, ("beta",)),
    nn.HuberLoss: (F.huber_loss, ("delta",)),
    nn.BCELoss: (F.binary_cross_entropy, ("weight",)),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    nn.KLDivLoss: (F.kl_div, ("log_target",)),
    nn.GaussianNLLLoss: (F.gaussian_nll_loss, ("full", "eps")),
    nn.PoissonNLLLoss: (F.poisson_nll_loss, ("log_input", "full", "eps")),
    nn.SoftMarginLoss: (F.soft_margin_loss, ()),
    nn.HingeEmbeddingLoss: (F.hinge_embedding_loss, ("margin",)),
    nn.MultiLabelSoftMarginLoss: (F.multilabel_soft_margin_loss, ("weight",)),
    nn.MultiLabelMarginLoss: (F.multilabel_margin_loss, ()),
    nn.MultiMarginLoss: (F.multi_margin_loss, ("p", "margin", "weight")),
}
FUNCTIONS = frozenset(function for function, _ in MODULES.values())
OF_CLASSES = frozenset({F.cross_entropy, F.nll_loss})
OF_ROWS = frozenset({F.multilabel_soft_margin_loss, F.multilabel_margin_loss, F.multi_margin_loss})
# Their `weight` has one entry for each element of the batch, and a mean over the weights (mse, l1): no rank holds the rows it belongs to.
WEIGHT_OF_ELEMENTS = frozenset({F.mse_loss, F.l1_loss, F.huber_loss})
PAIR_ADVICE = "Return a pair (total, count) from a function of your own instead."


@dataclass(frozen=True)
class Term:
    """One summand of a loss over some rows: a differentiable 0-dim total, and its count (None: the count known ahead)."""

    total: Tensor
    count: float | None = None


class LossRule(Protocol):
    """What Engine asks of a loss."""

    signature: Signature | None  # None: known after the first call

    def count_ahead(self, target: Any, rows: int) -> float:
        """Return the count of these targets as far as it is known without an output."""

    def denominator(self, count: float) -> float:
        """Return what the global total is divided by, given the global count known ahead."""

    def __call__(self, output: Any, target: Any, rows: int) -> dict[str, Term]:
        """Return the terms of one microbatch of `rows` > 0 rows."""


def loss_rule(loss: Callable[..., Any]) -> LossRule:
    """Return the rule of a loss: torch's own are taken apart, anything else is called as it is.

    Raises: ConfigError where the reduction leaves nothing to divide, or where the loss cannot be cut by rows.
    """
    function, options = loss, {}
    if isinstance(loss, functools.partial) and loss.func in FUNCTIONS:
        if loss.args:
            raise ConfigError(f"loss: partial({name_of(loss.func)}) binds its first argument, which is the output. Bind keywords only.")
        function, options = loss.func, dict(loss.keywords)
    for kind, (functional, attributes) in MODULES.items():
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            return TorchLoss(functional, functools.partial(_attributes, loss, (*attributes, "reduction")), name_of(loss))
    if function in FUNCTIONS:
        return TorchLoss(function, lambda: options, name_of(function))
    return UserLoss(loss)


class TorchLoss:
    """One of torch's own losses: its total is that of reduction="sum", its count that of reduction="mean"."""

    def __init__(self, function: Callable[..., Tensor], options: Callable[[], dict[str, Any]], name: str) -> None:
        self.signature: Signature | None = ONE_TERM
        self._function = function
        self._options = options  # read at every call: class weights may be changed during training
        self._name = name
        given = options()
        if given.get("size_average") is not None or given.get("reduce") is not None:
            raise ConfigError(f"loss: {name} with size_average or reduce, which torch replaced by reduction. Use reduction='mean'.")
        self._reduction = given.get("reduction", "mean")
        allowed = ("mean", "sum", "batchmean") if function is F.kl_div else ("mean", "sum")
        if self._reduction not in allowed:
            raise ConfigError(
                f"loss: {name} with reduction={self._reduction!r} returns no scalar whose global mean is known. "
                f"Use one of {', '.join(allowed)}. {PAIR_ADVICE}"
            )
        if function in WEIGHT_OF_ELEMENTS and given.get("weight") is not None:
            raise ConfigError(f"loss: {name} with a weight for each element of the batch: a rank holds some of the rows only. {PAIR_ADVICE}")

    @property
    def ignore_index(self) -> int | None:
        """The target that does not count, where targets are classes."""
        return self._options().get("ignore_index", -100) if self._function in OF_CLASSES else None

    def count_ahead(self, target: Any, rows: int) -> float:
        if self._reduction == "sum" or rows == 0:
            return 0.0
        if not isinstance(target, Tensor):
            raise ConfigError(f"loss: {self._name} needs a tensor as target, got {type(target).__name__}. {PAIR_ADVICE}")
        if self._reduction == "batchmean" or self._function in OF_ROWS:
            return float(rows)
        if self._function in OF_CLASSES:
            return self._class_count(target)
        return float(target.numel())

    def denominator(self, count: float) -> float:
        return 1.0 if self._reduction == "sum" else count

    def __call__(self, output: Any, target: Any, rows: int) -> dict[str, Term]:  # noqa: ARG002  the rule of every loss
        options = {name: self._fitting(name, value, output, target) for name, value in self._options().items()}
        options["reduction"] = "sum"
        if self._function is F.gaussian_nll_loss and "var" not in options:
            if not (isinstance(output, tuple | list) and len(output) == 2):
                raise ConfigError(f"loss: {self._name} needs the model to return (mean, variance), got {type(output).__name__}.")
            output, options["var"] = output
        if self._function not in OF_CLASSES | OF_ROWS and isinstance(output, Tensor) and output.shape != target.shape:
            raise ConfigError(
                f"loss: {self._name} got an output of shape {tuple(output.shape)} and a target of shape {tuple(target.shape)}. "
                "torch would broadcast them and average over pairs that are not in the batch. Give both the same shape."
            )
        return {"loss": Term(self._function(output, target, **options))}

    def _class_count(self, target: Tensor) -> float:
        """Return the denominator of the mean over class targets; the target's dim 1 holds classes if it is made of probabilities."""
        if target.is_floating_point():
            if target.dim() < 2:
                raise ConfigError(f"loss: {self._name} got class probabilities of shape {tuple(target.shape)}, without a dim of rows.")
            return target.numel() / max(1, target.shape[1])
        options = self._options()
        valid = target != int(options.get("ignore_index", -100))
        weight = options.get("weight")
        if weight is None:
            return float(valid.sum())
        return float(weight.to(target.device, torch.float64)[target[valid].long()].sum())

    def _fitting(self, name: str, value: Any, output: Any, target: Any) -> Any:
        """Return an option with the output's dtype and device; refuse a weight that has one entry for each row."""
        if not isinstance(value, Tensor):
            return value
        elementwise = self._function not in OF_CLASSES | OF_ROWS
        if elementwise and value.dim() and value.dim() == target.dim() and value.shape[0] != 1:
            raise ConfigError(
                f"loss: {self._name} with {name} of shape {tuple(value.shape)}, one entry for each row of the batch: "
                f"a rank holds some of the rows only. {PAIR_ADVICE}"
            )
        return value.to(output) if isinstance(output, Tensor) else value


class UserLoss:
    """A loss of the user's own: pairs say what they count, scalars are means over rows."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        self.signature: Signature | None = None
        self._loss = loss
        self._name = name_of(loss)
        if not callable(loss):
            raise ConfigError(f"loss: expected a function (output, target), got {type(loss).__name__}.")
        if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
            raise ConfigError(f"loss: {self._name} has trainable parameters, which nothing would train. Make them part of the model.")

    def count_ahead(self, target: Any, rows: int) -> float:  # noqa: ARG002  the rule of every loss
        return float(rows)

    def denominator(self, count: float) -> float:
        return count

    def __call__(self, output: Any, target: Any, rows: int) -> dict[str, Term]:
        value = self._loss(output, target)
        if isinstance(value, Mapping):
            if not value:
                raise ConfigError(f"loss: {self._name} returned an empty mapping. Return named pairs (total, count).")
            return {str(name): self._term(part, rows, f" for {name!r}") for name, part in value.items()}
        return {"loss": self._term(value, rows, "")}

    def _term(self, value: Any, rows: int, where: str) -> Term:
        if isinstance(value, tuple | list):
            if len(value) != 2:
                raise ConfigError(f"loss: {self._name} returned {len(value)} values{where}. Return a pair (total, count).")
            total, count = value[0], float(value[1])
            if not (math.isfinite(count) and count >= 0):
                raise ConfigError(f"loss: {self._name} returned the count {count}{where}. A count is a number of valid targets, 0 or more.")
            return Term(self._scalar(total, where), count)
        return Term(self._scalar(value, where) * rows)

    def _scalar(self, value: Any, where: str) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1:
            seen = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"loss: {self._name} returned {seen}{where}. Return a scalar tensor, or a pair (total, count) with a scalar total.")
        return value.reshape(())


def _attributes(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def name_of(function: Any) -> str:
    """Return the name by which the user knows a function, a partial or a module."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__qualname__", None) or type(function).__qualname__
