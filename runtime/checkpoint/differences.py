"""How a saved model differs from one that is to be loaded: all of it at once, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ringfold.runtime.checkpoint.manifest import Section
from ringfold.runtime.checkpoint.part import TensorPart
from ringfold.runtime.checkpoint.tree import tensor_names


def model_differences(section: Section, wanted: Mapping[str, Any], cast: bool) -> list[str]:
    """List names, shapes, dtypes (with `cast` only where one of two is no floating-point type) and ties that are not the same."""
    saved = tensor_names(section.tree)
    differences = [f"missing in the checkpoint: {name} {_form(wanted[name])}" for name in wanted if name not in saved]
    differences += [f"not in the model: {name} {_entry_form(section, saved[name])}" for name in saved if name not in wanted]
    for name in saved:
        if name in wanted:
            differences += _differences(name, _entry_form(section, saved[name]), _form(wanted[name]), cast)
    return differences + _untied(section, wanted, saved)


def listed(what: str, differences: Sequence[str]) -> str:
    """Return an error's text: what differs, one line each, and what to do."""
    lines = "".join(f"\n  {difference}" for difference in differences)
    return f"{what}; they differ in {len(differences)}:{lines}\nBuild what was saved, or begin without it."


def _untied(section: Section, wanted: Mapping[str, Any], saved: Mapping[str, str | None]) -> list[str]:
    """List tensors that are one in the model and had different values when they were saved."""
    first: dict[tuple[Any, ...], str] = {}
    differences = []
    for name, value in wanted.items():
        stored = saved.get(name)
        values, start = (value.values, value.start) if isinstance(value, TensorPart) else (value, 0)
        if stored is None or not isinstance(values, torch.Tensor) or values.numel() == 0:
            continue
        known = first.setdefault((values.data_ptr(), values.shape, values.stride(), start), name)
        hashes = [(part.coordinate, part.range, part.sha256) for part in section.tensors[stored].parts]
        if hashes != [(part.coordinate, part.range, part.sha256) for part in section.tensors[saved[known] or stored].parts]:
            differences.append(f"tied in the model, and different in the checkpoint: {known} and {name}")
    return differences


def _form(value: Any) -> str:
    if isinstance(value, TensorPart):
        return f"{_dtype(value.values)} {list(value.shape)}"
    return f"{_dtype(value)} {list(value.shape)}" if isinstance(value, torch.Tensor) else "(not a tensor)"


def _entry_form(section: Section, tensor: str | None) -> str:
    if tensor is None:
        return "(not a tensor)"
    entry = section.tensors[tensor]
    return f"{entry.dtype} {list(entry.placement.shape)}"


def _differences(name: str, saved: str, wanted: str, cast: bool) -> list[str]:
    if saved == wanted:
        return []
    saved_dtype, _, saved_shape = saved.partition(" ")
    dtype, _, shape = wanted.partition(" ")
    differences = [f"shape of {name}: {saved_shape} in the checkpoint, {shape} in the model"] if saved_shape != shape else []
    if saved_dtype != dtype and not (cast and _is_floating(saved_dtype) and _is_floating(dtype)):
        differences.append(f"dtype of {name}: {saved_dtype} in the checkpoint, {dtype} in the model")
    return differences


def _dtype(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _is_floating(name: str) -> bool:
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
