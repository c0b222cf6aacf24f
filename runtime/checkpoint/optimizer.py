"""Optimizer state by parameter name: what torch keys by the order of parameters, which another model or layout does not share.

    {"state": {"up.weight": {"step": ..., "exp_avg": ...}},
     "param_groups": [{"lr": ..., "params": ["up.weight", ...]}],
     "parameters": {"up.weight": {"dtype": torch.float32, "shape": [8, 4]}}}

Any torch optimizer: tensors, numbers and lists of them are taken as they are. Of an optimizer whose parameters are pieces (piece.py), each
entry that has a value for each element is a TensorPart, and loading cuts any checkpoint to the pieces. Options that choose an
implementation (`fused`, `foreach`, ...) stay those of the optimizer that is loaded into, as they say nothing of the training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from ringfold.collectives.errors import CheckpointError
from ringfold.runtime.checkpoint.part import TensorPart
from ringfold.runtime.checkpoint.piece import Named, Piece, pieces_of
from ringfold.runtime.checkpoint.tree import merge

_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def optimizer_state_by_name(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Any]:
    """Return the optimizer's state with names for indices; its tensors are the optimizer's own, not copies.

    named: pairs (name, parameter), or (name, Piece) for what holds a piece of it; a tied parameter has its first name.

    Raises:
        CheckpointError: the optimizer has parameters that `named` lacks.
    """
    groups = _groups(optimizer, named)
    by_index = optimizer.state_dict()
    indices = [index for group in by_index["param_groups"] for index in group["params"]]
    of_index = dict(zip(indices, (pair for mine in groups for pair in mine), strict=True))
    state = {}
    for index, entries in by_index["state"].items():
        name, piece = of_index[index]
        state[name] = {key: piece.part(key, value) if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
    options = [
        {**{key: value for key, value in group.items() if key != "param_names"}, "params": [name for name, _ in mine]}
        for group, mine in zip(by_index["param_groups"], groups, strict=True)
    ]
    forms = {name: {"dtype": piece.parameter.dtype, "shape": list(piece.shape)} for mine in groups for name, piece in mine}
    return {"state": state, "param_groups": options, "parameters": forms}


def load_optimizer_state(optimizer: torch.optim.Optimizer, named: Named, state: Mapping[str, Any], *, cast: bool = False) -> None:
    """Load what `optimizer_state_by_name` returned for the same pieces; `optimizer_differences` must have found nothing.

    cast: floating-point entries that have their saved parameter's dtype get this parameter's.
    """
    groups = _groups(optimizer, named)
    flat = [pair for mine in groups for pair in mine]
    index_of = {name: index for index, (name, _) in enumerate(flat)}
    options = []
    for saved, group, mine in zip(state["param_groups"], optimizer.param_groups, groups, strict=True):
        kept = {key: group[key] for key in _IMPLEMENTATION if key in group}
        options.append({**saved, **kept, "params": [index_of[name] for name, _ in mine]})
    forms = state.get("parameters", {})
    here = {}
    for name, piece in flat:
        if name in state["state"]:
            old = forms[name]["dtype"] if cast and name in forms else None
            here[name] = {key: _fitted(value, piece, old) for key, value in state["state"][name].items()}
    optimizer.load_state_dict({"state": {index_of[name]: entries for name, entries in here.items()}, "param_groups": options})
    _undo_casts(optimizer, flat, here)


def merge_optimizer_trees(trees: Sequence[Any]) -> Any:
    """Return the encoded state of the optimizers of all ranks as one: each rank's groups name only what it has a piece of.

    Raises:
        CheckpointError: the optimizers have different numbers of groups.
    """
    merged = merge(trees)
    if not isinstance(merged, dict) or "param_groups" not in merged:
        return merged
    numbers = {len(tree["param_groups"]) for tree in trees}
    if len(numbers) > 1:
        raise CheckpointError(f"the optimizers of the ranks have different numbers of groups: {sorted(numbers)}; a group may be empty")
    for number, group in enumerate(merged["param_groups"]):
        group["params"] = list(dict.fromkeys(name for tree in trees for name in tree["param_groups"][number]["params"]))
    return merged


def group_of_each(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, int]:
    """Return the number of its group for each name that the optimizer has a parameter or piece of."""
    return {name: number for number, mine in enumerate(_groups(optimizer, named)) for name, _ in mine}


def optimizer_differences(
    saved: Mapping[str, Any], pieces: Mapping[str, Piece], groups: Mapping[str, int], known: Collection[str], cast: bool
) -> list[str]:
    """List how the saved state does not fit an optimizer whose `pieces` are in `groups`; `known` are the names that any rank has."""
    saved_groups = {name: number for number, group in enumerate(saved["param_groups"]) for name in group["params"]}
    differences = [f"missing in the checkpoint: {name} (group {groups[name]})" for name in groups if name not in saved_groups]
    differences += [f"not in the optimizer: {name} (group {saved_groups[name]})" for name in saved_groups if name not in known]
    both = [name for name in groups if name in saved_groups]
    differences += [
        f"group of {name}: {saved_groups[name]} in the checkpoint, {groups[name]} in the optimizer"
        for name in both
        if groups[name] != saved_groups[name]
    ]
    for name in both:
        form, piece = saved.get("parameters", {}).get(name), pieces[name]
        if form is None:
            continue
        if tuple(form["shape"]) != piece.shape:
            differences.append(f"shape of {name}: {form['shape']} in the checkpoint, {list(piece.shape)} in the optimizer")
        ours, theirs = piece.parameter.dtype, form["dtype"]
        if ours != theirs and not (cast and ours.is_floating_point and theirs.is_floating_point):
            names = [str(dtype).removeprefix("torch.") for dtype in (theirs, ours)]
            differences.append(f"dtype of {name}: {names[0]} in the checkpoint, {names[1]} in the optimizer")
    return differences


def _groups(optimizer: torch.optim.Optimizer, named: Named) -> list[list[tuple[str, Piece]]]:
    of_parameter = {id(piece.parameter): (name, piece) for name, piece in pieces_of(named)}
    unknown = [
        f"parameter {index} of group {number}: {list(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if id(parameter) not in of_parameter
    ]
    if unknown:
        listed = "\n  ".join(unknown)
        raise CheckpointError(f"the optimizer has parameters that are not the model's, so they have no name to be saved by:\n  {listed}")
    return [[of_parameter[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _fitted(value: Any, piece: Piece, saved_dtype: torch.dtype | None) -> Any:
    """Return a saved entry in the form of the piece's own."""
    values = value.values.view(piece.parameter.shape) if isinstance(value, TensorPart) else value
    if isinstance(values, torch.Tensor) and values.is_floating_point() and values.dtype == saved_dtype and values.shape == piece.parameter.shape:
        return values.to(piece.parameter.dtype)
    return values


def _undo_casts(optimizer: torch.optim.Optimizer, flat: Sequence[tuple[str, Piece]], saved: Mapping[str, Any]) -> None:
    """Put back float32 moments of low-precision parameters: torch's load_state_dict casts state to the parameter's dtype."""
    for name, piece in flat:
        for key, value in saved.get(name, {}).items():
            loaded = optimizer.state[piece.parameter][key]
            if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[piece.parameter][key] = value.to(loaded.device, copy=True)
