"""Checkpoints: safetensors and one JSON manifest, whole or absent, and no pickle.

    save("run/step-300", step=300, model_state=..., optimizer_state=optimizer_state_by_name(optimizer, named), extra=..., comm=world)
    checkpoint = load("run", comm=world)                            # the newest complete one
    checkpoint.load_model(module); checkpoint.load_optimizer(optimizer, named); checkpoint.extra()

In this version rank 0 writes the full state and every rank reads it. The manifest already tells each tensor by its Placement.
"""

from ringfold.runtime.checkpoint.optimizer import load_optimizer_state, optimizer_state_by_name
from ringfold.runtime.checkpoint.random_state import random_state, restore_random_state
from ringfold.runtime.checkpoint.reader import Checkpoint, load
from ringfold.runtime.checkpoint.writer import save

__all__ = [
    "Checkpoint",
    "load",
    "load_optimizer_state",
    "optimizer_state_by_name",
    "random_state",
    "restore_random_state",
    "save",
]
