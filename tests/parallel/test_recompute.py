"""Recomputation changes no bit: of losses, gradients, weights and buffers, whatever the word, with dropout on, and on ranks."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import ringfold as rf
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.layout import Layout
from ringfold.parallel.recompute.buffers import BufferCopies
from ringfold.parallel.recompute.offload import HostOffload
from ringfold.parallel.recompute.recomputation import Recomputation
from ringfold.parallel.recompute.surroundings import Surroundings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine, mine

WORDS = ["recompute", "recompute:selective", "recompute:budget=1TiB"]  # a budget begins by recomputing all


class Alone:
    """The communicator of one rank."""

    size = 1

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


def recompute(module: nn.Module, word: str = "recompute", **options: Any) -> Recomputation:
    return Recomputation(module, Layout.parse(word), Alone(), **options)  # type: ignore[arg-type]


class Attention(nn.Module):
    """A pre-norm transformer block with its attention written out, called with keywords and nested values."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.3))

    def forward(self, x: Tensor, *, given: dict[str, Any]) -> dict[str, Any]:
        q, k, v = self.qkv(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)).masked_fill(given["masks"][0], -1e9)
        attended = F.dropout(scores.softmax(3), 0.2, self.training) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return {"x": (x + self.mlp(self.second(x)), None), "entropy": scores.logsumexp(3).mean()}


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mask, entropy = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), x.new_zeros(())
        for block in self.blocks:
            output = block(x, given={"masks": [mask], "unused": "text"})
            (x, _), entropy = output["x"], entropy + output["entropy"]
        return x * entropy


class Looped(nn.Module):
    """Calls each block twice, the second time with one tensor as two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(12, 2, dropout=0.2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = x + block(x, x, x)[0]
        return x


class Checkpointed(nn.Module):
    """A block with a checkpoint of its own inside, and a double derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(0.5)), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.inner, x.sin(), use_reentrant=False)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return self.outer(y * 0.5).tanh() * y + slope


class Picture(nn.Module):
    """Convolution, every kind of state in buffers, and an in-place activation that is not the first of its block."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        shared = nn.BatchNorm2d(3, momentum=momentum)
        normed = nn.utils.spectral_norm(nn.Conv2d(1, 3, 3, padding=1))  # type: ignore[no-untyped-call]
        self.blocks = nn.ModuleList([nn.Sequential(normed, shared, nn.ReLU(inplace=True)), nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), shared)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.view(-1, x.shape[-3] if x.dim() == 4 else 1, 4, 3))
        return x


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "transformer": (Transformer, {}),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 24, 0.2, batch_first=True), 2, enable_nested_tensor=False), {}),
    "blocks called twice": (Looped, {}),
    "checkpoint and double derivative in a block": (lambda: nn.Sequential(*(Checkpointed() for _ in range(2))), {"blocks": ["0", "1"]}),
    "buffers": (Picture, {"blocks": ["blocks.*"]}),
    "cumulative average": (lambda: Picture(None), {"blocks": ["blocks.*"]}),
}


def train(case: str, word: str | None, steps: int = 3, **options: Any) -> list[Tensor]:
    """Train on one process and return every number that came out."""
    torch.manual_seed(0)
    build, choice = CASES[case]
    model = build()
    recomputation = None if word is None else recompute(model, word, **choice, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(steps):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(step)).requires_grad_()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        found += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        if recomputation is not None:
            recomputation.finish_step()
    return [*found, *model.state_dict().values(), torch.rand(1)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("case", "word"), [(c, w) for c in CASES for w in WORDS if not (c.endswith("derivative in a block") and w.endswith("selective"))]
)
def test_no_bit_of_plain_pytorch_changes(case: str, word: str) -> None:
    assert_same_bits(train(case, word), train(case, None))
