"""Comparison of a layout's training steps with the oracle's: what departs first, by how much, and what usually causes such a ratio."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from ringfold.parallel.layout import Layout
from ringfold.runtime.oracle import Step
from torch import Tensor

__all__ = ["Departure", "Report", "compare"]

# Right results differ by rounding alone: some thousand float64 operations, 1e-16 each, a few of which cancel digits.
RELATIVE = 1e-9
# What a tensor's greatest value is taken for where it is smaller than anything that matters in a step: a gradient that is zero but for
# rounding (a bias before a normalisation) equals zero. Of the gradient norm; of weights and losses, of 1.
SMALL = 1e-3
FLOAT32_ROUNDING = 1e-5


@dataclass(frozen=True)
class Departure:
    """One number that is not the oracle's: of a tensor its worst element."""

    step: int
    what: str
    expected: str
    found: str
    ratio: float | None
    cause: str | None

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"  (ratio {self.ratio:.6g})"
        cause = "" if self.cause is None else f"\n  likely cause: {self.cause}"
        return f"step {self.step}, {self.what}:\n  one process  {self.expected}\n  this layout  {self.found}{ratio}{cause}"


@dataclass(frozen=True)
class Row:
    """One step: the losses and the greatest differences, relative to the greatest value of the tensor they are in (see SMALL)."""

    step: int
    rows: int
    expected_loss: float
    found_loss: float
    norm: float
    gradient: float
    weight: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """What `verify` found; `departures` are in the order in which training meets them."""

    layout: Layout
    parameters: int
    table: tuple[Row, ...]
    departures: tuple[Departure, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the layout has the numbers of one process."""
        return not self.departures

    def print(self) -> None:
        """Print the report, in colour on a terminal."""
        Console(highlight=False).print(self)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, highlight=False)
        console.print(self)
        text = console.file
        assert isinstance(text, io.StringIO)
        return text.getvalue().rstrip()

    def __rich__(self) -> RenderableType:
        title = f'layout "{self.layout}": losses, and greatest differences from plain PyTorch'
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in ("step", "rows", "one process", "this layout", "norm", "gradients", "weights", ""):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.table:
            mark = Text("same", style="green") if row.ok else Text("DEPARTS", style="bold red")
            differences = [f"{value:.1e}" for value in (row.norm, row.gradient, row.weight)]
            table.add_row(str(row.step), str(row.rows), f"{row.expected_loss:.12f}", f"{row.found_loss:.12f}", *differences, mark)
        if self.ok:
            verdict = Text(f"every number of {self.parameters} parameters agrees ({self.seconds:.1f} s)", style="green")
        else:
            more = f"\n{len(self.departures) - 1} more numbers depart." if len(self.departures) > 1 else ""
            verdict = Text(f"the first departure is in {self.departures[0]}{more}", style="red")
        return Group(table, Text(""), verdict)


def compare(layout: Layout, expected: list[Step], found: list[Step], digests: list[list[str]], seconds: float) -> Report:
    """Compare step by step: loss, gradients, norm, weights, then the ranks' weights among themselves."""
    departures: list[Departure] = []
    rows = []
    for number, (one, ours) in enumerate(zip(expected, found, strict=True), start=1):
        here = [
            *_loss_departures(number, one, ours, layout),
            *_gradient_departures(number, one, ours, layout),
            *_norm_departures(number, one, ours, layout),
            *_weight_departures(number, one, ours),
            *_replica_departures(number, [of_rank[number - 1] for of_rank in digests]),
        ]
        gradient = max((_difference(ours.grads.get(name), grad, one.norm) for name, grad in one.grads.items()), default=0.0)
        weight = max((_difference(ours.weights.get(name), value) for name, value in one.weights.items()), default=0.0)
        rows.append(Row(number, one.rows, one.loss, ours.loss, abs(ours.norm / one.norm - 1) if one.norm else 0.0, gradient, weight, not here))
        departures += here
    return Report(layout, len(expected[0].grads), tuple(rows), tuple(departures), seconds)


def _loss_departures(step: int, one: Step, ours: Step, layout: Layout) -> Iterator[Departure]:
    if not _close(ours.loss, one.loss):
        named = next((cause for cause, value in one.wrong_losses.items() if _close(ours.loss, value)), None)
        ratio = ours.loss / one.loss if one.loss else None
        yield Departure(step, "loss", f"{one.loss:.15g}", f"{ours.loss:.15g}", ratio, named or _cause(ratio, layout))


def _gradient_departures(step: int, one: Step, ours: Step, layout: Layout) -> Iterator[Departure]:
    for name, expected in one.grads.items():
        found = ours.grads.get(name)
        what = f"gradient of {name}"
        if expected is None or found is None:
            if (expected is None) != (found is None):
                kinds = ["none" if grad is None else f"norm {grad.norm().item():.6g}" for grad in (expected, found)]
                yield Departure(step, what, kinds[0], kinds[1], None, None)
            continue
        if not _difference(found, expected, one.norm) <= RELATIVE:  # a NaN is not
            ratio = _ratio(found, expected)
            yield Departure(step, what, *_worst(found, expected), ratio, _cause(ratio, layout) or _rounding(found, expected))


def _norm_departures(step: int, one: Step, ours: Step, layout: Layout) -> Iterator[Departure]:
    if not _close(ours.norm, one.norm):
        ratio = ours.norm / one.norm if one.norm else None
        yield Departure(step, "gradient norm before clipping", f"{one.norm:.15g}", f"{ours.norm:.15g}", ratio, _cause(ratio, layout))


def _weight_departures(step: int, one: Step, ours: Step) -> Iterator[Departure]:
    for name, expected in one.weights.items():
        found = ours.weights.get(name)
        if found is None:
            yield Departure(step, f"weight {name}", f"shape {tuple(expected.shape)}", "missing", None, "the layout's model has other names")
        elif not _difference(found, expected) <= RELATIVE:
            cause = _rounding(found, expected)
            yield Departure(step, f"weight {name}", *_worst(found, expected), _ratio(found, expected), cause)


def _replica_departures(step: int, digests: list[str]) -> Iterator[Departure]:
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        ranks = f"rank {', '.join(map(str, others))}"
        cause = "ranks update their copies with different gradients: one of them is not reduced, or state differs"
        yield Departure(step, "weights of the copies", "the same bits on every rank", f"other bits on {ranks} than on rank 0", None, cause)


def _close(found: float, expected: float) -> bool:
    return abs(found - expected) <= RELATIVE * (abs(expected) + SMALL)


def _difference(found: Tensor | None, expected: Tensor | None, unit: float = 1.0) -> float:
    """Return the greatest difference relative to the greatest value and SMALL units."""
    if found is None or expected is None or not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() + SMALL * (unit or 1.0)) if difference else 0.0


