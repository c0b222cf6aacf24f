"""Context parallelism: parts of sequences on each rank never change the numbers of plain PyTorch, with no line of the model changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.context import ring
from ringfold.parallel.split import exchange
from ringfold.parallel.split.rules import agreement
from ringfold.parallel.split.stand_ins import StandIns
from ringfold.runtime import division
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import CLIP_NORM, LOSSES, POSITIONS, assert_same_numbers, make_engine, plain_training, train
from tests.parallel.test_tensor_parallel import MODELS, WIDTH, Attention, Block, Writer, grouped, writer


def train_under(world: Communicator, model: str, layout: str, micro: int = 1, loss: str = "pair") -> dict[str, Any]:
    return train(world, micro, loss, CLIP_NORM, layout, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("size", "layout", "micro"),
    [
        (2, "cp2", 1),
        (3, "cp3:ulysses", 2),
        (4, "dp2 cp2", 2),
        (4, "tp2 cp2", 1),
        (4, "dp2 cp2 zero1", 1),
        (4, "dp2 cp2 zero3", 2),
        (4, "tp2 cp2 zero2 recompute", 1),
        (2, "cp2 zero3 recompute:selective", 1),
    ],
)
def test_every_layout_has_the_numbers_of_plain_pytorch(model: str, size: int, layout: str, micro: int) -> None:
    expected = plain_training(LOSSES["pair"], make=MODELS[model])
    results = run_ranks(size, train_under, model, layout, micro)
    for found in results:
        assert_same_numbers(found, expected)
        assert all(torch.equal(weight, results[0]["weights"][name]) for name, weight in found["weights"].items()), "ranks drifted apart"


@pytest.mark.parametrize("loss", ["torch", "module", "terms", "scalar"])
def test_every_kind_of_loss_of_divided_sequences_is_that_of_plain_pytorch(loss: str) -> None:
    expected = plain_training(LOSSES[loss], make=writer)
    for found in run_ranks(2, train_under, "writer", "cp2", 1, loss):
        assert_same_numbers(found, expected)


class Pooled(Writer):
    """Looks at tokens by place: the first one, shifted ones and the mean of all, as classifiers and losses of language models do."""

    def forward(self, tokens: Tensor) -> Tensor:
        scores = super().forward(tokens)
        shifted = torch.nn.functional.pad(scores[..., 1:], (0, 1))
        return scores + shifted + scores[..., :1] + scores.mean(-1, keepdim=True)


class Aside(Writer):
    """Keeps a parameter in a list of its own, where nothing can be put in its place."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5, dtype=torch.float64))
        self.kept = [self.scale]
        self.norm.register_forward_hook(lambda _, __, output: output * self.kept[0])


def aside() -> nn.Module:
    return Aside([Block(Attention())])


def train_aside(world: Communicator) -> dict[str, Any]:
    return train(world, 1, "pair", CLIP_NORM, "cp2", aside)


def test_the_gradient_of_a_parameter_that_is_kept_aside_is_summed_once() -> None:
    expected = plain_training(LOSSES["pair"], make=aside)
    for found in run_ranks(2, train_aside):
        assert_same_numbers(found, expected)


def pooled() -> nn.Module:
    return Pooled([Block(Attention())])


def train_pooled(world: Communicator) -> dict[str, Any]:
    return train(world, 1, "pair", CLIP_NORM, "cp2", pooled)


def test_a_model_that_looks_at_places_sees_those_of_the_whole_sequence() -> None:
    expected = plain_training(LOSSES["pair"], make=pooled)
    for found in run_ranks(2, train_pooled):
        assert_same_numbers(found, expected)


def no_sum(tensor: Tensor, axis: Any) -> Tensor:  # noqa: ARG001
    return tensor


def without_terms(module: nn.Module, divided: Any, terms: Any, inputs: Any) -> StandIns:  # noqa: ARG001
    return StandIns(module, divided, frozenset(), inputs)


with_keys_of = ring._Meetings.with_keys_of


def own_keys_only(self: ring._Meetings, source: int) -> Any:
    return with_keys_of(self, source) if source == self._cut.axis.rank else iter(())


def as_it_is(operand: Tensor, axes: Any) -> Tensor:  # noqa: ARG001
    return operand


MUTATIONS: dict[str, list[tuple[Any, str, Any]]] = {
    "sums over tokens are those of this rank": [(exchange, "total", no_sum)],
    "keys of others are never seen": [(ring._Meetings, "with_keys_of", own_keys_only)],
    "gradients are summed over cp once more": [(division, "StandIns", without_terms), (agreement, "_of_parameter", as_it_is)],
}


def train_wrongly(world: Communicator, mutation: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for change in MUTATIONS[mutation]:
            patch.setattr(*change)
        return train(world, 1, "pair", CLIP_NORM, "cp2", grouped)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation: str) -> None:
    expected = plain_training(LOSSES["pair"], make=grouped)
    with pytest.raises(AssertionError):
        assert_same_numbers(run_ranks(2, train_wrongly, mutation)[0], expected)


def too_short(world: Communicator, tokens: int) -> str:
    engine = make_engine(world, "cp2", writer, loss=LOSSES["pair"])
    with pytest.raises(ConfigError) as caught:
        engine.train_step((torch.zeros(2, tokens, dtype=torch.long), torch.zeros(2, tokens, dtype=torch.long)))
    return str(caught.value)


def test_a_sequence_with_fewer_tokens_than_parts_is_refused_with_what_fits() -> None:
    for message in run_ranks(2, too_short, 3):
        assert "cp2:ring cuts a sequence into 4 parts, and this one has 3 tokens. Use cp1, or longer sequences." in message
    assert POSITIONS > 4  # what the tests train on
