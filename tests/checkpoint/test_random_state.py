"""runtime/checkpoint/random_state.py: the generators go on where they were, through JSON."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from ringfold.runtime.checkpoint import random_state, restore_random_state


def drawn() -> list[float]:
    return [float(torch.randn(())), float(torch.randn(())), random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]


def test_every_generator_goes_on_where_it_was() -> None:
    drawn()  # leaves a half-used pair in the generators of normal numbers
    text = json.dumps(random_state())
    first = drawn()
    drawn()
    restore_random_state(json.loads(text))
    assert drawn() == first
    assert len(text) < 20_000
