"""Evaluation: exact global means of the loss and of metrics over any number of batches.

Totals and counts are added up on each rank and exchanged once at the end, so that ranks with fewer batches, rows or valid targets weigh
what they hold. Nothing is communicated before, and no gradient is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.batch import Batch
from ringfold.runtime.loss import LossRule, name_of
from torch import Tensor, nn

__all__ = ["Metric", "evaluate"]

# (output, target) -> (total, count), or a number or 0-dim tensor that is a mean over rows.
Metric = Callable[[Any, Any], Any]


@torch.no_grad()
def evaluate(
    call: Callable[[Batch], Any],
    module: nn.Module,
    batches: Iterable[Batch],
    rule: LossRule,
    metrics: Mapping[str, Metric],
    comm: Communicator,
    *,
    always_calls: bool = False,
) -> dict[str, float]:
    """Return "loss", each term of it by name if it has several, and each metric; the same on every rank.

    call(batch) gives the output of the model, which is `module`. always_calls: the model is collective, so it is called without rows, too.

    Raises: ConfigError on every rank if all batches together have no valid target.
    """
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    with evaluating(module):
        for batch in batches:
            if not batch.rows:
                if always_calls:
                    call(batch)
                continue
            output = call(batch)
            ahead = rule.count_ahead(batch.target, batch.rows)
            for name, term in rule(output, batch.target, batch.rows).items():
                _add(sums["term", name], float(term.total), ahead if term.count is None else term.count)
            for name, metric in metrics.items():
                _add(sums["metric", name], *_pair(metric(output, batch.target), batch.rows, name, metric))
    for theirs in (gathered := comm.all_gather_object(dict(sums))):
        for key in theirs:
            sums[key] = [0.0, 0.0]
    for theirs in gathered:
        for key, (total, count) in theirs.items():
            _add(sums[key], total, count)
    return _means(sums, rule)


def gather_rows(rows: Tensor, comm: Communicator) -> Tensor:
    """Return the rows of all ranks in rank order; a 0-dim tensor is one row.

    Raises: ConfigError on every rank if their rows have different shapes or dtypes.
    """
    rows = rows.detach().reshape(1) if rows.dim() == 0 else rows.detach()
    kinds = comm.all_gather_object((tuple(rows.shape), str(rows.dtype)))
    filled = {(shape[1:], dtype) for shape, dtype in kinds if shape[0]}
    if len(filled) > 1:
        raise ConfigError(f"gather_metric: ranks have rows of different kinds: {', '.join(map(str, kinds))}.")
    tail = next(iter(filled))[0] if filled else rows.shape[1:]
    width = torch.Size(tail).numel()
    dtype = torch.uint8 if rows.dtype == torch.bool else rows.dtype
    gathered = torch.empty(sum(shape[0] for shape, _ in kinds) * width, dtype=dtype, device="cpu")
    comm.all_gather(gathered, rows.to("cpu", dtype).reshape(-1), counts=[shape[0] * width for shape, _ in kinds])
    return gathered.view(-1, *tail).to(rows.device, rows.dtype)


def _means(sums: Mapping[tuple[str, str], list[float]], rule: LossRule) -> dict[str, float]:
    terms = {name: (total, rule.denominator(count)) for (kind, name), (total, count) in sums.items() if kind == "term"}
    if not any(count > 0 for _, count in terms.values()):
        raise ConfigError("eval_step: no rank has a valid target (no rows, or all of them ignored), so there is no mean to return.")
    means = {name: total / count if count > 0 else 0.0 for name, (total, count) in terms.items()}
    found = {"loss": sum(means.values()), **(means if len(means) > 1 else {})}
    for (kind, name), (total, count) in sums.items():
        if kind == "metric":
            found[name] = total / count if count > 0 else float("nan")
    return found


def _add(sums: list[float], total: float, count: float) -> None:
    sums[0] += total
    sums[1] += count


def _pair(value: Any, rows: int, name: str, metric: Metric) -> tuple[float, float]:
    try:
        if isinstance(value, tuple | list):
            total, count = value
            return float(total), float(count)
        return float(value) * rows, float(rows)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"metric {name!r}: {name_of(metric)} must return a pair (total, count) or a mean over rows.") from None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and give every part of it its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
