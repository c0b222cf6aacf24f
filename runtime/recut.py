"""Recut: parts of divided parameters as ranges of the wholes, which is what checkpoints hold, and ranges as parts again.

    in a run            rank's part over tp, of that its piece over dp
    in a checkpoint     each rank an equal range of the whole, in row-major order

A part is no range where rows are divided, so between the two every tensor is put together once, one at a time. Files then know nothing of layouts,
and whoever reads ranges reads them. What it costs is an all-gather of the state for a save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.tensor.tensor_parallel import TensorParallel
from ringfold.parallel.zero.sharding import Sharding
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint.optimizer import group_of_each
from ringfold.runtime.checkpoint.piece import is_elementwise
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Recut"]

OfTarget = Callable[[nn.Parameter], Tensor | None]
Named = list[tuple[str, "nn.Parameter | checkpoint.Piece"]]


class Recut:
    """Ranges of the parameters of `module` that `tensor` divides, for the ranks of `comm`, which together have all of it. Methods are collective."""

    def __init__(self, module: nn.Module, tensor: TensorParallel, sharding: Sharding | None, comm: Communicator) -> None:
        self._tensor = tensor
        self._sharding = sharding
        self._comm = comm
        self._divided = [(name, parameter) for name, parameter in module.named_parameters() if tensor.is_divided(parameter)]
        self._names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def model_ranges(self) -> dict[str, checkpoint.TensorPart]:
        """Return this rank's ranges of the values that are trained, by name."""
        found = {}
        for _, parameter in self._divided:
            mine = self._range(parameter, self._local(parameter, lambda target: target.detach(), self._dtype(parameter)))
            found.update(dict.fromkeys(self._names[id(parameter)], mine))
        return found

    def optimizer_ranges(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state by name with ranges of wholes where `state` has those of parts."""
        kinds: dict[str, dict[str, torch.dtype]] = {}
        for of_rank in self._comm.all_gather_object(self._kinds(optimizer)):
            for name, dtypes in of_rank.items():
                kinds.setdefault(name, {}).update(dtypes)
        for name, parameter in self._divided:
            for key, dtype in sorted(kinds.get(name, {}).items()):

                def of(target: nn.Parameter, key: str = key) -> Tensor | None:
                    value = optimizer.state.get(target, {}).get(key)
                    return value if isinstance(value, Tensor) else None

                state["state"].setdefault(name, {})[key] = self._range(parameter, self._local(parameter, of, dtype))
            if name in state["parameters"]:
                state["parameters"][name]["shape"] = list(self._shape(parameter))
        return state

    def restore(self, found: checkpoint.Checkpoint, model: dict[str, Any], optimizer: Optimizer, pieces: Named) -> None:
        """Load a checkpoint into `model`, tensors and parts by name, and `optimizer`, whose parameters are `pieces`; both or neither.

        Raises: Incompatible, Corrupt, Incomplete, before anything is changed.
        """
        names = {name for name, _ in self._divided}
        groups: dict[str, int] = {}
        for of_rank in self._comm.all_gather_object(group_of_each(optimizer, pieces)):
            groups.update(of_rank)
        ranges = {name: self._empty(parameter) for name, parameter in self._divided}
        for name, parameter in self._divided:
            model.update(dict.fromkeys(self._names[id(parameter)], ranges[name].part("", ranges[name].parameter.detach())))
        lists = [list(group["params"]) for group in optimizer.param_groups]
        own = {id(piece.parameter if isinstance(piece, checkpoint.Piece) else piece) for name, piece in pieces if name in names}
        for number, group in enumerate(optimizer.param_groups):
            theirs = [ranges[name].parameter for name, of in groups.items() if name in names and of == number]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own] + theirs
        kept = [(name, piece) for name, piece in pieces if name not in names]
        try:
            found.restore(model, optimizer, [*kept, *((name, ranges[name]) for name in groups if name in names)], cast=True)
        finally:
            for group, parameters in zip(optimizer.param_groups, lists, strict=True):
                group["params"] = parameters
        for name, parameter in self._divided:
            self._put(parameter, ranges[name].parameter.detach())
            entries = optimizer.state.pop(ranges[name].parameter, {})
            for key, value in sorted(entries.items()):
                self._put_state(optimizer, parameter, key, value, ranges[name])

    def _kinds(self, optimizer: Optimizer) -> dict[str, dict[str, torch.dtype]]:
        """Return what this rank's optimizer keeps for each element of divided parameters."""
        found: dict[str, dict[str, torch.dtype]] = {}
        for name, parameter in self._divided:
            for target in self._targets(parameter):
                for key, value in optimizer.state.get(target, {}).items():
                    if isinstance(value, Tensor) and is_elementwise(key, tuple(value.shape), tuple(target.shape)):
                        found.setdefault(name, {})[key] = value.dtype
        return found

    def _targets(self, parameter: nn.Parameter) -> Iterator[nn.Parameter]:
        """Yield what the optimizer has of a parameter on this rank."""
        piece = None if self._sharding is None else self._sharding.piece_of(parameter)
        if piece is not None:
            yield piece[1]
        elif self._sharding is None or not self._sharding.is_cut(parameter):
            yield parameter

    def _local(self, parameter: nn.Parameter, of: OfTarget, dtype: torch.dtype) -> Tensor:
        """Return this rank's part over tp of what `of` tells of targets, put together over dp."""
        is_cut = self._sharding is not None and self._sharding.is_cut(parameter)
        value = self._sharding.gathered(parameter, of, dtype) if self._sharding is not None and is_cut else of(parameter)
        assert value is not None, "ranks keep the same"
        return value

    def _range(self, parameter: nn.Parameter, local: Tensor) -> checkpoint.TensorPart:
        whole = self._tensor.whole(parameter, local).reshape(-1)
        start, stop = self._bounds(whole.numel())[self._comm.rank]
        return checkpoint.TensorPart(whole[start:stop].clone(), tuple(self._shape(parameter)), start)

    def _empty(self, parameter: nn.Parameter) -> checkpoint.Piece:
        shape = self._shape(parameter)
        start, stop = self._bounds(shape.numel())[self._comm.rank]
        memory = torch.empty(stop - start, dtype=self._dtype(parameter), device=parameter.device)
        return checkpoint.Piece(nn.Parameter(memory, requires_grad=False), start, tuple(shape))

    def _whole(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """Put the ranges of all ranks together."""
        shape = self._shape(parameter)
        counts = [stop - start for start, stop in self._bounds(shape.numel())]
        flat = values.new_empty(shape.numel())
        self._comm.all_gather(flat, values.contiguous(), counts=counts)
        return flat.view(shape)

    def _put(self, parameter: nn.Parameter, values: Tensor) -> None:
        local = self._tensor.part(parameter, self._whole(parameter, values))
        if self._sharding is None or not self._sharding.write(parameter, local):
            parameter.data.copy_(local)

    def _put_state(self, optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Any, of: checkpoint.Piece) -> None:
        if isinstance(value, Tensor) and is_elementwise(key, tuple(value.shape), tuple(of.parameter.shape)):
            local = self._tensor.part(parameter, self._whole(parameter, value))
            piece = None if self._sharding is None else self._sharding.piece_of(parameter)
            value = local.contiguous() if piece is None else local.reshape(-1)[piece[0].start : piece[0].stop].clone()
        for target in self._targets(parameter):
            optimizer.state[target][key] = value

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._tensor.divided[parameter][0]

    def _dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return parameter.dtype if self._sharding is None else self._sharding.trained_dtype(parameter)

    def _bounds(self, numel: int) -> list[tuple[int, int]]:
        return [(numel * rank // self._comm.size, numel * (rank + 1) // self._comm.size) for rank in range(self._comm.size)]
