"""Rules: every function on split tensors gives the values and the gradients that it gives on whole ones, however its operands are divided.

Each operand is tried whole, as a term of its gradient, and divided along each dimension. What is gathered is right as well; which functions are done
without is asserted beside it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.parallel.split import rules  # noqa: F401  makes them known
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.tensor import Split, gathered, local_of, made
from torch import Tensor

from tests.harness import run_ranks

F64 = torch.float64
Case = tuple[Callable[..., Any], list[Any]]


def ids(*shape: int, high: int) -> Tensor:
    return torch.randint(0, high, shape)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def split_heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    B, T, _ = x.shape
    q, k, v = F.linear(x, weight).view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)


def chunked_heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    B, T, C = x.shape
    q, k, v = (part.view(B, T, heads, C // heads).transpose(1, 2) for part in F.linear(x, weight).split(C, dim=2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)


# name: (function, operands; numbers of elements that two and three ranks divide, and some that they do not)
CASES: dict[str, Callable[[], Case]] = {
    "gelu": lambda: (F.gelu, [real(4, 6)]),
    "add": lambda: (torch.add, [real(4, 6), real(6)]),
    "+ of another shape": lambda: (lambda a, b: a + b, [real(4, 1, 6), real(5, 6)]),
    "+ number": lambda: (lambda a: 2.0 - a * 3, [real(4, 6)]),
    "where": lambda: (torch.where, [real(4, 6) > 0, real(4, 6), real(6)]),
    "masked_fill": lambda: (lambda a, b: a.masked_fill(b, -1.0), [real(4, 6), real(4, 6) > 0]),
    "in place": lambda: (lambda a, b: (a * 1).mul_(b).add_(1.0), [real(4, 6), real(6)]),
    "+=": lambda: (add_in_place, [real(4, 6), real(4, 6)]),
    "to float32 and back": lambda: (lambda a: a.float().to(F64), [real(4, 6)]),
    "linear": lambda: (F.linear, [real(2, 5, 6), real(12, 6), real(12)]),
    "linear without bias": lambda: (F.linear, [real(5, 6), real(12, 6)]),
    "matmul": lambda: (torch.matmul, [real(4, 5, 6), real(6, 3)]),
    "@ of batches": lambda: (lambda a, b: a @ b, [real(4, 5, 6), real(4, 6, 3)]),
    "@ of repeated batches": lambda: (lambda a, b: a @ b, [real(4, 1, 5, 6), real(3, 6, 2)]),
    "matrix by vector": lambda: (torch.matmul, [real(5, 6), real(6)]),
    "dot": lambda: (torch.dot, [real(6), real(6)]),
    "addmm": lambda: (torch.addmm, [real(4), real(5, 6), real(6, 4)]),
    "einsum": lambda: (lambda a, b: torch.einsum("bij,bkj->bki", a, b), [real(4, 5, 6), real(4, 3, 6)]),
    "reshape of heads": lambda: (lambda a: a.view(2, 5, 6, 2).transpose(1, 2).reshape(2, 6, 10), [real(2, 5, 12)]),
    "flatten": lambda: (lambda a: a.flatten(0, 1), [real(4, 6, 3)]),
    "unflatten": lambda: (lambda a: a.unflatten(-1, (3, -1)), [real(4, 6)]),
    "view -1": lambda: (lambda a: a.view(-1, a.size(-1)), [real(2, 6, 4)]),
    "squeeze": lambda: (lambda a: a.unsqueeze(1).squeeze(), [real(4, 6)]),
    "permute": lambda: (lambda a: a.permute(2, 0, 1), [real(4, 6, 3)]),
    "movedim": lambda: (lambda a: a.movedim((0, 1), (-1, 0)), [real(4, 6, 3)]),
    "T": lambda: (lambda a: a.T, [real(4, 6)]),
    "mT": lambda: (lambda a: a.mT, [real(2, 4, 6)]),
    "expand": lambda: (lambda a: a.unsqueeze(2).expand(-1, -1, 3, -1).reshape(4, 18, 5), [real(4, 6, 5)]),
    "repeat_interleave": lambda: (lambda a: a.repeat_interleave(2, 1), [real(4, 6, 5)]),
    "chunk": lambda: (lambda a: torch.cat([part * (k + 1.0) for k, part in enumerate(a.chunk(3, -1))], 0), [real(4, 12)]),
    "split": lambda: (lambda a: [part * 2.0 for part in a.split([2, 4, 6], -1)], [real(4, 12)]),
    "unbind": lambda: (lambda a: list(a.unbind(0)), [real(3, 6)]),
    "iteration": lambda: (lambda a: [part.sin() for part in a], [real(3, 6)]),
    "cat": lambda: (lambda a, b: torch.cat([a, b], 1), [real(4, 6), real(4, 3)]),
    "stack": lambda: (lambda a, b: torch.stack([a, b], -1), [real(4, 6), real(4, 6)]),
    "[...]": lambda: (lambda a: a[..., :3] * a[..., 3:], [real(4, 5, 6)]),
    "[:, -1]": lambda: (lambda a: a[:, -1], [real(4, 6)]),
    "[None, 1:]": lambda: (lambda a: a[None, 1:, ::2], [real(4, 6)]),
    "[ids]": lambda: (lambda a, i: a[i], [real(6, 4), ids(3, high=6)]),
    "[:, mask]": lambda: (lambda a: a[:, torch.arange(6) % 3 != 1] * 2.0, [real(4, 6, 3)]),
    "[..., ids of two dims, :]": lambda: (lambda a: a[..., torch.tensor([[0, 1], [3, 3], [5, 2]]), :], [real(4, 6, 3)]),
    "[ids of none]": lambda: (lambda a: a[torch.tensor(1)], [real(4, 6, 3)]),
    "item set": lambda: (item_set, [real(4, 6)]),
    "index_add_": lambda: (items_added, [real(6, 4), real(3, 4)]),
    "sum": lambda: (torch.sum, [real(4, 6)]),
    "sum of a dim": lambda: (lambda a: a.sum(1), [real(4, 6, 3)]),
    "mean": lambda: (lambda a: a.mean((0, 2), keepdim=True), [real(4, 6, 3)]),
    "amax": lambda: (lambda a: a.amax(-1), [real(4, 6)]),
    "max": lambda: (lambda a: a.max(-1).values, [real(4, 6)]),
    "argmax": lambda: (lambda a: a.argmax(-1), [real(4, 6)]),
    "logsumexp": lambda: (lambda a: a.logsumexp(1), [real(4, 6)]),
    "norm": lambda: (lambda a: a.norm(dim=-1), [real(4, 6)]),
    "softmax": lambda: (lambda a: a.softmax(-1), [real(4, 6)]),
    "log_softmax": lambda: (lambda a: F.log_softmax(a, 1), [real(4, 6, 5)]),
    "layer_norm": lambda: (lambda a, w, b: F.layer_norm(a, (6,), w, b), [real(4, 5, 6), real(6), real(6)]),
    "rms_norm": lambda: (lambda a, w: F.rms_norm(a, (6,), w, 1e-6), [real(4, 5, 6), real(6)]),
    "rms_norm by hand": lambda: (lambda a, w: w * a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6), [real(4, 5, 6), real(6)]),
    "cumsum": lambda: (lambda a: a.cumsum(0), [real(4, 6)]),
    "topk": lambda: (lambda a: a.topk(2, -1).values, [real(4, 6)]),
    "sort": lambda: (lambda a: a.sort(-1).values, [real(4, 6)]),
    "tril": lambda: (torch.tril, [real(4, 6, 6)]),
    "pad": lambda: (lambda a: F.pad(a, (1, 2)), [real(4, 6)]),
    "gather": lambda: (lambda a, i: a.gather(1, i), [real(4, 6), ids(4, 2, high=6)]),
    "embedding": lambda: (F.embedding, [ids(4, 5, high=7), real(7, 6)]),
    "embedding with padding": lambda: (lambda i, w: F.embedding(i, w, 1), [ids(4, 5, high=6), real(6, 4)]),
    "attention": lambda: (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [real(2, 6, 5, 4) for _ in range(3)]),
    "attention with a mask": lambda: (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        [real(2, 6, 5, 4), real(2, 6, 3, 4), real(2, 6, 3, 4), real(2, 1, 5, 3)],
    ),
    "grouped-query attention": lambda: (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [real(2, 6, 5, 4), real(2, 3, 5, 4), real(2, 3, 5, 4)],
    ),
    "attention of a fused product": lambda: (lambda x, w: split_heads(x, w, 6), [real(2, 5, 12), real(36, 12)]),
    "attention of a chunked product": lambda: (lambda x, w: chunked_heads(x, w, 6), [real(2, 5, 12), real(36, 12)]),
    "multi-head attention": lambda: (multi_head, [real(5, 2, 12), real(36, 12), real(36), real(12, 12), real(12)]),
    "cross_entropy": lambda: (F.cross_entropy, [real(5, 6), ids(5, high=6)]),
    "cross_entropy, ignoring, smooth, weighted": lambda: (
        lambda x, t: F.cross_entropy(x, t, torch.arange(1, 8, dtype=F64), ignore_index=2, label_smoothing=0.1),
        [real(5, 7, 4), ids(5, 4, high=7)],
    ),
    "cross_entropy, none": lambda: (lambda x, t: F.cross_entropy(x, t, reduction="none"), [real(4, 6, 5), ids(4, 5, high=6)]),
    "cross_entropy of flattened": lambda: (
        lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten(), reduction="sum"),
        [real(2, 6, 7), ids(2, 6, high=7)],
    ),
    "mse_loss": lambda: (F.mse_loss, [real(4, 6), real(4, 6)]),
    "no rule": lambda: (torch.linalg.qr, [real(6, 3)]),
    "item": lambda: (lambda a: a.sum().item() * a, [real(4, 6)]),
    "detach": lambda: (lambda a: a.detach() * a, [real(4, 6)]),
    "checkpoint": lambda: (lambda a, b: torch.utils.checkpoint.checkpoint(torch.matmul, a, b, use_reentrant=False), [real(4, 6), real(6, 3)]),
}
# what is done in parts, when the operands are divided so: no tensor may be gathered
IN_PARTS = {
    "add": [(0, None), (1, None), (1, 0), ("term", "term")],
    "linear": [(None, 0, 0), (2, 1, None), (0, None, None), (1, "term", "term")],
    "matmul": [(0, None), (1, "term"), (2, 0), (None, 1)],
    "reshape of heads": [(0,), (1,), (2,)],
    "flatten": [(0,), (1,), (2,)],
    "embedding": [(None, 0), (None, 1), (0, None), (1, "term")],
    "attention": [(0, 0, 0), (1, 1, 1), (1, None, None)],
    "attention with a mask": [(1, 1, 1, None), (0, 0, 0, 0), (0, 0, 0, None)],
    "grouped-query attention": [(1, None, None), (0, 0, 0)],
    "cross_entropy": [(1, None), (0, 0), (0, None)],
    "cross_entropy of flattened": [(2, None), (1, 1), (0, 0), (1, None)],
    "layer_norm": [(0, None, None), (1, "term", "term")],
    "mean": [(0,), (1,), (2,)],
    "[:, mask]": [(0,), (2,)],
    "[..., ids of two dims, :]": [(0,), (2,)],
    "[ids of none]": [(1,), (2,)],
    "multi-head attention": [(None, "fused", "fused", 1, None)],
    "attention of a fused product": [(None, "fused")],
    "attention of a chunked product": [(None, "fused")],
}


def add_in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a * 1.0
    a += b
    return a


def item_set(a: Tensor) -> Tensor:
    a = a * 1.0
    a[:, 2:4] = 0.0
    return a


def items_added(a: Tensor, b: Tensor) -> Tensor:
    found = torch.zeros_like(a)
    for k in range(2):
        found.index_add_(0, torch.tensor([5, k, 0]), b)
    return found * a


def multi_head(x: Tensor, w: Tensor, b: Tensor, out_w: Tensor, out_b: Tensor) -> Tensor:
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    return F.multi_head_attention_forward(
        x, x, x, 12, 6, w, b, None, None, False, 0.0, out_w, out_b, attn_mask=mask, key_padding_mask=padding, need_weights=False
    )[0]


def divisions(operand: Tensor, size: int) -> Iterator[object]:
    yield None
    if operand.is_floating_point():
        yield "term"
    yield from (dim for dim, length in enumerate(operand.shape) if length >= size)  # nobody has nothing


def divided(operand: Tensor, how: object, axis: Axis) -> Tensor:
    """Return the operand as a user of it has it, with a leaf behind it."""
    leaf = operand.detach().clone().requires_grad_(operand.is_floating_point())
    if how is None:
        return leaf
    if how == "term":
        return made(leaf, leaf.shape, (), frozenset([axis]))
    cut = Cut.evenly(axis, 0, len(operand) // 3) if how == "fused" else Cut.evenly(axis, how, operand.shape[how])
    cut = Cut(axis, cut.dim, 3 if how == "fused" else 1, cut.period, cut.runs)
    return made(cut.take(operand).detach().clone().requires_grad_(operand.is_floating_point()), operand.shape, [cut])


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def weighted(results: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return sum((one * torch.randn(one.shape, dtype=F64, generator=generator)).sum() for one in results if one.is_floating_point())


def hold(world, name: str, hows: tuple[object, ...], expected: list[Tensor], gradients: list[Tensor | None], operands: list[Tensor]) -> int:
    """Compare one way to divide the operands with the whole; return how many tensors were gathered."""
    axis = Axis("tp", world)
    function, _ = CASES[name]()
    given = [divided(one, how, axis) for one, how in zip(operands, hows, strict=True)]
    results = tensors_of(function(*given))
    count = sum(axis.gathered.values())
    assert [one.shape for one in results] == [one.shape for one in expected], (name, hows)
    wholes = [gathered(one, "result") for one in results]
    for found, wanted in zip(wholes, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=1e-12, msg=lambda m: f"{name} {hows}: {m}")
    if not any(one.requires_grad for one in wholes):
        return count
    weighted(wholes).backward()
    for number, (one, how, wanted) in enumerate(zip(given, hows, gradients, strict=True)):
        if wanted is None:
            continue
        local = local_of(one)
        mine = torch.zeros_like(local) if local.grad is None else local.grad
        if how == "term":
            world.all_reduce(mine)
        elif isinstance(one, Split):
            wanted = one.cuts[0].take(wanted)
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11, msg=lambda m, n=number: f"{name} {hows}, gradient {n}: {m}")
    return count


def hold_all(world, names: list[str]) -> None:
    for name in names:
        torch.manual_seed(zlib.crc32(name.encode()))
        function, operands = CASES[name]()
        leaves = [one.clone().requires_grad_() if one.is_floating_point() else one for one in operands]
        expected = tensors_of(function(*leaves))
        if any(one.requires_grad for one in expected):
            weighted(expected).backward()
        gradients = [one.grad if one.is_floating_point() else None for one in leaves]
        for hows in itertools.product(*(list(divisions(one, world.size)) for one in operands)):
            if sum(isinstance(how, int) for how in hows) <= 2:
                hold(world, name, hows, expected, gradients, operands)
        for hows in IN_PARTS.get(name, []):
            if any(isinstance(how, int) and one.shape[how] < world.size for one, how in zip(operands, hows, strict=True)):
                continue
            assert hold(world, name, hows, expected, gradients, operands) == 0, (name, hows)


NAMES = list(CASES)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("names", [NAMES[k::4] for k in range(4)], ids=range(4))
def test_values_and_gradients_are_those_of_the_whole(size: int, names: list[str]) -> None:
    run_ranks(size, hold_all, names, timeout_s=120)
