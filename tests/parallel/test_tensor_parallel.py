"""Tensor parallelism: parts of parameters on each rank never change the numbers of plain PyTorch, with no line of the model changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError, LayoutError
from ringfold.parallel.placement import Shard
from ringfold.parallel.split import exchange
from ringfold.parallel.split.tensor import local_of
from ringfold.parallel.tensor.plan import find_plan, shards_of
from ringfold.parallel.tensor.tensor_parallel import TensorParallel
from ringfold.runtime.engine import Engine
from ringfold.runtime.update import Update
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import (
    CLIP_NORM,
    LOSSES,
    POSITIONS,
    VOCABULARY,
    assert_same_numbers,
    global_batches,
    make_engine,
    mine,
    plain_training,
    train,
)

WIDTH, HEADS = 12, 6


class Attention(nn.Module):
    """As people write it: every shape is that of the whole."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (each.view(B, T, HEADS, C // HEADS).transpose(1, 2) for each in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / (C // HEADS) ** 0.5)
        scores = scores.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        y = F.dropout(F.softmax(scores, dim=-1), self.drop, self.training) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GroupedAttention(nn.Module):
    """With half as many key-value heads, and a norm of each head, whose weight is used in parts but not divided."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.RMSNorm(WIDTH // HEADS, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (each.out_features // 2, 2)) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
        y = F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, 1), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attention
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, 20), "gate": nn.Linear(WIDTH, 20, bias=False), "down": nn.Linear(20, WIDTH)})
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        y = self.norm_2(x)
        inside = F.dropout(F.silu(self.mlp["gate"](y)) * self.mlp["up"](y), self.drop, self.training)
        return x + F.dropout(self.mlp["down"](inside), self.drop, self.training)


class Writer(nn.Module):
    """A small GPT with its head tied to its embedding, a frozen positional table, and a parameter that nobody uses."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(POSITIONS, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


class Encoder(nn.Module):
    """torch's own transformer layers, an encoder and a decoder that looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 20, 0.0, F.gelu, batch_first=True, norm_first=True), 1)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
        x = self.embed(tokens)
        memory = self.encoder(x, src_key_padding_mask=tokens == 3)
        return self.head(self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True)).transpose(1, 2)


def writer() -> nn.Module:
    return Writer([Block(Attention()), Block(Attention())])


def grouped() -> nn.Module:
    model = Writer([Block(GroupedAttention())])
    model.config = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}  # two ranks do not divide 3: each has all keys and values
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"writer": writer, "grouped": grouped, "torch's layers": Encoder}


def train_and_count(world: Communicator, model: str, layout: str, micro: int = 1, loss: str = "pair") -> dict[str, Any]:
    """Train, and return also what was gathered, and the share of elements that this rank has."""
    engines: list[Engine] = []
    init = Engine.__init__

    def kept(self: Engine, *args: Any, **kwargs: Any) -> None:
        engines.append(self)
        init(self, *args, **kwargs)

    Engine.__init__ = kept  # type: ignore[method-assign]
    try:
        found = train(world, micro, loss, CLIP_NORM, layout, MODELS[model])
    finally:
        Engine.__init__ = init  # type: ignore[method-assign]
    tensor = engines[0]._division.tensor
    return found | {"gathered": {} if tensor is None else dict(tensor.axis.gathered)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("size", "layout", "micro"),
    [
        (2, "tp2", 1),
        (3, "tp3", 2),
        (4, "dp2 tp2", 1),
        (4, "dp2 tp2 zero1", 2),
        (4, "dp2 tp2 zero2 recompute", 1),
        (4, "dp2 tp2 zero3", 2),
        (2, "tp2 zero3 recompute:selective", 1),
    ],
)
def test_every_layout_has_the_numbers_of_plain_pytorch_and_gathers_nothing(model: str, size: int, layout: str, micro: int) -> None:
    expected = plain_training(LOSSES["pair"], make=MODELS[model])
    results = run_ranks(size, train_and_count, model, layout, micro)
    for found in results:
        assert_same_numbers(found, expected)
        assert found["gathered"] == {}
        assert all(torch.equal(weight, results[0]["weights"][name]) for name, weight in found["weights"].items()), "ranks drifted apart"


@pytest.mark.parametrize("loss", ["torch", "module", "terms", "scalar"])
def test_every_kind_of_loss_of_divided_logits_is_that_of_plain_pytorch(loss: str) -> None:
    expected = plain_training(LOSSES[loss], make=writer)
    for found in run_ranks(2, train_and_count, "writer", "tp2", 1, loss):
        assert_same_numbers(found, expected)


def shares(world: Communicator) -> tuple[int, int]:
    engine = make_engine(world, "tp2", writer, loss=LOSSES["pair"])
    return sum(p.numel() for p in engine.module.parameters()), sum(p.numel() for p in writer().parameters())


def test_each_rank_has_its_part_of_the_large_parameters() -> None:
    for mine_has, whole in run_ranks(2, shares):
        small = 3 + 5 * 12 + 2 * WIDTH + 2 * (4 * WIDTH + 2 * WIDTH)  # the unused, positions, norms, biases of rows
        assert mine_has <= (whole - small) / 2 + small + WIDTH  # the vocabulary is odd


# -- what the numbers would be if something went wrong: the bugs of others, made again ------------------------------------------------------


def no_sum(tensor: Tensor, axis: Any) -> Tensor:  # noqa: ARG001
    return tensor


def divided_norm_only(self: Update) -> float:
    return self._squares_of(self._parameters)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "the gradient of a column's input is not summed": (exchange, "share", no_sum),
    "the terms of a row are not summed": (exchange, "total", no_sum),
    "the norm is that of this rank's parts": (Update, "_squares", divided_norm_only),
}


def train_wrongly(world: Communicator, mutation: str) -> dict[str, Any]:
    owner, name, wrong = MUTATIONS[mutation]
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        return train(world, 1, "pair", CLIP_NORM, "tp2", writer)
    finally:
        setattr(owner, name, right)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation: str) -> None:
    expected = plain_training(LOSSES["pair"], make=writer)
    with pytest.raises(AssertionError):
        assert_same_numbers(run_ranks(2, train_wrongly, mutation)[0], expected)


# -- random numbers -------------------------------------------------------------------------------------------------------------------------


def dropped(world: Communicator, layout: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a replicated and a divided activation, and the gradients of a step with dropout."""
    torch.manual_seed(7 + world.rank)  # ranks that were seeded apart draw alike all the same

    def make() -> nn.Module:
        return Writer([Block(Attention(0.3), 0.3)])

    engine = make_engine(world, layout, make, loss=LOSSES["pair"])
    seen: dict[str, Tensor] = {}

    def look(_: nn.Module, args: tuple[Tensor]) -> None:
        seen["divided" if hasattr(args[0], "local") else "whole"] = local_of(args[0]).detach().clone()

    engine.module.blocks[0].mlp["down"].register_forward_pre_hook(look)
    engine.module.norm.register_forward_pre_hook(look)
    engine.train_step(global_batches()[0])
    return seen["whole"], seen["divided"], [engine.grad(name) for name, _ in engine.module.named_parameters()]


