"""Recomputation: a block that cannot be run again is one error that names it, and nothing wrong is computed without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.recompute.replay import Tape, once
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine
from tests.parallel.test_recompute import recompute


class Block(nn.Module):
    """A linear layer around which a test does something."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.wrong, self.calls = nn.Linear(4, 4), forward, 0
        self.register_buffer("large", torch.zeros(1 << 14))
        self.register_buffer("huge", torch.zeros(1 << 14))

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        self.calls += 1
        return self.wrong(self, *arguments, **keywords)


def changes_its_argument(block: Block, x: Tensor) -> Tensor:
    return block.linear(x.relu_())


def changes_a_nested_keyword(block: Block, x: Tensor, *, state: dict[str, list[Tensor]]) -> Tensor:
    state["sum"][0].add_(1)
    return block.linear(x)


def cuts_the_second_time(block: Block, x: Tensor) -> Tensor:
    return block.linear(x[: 3 - block.calls]).sigmoid()


def saves_less_the_second_time(block: Block, x: Tensor) -> Tensor:
    y = block.linear(x).sigmoid()
    return y.tanh().cos() if block.calls == 1 else y


def multiplies_more_the_second_time(block: Block, x: Tensor) -> Tensor:
    y = block.linear(x)
    if block.calls == 2:
        x.detach() @ x.detach().T
    return y.sigmoid()


def multiplies_otherwise_the_second_time(block: Block, x: Tensor) -> Tensor:
    return F.linear(x, block.linear.weight, block.linear.bias if block.calls == 1 else None).sigmoid()


def train(forward: Callable[..., Tensor], word: str = "recompute", between: Callable[[Tensor], Any] = lambda _: None, **keywords: Any) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Block(lambda block, x: block.linear(x)), Block(forward)])
    recompute(model, word)
    x = model.layers[0](torch.ones(4, 4))
    y = model.layers[1](x, **keywords)
    with torch.no_grad():
        between(x)
    y.sum().backward()


@pytest.mark.parametrize("word", ["recompute:full", "recompute:selective", "recompute:budget=1KiB"])
@pytest.mark.parametrize(
    ("forward", "keywords", "words"),
    [
        (changes_its_argument, {}, 'block "layers.1" changes its argument 0 in place.*inplace=True.*Engine'),
        (changes_a_nested_keyword, {"state": {"sum": [torch.ones(2)]}}, "block \"layers.1\" changes its argument 'state' in place"),
        (
            cuts_the_second_time,
            {},
            r'block "layers.1" did something else.*was \(2, 4\) torch.float32 on cpu in forward, and is \(1, 4\) torch.float32',
        ),
        (saves_less_the_second_time, {}, 'block "layers.1" did something else.*it saved [0-9] tensors for backward in forward, and [0-9] now'),
    ],
)
def test_a_block_that_cannot_be_run_again_is_named(forward: Callable[..., Tensor], keywords: dict[str, Any], words: str, word: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(forward, word, **keywords)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (multiplies_more_the_second_time, "it came to aten.mm.default, and in forward to nothing more"),
        (multiplies_otherwise_the_second_time, "it came to aten.mm.default, and in forward to aten.addmm.default"),
    ],
)
def test_selective_names_an_operation_without_a_counterpart(forward: Callable[..., Tensor], words: str) -> None:
    with pytest.raises(ConfigError, match=f'block "layers.1" did something else.*({words})'):
        train(forward, "recompute:selective")


@pytest.mark.parametrize("word", ["recompute:full", "recompute:selective"])
def test_an_argument_that_is_changed_before_backward_is_an_error_and_no_wrong_gradient(word: str) -> None:
    with pytest.raises(ConfigError, match=r'an argument of block "layers\.1" was changed in place between its forward and its backward'):
        train(lambda block, x: block.linear(x).sigmoid(), word, between=lambda x: x.add_(1))


def test_an_error_of_the_block_itself_stays_what_it_is() -> None:
    def fails(block: Block, x: Tensor) -> Tensor:
        if block.calls == 2:
            raise ZeroDivisionError("of the block")
        return block.linear(x).sigmoid()

    with pytest.raises(ZeroDivisionError, match="of the block"):
        train(fails)


def test_a_block_that_catches_exceptions_does_not_catch_the_end_of_the_second_run() -> None:
    def catches(block: Block, x: Tensor) -> Tensor:
        try:
            return block.linear(x).sigmoid()
        except Exception:
            raise AssertionError from None

    train(catches)


def test_a_large_buffer_that_changes_at_first_is_kept_and_one_that_changes_later_is_an_error() -> None:
    def counts(block: Block, x: Tensor, which: str) -> Tensor:
        getattr(block, which).add_(1)
        return block.linear(x).sigmoid()

    model = nn.Sequential(Block(counts))
    recompute(model)
    for _ in range(3):
        model[0](torch.ones(2, 4), "large").sum().backward()
    assert model[0].calls == 6
    assert torch.all(model[0].large == 3)
    with pytest.raises(ConfigError, match=r"recompute: 0\.huge changed in forward now, but not at the block's first call"):
        model[0](torch.ones(2, 4), "huge")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recompute:selective: the model has no blocks: .*Engine\(blocks="):
        recompute(nn.Linear(2, 2), "recompute:selective")
    with pytest.raises(ConfigError, match="no module with parameters is called 'block"):
        recompute(nn.Sequential(nn.Linear(2, 2)), blocks=["block*"])


def refused(world: Communicator, layout: str) -> str:
    try:
        make_engine(world, layout, lambda: nn.Sequential(nn.Linear(4, 4)), offload_activations=True)
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("layout", ["", "recompute"])
def test_engine_refuses_to_offload_to_the_host_what_is_there(layout: str) -> None:
    assert "offload_activations: the model is on the cpu, where activations are in host memory anyway" in run_ranks(1, refused, layout)[0]


def test_a_tape_gives_answers_again_in_order_and_is_off_elsewhere() -> None:
    numbers = iter(range(100))
    tape, other = Tape(), Tape()
    assert once(next, numbers) == 0
    with tape.recording():
        assert [once(next, numbers), once(next, numbers)] == [1, 2]
        with other.recording():
            assert once(next, numbers) == 3
        assert once(next, numbers) == 4
    for _ in range(2):
        with tape.replaying():
            assert [once(next, numbers) for _ in range(3)] == [1, 2, 4]
    with tape.replaying():
        assert [once(next, numbers) for _ in range(4)] == [1, 2, 4, 5]
    assert once(next, numbers) == 6
