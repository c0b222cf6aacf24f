"""Cross-entropy of logits whose classes are divided: no rank ever has all of a row.

log sum exp x - x[target], each a sum over ranks; the largest logit comes first, so that nothing overflows
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from ringfold.parallel.split import exchange
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.rules.agreement import agree
from ringfold.parallel.split.tensor import NO_RULE, cuts_of, made, rule
from torch import Tensor

__all__: list[str] = []

CLASSES = "classes"


@rule(F.cross_entropy)
def _cross_entropy(
    func: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if size_average is not None or reduce is not None or target.is_floating_point() or cuts_of(weight) or input.dim() == 0:
        return NO_RULE
    at = 1 if input.dim() > 1 else 0
    labels = [dim if dim != at else CLASSES for dim in range(input.dim())]
    places = [label for label in labels if label != CLASSES]
    found = agree([target, input], [places, labels], "cross_entropy")
    here, logits = found.locals
    by_class = found.divided.get(CLASSES)
    if by_class is not None and (by_class.outer != 1 or any(len(runs) != 1 for runs in by_class.runs)):
        return NO_RULE
    if weight is not None and (weight.requires_grad or found.terms):
        return NO_RULE
    if by_class is None:
        losses = func(logits, here, weight, None, ignore_index, None, "none", label_smoothing)
    else:
        losses = _over_ranks(logits, here, at, by_class, weight, ignore_index, label_smoothing)
    each = made(losses, target.shape, found.cuts(places), found.terms)
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    valid = here != ignore_index
    counts = valid.to(losses.dtype) if weight is None else weight[here.masked_fill(~valid, 0)] * valid
    return each.sum() / made(counts, target.shape, found.cuts(places)).sum()


def _over_ranks(logits: Tensor, target: Tensor, at: int, cut: Cut, weight: Tensor | None, ignore: int, smoothing: float) -> Tensor:
    """Return the loss of each target."""
    axis, (start, stop) = cut.axis, cut.runs[cut.axis.rank][0]
    valid = target != ignore
    ids = target.masked_fill(~valid, 0)
    mine = (ids >= start) & (ids < stop)
    highest = exchange.highest(logits.amax(at) if stop > start else logits.new_full(target.shape, float("-inf")), axis)
    shifted = logits - highest.unsqueeze(at)
    normaliser = exchange.total(shifted.exp().sum(at), axis).log()
    own = (ids - start).clamp(0, max(0, stop - start - 1)).unsqueeze(at)
    chosen = exchange.total(shifted.gather(at, own).squeeze(at).masked_fill(~mine, 0.0), axis)
    of_class = 1.0 if weight is None else weight[ids]
    losses: Tensor = (normaliser - chosen) * of_class
    if smoothing:
        shape = [-1 if dim == at else 1 for dim in range(logits.dim())]
        weights = None if weight is None else weight[start:stop]
        total = cut.length if weight is None else weight.sum()
        spread = normaliser * total - exchange.total((shifted if weights is None else shifted * weights.view(shape)).sum(at), axis)
        losses = (1.0 - smoothing) * losses + smoothing / cut.length * spread
    return losses.masked_fill(~valid, 0.0)
