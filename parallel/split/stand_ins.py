"""StandIns: split tensors in the place of a model's parameters, and of what it is given, while it runs.

before a run                        while it runs
nn.Parameter, this rank's part      Split of the whole's shape, cut over "tp"
nn.Parameter, whole                 Split whose gradient is the sum of what the ranks of "cp" have, where these divide the sequence
ids [B, T]                          Split, cut over "cp"
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from ringfold.parallel.split import rules  # noqa: F401  importing them makes them known
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.tensor import Split
from torch import nn

__all__ = ["Divided", "StandIns"]

Divided = Mapping[nn.Parameter, tuple[torch.Size, Cut]]  # the whole's shape, and how it is cut
Inputs = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class StandIns:
    """Let `module` run on split tensors: `divided` parameters, all others if their gradients have `terms`, and what `inputs` makes of arguments."""

    def __init__(self, module: nn.Module, divided: Divided, terms: frozenset[Axis], inputs: Inputs | None = None) -> None:
        self._divided = divided
        self._terms = terms
        self._inputs = inputs
        self._places = [
            (part._parameters, name, parameter)
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None and (terms or parameter in divided)
        ]
        self._depth = 0
        self._runs: list[contextlib.AbstractContextManager[None]] = []
        self._hooks = [
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have them in their places inside."""
        self._depth += 1
        if self._depth == 1:
            made: dict[int, Split] = {}  # one that is used in two places stays one
            for owner, name, parameter in self._places:
                owner[name] = made.setdefault(id(parameter), self._of(parameter))  # type: ignore[assignment]
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for owner, name, parameter in self._places:
                    owner[name] = parameter

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Let the module run as it is inside: its parameters are whole."""
        self._depth += 1
        inputs, self._inputs = self._inputs, None
        try:
            yield
        finally:
            self._depth -= 1
            self._inputs = inputs

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _of(self, parameter: nn.Parameter) -> Split:
        shape, *cuts = self._divided.get(parameter, (parameter.shape,))
        return Split(parameter, shape, tuple(cuts), self._terms)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        run = self.running()
        run.__enter__()
        self._runs.append(run)
        return None if self._inputs is None else self._inputs(args, kwargs)

    def _after(self, *_: Any) -> None:
        if self._runs:
            self._runs.pop().__exit__(None, None, None)
