"""Recomputation: the bytes that are kept are those that it says, and a budget is used as well as it can be."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.recompute import budget
from ringfold.parallel.recompute.budget import choose_kept
from ringfold.parallel.recompute.selective import is_kept
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine, mine
from tests.parallel.test_recompute import Transformer, recompute

ROWS, WIDTH = 6, 8
FLOAT = 4  # bytes


class Alive(TorchDispatchMode):
    """Knows every storage that operations made, and which are alive: an account of memory that knows nothing of autograd."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.storages[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        return output

    @property
    def nbytes(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.items() if storage not in self.given and not storage.expired())


class Mlp(nn.Module):
    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, factor * WIDTH), nn.Linear(factor * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.5, self.training)


def kept_after_forward(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that operations made and that are alive between forward and backward."""
    with Alive([x, *model.parameters()]) as alive:
        output = model(x)
    gc.disable()  # what only the garbage collector would free counts
    try:
        return alive.nbytes
    finally:
        gc.enable()
        output.sum().backward()


INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(*(Mlp() for _ in range(3))), (ROWS, WIDTH)),
    "transformer": (Transformer, (2, 5, 12)),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 24, 0.2), 2, enable_nested_tensor=False), (5, 2, 12)),
}


def test_full_keeps_nothing_but_the_blocks_outputs() -> None:
    model = INPUTS["mlp"][0]()
    x = torch.randn(ROWS, WIDTH)
    plain = kept_after_forward(model, x)
    # Of each block: norm's output and 2 statistics, up's output, gelu's, the mask of dropout and the output, which is the next one's input.
    assert plain == 3 * ROWS * (WIDTH + 2 + 2 * 4 * WIDTH + WIDTH + WIDTH) * FLOAT
    recompute(model)
    assert kept_after_forward(model, x) == 3 * ROWS * WIDTH * FLOAT


def test_selective_keeps_matmuls_besides() -> None:
    model = INPUTS["mlp"][0]()
    recompute(model, "recompute:selective")
    # Of each block: the outputs of up, of down, and its own.
    assert kept_after_forward(model, torch.randn(ROWS, WIDTH)) == 3 * ROWS * (4 * WIDTH + WIDTH + WIDTH) * FLOAT


def test_selective_does_not_keep_what_comes_after_all_that_backward_needs() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)))
    recompute(model, "recompute:selective", blocks=["0"])
    x = torch.randn(ROWS, WIDTH)
    assert kept_after_forward(model, x) == ROWS * (3 * WIDTH + WIDTH) * FLOAT  # the first layer's output, and the block's own, which the caller has
    with Alive([x, *model.parameters()]) as alive:
        shape = model(x).sum().grad_fn  # only the graph is kept
    assert shape is not None
    assert alive.nbytes == ROWS * 3 * WIDTH * FLOAT


@pytest.mark.parametrize("case", INPUTS)
def test_the_bytes_that_it_reports_are_those_that_an_independent_account_finds(case: str) -> None:
    build, shape = INPUTS[case]
    model, x = build(), torch.randn(shape)
    plain = kept_after_forward(model, x)
    held = {}
    for word in ("recompute:full", "recompute:selective", "recompute:budget=1GiB"):
        recomputation = recompute(model, word)
        held[word] = kept_after_forward(model, x)
        recomputation.finish_step()
        accounts = [block.account for block in recomputation._blocks.values()]
        if word == "recompute:full":
            outside = held[word]
        assert held[word] - outside == sum(account.kept_nbytes for account in accounts)
        assert plain - outside == sum(account.nbytes for account in accounts)
        if "budget" in word:
            assert recomputation.recomputed == ()
            assert kept_after_forward(model, x) == plain
        recomputation.close()
    assert held["recompute:full"] < held["recompute:selective"] < plain


def measured(run: Callable[[nn.Module], None]) -> tuple[list[int], int]:
    model = nn.Sequential(*(Mlp() for _ in range(2)))
    recomputation = recompute(model)
    run(model)
    return [block.account.nbytes for block in recomputation._blocks.values()], recomputation._arguments.nbytes


def test_graphs_alive_together_add_up_and_one_after_the_other_do_not() -> None:
    x = torch.randn(ROWS, WIDTH)

    def together(model: nn.Module) -> None:
        (model(x.clone()).sum() + model(x.clone()).sum()).backward()

    def in_turn(model: nn.Module) -> None:
        for _ in range(3):
            model(x.clone()).sum().backward()

    (first, second), arguments = measured(in_turn)
    assert first == second
    assert arguments == 2 * ROWS * WIDTH * FLOAT
    assert measured(together) == ([2 * first, 2 * second], 2 * arguments)


def test_an_argument_of_all_blocks_counts_once() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x) * mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Masked(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(100, 1, WIDTH)[:1]
            for block in self.blocks:
                x = block(x, mask)
            return x

    model = Model()
    recomputation = recompute(model)
    model(torch.randn(ROWS, WIDTH)).sum().backward()
    assert recomputation._arguments.nbytes == (100 * WIDTH + ROWS * WIDTH + 3 * ROWS * WIDTH) * FLOAT
    # and is not what a block saves: only the layer's output is
    assert [block.account.nbytes for block in recomputation._blocks.values()] == [0, *[0] * 3]


costs = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.tuples(st.integers(0, 20), st.integers(0, 20).map(float)), max_size=8)


def total(costs: dict[str, tuple[int, float]], names: Any, which: int) -> float:
    return sum(costs[name][which] for name in names)


def best_by_brute_force(costs: dict[str, tuple[int, float]], capacity: int) -> float:
    subsets = itertools.chain.from_iterable(itertools.combinations(costs, size) for size in range(len(costs) + 1))
    return max(total(costs, names, 1) for names in subsets if total(costs, names, 0) <= capacity)


@given(costs, st.integers(0, 80))
def test_the_choice_is_the_best_of_all_subsets(costs: dict[str, tuple[int, float]], capacity: int) -> None:
    kept = choose_kept(costs, capacity)
    assert total(costs, kept, 0) <= capacity
    assert total(costs, kept, 1) == best_by_brute_force(costs, capacity)


@given(costs, st.integers(0, 80), st.integers(1, 6))
def test_a_choice_with_too_many_states_fits_and_is_as_good_as_its_bound(costs: dict[str, tuple[int, float]], capacity: int, limit: int) -> None:
    kept = choose_kept(costs, capacity, limit)
    assert total(costs, kept, 0) <= capacity
    unit = -(-capacity // limit)
    assert total(costs, kept, 1) >= best_by_brute_force(costs, max(0, capacity - len(costs) * unit))


def test_a_choice_among_a_hundred_blocks_of_any_size_takes_seconds_at_most() -> None:
    dice = random.Random(0)
    many = {f"blocks.{i}": (dice.randint(1, 1 << 40), dice.random()) for i in range(100)}
    began = time.process_time()
    kept = choose_kept(many, 25 << 40)
    assert time.process_time() - began < 20
    assert 0.97 * (25 << 40) < total(many, kept, 0) <= 25 << 40


def test_a_greedy_choice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: the most seconds per byte first."""

    def greedy(items: list[tuple[int, float]], capacity: int, _: int) -> list[int]:
        chosen = []
        for index in sorted(range(len(items)), key=lambda i: -items[i][1] / items[i][0]):
            if items[index][0] <= capacity:
                chosen.append(index)
                capacity -= items[index][0]
        return chosen

    monkeypatch.setattr(budget, "_best", greedy)
    with pytest.raises(AssertionError):
        test_the_choice_is_the_best_of_all_subsets()


class Uneven(nn.Module):
    """Blocks of different width, of which the ranks measure different seconds and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(factor) for factor in (1, 2, 4, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train(world: Communicator, layout: str) -> tuple[tuple[str, ...], tuple[str, ...], str, list[int], str]:
    torch.manual_seed(0)
    batch = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    engine = make_engine(world, layout, Uneven, loss=F.mse_loss)
    before = engine.recomputation.recomputed
    try:
        engine.train_step(mine(batch, world.rank, world.size))
        engine.train_step(mine(batch, world.rank, world.size))
        error = ""
    except ConfigError as caught:
        error = str(caught)
    recomputation = engine.recomputation
    agreed = [nbytes for nbytes, _ in recomputation._agreed.values()] + [recomputation._arguments.nbytes]
    return before, recomputation.recomputed, recomputation.explain(), agreed, error


def test_ranks_measure_differently_and_choose_alike() -> None:
    answers = run_ranks(3, train, "recompute:budget=4KiB")  # 2, 2 and 1 rows
    assert len({(after, text) for _, after, text, _, _ in answers}) == 1
    before, after, text, (*saved, arguments), error = answers[0]
    assert not error
    assert before == tuple(f"blocks.{i}" for i in range(5))
    assert 0 < len(after) < 5
    # 2 rows: of each block what the first test derives, but for its output; and the arguments, the first of which is a view of all 5 rows
    assert arguments == (5 + 4 * 2) * WIDTH * FLOAT
    assert saved == [2 * (WIDTH + 2 + 2 * factor * WIDTH + WIDTH) * FLOAT for factor in (1, 2, 4, 8, 16)]
    assert arguments + sum(nbytes for i, nbytes in enumerate(saved) if f"blocks.{i}" not in after) <= 4096
    head, columns, *rows = text.splitlines()
    assert head.startswith("recompute:budget=4KiB: blocks hold ")
    assert head.endswith("and 416 B of arguments")
    assert columns.split() == ["block", "in", "backward", "would", "hold", "holds", "to", "run", "again"]
    for i, row in enumerate(rows):
        name, what, *_, milliseconds, unit = row.split()
        assert (name, what, unit) == (f"blocks.{i}", "recomputed" if f"blocks.{i}" in after else "kept", "ms")
        assert float(milliseconds) >= 0


def test_a_budget_below_the_arguments_is_one_error_that_says_which_one_would_do() -> None:
    for answer in run_ranks(2, train, "recompute:budget=543"):
        assert (
            "recompute:budget=543: with every block recomputed, the arguments of the 5 blocks alone take 544 B. Use recompute:budget=544"
            in answer[-1]
        )
    for _, after, _, _, error in run_ranks(2, train, "recompute:budget=544"):
        assert not error
        assert len(after) == 5


def test_explain_before_the_first_step_and_of_a_layout_without_the_word() -> None:
    assert recompute(nn.Sequential(nn.Linear(2, 2)), "").explain() == "recompute: off"
    assert recompute(Transformer()).explain() == "recompute:full: 3 blocks, all recomputed; measured in the first train step"


def choices(run: Callable[[], Any]) -> list[tuple[str, bool]]:
    found = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append((func.overloadpacket.__name__, is_kept(func, args, kwargs or {})))
            return func(*args, **(kwargs or {}))

    with Seen():
        run()
    return found


def test_selective_keeps_what_takes_long_for_its_bytes() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4)
    assert ("mm", True) in choices(lambda: x @ w)
    assert ("addmm", True) in choices(lambda: F.linear(x, w, torch.ones(4)))
    assert ("convolution", True) in choices(lambda: F.conv1d(x[None], torch.ones(1, 3, 2)))
    q, k, v = torch.randn(3, 2, 64, 8).unbind()
    assert ("bmm", False) in choices(lambda: q @ k.transpose(1, 2))  # 64 x 64 scores, each of 8 products
    assert ("bmm", True) in choices(lambda: torch.randn(2, 64, 64) @ v)
    assert ("bmm", True) in choices(lambda: torch.randn(2, 90, 8) @ torch.randn(2, 8, 32))  # an expert that widens by 4
    assert not any(kept for _, kept in choices(lambda: F.dropout(F.layer_norm(F.gelu(x).softmax(1) + x, (4,)), 0.5)))


@pytest.mark.parametrize("name", ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"])
def test_fused_attention_is_kept_unless_it_draws_random_numbers(name: str) -> None:
    operation = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    q = torch.ones(1, 1, 2, 2)
    between = (None, True) if name in ("efficient_attention", "cudnn_attention") else ()
    assert is_kept(operation, (q, q, q, *between), {})
    assert is_kept(operation, (q, q, q, *between, 0.0), {})
    assert not is_kept(operation, (q, q, q, *between, 0.1), {})
    assert not is_kept(operation, (q, q, q, *between), {"dropout_p": 0.1})


def test_a_kept_output_that_is_changed_in_place_is_done_again() -> None:
    def run(word: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()))
        if word is not None:
            recompute(model, word, blocks=["0", "1"])
        output = model[0](torch.randn(3, 4))
        loss = model[1](output.mul_(2.0)).sum()
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run("recompute:selective"), run(None), strict=True))
