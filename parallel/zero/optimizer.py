"""An optimizer whose parameters are pieces: what `cut` makes of one that was built on whole parameters.

The factory sees the originals (rules such as `p.dim() >= 2` for weight decay need their shapes); their pieces then take their places in the
groups. That is right only where each element's step depends on its own gradient and state alone. It is tried, not looked up in a list:
two steps on small tensors, once whole and once in pieces, must agree.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from torch import nn
from torch.optim import Optimizer

__all__ = ["States", "cut", "is_elementwise", "require_elementwise"]

States = dict[int, dict[str, torch.dtype]]  # by id of a piece: what the optimizer will keep for each of its elements

PROBE = (2, 96)  # cut at 64 elements, as buckets cut
AGREES = 1e-5  # relative; a float32 step that is elementwise agrees to some 1e-7, one that is not by far less


def cut(optimizer: Optimizer, pieces: Mapping[int, tuple[nn.Parameter | None, int]]) -> States:
    """Put this rank's piece of every parameter in the parameter's place, cut state that the optimizer has made already, and return what it will make.

    pieces: by id of the parameter, the piece (None where this rank has none of it) and the index of its first element.

    Raises:
        ConfigError: the optimizer is not elementwise.
    """
    kinds, states = require_elementwise(optimizer), States()
    state, optimizer.state = optimizer.state, defaultdict(dict)
    for group, kept_state in zip(optimizer.param_groups, kinds, strict=True):
        names = group.get("param_names")
        kept = [number for number, parameter in enumerate(group["params"]) if pieces[id(parameter)][0] is not None]
        originals = [group["params"][number] for number in kept]
        group["params"] = [pieces[id(parameter)][0] for parameter in originals]
        if names is not None:
            group["param_names"] = [names[number] for number in kept]
        for parameter, piece in zip(originals, group["params"], strict=True):
            states[id(piece)] = {key: piece.dtype if dtype == torch.float32 else dtype for key, dtype in kept_state.items()}
            if parameter in state:
                start = pieces[id(parameter)][1]
                optimizer.state[piece] = {key: _cut_value(key, value, parameter, start, piece.numel()) for key, value in state[parameter].items()}
    return states


def require_elementwise(optimizer: Optimizer) -> list[dict[str, torch.dtype]]:
    """Refuse an optimizer whose step on a parameter in pieces is not its step on the whole; return the elementwise state it makes, for each group.

    The dtypes are those for a float32 parameter.

    Raises:
        ConfigError: naming it, with what was seen.
    """
    name = type(optimizer).__name__
    advice = "ZeRO cuts parameters into pieces, so it needs an elementwise optimizer (SGD, Adam, AdamW, RMSprop, Adagrad, ...), or zero0."
    kinds: list[dict[str, torch.dtype]] = []
    for group in optimizer.param_groups:
        kinds.append({})
        if not group["params"]:
            continue
        generator = torch.Generator().manual_seed(0)
        values, *grads = (torch.randn(PROBE, generator=generator, device="cpu") for _ in range(3))
        whole = [values.clone()]
        pieces = [values.view(-1)[:64].clone(), values.view(-1)[64:].clone()]
        try:
            kinds[-1] = _steps(optimizer, group, whole, [[grad] for grad in grads])
            _steps(optimizer, group, pieces, [[grad.view(-1)[:64].clone(), grad.view(-1)[64:].clone()] for grad in grads])
        except Exception as error:  # whatever somebody's optimizer raises
            raise ConfigError(
                f"optimizer: {name} does not step on a one-dimensional piece of a parameter ({type(error).__name__}: {error}). {advice}"
            ) from error
        apart = (torch.cat(pieces).view(PROBE) - whole[0]).abs().max() / whole[0].abs().max()
        if not apart <= AGREES:
            raise ConfigError(f"optimizer: {name} on a parameter in two pieces differs by {float(apart):.1e} from its step on the whole. {advice}")
    return kinds


def _steps(optimizer: Optimizer, group: Mapping[str, Any], values: list[torch.Tensor], grads: list[list[torch.Tensor]]) -> dict[str, torch.dtype]:
    """Step a copy of the optimizer, with the options of one group, on other values; return what it then keeps for each element."""
    parameters = [nn.Parameter(value) for value in values]  # shares the values' memory
    probe = object.__new__(type(optimizer))
    probe.__dict__.update(optimizer.__dict__)
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        probe.__dict__[hooks] = OrderedDict()
    options = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items() if key != "param_names"}
    probe.param_groups = [{**options, "params": parameters}]
    example = next((parameter for parameter in group["params"] if parameter in optimizer.state), None)
    probe.state = defaultdict(dict)
    if example is not None:
        for parameter in parameters:
            probe.state[parameter] = {key: _like(key, value, example, parameter) for key, value in optimizer.state[example].items()}
    for of_step in grads:
        for parameter, grad in zip(parameters, of_step, strict=True):
            parameter.grad = grad.clone()
        probe.step()
    return {key: value.dtype for key, value in probe.state[parameters[0]].items() if is_elementwise(key, value, parameters[0])}


def _like(key: str, value: Any, example: nn.Parameter, parameter: nn.Parameter) -> Any:
    """Return initial state for a parameter, after that of another one."""
    if not isinstance(value, torch.Tensor):
        return value
    if is_elementwise(key, value, example):
        return torch.full_like(parameter, float(value.reshape(-1)[0]) if value.numel() else 0.0, dtype=value.dtype)
    return value.detach().cpu().clone()


def _cut_value(key: str, value: Any, parameter: nn.Parameter, start: int, numel: int) -> Any:
    if is_elementwise(key, value, parameter):
        return value.reshape(-1)[start : start + numel].clone()
    return value


def is_elementwise(key: str, value: Any, parameter: nn.Parameter) -> bool:
    """Tell whether a state has an entry for each element; `step` of a parameter with one element has its shape and is a count."""
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape and key != "step"
