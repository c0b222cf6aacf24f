"""verify: right layouts pass, each well-known mistake is found and named, and what cannot be verified is one clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.layout import Layout
from ringfold.runtime import oracle
from ringfold.runtime.comparison import compare
from ringfold.runtime.oracle import Step
from ringfold.runtime.verify import main, verify
from torch import Tensor, nn

VOCABULARY, POSITIONS = 9, 4
TOKENS = torch.randint(0, VOCABULARY, (8, POSITIONS), generator=torch.Generator().manual_seed(1))
BATCH = (TOKENS, TOKENS.roll(-1, 1))


class Model(nn.Module):
    """Dropout must not matter, BatchNorm must be synchronised, and one parameter is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, VOCABULARY)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.embedding(tokens).cumsum(1).transpose(1, 2)))
        return self.head(x.transpose(1, 2)).transpose(1, 2)


def random_model() -> nn.Module:
    class Noisy(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.dropout(super().forward(tokens), 0.5)

    return Noisy()


def without_norm() -> nn.Module:
    model = Model()
    model.norm = nn.Identity()  # type: ignore[assignment]
    return model


def steps() -> list[Step]:
    torch.manual_seed(0)
    model = oracle.build(without_norm())
    return oracle.train_plainly(model, oracle.shape_batches(model, BATCH, F.cross_entropy, 2), F.cross_entropy, None, 2)[0]


def test_batches_are_of_a_row_or_of_two_if_the_model_takes_no_less() -> None:
    x = torch.randn(5, 3)
    for model, rows in ((nn.Linear(3, 2), [5, 1, 3]), (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), [5, 2, 3])):
        batches = oracle.shape_batches(model.double(), (x, x), F.mse_loss, 2)
        assert [batch.rows for batch in batches] == rows


def spoil(kind: str, found: list[Step]) -> None:
    grads, weights = found[0].grads, found[0].weights
    head = grads["head.weight"]
    assert head is not None
    if kind in ("dp", "1/dp", "1/micro"):
        factor = {"dp": 4.0, "1/dp": 0.25, "1/micro": 1 / 3}[kind]
        found[0] = replace(found[0], grads={n: None if g is None else g * factor for n, g in grads.items()}, norm=found[0].norm * factor)
    elif kind == "element":
        head[3, 2] += 1e-6
    elif kind == "float32":
        head.copy_(head.float())
    elif kind == "decayed":
        weights["unused"].mul_(0.999)
    elif kind == "missing":
        grads["head.weight"] = None
    elif kind == "nan":
        head[1, 1] = float("nan")
    elif kind == "norm":
        found[0] = replace(found[0], norm=found[0].norm * 2**0.5)


@pytest.mark.parametrize(
    ("kind", "what", "words"),
    [
        ("dp", "gradient of embedding.weight", "dp = 4 times too large"),
        ("1/dp", "gradient of embedding.weight", "1/dp = 1/4"),
        ("1/micro", "gradient of embedding.weight", "1/micro = 1/3"),
        ("element", "gradient of head.weight", "at [3, 2]"),
        ("float32", "gradient of head.weight", "float32 rounding"),
        ("decayed", "weight unused", "0.999"),
        ("missing", "gradient of head.weight", "this layout  none"),
        ("nan", "gradient of head.weight", "nan"),
        ("norm", "gradient norm before clipping", "ratio 1.41421"),
    ],
)
def test_each_mistake_is_found_and_named(kind: str, what: str, words: str) -> None:
    """Each is a mutation of right numbers."""
    expected, found = steps(), steps()
    spoil(kind, found)
    report = compare(Layout.parse("dp4 micro3"), expected, found, [["a", "a", "a"]] * 4, 1.0)
    first = report.departures[0]
    assert first.step == 1
    assert first.what == what
    assert words in str(first)


def test_right_numbers_have_no_departure_and_drifting_copies_have_one() -> None:
    assert compare(Layout.parse("dp2"), steps(), steps(), [["a", "b", "c"]] * 2, 1.0).ok
    report = compare(Layout.parse("dp2"), steps(), steps(), [["a", "b", "c"], ["a", "x", "y"]], 1.0)
    assert [departure.step for departure in report.departures] == [2, 3]
    assert "other bits on rank 1 than on rank 0" in str(report.departures[0])


