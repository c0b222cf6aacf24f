"""Engine: dp and microbatches never change the numbers of plain PyTorch on the same global batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.layout import Layout
from ringfold.parallel.mesh import DeviceMesh
from ringfold.runtime import gradients
from ringfold.runtime.engine import Engine
from ringfold.runtime.rows import row_range, take_rows
from torch import Tensor, nn

from tests.harness import run_ranks

VOCABULARY, WIDTH, POSITIONS = 11, 6, 5
ROWS = [7, 5, 2, 9, 1, 8]  # dp = 2, 3, 4 divide few of them; with 2 rows or 1 some ranks have none
CLIP_NORM = 1.5  # clips some of the steps and not others
LEARNING_RATE = 1e-2
# float64, a few thousand operations of values near 1 a step, six steps: the bar of the project
CLOSE = 1e-10


class Reader(nn.Module):
    """Predicts a token from the running mean of those before; one parameter is never used, one only by even tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY)
        self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(1) / torch.arange(1, POSITIONS + 1, device=tokens.device)[:, None]
        return self.head(self.norm(F.gelu(self.hidden(x)))).transpose(1, 2)


def global_batches() -> list[tuple[Tensor, Tensor]]:
    """Return batches in which rows have 0 to all of their positions valid."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for rows in ROWS:
        tokens = torch.randint(0, VOCABULARY, (rows, POSITIONS + 1), generator=generator)
        valid = torch.randint(0, POSITIONS + 1, (rows, 1), generator=generator)
        valid[0] = POSITIONS - 1 if rows == 1 else 0
        batches.append((tokens[:, :-1], tokens[:, 1:].masked_fill(torch.arange(POSITIONS) >= valid, -100)))
    return batches


def valid_pair(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output, target, reduction="sum"), (target != -100).sum()


def named_terms(output: Tensor, target: Tensor) -> dict[str, Any]:
    return {
        "tokens": valid_pair(output, target),
        "even": (output[:, ::2].square().sum(), (target % 2 == 0).sum()),
        "rows": 0.01 * output.square().mean(),
    }


def rows_scalar(output: Tensor, _: Tensor) -> Tensor:
    return output.square().mean()


def two_terms_of_the_row_count(output: Tensor, _: Tensor) -> dict[str, Tensor]:
    return {"first": output.square().mean(), "second": output.abs().mean()}


LOSSES: dict[str, Callable[..., Any]] = {
    "torch": F.cross_entropy,
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "pair": valid_pair,
    "terms": named_terms,
    "scalar": rows_scalar,
    "scalars": two_terms_of_the_row_count,
}


def plain_value(value: Any) -> Tensor:
    if isinstance(value, dict):
        return sum(map(plain_value, value.values()), torch.zeros((), dtype=torch.float64))
    return value[0] / value[1] if isinstance(value, tuple) else value


def plain_training(loss: Callable[..., Any], clip_norm: float | None = CLIP_NORM, make: Callable[[], nn.Module] = Reader) -> dict[str, Any]:
    """Train on whole batches with nothing but torch."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": []}
    for tokens, target in global_batches():
        optimizer.zero_grad()
        value = plain_value(loss(model(tokens), target))
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip_norm is None else clip_norm)
        optimizer.step()
        scheduler.step()
        found["losses"].append(value.item())
        found["norms"].append(norm.item())
        found["grads"].append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found | {"weights": model.state_dict()}


def mine(batch: Any, rank: int, size: int) -> Any:
    rows = len(batch["labels"]) if isinstance(batch, dict) else len(batch[1])
    return take_rows(batch, *row_range(rows, rank, size))


def make_engine(world: Communicator, layout: str = "", model: Callable[[], nn.Module] = Reader, **options: Any) -> Engine:
    torch.manual_seed(world.rank)  # ranks begin with different weights; rank 0's count
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE))
    options.setdefault("loss", F.cross_entropy)
    return Engine(model, DeviceMesh(Layout.parse(layout), world), **options)


def train(
    world: Communicator, micro: int, loss: str, clip_norm: float | None = CLIP_NORM, layout: str = "", make: Callable[[], nn.Module] = Reader
) -> dict[str, Any]:
    engine = make_engine(
        world,
        f"{layout} micro{micro}",
        make,
        loss=LOSSES[loss],
        scheduler=slower,
        clip_norm=clip_norm,
        bucket_mb=0.001,
    )
    return numbers_of(engine)


