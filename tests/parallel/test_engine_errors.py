"""Engine: what it refuses, each with one error that says what and why, on every rank alike; and the next step is as good as the first."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.rows import take_rows
from torch import nn

from tests.harness import run_ranks
from tests.parallel.test_engine import Reader, accuracy, global_batches, make_engine, mine, rows_scalar, valid_pair


def provoke(world: Communicator, what: str) -> str:
    batch = mine(global_batches()[0], world.rank, world.size)
    engine = make_engine(world, loss=valid_pair if what == "pair" else F.cross_entropy)
    try:
        if what in ("ignored", "pair"):
            engine.train_step((batch[0], torch.full_like(batch[1], -100)))
        elif what == "some have no rows":
            engine.train_step((batch[0], torch.full_like(batch[1], -100)) if world.rank else take_rows(batch, 0, 0))
        elif what == "no rows":
            engine.train_step(take_rows(batch, 0, 0))
        elif what == "triple":
            engine.train_step((*batch, batch[1]))
        elif what == "unlabelled":
            engine.train_step({"tokens": batch[0]})
        elif what == "name":
            engine.grad("nonsense")
        elif what == "evaluation":
            engine.evaluate([])
    except ConfigError as error:
        # The step that raised leaves nothing behind: the next one is as good as the first.
        weights = [p.detach().clone() for p in engine.module.parameters()]
        assert math.isfinite(engine.train_step(batch))
        assert not all(torch.equal(a, b) for a, b in zip(weights, engine.module.parameters(), strict=True))
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ignored", "train step 1: the global batch holds no valid target"),
        ("pair", "train step 1: the global batch holds no valid target"),
        ("some have no rows", "train step 1: the global batch holds no valid target"),
        ("no rows", "train step 1: the global batch holds no valid target"),
        ("triple", "expected a pair (inputs, target) or a mapping with labels, got a tuple of 3"),
        ("unlabelled", "a mapping needs the key 'labels', this one has 'tokens'"),
        ("name", "no parameter 'nonsense'. It has unused, embedding.weight"),
        ("evaluation", "no rank has a valid target"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_one_error_on_every_rank(what: str, words: str) -> None:
    for message in run_ranks(3, provoke, what):
        assert words in message


def refuse(world: Communicator, options: dict[str, Any], model: Any = Reader) -> str:
    with pytest.raises(ConfigError) as caught:
        make_engine(world, model=model, **options)
    return str(caught.value)


def no_module() -> int:
    return 3


def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


def foreign(_: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(Reader().parameters(), lr=0.1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.head.weight = self.embed.weight


def split_tied(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters}], lr=0.1)


def twice(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    with warnings.catch_warnings(action="ignore"):  # torch warns, and steps twice
        return torch.optim.SGD([*parameters, parameters[0]], lr=0.1)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"optimizer": lbfgs}, "LBFGS"),
        ({"optimizer": foreign}, "8 of its parameters are not the model's"),
        ({"optimizer": list}, "got list"),
        (
            {"optimizer": split_tied, "model": Tied},
            "in more than one parameter group. Tied, and so to be in one group only: embed.weight = head.weight.",
        ),
        (
            {"optimizer": twice, "model": Tied},
            "has a parameter twice, and would step on it twice. Tied, and so to be in one group only: embed.weight",
        ),
        ({"scheduler": plateau}, "ReduceLROnPlateau"),
        ({"metrics": {"loss": accuracy}}, "'loss' is taken"),
        ({"model": no_module}, "no_module returned int"),
    ],
)
def test_what_cannot_work_is_refused_when_the_engine_is_made(options: dict[str, Any], words: str) -> None:
    for message in run_ranks(1, refuse, {k: v for k, v in options.items() if k != "model"}, options.get("model", Reader)):
        assert words in message


def changing_loss(world: Communicator) -> str:
    kinds = iter([valid_pair, rows_scalar])
    engine = make_engine(world, loss=lambda output, target: next(kinds)(output, target))
    batch = mine(global_batches()[0], world.rank, world.size)
    engine.train_step(batch)
    with pytest.raises(ConfigError) as caught:
        engine.train_step(batch)
    return str(caught.value)


def test_a_loss_that_changes_its_terms_is_refused() -> None:
    assert "{loss: scalar} in train step 2, where it was {loss: pair}" in run_ranks(1, changing_loss)[0]
