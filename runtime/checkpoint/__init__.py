"""Checkpoints: safetensors and one JSON manifest, whole or absent, and no pickle.

    saver = Saver(world)
    saver.save("run/step-300", step=300, model_state=..., optimizer_state=optimizer_state_by_name(optimizer, named), extra=..., asynchronous=True)
    checkpoint = load("run", comm=world)                            # the newest complete one
    checkpoint.load_model(module); checkpoint.load_optimizer(optimizer, named); checkpoint.extra()

Every rank writes a share, and reads what it wants. State may be in pieces: TensorPart says which elements of a tensor a value is, Piece which
of a parameter an optimizer holds, either of the whole tensor or of what a Placement gives this rank (Local); any other mesh loads it.
"""

from ringfold.runtime.checkpoint.optimizer import load_optimizer_state, optimizer_state_by_name
from ringfold.runtime.checkpoint.part import TensorPart
from ringfold.runtime.checkpoint.piece import Piece
from ringfold.runtime.checkpoint.random_state import random_state, restore_random_state
from ringfold.runtime.checkpoint.reader import Checkpoint, load
from ringfold.runtime.checkpoint.saver import Saver
from ringfold.runtime.checkpoint.writer import save

__all__ = [
    "Checkpoint",
    "Piece",
    "Saver",
    "TensorPart",
    "load",
    "load_optimizer_state",
    "optimizer_state_by_name",
    "random_state",
    "restore_random_state",
    "save",
]
