"""Casting: a model that is declared in float32 and computes in bf16 or fp16, but for what needs the precision.

Parameters and floating buffers get the compute dtype, except those of modules that are kept: normalisations, whose sums over a row need it,
and what the user names (a router, a positional table). A kept module gets its floating inputs in float32, and gives back the compute dtype.
Softmax and log_softmax compute in float32 inside by themselves, whatever comes in; outputs of the model are made float32 before the loss.

What is said here of parameters is carried out by who owns their memory: `dtype_of` tells it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from ringfold.collectives.errors import PrecisionError, nearest
from torch import Tensor, nn

__all__ = ["Casting", "to_dtype"]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)


class Casting:
    """Let `module` compute in `compute`; `keep` are shell patterns of names of modules or parameters that stay as they are.

    A parameter that is kept alone meets operands of the compute dtype inside its module, which has to expect that.

    Raises:
        PrecisionError: a pattern fits nothing.
    """

    def __init__(self, module: nn.Module, compute: torch.dtype, keep: Sequence[str] = ()) -> None:
        self.compute = compute
        modules = {name: part for name, part in module.named_modules() if name}
        parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        known = [*modules, *parameters]
        lost = [pattern for pattern in keep if not any(fnmatchcase(name, pattern) for name in known)]
        if lost:
            advice = [f"{pattern!r}" + (f" (did you mean {meant!r}?)" if (meant := nearest(pattern, known)) else "") for pattern in lost]
            raise PrecisionError(f"keep_float32: no module or parameter is called {', '.join(advice)}.")

        def is_named(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in keep)

        kept = {name: part for name, part in modules.items() if is_named(name) or isinstance(part, NORMS) or type(part).__name__.endswith("Norm")}
        outermost = {name: part for name, part in kept.items() if not any(name.startswith(f"{other}.") for other in kept)}
        inside = {id(part) for outer in outermost.values() for part in outer.modules()}
        self._kept = {id(p) for outer in outermost.values() for p in outer.parameters()}
        self._kept |= {id(p) for name, p in module.named_parameters(remove_duplicate=False) if is_named(name)}
        for part in module.modules():
            if id(part) not in inside:
                for name, buffer in part.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        part._buffers[name] = buffer.to(compute)
        self._hooks = [hook for part in outermost.values() for hook in self._surround(part)]

    def dtype_of(self, _: str, parameter: nn.Parameter) -> torch.dtype:
        """Return the dtype that a parameter is computed with."""
        return self.compute if parameter.is_floating_point() and id(parameter) not in self._kept else parameter.dtype

    def close(self) -> None:
        """Let kept modules take what they are given again; parameters and buffers stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def _surround(self, part: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        compute = self.compute

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return to_dtype(args, torch.float32), to_dtype(kwargs, torch.float32)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return to_dtype(output, compute)

        return [part.register_forward_pre_hook(before, with_kwargs=True), part.register_forward_hook(after)]


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return the same structure with every floating tensor in it as `dtype`."""
    return _mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(part, change) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _mapped(getattr(value, field.name), change) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        changed = {key: _mapped(part, change) for key, part in value.items()}
        return changed if type(value) is dict else type(value)(changed)  # type: ignore[call-arg]
    return value
