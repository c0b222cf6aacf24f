"""The loss rule: totals and counts of any split of the rows add up to what torch computes on all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.loss import UserLoss, loss_rule
from torch import Tensor, nn

ROWS, POSITIONS, CLASSES = 7, 5, 4
SPLITS = [[7], [3, 4], [1, 0, 6], [2, 2, 2, 1]]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGITS = torch.randn(ROWS, CLASSES, POSITIONS, dtype=torch.float64, generator=draw())
FLAT = torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=draw(1))
TOKENS = torch.randint(0, CLASSES, (ROWS, POSITIONS), generator=draw(2))
# Rows 0 and 4 have no valid target, the others differ in how many they have.
HOLEY = TOKENS.masked_fill(torch.arange(POSITIONS) < torch.tensor([5, 1, 0, 3, 5, 2, 4])[:, None], -100)
REAL = torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=draw(3))
UNIT = torch.rand(ROWS, CLASSES, dtype=torch.float64, generator=draw(4))
SIGNS = UNIT.round() * 2 - 1
WEIGHT = torch.tensor([0.5, 2.0, 1.25, 0.1], dtype=torch.float64)
PROBABLE = F.softmax(LOGITS.flip(0), dim=1)
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=draw(5))

CASES: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "cross_entropy": (F.cross_entropy, LOGITS, TOKENS),
    "cross_entropy with ignored targets": (F.cross_entropy, LOGITS, HOLEY),
    "cross_entropy with ignore_index": (partial(F.cross_entropy, ignore_index=2), LOGITS, TOKENS),
    "cross_entropy with class weights": (partial(F.cross_entropy, weight=WEIGHT), LOGITS, HOLEY),
    "cross_entropy with label smoothing": (partial(F.cross_entropy, label_smoothing=0.1), LOGITS, HOLEY),
    "cross_entropy with weights and smoothing": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.2), LOGITS, TOKENS),
    "cross_entropy of probabilities": (nn.CrossEntropyLoss(), LOGITS, PROBABLE),
    "cross_entropy of probabilities with weights": (partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1), LOGITS, PROBABLE),
    "cross_entropy of one label a row": (F.cross_entropy, FLAT, LABELS),
    "cross_entropy summed": (partial(F.cross_entropy, reduction="sum"), LOGITS, HOLEY),
    "nll_loss": (nn.NLLLoss(weight=WEIGHT), F.log_softmax(LOGITS, 1), HOLEY),
    "mse_loss": (F.mse_loss, FLAT, REAL),
    "MSELoss summed": (nn.MSELoss(reduction="sum"), FLAT, REAL),
    "l1_loss": (nn.L1Loss(), FLAT, REAL),
    "smooth_l1_loss": (partial(F.smooth_l1_loss, beta=0.3), FLAT, REAL),
    "SmoothL1Loss": (nn.SmoothL1Loss(beta=0.3), FLAT, REAL),
    "huber_loss": (nn.HuberLoss(delta=0.2), FLAT, REAL),
    "binary_cross_entropy": (nn.BCELoss(weight=WEIGHT), torch.sigmoid(FLAT), UNIT),
    "binary_cross_entropy_with_logits": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0)), FLAT, UNIT),
    "kl_div": (F.kl_div, F.log_softmax(FLAT, 1), F.softmax(REAL, 1)),
    "kl_div over rows": (nn.KLDivLoss(reduction="batchmean", log_target=True), F.log_softmax(FLAT, 1), F.log_softmax(REAL, 1)),
    "gaussian_nll_loss": (nn.GaussianNLLLoss(full=True), (FLAT, UNIT + 0.1), REAL),
    "gaussian_nll_loss of one variance": (partial(F.gaussian_nll_loss, var=0.5), FLAT, REAL),
    "poisson_nll_loss": (nn.PoissonNLLLoss(full=True), FLAT, UNIT),
    "soft_margin_loss": (nn.SoftMarginLoss(), FLAT, SIGNS),
    "hinge_embedding_loss": (nn.HingeEmbeddingLoss(margin=0.7), FLAT, SIGNS),
    "multilabel_soft_margin_loss": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), FLAT, UNIT.round()),
    "multilabel_margin_loss": (nn.MultiLabelMarginLoss(), FLAT, torch.tensor([[3, 0, -1, 1]] * ROWS)),
    "multi_margin_loss": (nn.MultiMarginLoss(weight=WEIGHT), FLAT, LABELS),
    "a scalar of the user's": (lambda output, target: ((output - target) ** 4).mean(), FLAT, REAL),
    "a pair of the user's": (lambda output, target: ((output * target.sign()).sum(), (target > 0).sum()), FLAT, REAL),
    "terms of the user's": (
        lambda output, target: {"main": (output.square().sum(), (target > 0).sum()), "extra": 0.1 * output.abs().mean()},
        FLAT,
        REAL,
    ),
}


def cut(value: Any, start: int, stop: int) -> Any:
    return tuple(part[start:stop] for part in value) if isinstance(value, tuple) else value[start:stop]


def by_the_rule(loss: Callable[..., Any], output: Any, target: Any, split: list[int]) -> float:
    """Compute the mean from the totals and counts of the pieces, as ranks and microbatches do."""
    rule = loss_rule(loss)
    ahead, start = 0.0, 0
    sums: dict[str, list[float]] = {}
    for rows in split:
        piece, goal = cut(output, start, start + rows), cut(target, start, start + rows)
        start += rows
        ahead += rule.count_ahead(goal, rows)
        for name, term in (rule(piece, goal, rows) if rows else {}).items():
            total, count = sums.get(name, (0.0, None))
            sums[name] = [total + float(term.total), None if term.count is None else term.count + (count or 0.0)]  # type: ignore[list-item]
    return sum(total / (rule.denominator(ahead) if count is None else count) for total, count in sums.values())


def by_torch(loss: Callable[..., Any], output: Any, target: Any) -> float:
    value = loss(output[0], target, output[1]) if isinstance(output, tuple) else loss(output, target)
    parts = value.values() if isinstance(value, dict) else [value]
    return sum(float(part[0]) / float(part[1]) if isinstance(part, tuple) else float(part) for part in parts)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of kl_div, which is right
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_pieces_of_a_batch_add_up_to_torchs_own_mean(case: str, split: list[int]) -> None:
    loss, output, target = CASES[case]
    # At most a few hundred float64 additions of values near 1, in another order.
    assert by_the_rule(loss, output, target, split) == pytest.approx(by_torch(loss, output, target), rel=1e-13)


def test_a_local_mean_is_told_from_the_global_one() -> None:
    """The mutation this suite exists for: means of pieces with unequal valid targets, averaged, are another number."""
    pieces = [by_torch(F.cross_entropy, LOGITS[a:b], HOLEY[a:b]) for a, b in ((0, 3), (3, 7))]
    assert sum(pieces) / 2 != pytest.approx(by_torch(F.cross_entropy, LOGITS, HOLEY), rel=1e-3)


def test_torchs_losses_know_their_count_before_the_forward_and_others_after() -> None:
    assert loss_rule(F.cross_entropy).signature is not None
    assert loss_rule(nn.MSELoss()).signature is not None
    assert loss_rule(lambda output, target: output.sum() - target.sum()).signature is None


def test_a_subclass_with_a_forward_of_its_own_is_the_users_loss() -> None:
    class Scaled(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 3 * super().forward(input, target)

    class Renamed(nn.MSELoss):
        pass

    assert isinstance(loss_rule(Scaled()), UserLoss)
    assert by_the_rule(Scaled(), FLAT, REAL, [3, 4]) == pytest.approx(3 * float(F.mse_loss(FLAT, REAL)), rel=1e-13)
    assert not isinstance(loss_rule(Renamed()), UserLoss)


def test_class_weights_are_read_at_every_call_and_in_the_outputs_dtype() -> None:
    loss = nn.CrossEntropyLoss(weight=WEIGHT.float())
    rule = loss_rule(loss)
    before = float(rule(LOGITS, TOKENS, ROWS)["loss"].total)
    loss.weight.mul_(2)
    assert float(rule(LOGITS, TOKENS, ROWS)["loss"].total) == pytest.approx(2 * before, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "reduction='none'.*mean, sum.*pair"),
        (partial(F.mse_loss, reduction="none"), "reduction='none'"),
        (partial(F.mse_loss, reduction="batchmean"), "reduction='batchmean'"),
        (partial(F.mse_loss, size_average=False), "size_average"),
        (partial(F.cross_entropy, FLAT), "binds its first argument"),
        (partial(F.mse_loss, weight=REAL), "weight for each element"),
        ("cross_entropy", "expected a function"),
        (nn.Bilinear(2, 2, 1), "trainable parameters"),
    ],
)
def test_what_has_no_global_mean_is_refused_before_training(loss: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loss_rule(loss)


@pytest.mark.parametrize(
    ("loss", "target", "words"),
    [
        (F.mse_loss, REAL[:, :1], r"\(7, 4\).*\(7, 1\).*same shape"),
        (partial(F.binary_cross_entropy_with_logits, weight=UNIT), UNIT, "one entry for each row"),
        (lambda output, _: output.mean(1), REAL, r"shape \(7,\).*scalar"),
        (lambda output, _: (output.sum(), 3, 4), REAL, "3 values"),
        (lambda output, _: (output.sum(), -1), REAL, "count -1"),
        (lambda output, _: (output.sum(), float("nan")), REAL, "count nan"),
        (lambda _output, _target: 1.5, REAL, "returned float"),
        (lambda _output, _target: {}, REAL, "empty mapping"),
        (nn.GaussianNLLLoss(), REAL, "mean, variance"),
    ],
)
def test_what_a_loss_must_not_return_is_said_in_one_error(loss: Any, target: Tensor, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loss_rule(loss)(FLAT, target, ROWS)
