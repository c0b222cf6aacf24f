"""The state of this process's random generators, as JSON-plain text: torch (CPU and CUDA), Python and numpy.

Generators are each rank's own: gather the states of all ranks and give each its own back. A generator object that a program made is
not among them.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the generators: about 15 kB, and as much again as torch says for each CUDA device that is in use."""
    version, words, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": _text(torch.get_rng_state().numpy()),
        "python": [version, _text(np.array(words, dtype=np.uint32)), gauss_next],
        "numpy": [name, _text(np.asarray(keys, dtype=np.uint32)), position, has_gauss, cached],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what `random_state` returned; a CUDA state is used where there is a device."""
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(int(word) for word in _array(words, np.uint32)), gauss_next))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, _array(keys, np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))


def _text(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _array(text: str, dtype: type) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