def test_what_all_ranks_have_is_dropped_alike_and_what_is_divided_apart() -> None:
    (whole, divided, _), (other_whole, other_divided, _) = run_ranks(2, dropped, "tp2")
    assert torch.equal(whole, other_whole)
    divided, other_divided = divided == 0, other_divided == 0
    assert 0.2 < divided.double().mean() < 0.4
    assert 0.3 < (divided != other_divided).double().mean() < 0.55  # 2 x 0.3 x 0.7 of independent ones


@pytest.mark.parametrize("word", ["recompute", "recompute:selective"])
def test_dropout_is_the_same_when_a_block_is_recomputed(word: str) -> None:
    kept, again = run_ranks(2, dropped, "tp2")[0][2], run_ranks(2, dropped, f"tp2 {word}")[0][2]
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(kept, again, strict=True))


# -- the plan -------------------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_found_by_names_and_classes() -> None:
    assert find_plan(writer(), 2) == {
        "embed": "vocab",
        "head": "column",
        **{f"blocks.{k}.attn.c_attn": "column:3" for k in (0, 1)},
        **{f"blocks.{k}.attn.c_proj": "row" for k in (0, 1)},
        **{f"blocks.{k}.mlp.{name}": word for k in (0, 1) for name, word in (("up", "column"), ("gate", "column"), ("down", "row"))},
    }
    assert find_plan(Encoder(), 2)["encoder.layers.1.self_attn"] == "column"


