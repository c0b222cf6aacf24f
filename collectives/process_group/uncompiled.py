"""Code that torch.compile leaves alone.

While a compiled model runs, C++ (DDP's reducer, for one) calls the methods of a process group in Python, and dynamo would compile those. It cannot,
and need not. torch.compiler.disable does this too, for a microsecond a call and the import of all of dynamo; a mark on the code object costs nothing.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeVar

import torch._C._dynamo.eval_frame as eval_frame

__all__ = ["uncompiled"]

_frames: Any = eval_frame
_ALONE = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP)  # the frame, and every frame below it

Class = TypeVar("Class", bound=type)


def uncompiled(cls: Class) -> Class:
    """Mark every method of a class, so that neither it nor what it calls is ever compiled."""
    for value in vars(cls).values():
        function = value.fget if isinstance(value, property) else value
        if isinstance(function, FunctionType):
            _frames.set_code_exec_strategy(function.__code__, _ALONE)
    return cls