def inner_function() -> Any:
    def model_fn() -> nn.Module:
        return Model()

    return model_fn


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((lambda: Model(), BATCH, F.cross_entropy, "dp2"), "model_fn.*lambda.*define it with def at the top"),
        ((inner_function(), BATCH, F.cross_entropy, "dp2"), "model_fn.*inner_function.*cannot be sent"),
        ((Model, BATCH, lambda output, _: output.sum(), "dp2"), "loss.*lambda"),
        ((Model, BATCH, F.cross_entropy, "dp7"), "dp7 needs a batch of 9 rows or more.*this one has 8"),
        ((Model, BATCH, F.cross_entropy, "dp1 pp2"), "pp2 is not built"),
        ((random_model, BATCH, F.cross_entropy, "dp2"), "draws random numbers"),
        ((dict, BATCH, F.cross_entropy, "dp2"), "model_fn returned dict"),
    ],
)
def test_what_cannot_be_verified_is_one_error_before_anything_starts(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        verify(*arguments)


SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn

class Model(nn.Module):
    # Dropout must not matter, BatchNorm must be synchronised, and one parameter is used by nobody.
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.body(x)

def right():
    x = torch.randn(8, 3)  # drawn anew wherever this is called
    return lambda: Model(), (x, x[:, :2].sin()), F.mse_loss

def over_positives(output, target):
    return (output - target)[target > 0].square().mean()

def wrong():
    x = torch.randn(7, 3)
    return {"model_fn": lambda: nn.Linear(3, 2), "batch": (x, x[:, :2]), "loss": over_positives}

def nothing():
    return None
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "verified_train", raising=False)


@pytest.mark.usefixtures("script")
def test_the_command_passes_a_right_layout_and_draws_a_table() -> None:
    command = [sys.executable, "-m", "ringfold.runtime.verify", "train.py:right", "--layout", "dp2 micro1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'layout "dp2 fp64": losses' in done.stdout
    assert "every number of 7 parameters agrees" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith("same")]
    assert [int(row[1]) for row in rows] == [7, 2, 5]
    assert 0 < max(float(row[-3]) for row in rows) < 1e-9  # of gradients, also of the bias before the norm, which is zero but for rounding


@pytest.mark.usefixtures("script")
def test_a_scalar_that_is_no_mean_over_rows_is_found_and_explained() -> None:
    """The mistake that scalars invite, as others shipped it: each rank divides by its own count."""
    done = CliRunner().invoke(main, ["train.py:wrong", "--layout", "dp2 micro2"])
    assert done.exit_code == 1
    assert "DEPARTS" in done.output
    assert "the first departure is in step 1, loss" in done.output
    assert "Return a pair (total, count)" in " ".join(done.output.split())


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize(
    ("subject", "layout", "words"),
    [
        ("train.py:rihgt", "dp2", "did you mean 'right'?"),
        ("train.py:nothing", "dp2", "must return (model_fn, batch, loss)"),
        ("absent.py:right", "dp2", "there is no file absent.py"),
        ("train.py", "dp2", "expected SCRIPT.py:FUNCTION"),
        ("train.py:right", "dq2", "dq2"),
    ],
)
def test_a_wrong_command_is_one_error_and_status_2(subject: str, layout: str, words: str) -> None:
    done = CliRunner().invoke(main, [subject, "--layout", layout])
    assert done.exit_code == 2
    assert done.output.startswith("Error: ")
    assert words in done.output


@pytest.mark.parametrize(("layout", "factor", "words"), [("dp1 tp2", 0.5, "a factor of 1/tp = 1/2"), ("dp3 cp2", 2.0, "cp = 2 times too large")])
def test_a_sum_inside_layers_that_is_left_out_or_done_twice_is_named(layout: str, factor: float, words: str) -> None:
    expected, found = steps(), steps()
    found[0] = replace(found[0], grads={name: None if grad is None else grad * factor for name, grad in found[0].grads.items()})
    report = compare(Layout.parse(layout), expected, found, [["a", "a", "a"]] * 2, 1.0)
    assert words in str(report.departures[0])


def test_the_command_proves_divided_layers_of_the_example() -> None:
    script = Path(__file__).parents[2] / "examples" / "train_gpt.py"
    command = [sys.executable, "-m", "ringfold", "verify", f"{script}:verified", "--layout", "dp1 tp2 zero1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every number of 19 parameters agrees" in done.stdout