class Odd(nn.Module):
    """Has names that tell nothing, and says itself what they are, as models of Hugging Face do."""

    _tp_plan = {"inner.*.alpha": "colwise", "inner.*.omega": "rowwise", "inner.*.norm": "sequence_parallel", "table": "colwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3))
        self.inner = nn.ModuleList(nn.ModuleDict({"alpha": nn.Linear(4, 6), "omega": nn.Linear(6, 4), "norm": nn.LayerNorm(4)}) for _ in range(2))


def test_the_plan_that_a_model_carries_counts_where_names_tell_nothing() -> None:
    assert find_plan(Odd(), 2) == {f"inner.{k}.{name}": word for k in (0, 1) for name, word in (("alpha", "column"), ("omega", "row"))}
    assert find_plan(Odd().inner, 2) == {}, "a part of a model carries none"


def test_words_of_a_plan_become_shards() -> None:
    assert shards_of("a", nn.Linear(4, 9), "column:3+3+3") == {"weight": Shard(0, (3, 3, 3)), "bias": Shard(0, (3, 3, 3))}
    assert shards_of("a", nn.Linear(4, 9, bias=False), "row") == {"weight": Shard(1)}
    assert shards_of("a", nn.Embedding(4, 9), "vocab") == {"weight": Shard(0)}


def own_plan(world: Communicator) -> tuple[list[str], float, float]:
    """Divide what a plan says, with a stretch in between that no rule knows."""
    batch = global_batches()[0]
    loss = LOSSES["pair"]
    plan = {"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row", "head": "whole"}
    engine = make_engine(world, "tp2", writer, loss=loss, plan=plan)
    with engine.whole_parameters(), torch.no_grad():
        total, count = loss(engine.module(batch[0]), batch[1])
    return sorted(engine._division.tensor.placements()), float(total / count), engine.train_step(mine(batch, 0, 1))


def test_only_what_a_plan_names_is_divided() -> None:
    for names, before, loss in run_ranks(2, own_plan):
        assert names == sorted(f"blocks.{k}.mlp.{name}" for k in (0, 1) for name in ("up.weight", "up.bias", "down.weight"))
        assert loss == pytest.approx(before, rel=1e-12)


def plan_error(world: Communicator, plan: dict[str, str] | None, make: Callable[[], nn.Module]) -> str:
    with pytest.raises(ConfigError) as caught:
        TensorParallel(make(), world, plan)
    return str(caught.value)


def unknown() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("plan", "make", "said"),
    [
        ({"blocks.*.mlp.upp": "column", "head": "columns"}, writer, ["fits no module", "did you mean 'blocks.", "'columns' is none of"]),
        ({"norm": "column"}, writer, ["norm is a LayerNorm, which cannot be column"]),
        ({"embed": "column", "head": "column"}, writer, ["embed.weight and head.weight are one parameter"]),
        ({"head": "column:5+5"}, writer, ["'column:5+5' does not make up its 11 features"]),
        (None, unknown, ["no parameter is divided", 'plan={"blocks.*.q": "column"']),
    ],
)
def test_a_plan_that_does_not_fit_is_said_in_full(plan: dict[str, str] | None, make: Callable[[], nn.Module], said: list[str]) -> None:
    for message in run_ranks(2, plan_error, plan, make):
        assert all(part in message for part in said), message


def other_rows(world: Communicator, layout: str) -> str:
    engine = make_engine(world, layout, writer, loss=LOSSES["pair"])
    tokens, target = global_batches()[0]
    with pytest.raises(ConfigError) as caught:
        engine.train_step((tokens.roll(world.rank, 0), target))
    return str(caught.value)


@pytest.mark.parametrize(("layout", "axis"), [("tp2", "tp"), ("cp2", "cp")])
def test_ranks_that_are_given_different_rows_of_what_they_divide_are_told(layout: str, axis: str) -> None:
    for message in run_ranks(2, other_rows, layout):
        assert f"train step 1: the ranks of {axis} were given different batches" in message


def explained(world: Communicator, layout: str) -> str:
    engine = make_engine(world, layout, writer, loss=LOSSES["pair"])
    engine.train_step(mine(global_batches()[0], engine.mesh["dp"].rank, engine.mesh["dp"].size))
    return str(engine.explain())


def test_what_is_divided_and_what_that_sends_is_explained() -> None:
    text = run_ranks(4, explained, "tp2 cp2")[0]
    assert "blocks.*.attn.c_attn.weight  column:3  x 2" in text
    assert "blocks.*.mlp.down.weight     row       x 2" in text
    assert "sequences are divided over cp, ring attention" in text
    # each block adds up two rows in forward, and the inputs of three columns in backward
    assert "inside layers, over tp" in text
    lines = {tuple(line.split("  ")[0:1]): line for line in text.splitlines()}
    assert any(line.startswith("inside layers, over cp") for (line,) in lines)


class Configured(Writer):
    def __init__(self) -> None:
        super().__init__([Block(Attention())])
        self.config = {"num_attention_heads": 5}


def heads_error(world: Communicator) -> str:
    with pytest.raises(LayoutError) as caught:
        make_engine(world, "tp2", Configured)
    return str(caught.value)


def test_heads_that_ranks_do_not_divide_are_said_with_what_would() -> None:
    assert "tp2 must divide the model's 5 attention heads. Try tp1." in run_ranks(2, heads_error)[0]
