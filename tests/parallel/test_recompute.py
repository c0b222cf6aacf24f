"""Recomputation changes no bit: of losses, gradients, weights and buffers, whatever the word, with dropout on, and on ranks."""

from __future__ import annotations

import contextlib
import copy
import functools
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


@pytest.mark.parametrize(("case", "word"), [(c, w) for c in CASES for w in WORDS])
def test_no_bit_of_plain_pytorch_changes(case: str, word: str) -> None:
    assert_same_bits(train(case, word), train(case, None))


@pytest.mark.parametrize("word", WORDS)
def test_autocast_is_the_same_in_both_runs_also_where_a_cast_was_cached_before(word: str) -> None:
    def run(word: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = Transformer()
        if word is not None:
            recompute(model, word)
        x = torch.randn(2, 5, 12)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.linear(x, model.blocks[0].qkv.weight).square().mean() + model(x).square().mean() + model(x).mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    assert_same_bits(run(word), run(None))


def test_backward_twice_and_second_derivatives_are_those_of_plain_pytorch() -> None:
    def run(recomputed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Transformer()
        if recomputed:
            recompute(model)
        x = torch.randn(2, 5, 12, requires_grad=True)
        loss = model(x).square().mean()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        again = torch.autograd.grad(loss, [x, *model.parameters()], create_graph=True)
        return [*first, *again, *torch.autograd.grad(again[0].square().sum(), x)]

    assert_same_bits(run(True), run(False))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_a_compiled_model_is_recomputed_and_its_blocks_are_still_compiled(recwarn: pytest.WarningsRecorder) -> None:
    compiled: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    def run(recomputed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Feed(), Feed())
        if recomputed:
            recompute(model)
        found = []
        for _ in range(2):
            loss = torch.compile(model, backend=backend)(torch.ones(2, 4)).square().mean()
            loss.backward()
            found.append(loss.detach())
        torch.compiler.reset()
        return [*found, *(p.grad for p in model.parameters())]

    assert_same_bits(run(True), run(False))
    assert sorted(map(len, compiled)) == [2, 2, 4]  # a layer and its activation, for each block, and once; the plain model whole, and once
    assert not list(recwarn)


def test_blocks_keep_names_signature_and_hooks_and_a_copy_of_the_model_is_plain() -> None:
    plain, model = Transformer(), Transformer()
    calls = []
    recomputation = recompute(model)
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append("hook"))
    inner = model.blocks[0].qkv.register_forward_hook(lambda *_: calls.append("inner hook"))
    model(torch.ones(1, 2, 12)).sum().backward()
    assert calls == ["hook", "inner hook", "inner hook"] or calls == ["inner hook", "hook", "inner hook"]
    handle.remove(), inner.remove()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert inspect.signature(model.blocks[0].forward) == inspect.signature(plain.blocks[0].forward)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for block in twin.blocks:
            assert block.forward.__func__ is Attention.forward
            assert block.forward.__self__ is block
    recomputation.close()
    assert all("forward" not in vars(block) for block in model.blocks)
    recompute(model).close()  # it can be recomputed again
    earlier, later = recompute(model), recompute(model)
    earlier.close()
    assert all(block.forward._owner is later for block in model.blocks)
    later.close()
    assert all("forward" not in vars(block) for block in model.blocks)
    own = model.blocks[0].forward = functools.partial(Attention.forward, model.blocks[0])
    recompute(model).close()
    assert model.blocks[0].forward is own


def test_close_leaves_graphs_that_are_alive_whole() -> None:
    expected = train("transformer", None, steps=1)[1]
    torch.manual_seed(0)
    model = Transformer()
    recomputation = recompute(model)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = model(x).square().mean()
    recomputation.close()
    loss.backward()
    assert torch.equal(x.grad, expected)


class Counting(nn.Module):
    """Counts the calls of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).tanh()


def test_a_block_runs_twice_in_training_and_once_without_gradients_or_in_evaluation() -> None:
    model = nn.Sequential(Counting(), Counting())
    recompute(model)
    x = torch.ones(2, 4)

    def calls(run: Callable[[], Any]) -> list[int]:
        before = [block.calls for block in model]
        run()
        return [block.calls - past for block, past in zip(model, before, strict=True)]

    assert calls(lambda: model(x).sum().backward()) == [2, 2]
    with torch.no_grad():
        assert calls(lambda: model(x)) == [1, 1]
    model.eval()
    assert calls(lambda: model(x).sum().backward()) == [1, 1]
    model.train().requires_grad_(False)
    assert calls(lambda: model(x)) == [1, 1]


def test_before_recompute_is_told_each_block_before_it_runs_again() -> None:
    model = nn.Sequential(Counting(), Counting(), Counting())
    recomputation = recompute(model)
    told: list[tuple[int, int]] = []
    recomputation.before_recompute = lambda block: told.append((list(model).index(block), block.calls))
    loss = model(torch.ones(2, 4)).sum()
    assert told == []
    loss.backward()
    assert told == [(2, 1), (1, 1), (0, 1)]


def test_a_tensor_saved_for_backward_may_be_asked_for_twice() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * (ctx.saved_tensors[0] + ctx.saved_tensors[0])

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Twice.apply(super().forward(x))

    model = nn.Sequential(Block(3, 3), Block(3, 3))
    x = torch.randn(2, 3)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    recompute(model)
    model(x).sum().backward()
    assert_same_bits([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("word", [None, "recompute", "recompute:selective"])
@pytest.mark.parametrize("case", ["transformer", "blocks called twice", "buffers"])
def test_offload_changes_no_bit(case: str, word: str | None) -> None:
    """To the host and back is from the CPU to the CPU here: copies of everything, whatever its size."""
    offload = HostOffload(torch.device("cpu"), smallest_nbytes=0)
    assert_same_bits(train(case, word or "", offload=offload), train(case, None))


def test_offload_moves_what_blocks_save_but_not_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    pack = HostOffload.pack
    monkeypatch.setattr(HostOffload, "pack", lambda self, tensor: (moved.append(tensor), pack(self, tensor))[1])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(2, 4)
    recomputation = recompute(model, "", offload=HostOffload(torch.device("cpu"), smallest_nbytes=0))
    assert recomputation.explain() == "recompute: off; 2 blocks keep what they save in host memory"
    model(x).sum().backward()
    assert [tuple(tensor.shape) for tensor in moved] == [(2, 4), (2, 4)]  # the inputs; weights are saved too
    moved.clear()
    recomputation.close()
    recompute(model, offload=HostOffload(torch.device("cpu"), smallest_nbytes=33))
    model(x).sum().backward()
    assert [tuple(tensor.shape) for tensor in moved] == [(2, 4), (2, 4)]  # asked for, and left where they are


@pytest.mark.gpu
@pytest.mark.parametrize("word", [None, "recompute", "recompute:selective"])
def test_on_a_gpu_neither_recomputation_nor_offload_changes_a_bit(word: str | None) -> None:
    def run(word: str | None, offload: HostOffload | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, 0.2, batch_first=True), 3, enable_nested_tensor=False).cuda()
        if word is not None or offload is not None:
            recompute(model, word or "", offload=offload)
        x = torch.randn(4, 33, 64, device="cuda", requires_grad=True)
        loss = model(x).square().mean()
        loss.backward()
        return [loss.detach(), x.grad, *(p.grad for p in model.parameters()), torch.rand(1, device="cuda")]

    expected = run(None, None)
    assert_same_bits(run(word, None), expected)
    assert_same_bits(run(word, HostOffload(torch.device("cuda", 0), smallest_nbytes=0)), expected)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)), nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2))]
        self.blocks = nn.ModuleList(blocks)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train_on_ranks(world: Communicator, layout: str) -> tuple[list[float], list[Tensor], list[str], int]:
    """Train with synchronised BatchNorm, dropout and a rank without rows; count the collectives of the statistics."""
    engine = make_engine(world, layout, Images, loss=F.mse_loss, clip_norm=0.1, blocks=["blocks.*"])
    gathers = 0
    real = type(world).all_gather

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return real(*arguments, **keywords)

    type(world).all_gather = counted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(7)
    losses = []
    for rows in (7, 2, 5):
        batch = torch.randn(rows, 4, dtype=torch.float64, generator=generator), torch.randn(rows, 2, dtype=torch.float64, generator=generator)
        torch.manual_seed(world.rank)
        losses.append(engine.train_step(mine(batch, world.rank, world.size)))
    recomputed = list(engine.recomputation.recomputed)
    assert engine.eval_step(mine(batch, world.rank, world.size))["loss"] > 0
    engine.close()
    return losses, list(engine.module.state_dict().values()), recomputed, gathers


@pytest.mark.parametrize("micro", ["", " micro2"])
@pytest.mark.parametrize("word", ["recompute:full", "recompute:selective", "recompute:budget=1GiB", "recompute:budget=1KiB"])
def test_ranks_have_the_bits_and_the_collectives_of_the_layout_without_recomputation(word: str, micro: str) -> None:
    for found, expected in zip(run_ranks(3, train_on_ranks, word + micro), run_ranks(3, train_on_ranks, micro), strict=True):
        assert found[0] == expected[0]
        assert_same_bits(found[1], expected[1])
        assert found[2] == ([] if word.endswith("GiB") else ["blocks.0", "blocks.1"]) or word.endswith("1KiB")
        assert found[3] == expected[3]


def make_verified() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3))


def test_verify_proves_a_layout_with_recomputation() -> None:
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    assert rf.verify(make_verified, batch, F.cross_entropy, "dp2 recompute:selective").ok


@contextlib.contextmanager
def nothing(*_: Any) -> Any:
    yield


@pytest.mark.parametrize(
    ("owner", "name", "case"),
    [(Surroundings, "restored", "transformer"), (BufferCopies, "standing_in", "buffers"), (Surroundings, "restored", "encoder")],
)
def test_a_second_run_in_other_surroundings_is_seen(owner: type, name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutations: other random numbers in the second run, and buffers that it updates once more."""
    monkeypatch.setattr(owner, name, nothing)
    with pytest.raises(AssertionError):
        assert_same_bits(train(case, "recompute"), train(case, None))
