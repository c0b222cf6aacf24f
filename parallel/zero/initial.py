"""Initial: the first values of parameters, and what stands in their place once they lie in shards.

a module              every rank has them all, the same
a deferred module     rank 0 computes one parameter at a time and gives it to all; no rank ever has two
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.deferred.model import Deferred
from torch import nn

__all__ = ["Initial"]


class Initial:
    """The values of a module's parameters on `device`; `deferred` if they are yet to be computed. Methods are collective then."""

    def __init__(self, comm: Communicator, device: torch.device, deferred: Deferred | None = None) -> None:
        self.device = device
        self._comm = comm
        self._deferred = deferred
        self._memory: torch.Tensor | None = None

    @contextmanager
    def using(self, nbytes: int) -> Iterator[None]:
        """Have so much registered memory for values inside; no parameter needs more."""
        if self._deferred is not None:
            self._memory = self._comm.empty(nbytes, dtype=torch.uint8, device=self.device)
        try:
            yield
        finally:
            self._memory = None

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter's values, contiguous, in the dtype it is trained in; they last until the next ones are asked for."""
        if self._deferred is None:
            return parameter.detach()
        assert self._memory is not None, "inside using()"
        values = self._memory[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        if self._comm.rank == 0:
            values.copy_(self._deferred.value_of(parameter))
        if values.numel():
            self._comm.broadcast(values.view(-1).view(torch.uint8), 0)
        return values

    def let_go(self, parameter: nn.Parameter, absent: torch.Tensor) -> None:
        """Put `absent`, which takes no memory, in the place of a parameter's values."""
        if self._deferred is None:
            parameter.data = absent
        else:
            self._deferred.become(parameter, absent)
