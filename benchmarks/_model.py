"""A plain torch GPT (pre-norm, learned positions, tied to nothing) and batches of random bytes: something to train in benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """The shape of a GPT."""

    dim: int
    layers: int
    heads: int


SIZES = {
    "tiny": Size(dim=32, layers=2, heads=2),
    "10M": Size(dim=368, layers=6, heads=8),
    "30M": Size(dim=640, layers=6, heads=8),
    "100M": Size(dim=840, layers=12, heads=12),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.dim)
        self.qkv = nn.Linear(size.dim, 3 * size.dim)
        self.out = nn.Linear(size.dim, size.dim)
        self.mlp_norm = nn.LayerNorm(size.dim)
        self.up = nn.Linear(size.dim, 4 * size.dim)
        self.down = nn.Linear(4 * size.dim, size.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        x_BTD = x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD))))
        return x_BTD


class GPT(nn.Module):
    def __init__(self, size: Size, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.dim)
        self.position = nn.Parameter(torch.randn(tokens, size.dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.dim)
        self.head = nn.Linear(size.dim, VOCABULARY, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary]."""
        x_BTD = self.embed(ids_BT) + self.position[: ids_BT.shape[1]]
        logits_BTV: Tensor = self.head(self.norm(self.blocks(x_BTD)))
        return logits_BTV


def next_byte_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())


def random_batches(number: int, rows: int, tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs (ids, next ids) of shape [rows, tokens]."""
    ids = torch.randint(0, VOCABULARY, (number, rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in ids]
