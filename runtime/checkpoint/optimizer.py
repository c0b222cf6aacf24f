"""Optimizer state by parameter name: what torch keys by the order of parameters, which another model or layout does not share.

    {"state": {"up.weight": {"step": ..., "exp_avg": ...}}, "param_groups": [{"lr": ..., "params": ["up.weight", ...]}]}

Any torch optimizer: tensors, numbers and lists of them are taken as they are. Options that choose an implementation (`fused`,
`foreach`, ...) stay those of the optimizer that is loaded into, as they say nothing of the training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from ringfold.collectives.errors import CheckpointError

Named = Iterable[tuple[str, torch.nn.Parameter]]
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def optimizer_state_by_name(optimizer: torch.optim.Optimizer, named_parameters: Named) -> dict[str, Any]:
    """Return the optimizer's state with names for indices; its tensors are the optimizer's own, not copies.

    Raises:
        CheckpointError: the optimizer has parameters that `named_parameters` lacks.
    """
    names = _names(optimizer, named_parameters)
    by_index = optimizer.state_dict()
    groups = []
    for group, mine in zip(by_index["param_groups"], names, strict=True):
        options = {key: value for key, value in group.items() if key != "param_names"}
        groups.append({**options, "params": mine})
    flat = [name for mine in names for name in mine]
    indices = [index for group in by_index["param_groups"] for index in group["params"]]
    name_of = dict(zip(indices, flat, strict=True))
    return {"state": {name_of[index]: state for index, state in by_index["state"].items()}, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, named_parameters: Named, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state_by_name` returned; `optimizer_differences` must have found nothing."""
    names = _names(optimizer, named_parameters)
    flat = [name for mine in names for name in mine]
    index_of = {name: index for index, name in enumerate(flat)}
    groups = []
    for saved, group, mine in zip(state["param_groups"], optimizer.param_groups, names, strict=True):
        kept = {key: group[key] for key in _IMPLEMENTATION if key in group}
        groups.append({**saved, **kept, "params": [index_of[name] for name in mine]})
    optimizer.load_state_dict({"state": {index_of[name]: value for name, value in state["state"].items()}, "param_groups": groups})
    _undo_casts(optimizer, flat, state["state"])


def optimizer_differences(saved_groups: Iterable[Mapping[str, Any]], optimizer: torch.optim.Optimizer, named_parameters: Named) -> list[str]:
    """List how the parameters of the saved groups are not those of the optimizer's."""
    names = _names(optimizer, named_parameters)
    saved = {name: number for number, group in enumerate(saved_groups) for name in group["params"]}
    here = {name: number for number, mine in enumerate(names) for name in mine}
    differences = [f"missing in the checkpoint: {name} (group {here[name]})" for name in here if name not in saved]
    differences += [f"not in the optimizer: {name} (group {saved[name]})" for name in saved if name not in here]
    both = [name for name in here if name in saved and here[name] != saved[name]]
    return differences + [f"group of {name}: {saved[name]} in the checkpoint, {here[name]} in the optimizer" for name in both]


def _names(optimizer: torch.optim.Optimizer, named_parameters: Named) -> list[list[str]]:
    name_of: dict[int, str] = {}
    for name, parameter in named_parameters:
        name_of.setdefault(id(parameter), name)
    unknown = [
        f"parameter {index} of group {number}: {list(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if id(parameter) not in name_of
    ]
    if unknown:
        listed = "\n  ".join(unknown)
        raise CheckpointError(f"the optimizer has parameters that are not the model's, so they have no name to be saved by:\n  {listed}")
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _undo_casts(optimizer: torch.optim.Optimizer, names: list[str], saved: Mapping[str, Any]) -> None:
    """Put back float32 moments of low-precision parameters: torch's load_state_dict casts state to the parameter's dtype."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in saved.get(name, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device, copy=True)
