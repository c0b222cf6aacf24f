"""Attention of a divided sequence: values and gradients of the whole, around the ring, by heads and on gathered keys."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ringfold.parallel.context import partial_attention
from ringfold.parallel.context.attention import over_tokens
from ringfold.parallel.context.ring import zigzag
from ringfold.parallel.split import rules  # noqa: F401  makes them known
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.tensor import gathered, made
from torch import Tensor

from tests.harness import run_ranks

F64 = torch.float64
TOKENS = 13


def masks() -> dict[str, Tensor | None]:
    return {
        "none": None,
        "padding": torch.arange(TOKENS) < torch.tensor([TOKENS, 6])[:, None, None, None],
        "band": (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() <= 3,
        "bias": torch.randn(2, 6, TOKENS, TOKENS, dtype=F64),
        "a query that sees nothing at first": torch.randn(TOKENS, TOKENS, dtype=F64).masked_fill(
            (torch.arange(TOKENS)[:, None] < 4) & (torch.arange(TOKENS) < 4), float("-inf")
        ),
    }


def hold(world, algorithm: str, division: str, kv_heads: int) -> None:
    axis = Axis("cp", world, functools.partial(over_tokens, algorithm=algorithm))
    for name, mask in masks().items():
        for is_causal in (False, True):
            if is_causal and mask is not None:
                continue
            torch.manual_seed(4)
            whole = [torch.randn(2, heads, TOKENS, 4, dtype=F64, requires_grad=True) for heads in (6, kv_heads, kv_heads)]
            expected = F.scaled_dot_product_attention(*whole, mask, is_causal=is_causal, enable_gqa=kv_heads < 6)
            weights = torch.randn_like(expected)
            (expected * weights).sum().backward()
            cut = zigzag(axis, 2, TOKENS) if division == "zigzag" else Cut.evenly(axis, 2, TOKENS)
            leaves = [cut.take(each.detach()).clone().requires_grad_() for each in whole]
            parts = [made(leaf, each.shape, [cut]) for leaf, each in zip(leaves, whole, strict=True)]
            found = F.scaled_dot_product_attention(*parts, mask, is_causal=is_causal, enable_gqa=kv_heads < 6)
            assert not axis.gathered
            together = gathered(found, "to compare")
            axis.gathered.clear()
            torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
            (together * weights).sum().backward()
            for leaf, each in zip(leaves, whole, strict=True):
                torch.testing.assert_close(leaf.grad, cut.take(each.grad), rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kv_heads", [6, 3])
@pytest.mark.parametrize(("algorithm", "division"), [("ring", "zigzag"), ("ring", "evenly"), ("ulysses", "evenly")])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_attention_of_a_divided_sequence_is_that_of_the_whole(size: int, algorithm: str, division: str, kv_heads: int) -> None:
    run_ranks(size, hold, algorithm, division, kv_heads)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_the_two_ways_to_attend_to_some_keys_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own function, and the arithmetic that stands in for it on other devices."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 7, 4, dtype=F64) for heads in (6, 3, 3))
    mask = {"bool": torch.rand(7, 7) > 0.4, "float": torch.randn(2, 1, 7, 7, dtype=F64)}.get(kind)
    if kind == "bool":
        mask[2] = False
    mask = mask if mask is None else mask[(None,) * (4 - mask.dim())]

    def both() -> list[Tensor]:
        out, lse = partial_attention.attend(q, k, v, mask, kind == "causal", 0.5)
        return [out, lse, *partial_attention.attend_backward(out.sin(), q, k, v, out, lse, mask, kind == "causal", 0.5)]

    fast = both()
    monkeypatch.setattr(partial_attention, "_has_flash", lambda *_: False)
    for one, other in zip(fast, both(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_zigzag_gives_every_rank_as_much_to_do_under_a_causal_mask(size: int) -> None:
    runs = zigzag(SimpleNamespace(size=size, rank=0), 0, 2 * size * 5).runs
    work = [sum(stop * (stop + 1) - start * (start + 1) for start, stop in of_rank) for of_rank in runs]
    assert len(set(work)) == 1
