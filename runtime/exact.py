"""Exact mode: what makes a train step the same bits at any data-parallel width and ZeRO stage (`exact8` in a layout).

The global batch is cut into a fixed number of shards, whatever dp is. Shard s runs as microbatch s // dp on rank s % dp, with random numbers
of its own (`ShardRandom`). Gradients are folded in one tree (parallel/zero: group.pairs, counter.py), losses and counts are summed exactly
(math.fsum over all shards), and so is the square of the gradient's norm (`squared_norm`), whoever holds which piece of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from ringfold.collectives.errors import ConfigError
from torch import Tensor, nn

__all__ = ["ShardRandom", "require_no_batch_norm", "squared_norm"]

# Levels of rounding in `squared_norm`. Each leaves of every square what is below 2^-(52 - k) of the one above, k being the bits of the number
# of elements: after three, for 2^30 elements, an error of 2^-66 of the largest square each, 2^-36 of the sum at most.
LEVELS = 3
BLOCK_COUNT = 1 << 16  # elements at a time, so that the float64 squares stay in the cache

AllReduce = Callable[[Tensor, str], None]


class ShardRandom:
    """A stream of torch's random numbers for each (step, shard), which depends on neither ranks nor what was drawn before."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self._device = device

    @contextmanager
    def stream(self, step: int, shard: int) -> Iterator[None]:
        """Draw from that stream inside, and go on outside as if nothing had been drawn."""
        digest = hashlib.blake2b(repr((self.seed, step, shard)).encode(), digest_size=8).digest()
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)
            yield


def squared_norm(grads: Sequence[Tensor], count: int, all_reduce: AllReduce) -> float:
    """Return the sum of the squares of all elements of all ranks' tensors: the same bits however they are cut and divided among ranks.

    `count` is the number of elements altogether, the same on every rank; all_reduce(tensor, op) works in place over those ranks. The result
    is within 2^-30 of the true sum; NaN or infinite if a gradient is. Sums of numbers that are first rounded to multiples of one power of
    two are exact, as long as none is too large for that, and then their order does not matter (Demmel and Nguyen, Fast Reproducible
    Floating-Point Summation, 2013).
    """
    largest = torch.tensor([_largest(grads)], dtype=torch.float64, device="cpu")
    largest.masked_fill_(largest.isnan(), math.inf)
    all_reduce(largest, "max")
    top = float(largest * largest)
    if not math.isfinite(top) or top == 0.0:
        return top
    bits = math.ceil(math.log2(count)) + 1
    exponents = [math.frexp(top)[1] + bits - level * (52 - bits) for level in range(LEVELS)]
    anchors = [math.ldexp(1.5, exponent) for exponent in exponents]
    if min(exponents) < -1000:  # squares that small are rounded to zero, and so would the anchors be
        anchors = [anchor for anchor, exponent in zip(anchors, exponents, strict=True) if exponent >= -1000]
    sums = torch.zeros(LEVELS, dtype=torch.float64, device="cpu")
    for grad in grads:
        for block in grad.detach().reshape(-1).split(BLOCK_COUNT):
            rest = block.to(torch.float64).square_() if block.dtype is not torch.float64 else block.square()
            for level, anchor in enumerate(anchors):
                high = (rest + anchor) - anchor
                sums[level] += high.sum().cpu()
                rest = rest - high
    all_reduce(sums, "sum")
    return math.fsum(sums.tolist())


def _largest(grads: Sequence[Tensor]) -> float:
    found = [float(grad.abs().max()) for grad in grads if grad.numel()]
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def require_no_batch_norm(module: nn.Module) -> None:
    """Refuse a model whose output for a row depends on the other rows of its microbatch, and thereby on how many ranks there are.

    Raises:
        ConfigError: naming the modules.
    """
    found = [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats]
    if found:
        raise ConfigError(
            f"exact mode: {', '.join(found)} keep running statistics of the batch, which depend on how it is divided among ranks. "
            "Use another normalisation (LayerNorm, GroupNorm), or leave exactN out."
        )
