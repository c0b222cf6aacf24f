"""Code that torch.compile leaves alone: what surrounds a block's forward. The forward itself is compiled as ever.

Hooks, random state and weak references are not for graphs; traced, they break them in many places, and are traced anew at every call.
torch.compiler.disable does this too, one function at a time, and imports all of dynamo for it: seconds, for those who do not compile.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch._C._dynamo.eval_frame as eval_frame

__all__ = ["leave_uncompiled"]

_frames: Any = eval_frame
_SKIPPED = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)  # the frame, but not those below it


def leave_uncompiled(*modules: ModuleType) -> None:
    """Mark every function of some modules, with what is defined inside of it, but not what it calls."""
    for module in modules:
        for function in _functions(module):
            function._torchdynamo_disable = True  # type: ignore[attr-defined]
            for code in _codes(function.__code__):
                _frames.set_code_exec_strategy(code, _SKIPPED)


def _functions(owner: Any) -> Iterator[FunctionType]:
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for value in vars(owner).values():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if getattr(value, "__module__", None) != name:
            continue
        if isinstance(value, type) and isinstance(owner, ModuleType):
            yield from _functions(value)
        elif isinstance(value, FunctionType):
            yield value
            if (inner := inspect.unwrap(value)) is not value:
                yield inner


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
