"""Random numbers: the same on all ranks for what all have, others on each for its part.

Ranks of an axis draw from generators in the same state. What is divided is drawn from a state that a number of the common generator and the rank's
place give: so whoever restores the common state, as recomputation does, has the same numbers again, and that state is the same everywhere after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.rules.pointwise import functions
from ringfold.parallel.split.tensor import NO_RULE, Split, local_of, made, rule
from torch import Tensor

__all__ = ["draw_alike", "drawn_apart"]


def draw_alike(comm: Communicator, device: torch.device) -> None:
    """Let the ranks draw the same random numbers from now on, those that rank 0 would have drawn; collective."""
    torch.set_rng_state(comm.broadcast_object(torch.get_rng_state()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(comm.broadcast_object(torch.cuda.get_rng_state(device)), device)


@contextlib.contextmanager
def drawn_apart(cuts: Sequence[Cut], device: torch.device) -> Iterator[None]:
    """Let random numbers inside be this rank's own over the axes of `cuts`; alike over all others."""
    if not cuts:
        yield
        return
    common = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    place = 0
    for cut in sorted(cuts, key=lambda cut: cut.axis.name):
        place = place * cut.axis.size + cut.axis.rank
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    before = generator.get_state()
    generator.manual_seed((common + place * 0x9E3779B97F4A7C15) % 2**63)  # the golden ratio: apart for any two places
    try:
        yield
    finally:
        generator.set_state(before)


@rule(*functions("dropout dropout_ alpha_dropout feature_dropout feature_alpha_dropout bernoulli rand_like randn_like randint_like rrelu"))
def _drawn(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or kwargs.get("inplace") or func.__name__.endswith("_"):
        return NO_RULE
    local = local_of(input)
    with drawn_apart(input.cuts, local.device):
        return made(func(local, *args, **kwargs), input.shape, input.cuts, input.terms)
