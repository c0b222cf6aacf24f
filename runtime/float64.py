"""Float64: a check's arithmetic, in which no rounding hides what is wrong.

Models that make numbers float32 inside, as many normalisations, rotary embeddings and losses do, would bring its rounding back, 1e-8 of a gradient.
Here what asks for float32 gets float64, in the one process and on every rank alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Float64"]


class Float64(TorchFunctionMode):
    """Make float64 the default dtype and stand it in for float32 inside, drawing from seed 0; give back dtype and random state after."""

    def __enter__(self) -> Float64:
        self._dtype, self._random = torch.get_default_dtype(), torch.get_rng_state()
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._dtype)
        torch.set_rng_state(self._random)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **kwargs)