def _worst(found: Tensor, expected: Tensor) -> tuple[str, str]:
    """Return the element that is furthest off, with its place, in both."""
    at = int((found - expected).abs().nan_to_num(nan=torch.inf).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), expected.shape)]
    return f"{expected.flatten()[at].item():.15g} at {place}", f"{found.flatten()[at].item():.15g}"


def _ratio(found: Tensor, expected: Tensor) -> float | None:
    """Return the factor between two tensors where one factor explains the whole difference."""
    square = float((expected.double() ** 2).sum())
    if not square:
        return None
    ratio = float((found.double() * expected.double()).sum()) / square
    rest = (found.double() - ratio * expected.double()).norm().item()
    return ratio if rest <= 1e-6 * found.double().norm().item() else None


def _cause(ratio: float | None, layout: Layout) -> str | None:
    dp, micro = layout.sizes["dp"], layout.micro
    known = {
        dp: f"dp = {dp} times too large: summed over ranks after it was already a global mean",
        1 / dp: f"a factor of 1/dp = 1/{dp}: averaged over ranks once too often",
        micro: f"micro = {micro} times too large: microbatches were added up, each a mean of its own",
        1 / micro: f"a factor of 1/micro = 1/{micro}: divided by the number of microbatches once too often",
        dp * micro: f"dp x micro = {dp * micro} times too large: pieces were added up, each a mean of its own",
        1 / (dp * micro): f"a factor of 1/(dp x micro) = 1/{dp * micro}: divided by the number of pieces once too often",
    }
    for axis in ("tp", "cp"):
        n = layout.sizes[axis]
        known.setdefault(n, f"{axis} = {n} times too large: summed over its ranks, each of which had the whole")
        known.setdefault(1 / n, f"a factor of 1/{axis} = 1/{n}: not summed over its ranks, or divided by their number")
    if ratio is None:
        return None
    return next((cause for factor, cause in known.items() if factor != 1 and abs(ratio / factor - 1) < 1e-6), None)


def _rounding(found: Tensor, expected: Tensor) -> str | None:
    if _difference(found, expected) < FLOAT32_ROUNDING:
        return "a difference of the size of a float32 rounding: the model or the loss leaves float64 somewhere (.float(), a float32 constant)"
    return None
