"""TensorParallel: a model of which each rank of the axis "tp" has a part of the large parameters (Shoeybi et al., arXiv:1909.08053).

The model's code is not changed. While it runs, the parameters that are divided are `Split` tensors, which have the shape of the whole; what its
functions make of them, and what ranks tell each other for that, follows from rules (parallel/split). Between runs they are ordinary parameters
with this rank's part in them, which is what optimizers, ZeRO and the reduction of gradients over "dp" see. A parameter that is not divided has
the same values and the same gradient on all ranks of the axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.placement import Placement, Shard
from ringfold.parallel.split import exchange, rules  # noqa: F401  rules: importing them makes them known
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.tensor import Split
from ringfold.parallel.tensor.plan import Plan, choose_plan, shards_of
from torch import Tensor, nn

__all__ = ["TensorParallel"]


@dataclass(frozen=True)
class _Divided:
    """A parameter that is divided, and everywhere that modules have it."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    shard: Shard
    cut: Cut
    places: tuple[tuple[nn.Module, str], ...]


class TensorParallel:
    """Divide the parameters of `module`, whole and alike on all ranks of `comm`, by a plan (plan.py).

    Raises:
        ConfigError: the plan does not fit, nothing is divided, or a parameter that is used in several places is divided differently.
    """

    def __init__(self, module: nn.Module, comm: Communicator, plan: Plan | None = None) -> None:
        self.axis = Axis("tp", comm)
        self.plan = choose_plan(module, comm.size, plan)
        self._running = 0
        self._divided = self._divide(module)
        if not self._divided:
            raise ConfigError(
                f"tp{comm.size}: no parameter is divided: no module of {type(module).__name__} has a name that is known. Say which are, as in "
                'Engine(plan={"blocks.*.q": "column", "blocks.*.out": "row"}).'
            )
        self._by_parameter = {id(each.parameter): each for each in self._divided}
        self._runs: list[contextlib.AbstractContextManager[None]] = []
        draw_alike(comm, next(iter(self._divided)).parameter.device)
        self._hooks = [
            module.register_forward_pre_hook(self._before, prepend=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def is_divided(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._by_parameter

    def placements(self) -> dict[str, Placement]:
        """Return where the parameters lie that are divided, by name."""
        return {each.name: Placement(each.name, tuple(each.shape), {"tp": each.shard}) for each in self._divided}

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
        self._running += 1  # a model that is whole runs as it is
        try:
            yield
        finally:
            self._running -= 1
            for each, local in kept:
                if write:
                    local.copy_(each.cut.take(each.parameter.data))
                each.parameter.data = local

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have split tensors in the place of divided parameters inside."""
        self._running += 1
        if self._running == 1:
            for each in self._divided:
                split = Split(each.parameter, each.shape, (each.cut,), frozenset())
                for owner, name in each.places:
                    owner._parameters[name] = split  # type: ignore[assignment]
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                for each in self._divided:
                    for owner, name in each.places:
                        owner._parameters[name] = each.parameter

    def close(self) -> None:
        """Leave the model to itself; its parameters stay parts."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        run = self.running()
        run.__enter__()
        self._runs.append(run)

    def _after(self, *_: Any) -> None:
        if self._runs:
            self._runs.pop().__exit__(None, None, None)

    def _divide(self, module: nn.Module) -> list[_Divided]:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        shards: dict[int, tuple[str, Shard]] = {}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parameters = {id(parameter): parameter for parameter in module.parameters()}
        problems = []
        for prefix, part in module.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((part, name))
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
            found.append(_Divided(names[key], parameter, shape, shard, cut, tuple(places[key])))
        return found


def draw_alike(comm: Communicator, device: torch.device) -> None:
    """Let the ranks draw the same random numbers from now on, those that rank 0 would have drawn; collective."""
    torch.set_rng_state(comm.broadcast_object(torch.get_rng_state()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(comm.broadcast_object(torch.cuda.get_rng_state(device)), device)


def _cut(axis: Axis, length: int, shard: Shard) -> Cut:
    """Return the cut that a placement describes: every piece is cut evenly."""
    runs: list[list[tuple[int, int]]] = [[] for _ in range(axis.size)]
    begin = 0
    for piece in shard.pieces or (length,):
        for rank, of_rank in enumerate(Cut.evenly(axis, shard.dim, piece).runs):
            runs[rank] += [(begin + start, begin + stop) for start, stop in of_rank]
        begin += piece
    return Cut(axis, shard.dim, 1, length, tuple(map(tuple, runs)))
