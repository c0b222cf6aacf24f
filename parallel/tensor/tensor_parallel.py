"""TensorParallel: a model of which each rank of the axis "tp" has a part of the large parameters (Shoeybi et al., arXiv:1909.08053).

The model's code is not changed. While it runs, the parameters that are divided are `Split` tensors, which have the shape of the whole; what its
functions make of them, and what ranks tell each other for that, follows from rules (parallel/split). Between runs they are ordinary parameters
with this rank's part in them, which is what optimizers, ZeRO and the reduction of gradients over "dp" see. A parameter that is not divided
has the same values and the same gradient on all ranks of the axis.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.placement import Placement, Shard
from ringfold.parallel.split import exchange
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.stand_ins import Divided
from ringfold.parallel.tensor.plan import Plan, choose_plan, shards_of
from torch import Tensor, nn

__all__ = ["TensorParallel"]


@dataclass(frozen=True)
class _Divided:
    """A parameter that is divided."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    shard: Shard
    cut: Cut


class TensorParallel:
    """Divide the parameters of `module`, whole and alike on all ranks of `comm`, by a plan (plan.py).

    Raises:
        ConfigError: the plan does not fit, nothing is divided, or a parameter that is used in several places is divided differently.
    """

    def __init__(self, module: nn.Module, comm: Communicator, plan: Plan | None = None) -> None:
        self.axis = Axis("tp", comm)
        self.plan = choose_plan(module, comm.size, plan)
        self._divided = self._divide(module)
        if not self._divided:
            raise ConfigError(
                f"tp{comm.size}: no parameter is divided: no module of {type(module).__name__} has a name that is known. Say which are, as in "
                'Engine(plan={"blocks.*.q": "column", "blocks.*.out": "row"}).'
            )
        self._by_parameter = {id(each.parameter): each for each in self._divided}

    @property
    def divided(self) -> Divided:
        """The shape of the whole and the cut of each parameter that is divided."""
        return {each.parameter: (each.shape, each.cut) for each in self._divided}

    def is_divided(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._by_parameter

    def placements(self) -> dict[str, Placement]:
        """Return where the parameters lie that are divided, by name."""
        return {each.name: Placement(each.name, tuple(each.shape), {"tp": each.shard}) for each in self._divided}

    def explain(self) -> str:
        """Return a line for each kind of module that is divided: its name, the plan's word, elements of the wholes and of this rank's parts."""
        alike: dict[tuple[str, str], list[int]] = {}
        for each in self._divided:
            module, _, name = each.name.rpartition(".")
            pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", each.name)
            found = alike.setdefault((pattern, self.plan.get(module, f"dim {each.shard.dim}, as {name}")), [0, 0, 0])
            for place, count in enumerate((1, each.shape.numel(), each.parameter.numel())):
                found[place] += count
        rows = [("divided over tp", "", "", "elements", "this rank's")]
        rows += [(name, word, f"x {n}" if n > 1 else "", f"{whole:,}", f"{part:,}") for (name, word), (n, whole, part) in alike.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.rjust(w) if k > 2 else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows)

    def sum_of_parts(self, value: float) -> float:
        """Return the sum of a number that each rank has computed of its parts; collective."""
        total = torch.tensor([value], dtype=torch.float64, device="cpu")
        self.axis.comm.all_reduce(total)
        return float(total)

    def whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """Put together what each rank has of values that are divided as the parameter is; the values themselves if it is not. Collective."""
        divided = self._by_parameter.get(id(parameter))
        return local if divided is None else exchange.gathered(local.detach().view(divided.parameter.shape), divided.cut)

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's part of whole values."""
        divided = self._by_parameter.get(id(parameter))
        return whole if divided is None else divided.cut.take(whole)

    @contextlib.contextmanager
    def everything(self, write: bool = False) -> Iterator[None]:
        """Have whole parameters in the model inside; with `write` what is changed there, alike on all ranks, stays. Collective."""
        kept = [(each, each.parameter.data) for each in self._divided]
        for each, local in kept:
            each.parameter.data = self.whole(each.parameter, local)
        try:
            yield
        finally:
            for each, local in kept:
                if write:
                    local.copy_(each.cut.take(each.parameter.data))
                each.parameter.data = local

    def _divide(self, module: nn.Module) -> list[_Divided]:
        shards: dict[int, tuple[str, Shard]] = {}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parameters = {id(parameter): parameter for parameter in module.parameters()}
        problems = []
        for prefix, part in module.named_modules():
            if prefix in self.plan:
                for name, shard in shards_of(prefix, part, self.plan[prefix]).items():
                    parameter, full = part.get_parameter(name), f"{prefix}.{name}" if prefix else name
                    other = shards.setdefault(id(parameter), (full, shard))
                    if other[1] != shard:
                        problems.append(f"{other[0]} and {full} are one parameter, and the plan divides it as {other[1]} and as {shard}")
                    if parameter.shape[shard.dim] < self.axis.size:
                        problems.append(f"{full}: dimension {shard.dim} has {parameter.shape[shard.dim]} entries for {self.axis.size} ranks")
        if problems:
            raise ConfigError("plan: " + "\n  ".join(problems))
        found = []
        for key, (_, shard) in shards.items():
            parameter = parameters[key]
            shape, cut = parameter.shape, _cut(self.axis, parameter.shape[shard.dim], shard)
            parameter.data = cut.take(parameter.detach()).contiguous().clone()
            found.append(_Divided(names[key], parameter, shape, shard, cut))
        return found


def _cut(axis: Axis, length: int, shard: Shard) -> Cut:
    """Return the cut that a placement describes: every piece is cut evenly."""
    runs: list[list[tuple[int, int]]] = [[] for _ in range(axis.size)]
    begin = 0
    for piece in shard.pieces or (length,):
        for rank, of_rank in enumerate(Cut.evenly(axis, shard.dim, piece).runs):
            runs[rank] += [(begin + start, begin + stop) for start, stop in of_rank]
        begin += piece
    return Cut(axis, shard.dim, 1, length, tuple(map(tuple, runs)))
