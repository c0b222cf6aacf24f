"""Counts and totals of one train step, over microbatches and ranks: the denominators of the loss rule.

    begin(count)       starts the all-reduce of the count known ahead; it travels during the first forward
    add(terms)         notes a microbatch's totals and counts after its forward
    reduce()           starts the all-reduce of the totals (and of counts that only the loss knew) after the last forward
    weights()          what each term's backward is multiplied by
    finish()           the global mean, and the factor that the gradients still lack

Three policies, cheapest first. AHEAD: every count is known from the batch alone; backward is divided by it, exactly. AFTER: one term
whose count only the loss knows; backward is divided by a power of two near the last step's count (in the first step that of the first microbatches,
else the sum of a loss would overflow in fp16), and the gradients get the exact rest once, together with clipping (no pass at all where the count is
that power of two). BETWEEN: several such terms have different
denominators, which no factor can mend afterwards; all forwards run before the first backward, at the price of every microbatch's
activations.

`global_mean` is the same rule for a user's own loop over `DataParallel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.work import Work
from ringfold.runtime.loss import LossRule, Signature, Term
from torch import Tensor

__all__ = ["GlobalMean", "Policy", "global_mean"]


class Policy(Enum):
    """When the denominators of a step are known."""

    AHEAD = "before the first forward ends"
    BETWEEN = "after every forward, before the first backward"
    AFTER = "after the last backward"


class GlobalMean:
    """The mean loss over the global batch of one train step at a time. Every method is called by every rank, in the same order.

    exact: sums over microbatches and ranks are rounded once, so that they do not depend on who ran what.
    """

    def __init__(self, rule: LossRule, comm: Communicator, exact: bool = False) -> None:
        self._rule = rule
        self._comm = comm
        self._signature = rule.signature
        self._guess = 1.0  # a power of two, the same on all ranks, so that dividing by it loses nothing
        self._ahead = comm.empty(1, dtype=torch.float64).zero_()
        self._sums = torch.empty(0, dtype=torch.float64, device="cpu")
        self._ahead_work: Work | None = None
        self._sums_work: Work | None = None
        self._policy = Policy.AHEAD
        self._single = True
        self._step = 0
        self._exact = exact
        self._terms: list[list[float]] = []  # in exact mode, totals and counts of each microbatch
        if self._signature is not None:
            self._sums = self._allocate(self._signature)

    @property
    def agreed(self) -> bool:
        """Whether all ranks know the terms of the loss."""
        return self._signature is not None

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def count(self) -> float:
        """The global count of the last step's first term (valid tokens, rows)."""
        signature = self._signature or ()
        return float(self._sums[len(signature)]) if signature and signature[0][1] else float(self._ahead)

    def begin(self, step: int, counts: Sequence[float], *, single: bool) -> None:
        """Start a step with the counts of this rank's microbatches; `single`: every rank runs one microbatch."""
        self._settle()  # of a step that raised
        self._step = step
        self._single = single
        self._ahead.fill_(math.fsum(counts))
        self._sums.zero_()
        self._terms.clear()
        if self._signature is not None:
            self._choose()
        if not self._signature or not all(counted for _, counted in self._signature):
            if self._exact:
                self._ahead.fill_(math.fsum(count for theirs in self._comm.all_gather_object(list(counts)) for count in theirs))
            else:
                self._ahead_work = self._comm.all_reduce(self._ahead, async_op=True)

    def agree(self, terms: Mapping[str, Term] | None) -> None:
        """Tell all ranks what the terms of the loss are called; a rank that has not called its loss yet passes None.

        Raises: ConfigError on every rank if their losses returned different terms, or if no rank has a row.
        """
        mine = None if terms is None else (signature_of(terms), next(iter(terms.values())).count)
        told = [theirs for theirs in self._comm.all_gather_object(mine) if theirs is not None]
        found = {signature for signature, _ in told}
        if len(found) > 1:
            raise ConfigError(f"loss: ranks returned different terms: {' / '.join(sorted(map(describe, found)))}. They must be the same everywhere.")
        if not found:
            raise ConfigError(f"train step {self._step}: no rank has a row, so there is no loss. Skip empty global batches.")
        self._signature = found.pop()
        if not self._exact:  # which microbatches are the first depends on the number of ranks
            self._guess = power_of_two_near(sum(count or 0.0 for _, count in told))
        self._sums = self._allocate(self._signature)
        self._choose()

    def add(self, terms: Mapping[str, Term]) -> None:
        """Note the totals and counts of one microbatch."""
        signature = signature_of(terms)
        if signature != self._signature:
            raise ConfigError(
                f"loss: rank {self._comm.rank} returned {describe(signature)} in train step {self._step}, "
                f"where it was {describe(self._signature or ())} in the first. The terms must stay the same."
            )
        if self._exact:
            self._terms.append([float(term.total.detach()) for term in terms.values()] + [term.count or 0.0 for term in terms.values()])
            return
        for i, term in enumerate(terms.values()):
            self._sums[i] += float(term.total.detach())
            if term.count:
                self._sums[len(terms) + i] += term.count

    def reduce(self) -> None:
        """Start the sum over ranks; after every rank's last forward and before any gradient is reduced."""
        if self._exact:
            columns = zip(*(row for theirs in self._comm.all_gather_object(self._terms) for row in theirs), strict=True)
            for i, column in enumerate(columns):
                self._sums[i] = math.fsum(column)
        else:
            self._sums_work = self._comm.all_reduce(self._sums, async_op=True)

    def weights(self) -> list[float]:
        """Return what the backward of each term is multiplied by; under BETWEEN after `reduce`.

        Raises: ConfigError on every rank if the global batch is known to hold no valid target.
        """
        if self._policy is Policy.AFTER:
            return [1.0 / self._guess]
        self._settle(totals=self._policy is Policy.BETWEEN)
        return [1.0 / c if c > 0 else 0.0 for c in self._denominators()]

    def finish(self) -> tuple[float, float]:
        """Return the global mean loss, and the factor that turns the summed gradients into its gradient.

        Raises: ConfigError on every rank if the global batch holds no valid target.
        """
        self._settle()
        denominators = self._denominators()
        loss = sum(float(total) / c for total, c in zip(self._sums, denominators, strict=False) if c > 0)
        if self._policy is not Policy.AFTER:
            return loss, 1.0
        factor = self._guess / denominators[0]
        self._guess = power_of_two_near(denominators[0])
        return loss, factor

    def _choose(self) -> None:
        signature = self._signature or ()
        if not any(counted for _, counted in signature):
            self._policy = Policy.AHEAD
        elif len(signature) == 1 and not (self._single and self._comm.size == 1):
            self._policy = Policy.AFTER
        else:
            self._policy = Policy.BETWEEN

    def _denominators(self) -> list[float]:
        signature = self._signature or ()
        ahead = self._rule.denominator(float(self._ahead))
        found = [float(self._sums[len(signature) + i]) if counted else ahead for i, (_, counted) in enumerate(signature)]
        if not any(c > 0 for c in found):
            raise ConfigError(
                f"train step {self._step}: the global batch holds no valid target (no rows, or all of them ignored), "
                "so its mean loss is 0 / 0. Skip such batches."
            )
        return found

    def _settle(self, totals: bool = True) -> None:
        """Wait for what is in flight; without `totals` for the count known ahead only, while the totals go on travelling."""
        if self._ahead_work is not None:
            work, self._ahead_work = self._ahead_work, None
            work.wait()
        if totals and self._sums_work is not None:
            work, self._sums_work = self._sums_work, None
            work.wait()

    def _allocate(self, signature: Signature) -> Tensor:
        return self._comm.empty(2 * len(signature), dtype=torch.float64).zero_()


