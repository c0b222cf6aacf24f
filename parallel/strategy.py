"""What composes with what: everything, but for the pairs listed here, each with its reason; and the order in which strategies are applied.

    built whole -> divided over tp -> cast -> cut into shards over dp x cp -> run: recomputed blocks of split tensors

Parameters are divided before anything looks at their shapes, so ZeRO, optimizers, precision and the reduction of gradients see this rank's parts as
they would see a smaller model. Sequences are divided when the model is called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

__all__ = ["REFUSED", "Refusal", "refusals"]


@dataclass(frozen=True)
class Refusal:
    """Two features of a layout that do not go together yet."""

    one: str
    other: str
    reason: str


REFUSED = (
    Refusal("tp", "exact", "the sums inside a layer are folded in another order at another width, so no bits could be promised"),
    Refusal("cp", "exact", "the sums over a sequence are folded in another order at another width, so no bits could be promised"),
    Refusal("tp", "fp8", "the product in 8 bits does not know of parts of a weight yet. Use bf16"),
    Refusal("cp", "fp8", "the product in 8 bits does not know of parts of a sequence yet. Use bf16"),
)


def refusals(features: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each pair among the features of a layout that is refused."""
    for refusal in REFUSED:
        if refusal.one in features and refusal.other in features:
            yield f"{refusal.one} does not go with {refusal.other}: {refusal.reason}."