def numbers_of(engine: Engine) -> dict[str, Any]:
    """Train on all batches, and return losses, norms, gradients and weights, on the CPU."""
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": []}
    for batch in global_batches():
        found["losses"].append(engine.train_step(mine(batch, engine.mesh["dp"].rank, engine.mesh["dp"].size)))
        found["norms"].append(engine.grad_norm)
        found["grads"].append({name: on_cpu(engine.grad(name)) for name, _ in engine.module.named_parameters()})
    assert engine.grad("unused") is None
    assert 0 <= engine.communication_share <= 1
    with engine.whole_parameters():
        return found | {"weights": {name: value.to("cpu", copy=True) for name, value in engine.module.state_dict().items()}}


def on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def slower(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def assert_same_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=CLOSE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=CLOSE)
    for mine_at, theirs_at in zip(found["grads"], expected["grads"], strict=True):
        for name, grad in theirs_at.items():
            torch.testing.assert_close(mine_at[name], grad, rtol=CLOSE, atol=CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=CLOSE, atol=CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_width_has_the_numbers_of_plain_pytorch(size: int, micro: int) -> None:
    expected = plain_training(F.cross_entropy)
    assert min(expected["norms"]) < CLIP_NORM < max(expected["norms"])
    for found in run_ranks(size, train, micro, "torch"):
        assert_same_numbers(found, expected)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("loss", ["module", "pair", "terms", "scalar", "scalars"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_kind_of_loss_has_the_numbers_of_plain_pytorch(size: int, loss: str, micro: int) -> None:
    expected = plain_training(LOSSES[loss])
    for found in run_ranks(size, train, micro, loss):
        assert_same_numbers(found, expected)


def test_without_clipping_the_norm_is_there_when_asked_for() -> None:
    expected = plain_training(valid_pair, clip_norm=None)
    for found in run_ranks(2, train, 2, "pair", None):
        assert_same_numbers(found, expected)


def test_all_ranks_hold_the_same_bits() -> None:
    results = run_ranks(3, train, 2, "pair")
    for found in results[1:]:
        assert found["losses"] == results[0]["losses"]
        assert all(torch.equal(weight, results[0]["weights"][name]) for name, weight in found["weights"].items())


def train_in_two_halves(world: Communicator, folder: Path, first: bool, layout: str = "", make: Callable[[], nn.Module] = Reader) -> dict[str, Any]:
    half = len(ROWS) // 2
    engine = make_engine(
        world,
        f"{layout} micro2",
        make,
        loss=valid_pair,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        clip_norm=CLIP_NORM,
    )
    if not first:
        assert engine.resume(folder) == engine.step == half
    losses, norms, grads = [], [], []
    for batch in itertools.islice(engine.shard(global_batches()), half):
        losses.append(engine.train_step(batch))
        norms.append(engine.grad_norm)
        grads.append({name: engine.grad(name) for name, _ in engine.module.named_parameters()})
    if first:
        engine.save(folder / f"step-{engine.step}")
    with engine.whole_parameters():
        weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return {"losses": losses, "norms": norms, "grads": grads, "weights": weights}


def test_a_checkpoint_goes_on_at_another_width_where_it_stopped(tmp_path: Path) -> None:
    expected = plain_training(valid_pair)
    half = len(ROWS) // 2
    for found in run_ranks(2, train_in_two_halves, tmp_path, True):
        assert found["losses"] == pytest.approx(expected["losses"][:half], rel=CLOSE)
    for found in run_ranks(3, train_in_two_halves, tmp_path, False):
        assert_same_numbers(found, {key: value[half:] if isinstance(value, list) else value for key, value in expected.items()})


def count_passes(world: Communicator) -> list[int]:
    """Train on 1, 4, 4 and 3 rows of one valid token each; return how often the gradients were written again after the sum."""
    passes = 0
    real = gradients.scale

    def counted(*arguments: Any) -> None:
        nonlocal passes
        passes += 1
        real(*arguments)

    gradients.scale = counted
    engine = make_engine(world, loss=valid_pair, clip_norm=1e6)
    found = []
    for rows in (1, 4, 4, 3):
        tokens = torch.ones(rows, POSITIONS, dtype=torch.int64)
        target = torch.full_like(tokens, -100)
        target[:, 0] = 2
        engine.train_step(mine((tokens, target), world.rank, world.size))
        found.append(passes)
    return found


def test_gradients_are_scaled_only_where_the_count_is_new_and_no_power_of_two() -> None:
    assert run_ranks(2, count_passes) == [[0, 1, 1, 2]] * 2


def mean_of_valid(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target).nan_to_num()


def train_with_local_means(world: Communicator) -> dict[str, Any]:
    LOSSES["local"] = mean_of_valid
    return train(world, 1, "local")


def test_a_local_mean_hidden_in_a_scalar_departs() -> None:
    """The mutation: a mean over this rank's valid tokens, weighted by rows, is what others shipped; our oracle must see it."""
    found = run_ranks(2, train_with_local_means)[0]
    with pytest.raises(AssertionError):
        assert_same_numbers(found, plain_training(F.cross_entropy))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.body(image * scale[:, None, None, None])


def image_batches() -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [((draw(rows, 1, 3, 3), draw(rows)), draw(rows, 2)) for rows in (5, 2, 7)]


def train_images(world: Communicator) -> dict[str, Tensor]:
    engine = make_engine(world, model=Images, loss=F.mse_loss)
    for batch in image_batches():
        engine.train_step(mine(batch, world.rank, world.size))
    return dict(engine.module.state_dict())


def test_batch_norm_has_global_statistics_also_where_a_rank_has_no_rows() -> None:
    torch.manual_seed(0)
    model = Images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for inputs, target in image_batches():
        optimizer.zero_grad()
        F.mse_loss(model(*inputs), target).backward()
        optimizer.step()
    for found in run_ranks(3, train_images):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=CLOSE, atol=CLOSE)


def accuracy(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (output.argmax(1) == target)[target != -100].sum(), (target != -100).sum()


def rows_mean(output: Tensor, _: Tensor) -> float:
    return float(output.mean())


def evaluate(world: Communicator) -> tuple[dict[str, float], dict[str, float], bool, Tensor, Tensor, int]:
    engine = make_engine(world, metrics={"accuracy": accuracy, "mean": rows_mean})
    batches = [mine(batch, world.rank, world.size) for batch in global_batches()]
    all_of_them = engine.evaluate(batches)
    tokens, target = batches[2]
    gathered = engine.gather_metric(target)
    flags = engine.gather_metric(torch.tensor(world.rank % 2 == 0))
    return engine.eval_step((tokens, target)), all_of_them, engine.module.training, gathered, flags, len(engine.state_dict())


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_is_exact_over_ranks_and_batches(size: int) -> None:
    torch.manual_seed(0)
    model = Reader()
    batches = global_batches()
    outputs = torch.cat([model(tokens) for tokens, _ in batches]).detach()
    targets = torch.cat([target for _, target in batches])
    right, valid = accuracy(outputs, targets)
    for rank, (one, every, training, gathered, flags, names) in enumerate(run_ranks(size, evaluate)):
        assert every["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-13)
        assert every["accuracy"] == int(right) / int(valid)
        assert every["mean"] == pytest.approx(outputs.mean().item(), rel=1e-12)
        assert one["loss"] == pytest.approx(F.cross_entropy(model(batches[2][0]), batches[2][1]).item(), rel=1e-13)
        assert training
        assert torch.equal(gathered, batches[2][1])
        assert flags.tolist() == [r % 2 == 0 for r in range(size)]
        assert names == (len(model.state_dict()) if rank == 0 else 0)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, *, left: Tensor, right: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.layer(left - right) * factor}


def of_logits(output: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(output["logits"], labels, reduction="sum"), len(labels)


def train_on_every_form(world: Communicator) -> list[float]:
    left, right, labels = torch.arange(15.0, dtype=torch.float64).view(5, 3), torch.ones(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    forms: list[Any] = [
        {"left": left, "right": right, "labels": labels, "factor": 0.5},
        ({"left": left, "right": right}, labels),
        [{"left": left, "right": right}, labels],
    ]
    engine = make_engine(world, "micro2", model=Keywords, loss=of_logits, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    return [engine.train_step(mine(form, world.rank, world.size)) for form in forms]


def test_a_batch_may_be_a_pair_or_a_mapping() -> None:
    losses = run_ranks(2, train_on_every_form)
    assert losses[0] == losses[1]
    assert losses[0][1] == losses[0][2] != losses[0][0]


def count_operations(world: Communicator) -> list[int]:
    engine = make_engine(world, "micro2")
    counts = []
    for batch in global_batches()[:3]:
        before = world.page.read().next_op
        engine.train_step(mine(batch, world.rank, world.size))
        counts.append(world.page.read().next_op - before)
    return counts


def test_a_step_costs_two_small_messages_and_one_for_each_bucket() -> None:
    assert run_ranks(2, count_operations) == [[3, 3, 3]] * 2
