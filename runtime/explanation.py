"""Explanation: what an engine makes of a model, as a value that prints as text.

every parameter   its dtypes: trained, computed with, gradient as it is summed over ranks and as it is kept, optimizer state
every kind of collective of a step, with what a rank has to send at the least
the bytes that this rank keeps between steps, by purpose, as they are and as the layout promises
what is recomputed
what is divided inside layers
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from ringfold.mixed_precision.casting import Casting
from ringfold.mixed_precision.linears import QuantisedLinears
from ringfold.mixed_precision.quantised import E4M3
from ringfold.parallel.traffic import Traffic
from ringfold.parallel.zero.sharding import Sharding
from torch import nn

__all__ = ["Explanation", "ParameterUse", "uses_of_parameters"]


@dataclass(frozen=True)
class ParameterUse:
    """The dtypes in which one parameter is kept and used.

    trained: what the optimizer steps on. computed: what the module has. product: in which it multiplies, if that is neither. output: what the
    module gives. summed, kept: its gradient, on its way over ranks and afterwards; these and state are empty where it is frozen.
    """

    name: str
    numel: int
    trained: torch.dtype
    computed: torch.dtype
    output: torch.dtype
    product: torch.dtype | None = None
    summed: torch.dtype | None = None
    kept: torch.dtype | None = None
    state: dict[str, torch.dtype] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """Return the dtypes as words."""
        state = ", ".join(f"{name} {_word(dtype)}" for name, dtype in self.state.items())
        dtypes = (self.trained, self.computed, self.product or self.computed, self.output, self.summed, self.kept)
        return (*(_word(dtype) for dtype in dtypes), state or "-")


def uses_of_parameters(
    module: nn.Module, sharding: Sharding | None, casting: Casting | None, linears: QuantisedLinears | None, optimizer: torch.optim.Optimizer
) -> list[ParameterUse]:
    """Return the dtypes of every parameter; without sharding, state is known when the optimizer has made it."""
    uses = []
    for name, parameter in module.named_parameters():
        use = ParameterUse(name, parameter.numel(), parameter.dtype, parameter.dtype, parameter.dtype)
        if sharding is not None:
            use = replace(use, trained=sharding.trained_dtype(parameter))
        if casting is not None and parameter.is_floating_point():
            use = replace(use, output=casting.compute)
        if linears is not None and name.removesuffix(".weight") in linears.names:
            use = replace(use, product=E4M3)
        if parameter.requires_grad and sharding is not None:
            summed, kept = sharding.gradient_dtypes(parameter)
            use = replace(use, summed=summed, kept=kept, state=sharding.state_dtypes(parameter))
        elif parameter.requires_grad:
            values = optimizer.state.get(parameter, {}).items()
            state = {
                key: value.dtype for key, value in values if isinstance(value, torch.Tensor) and value.shape == parameter.shape and key != "step"
            }
            use = replace(use, summed=parameter.dtype, kept=parameter.dtype, state=state)
        uses.append(use)
    return uses


@dataclass(frozen=True)
class Explanation:
    """What `Engine.explain()` returns; see the module. `predicted` and `memory` are bytes by purpose."""

    layout: str
    ranks: int
    parameters: Sequence[ParameterUse]
    traffic: Sequence[Traffic]
    memory: dict[str, int]
    predicted: dict[str, float]
    recomputation: str
    built: str
    divided: str = ""

    def __str__(self) -> str:
        count = sum(use.numel for use in self.parameters)
        head = f"layout {self.layout}: {self.ranks} rank{'s' * (self.ranks > 1)}, {count:,} parameters{' on this one' * bool(self.divided)}"
        tables = [self._parameter_table(), self._traffic_table(), self._memory_table(), self.divided, self.recomputation, f"built {self.built}"]
        return "\n\n".join([head, *filter(None, tables)])

    def _parameter_table(self) -> str:
        alike: dict[tuple[str, ...], list[ParameterUse]] = {}
        for use in self.parameters:
            alike.setdefault((re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", use.name), *use.cells()), []).append(use)
        rows = [("parameter", "", "elements", "trained", "computed", "multiplied", "module gives", "summed", "gradient", "optimizer state")]
        for (name, *cells), uses in alike.items():
            rows.append((name, f"x {len(uses)}" if len(uses) > 1 else "", f"{sum(use.numel for use in uses):,}", *cells))  # type: ignore[arg-type]
        return _table(rows, right=(2,))

    def _traffic_table(self) -> str:
        if not self.traffic:
            return "a step sends nothing but the loss and its counts"
        rows = [("a step sends", "", "over", "collectives", "MiB together", "MiB from each rank, at least")]
        for each in self.traffic:
            rows.append((each.purpose, each.operation, f"{each.ranks} ranks", str(each.count), _mib(each.nbytes), _mib(each.sent_nbytes)))
        return _table(rows, right=(3, 4, 5))

    def _memory_table(self) -> str:
        rows = [("this rank keeps", "MiB", "promised MiB")]
        for purpose, nbytes in self.memory.items():
            promised = self.predicted.get(purpose)
            if not nbytes and not promised:
                continue
            rows.append((purpose, _mib(nbytes), "" if promised is None else _mib(promised)))
        return _table(rows, right=(1, 2))


def _table(rows: Sequence[tuple[str, ...]], right: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _word(dtype: torch.dtype | None) -> str:
    return "-" if dtype is None else str(dtype).removeprefix("torch.")


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2f}"
