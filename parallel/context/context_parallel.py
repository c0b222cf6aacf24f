"""ContextParallel: every rank of the axis "cp" has a part of each sequence.

All ranks of the axis are given the same rows. While the model runs, what it is given is a `Split` tensor of the whole's shape of which a rank has the
tokens of its part; so positions, masks and shifted labels are those of the whole sequence, in the model's own code. Rules (parallel/split) do the
rest: attention sees all of the sequence (attention.py), sums are finished between ranks, what has no rule is gathered. A parameter's gradient
is the sum of what the ranks have, as over "dp", and is reduced together with that.

    ring        parts in zigzag order, so that under a causal mask all have as much to do
    ulysses     parts in order
"""

from __future__ import annotations

import functools
from typing import Any

from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.context.attention import over_tokens
from ringfold.parallel.context.ring import zigzag
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.tensor import made
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["ContextParallel"]

TOKENS = 1  # the dimension of a sequence, after that of rows


class ContextParallel:
    """Divide sequences over the ranks of `comm` for the attention of `algorithm`, "ring" or "ulysses"."""

    def __init__(self, comm: Communicator, algorithm: str) -> None:
        self.algorithm = algorithm
        self.axis = Axis("cp", comm, functools.partial(over_tokens, algorithm=algorithm), sums_parameters=True)

    def divide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a model with this rank's part of every tensor that has tokens: [rows, tokens, ...].

        The first tensor of two dimensions or more says how many tokens there are.

        Raises:
            ConfigError: there is no such tensor, or there are fewer tokens than parts.
        """
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > TOKENS), None)
        if first is None:
            raise ConfigError(f"cp{self.axis.size}: the model is given no tensor of [rows, tokens, ...], so there is no sequence to divide.")
        length = first.shape[TOKENS]
        cut = self.cut(length)

        def part(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() <= TOKENS or leaf.shape[TOKENS] != length:
                return leaf
            return made(cut.take(leaf), leaf.shape, [cut])

        divided: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(part, (args, kwargs))
        return divided

    def cut(self, length: int) -> Cut:
        """Return how so many tokens are divided."""
        parts = self.axis.size * (2 if self.algorithm == "ring" else 1)
        if length < parts:
            raise ConfigError(
                f"cp{self.axis.size}:{self.algorithm} cuts a sequence into {parts} parts, and this one has {length} tokens. "
                f"Use cp{max(1, length * self.axis.size // parts)}, or longer sequences."
            )
        return zigzag(self.axis, TOKENS, length) if self.algorithm == "ring" else Cut.evenly(self.axis, TOKENS, length)
