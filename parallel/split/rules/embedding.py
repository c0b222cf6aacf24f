"""Lookup in a table, also in one whose rows are divided: each rank looks up what it has, and the results are added."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from ringfold.parallel.split import exchange
from ringfold.parallel.split.rules.agreement import agree
from ringfold.parallel.split.tensor import NO_RULE, cuts_of, made, rule
from torch import Tensor

__all__: list[str] = []

ROWS, WIDTH = "rows", "width"


@rule(F.embedding)
def _embedding(
    func: Any, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *args: Any, **kwargs: Any
) -> Any:
    counts_or_sparse = any(value is True for value in (*args, *kwargs.values()))  # both are of whole rows
    if max_norm is not None or counts_or_sparse:
        return NO_RULE
    by_row = next((cut for cut in cuts_of(weight) if cut.dim == 0), None)
    if by_row is not None and (by_row.outer != 1 or any(len(runs) != 1 for runs in by_row.runs)):
        return NO_RULE
    labels = list(range(input.dim()))
    shape = (*input.shape, weight.shape[1])
    found = agree([input, weight], [labels, [ROWS, WIDTH]], "embedding")
    ids, table = found.locals
    if ROWS not in found.divided:
        return made(func(ids, table, padding_idx), shape, found.cuts([*labels, WIDTH]), found.terms)
    (start, stop), length = found.divided[ROWS].runs[found.divided[ROWS].axis.rank][0], weight.shape[0]
    _require_in(ids, length)
    mine = (ids >= start) & (ids < stop)
    here = None if padding_idx is None or not start <= padding_idx % length < stop else padding_idx % length - start
    values = func((ids - start).clamp(0, max(0, stop - start - 1)), table, here).masked_fill(~mine.unsqueeze(-1), 0.0)
    return made(exchange.total(values, found.divided[ROWS].axis), shape, found.cuts([*labels, WIDTH]), found.terms)


def _require_in(ids: Tensor, length: int) -> None:
    if ids.numel() and not ids.is_cuda and (int(ids.min()) < 0 or int(ids.max()) >= length):  # a GPU would have to be waited for
        raise IndexError("index out of range in self")
