"""Optimizer and scheduler of an Engine: what their factories return, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ringfold.collectives.errors import ConfigError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["make_optimizer", "make_scheduler"]


def make_optimizer(factory: Callable[[list[nn.Parameter]], Optimizer], module: nn.Module) -> Optimizer:
    """Return what the factory makes of a model's parameters.

    Raises: ConfigError for what is no optimizer, calls the model several times a step, has a parameter twice, or some that are not the model's.
    """
    parameters = list(module.parameters())
    try:
        optimizer = factory(list(parameters))
    except ValueError as error:
        if "more than one parameter group" not in str(error):
            raise
        raise ConfigError(f"optimizer: {error}. {_tied(module)}") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer: expected a function of the parameters that returns a torch Optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("optimizer: LBFGS calls the model several times a step, which train_step does not do. Use another one.")
    if any(len(set(map(id, group["params"]))) < len(group["params"]) for group in optimizer.param_groups):
        raise ConfigError(f"optimizer: a group has a parameter twice, and would step on it twice. {_tied(module)}")
    known = set(map(id, parameters))
    strangers = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ConfigError(
            f"optimizer: {strangers} of its parameters are not the model's: they were made before the model was. "
            "Build it from the list that the function is given."
        )
    return optimizer


def _tied(module: nn.Module) -> str:
    """Return which parameters have several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [" = ".join(alike) for alike in names.values() if len(alike) > 1]
    return f"Tied, and so to be in one group only: {'; '.join(tied)}." if tied else "No parameter of the model is tied."


def make_scheduler(factory: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """Return what the factory makes of the optimizer.

    Raises: ConfigError for what is not stepped once a train step.
    """
    scheduler = factory(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"scheduler: {type(scheduler).__name__} is no LRScheduler that steps once a train step. Step it in your own loop.")
    return scheduler
