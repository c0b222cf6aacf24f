"""Passes: forward and backward of the microbatches of a train step, and the sum of their gradients over ranks.

forward      each microbatch gives totals and counts (loss.py); the global count travels meanwhile (global_mean.py)
backward     of total / global count; buckets are summed over dp as soon as they are full: during the last microbatch, or in each
             where there is no room in which whole gradients could accumulate
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.mixed_precision.casting import to_dtype
from ringfold.parallel.reducer import GradientReducer
from ringfold.parallel.zero.gradients import ShardedGradients
from ringfold.runtime.batch import Batch, tensors_in
from ringfold.runtime.exact import ShardRandom
from ringfold.runtime.global_mean import GlobalMean, Policy
from ringfold.runtime.loss import LossRule, Term
from torch import nn

__all__ = ["Passes"]


class Passes:
    """Run `module` on the `micro` microbatches of a step and reduce; collective.

    always_calls: a rank without rows calls the module as well, as there are collectives in it. random: streams of random numbers for exact mode,
    in which `reducer` gives gradients once for all microbatches. before_final: called before a backward of which each sum is at once the step's
    gradient, without a factor. widens: what the module gives goes to the loss in float32.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        rule: LossRule,
        reducer: GradientReducer[Any],
        *,
        micro: int,
        always_calls: bool,
        random: ShardRandom | None,
        before_final: Callable[[], None],
        widens: bool,
    ) -> None:
        self._module = module
        self._comm = comm
        self._rule = rule
        self._reducer = reducer
        self._micro = micro
        self._always_calls = always_calls
        self._random = random
        self._before_final = before_final
        self._widens = widens
        self.mean = GlobalMean(rule, comm, exact=random is not None)

    def microbatches(self, batch: Batch) -> list[Batch]:
        """Return the microbatches that this rank runs."""
        parts = batch.microbatches(self._micro)
        return parts if self._always_calls or self._random is not None else [part for part in parts if part.rows]

    def run(self, step: int, parts: list[Batch], scale: float) -> tuple[float, float]:
        """Run every microbatch of a step, with a loss times `scale`, and reduce; return the loss and the factor that the gradients still lack.

        Raises: ConfigError: as `Engine.train_step`.
        """
        mean = self.mean
        mean.begin(step + 1, [self._rule.count_ahead(part.target, part.rows) for part in parts], single=self._micro == 1)
        every = self._reducer.reduces_every_backward
        if isinstance(self._reducer, ShardedGradients) and self._random is not None:
            self._reducer.begin_step()
        elif not every:
            self._reducer.begin()
        waiting: list[tuple[Term, ...]] = []
        for i, part in enumerate(parts):
            terms = self._terms(step, i, part)
            is_last = i == len(parts) - 1
            if is_last:
                mean.reduce()
            if mean.policy is Policy.BETWEEN:
                waiting.append(terms)
                continue
            with self._one_backward(is_last):
                _backward(terms, mean.weights(), scale, step)
        if not parts:
            if not mean.agreed:
                mean.agree(None)
            mean.reduce()
        if waiting or not parts:
            weights = mean.weights()
        for i, terms in enumerate(waiting):
            with self._one_backward(i == len(waiting) - 1):
                _backward(terms, weights, scale, step)
        if every:
            for _ in range(self._micro - len(parts)):
                with self._reducer.no_sync():  # the others' backwards
                    pass
            if isinstance(self._reducer, ShardedGradients) and self._random is not None:
                self._reducer.combine()
        else:
            self._reducer.finish()
        return mean.finish()

    def output(self, part: Batch) -> Any:
        """Call the module; what it computed in 16 bits goes to the loss in 32."""
        output = part.call(self._module)
        return to_dtype(output, torch.float32) if self._widens else output

    def loss(self, part: Batch) -> Any:
        """Call module and loss, as a step does, and nothing else."""
        output = self.output(part)
        return self._rule(output, part.target, part.rows) if part.rows else output

    def _one_backward(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if self._micro == 1 and self._random is None and self.mean.policy is not Policy.AFTER:
            self._before_final()
        every = self._reducer.reduces_every_backward
        return self._reducer.no_sync() if every or not is_last else contextlib.nullcontext()

    def _terms(self, step: int, index: int, part: Batch) -> tuple[Term, ...]:
        """Call module and loss; without rows the loss is not called, and the output only reaches backward as zero."""
        if self._random is None:
            return self._called(part)
        with self._random.stream(step, index * self._comm.size + self._comm.rank):
            return self._called(part)

    def _called(self, part: Batch) -> tuple[Term, ...]:
        if not part.rows and not self._always_calls:
            if not self.mean.agreed:
                self.mean.agree(None)
            return ()
        output = self.output(part)
        terms = self._rule(output, part.target, part.rows) if part.rows else None
        if not self.mean.agreed:
            self.mean.agree(terms)
        if terms is None:
            return (Term(torch.stack([t.sum() for t in tensors_in(output) if t.requires_grad]).sum() * 0.0),)
        self.mean.add(terms)
        return tuple(terms.values())


def _backward(terms: tuple[Term, ...], weights: list[float], scale: float, step: int) -> None:
    roots = [(term.total, weight) for term, weight in zip(terms, weights, strict=False) if term.total.requires_grad and weight]
    if terms and not any(term.total.requires_grad for term in terms):
        raise ConfigError(f"train step {step + 1}: the loss does not depend on any trainable parameter. Is it detached, or all frozen?")
    if roots:
        torch.autograd.backward([total for total, _ in roots], [total.new_tensor(weight * scale) for total, weight in roots])