def global_mean(total: Tensor, count: float | Tensor, comm: Communicator | None = None) -> Tensor:
    """Return the mean sum(total) / sum(count) over the ranks of `comm`, the current mesh's "dp" by default.

    For a loop over `DataParallel`, which averages gradients over ranks: every rank gets the same value, and backward on every rank,
    averaged, is the gradient of that value. A rank without rows passes a total of zero that depends on the model's output, and the count
    0.

    Raises: ConfigError if the counts add up to zero.
    """
    if comm is None:
        from ringfold.runtime.context import current_mesh

        comm = current_mesh()["dp"]
    sums = torch.tensor([float(total.detach()), float(count)], dtype=torch.float64, device="cpu")
    comm.all_reduce(sums)
    if not sums[1] > 0:
        raise ConfigError(f"global_mean: the counts of all {comm.size} ranks add up to {float(sums[1])}. Skip batches without a valid target.")
    mean = (sums[0] / sums[1]).to(total)
    return mean + (total - total.detach()) * (comm.size / float(sums[1]))


def power_of_two_near(count: float) -> float:
    return 2.0 ** round(math.log2(count)) if count > 0 else 1.0


def signature_of(terms: Mapping[str, Term]) -> Signature:
    return tuple((name, term.count is not None) for name, term in terms.items())


def describe(signature: Signature) -> str:
    return "{" + ", ".join(f"{name}: {'pair' if counted else 'scalar'}" for name, counted in signature) + "}"
