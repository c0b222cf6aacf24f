"""Division: how a model's own work is divided among ranks: its parameters over "tp", the sequences it is given over "cp".

What is divided runs as split tensors (parallel/split); ranks that share a part of the parameters, those of "dp" and "cp", sum their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.context.context_parallel import ContextParallel
from ringfold.parallel.mesh import DeviceMesh
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.rules.randomness import draw_alike
from ringfold.parallel.split.stand_ins import StandIns
from ringfold.parallel.tensor.plan import Plan
from ringfold.parallel.tensor.tensor_parallel import TensorParallel
from ringfold.parallel.traffic import Traffic
from ringfold.runtime.batch import tensors_in
from torch import Tensor, nn

__all__ = ["Division"]


class Division:
    """Divide `module`, whole and alike on all ranks of the mesh, as its layout says; nothing is changed where that has neither tp nor cp.

    Raises: ConfigError, LayoutError: the model or the plan does not allow it.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, plan: Plan | None) -> None:
        layout = mesh.layout
        layout.resolve(mesh.size, module)
        self.tensor = TensorParallel(module, mesh["tp"], plan) if layout.tp > 1 else None
        self.context = ContextParallel(mesh["cp"], layout.cp_algorithm) if layout.cp > 1 else None
        if self.context is not None:
            _require_no_batch_norm(module)
        self._alike: Communicator | None = None
        self._stand_ins: StandIns | None = None
        if self.tensor is not None or self.context is not None:
            self._alike = mesh["cp", "tp"]
            draw_alike(self._alike, mesh.device)
            divided = {} if self.tensor is None else self.tensor.divided
            terms, inputs = (frozenset[Axis](), None) if self.context is None else (frozenset([self.context.axis]), self.context.divide)
            self._stand_ins = StandIns(module, divided, terms, inputs)

    def require_same(self, batch: Any, step: int) -> None:
        """Hold ranks that divide the work on the same rows to having the same; collective.

        Raises: ConfigError on every rank: they have not.
        """
        if self._alike is None:
            return
        digest = functools.reduce(_digest, tensors_in(batch), 0)
        highest = torch.tensor([digest, -digest], device="cpu")
        self._alike.all_reduce(highest, "max")
        if int(highest[0]) != -int(highest[1]):
            raise ConfigError(
                f"train step {step}: the ranks of {self._alike.name} were given different batches. They divide the work on the same rows: cut and "
                'shuffle data by mesh["dp"].rank, or use rf.shard, which does.'
            )

    @property
    def axes(self) -> list[Axis]:
        """The axes over which work is divided."""
        return [each.axis for each in (self.tensor, self.context) if each is not None]

    def begin_step(self) -> None:
        """Count what is exchanged from now on."""
        for axis in self.axes:
            axis.forget()

    def traffic(self) -> list[Traffic]:
        """Return what the last step sent inside layers."""
        return [
            Traffic(f"inside layers, over {axis.name}", operation, count, nbytes, axis.size)
            for axis in self.axes
            for operation, (count, nbytes) in sorted(axis.exchanged.items())
        ]

    def explain(self) -> str:
        """Return which parameters are divided and how, and what was gathered in the last step because no rule knew better."""
        lines = [] if self.tensor is None else [self.tensor.explain()]
        if self.context is not None:
            lines.append(f"sequences are divided over cp, {self.context.algorithm} attention")
        for axis in self.axes:
            if axis.gathered:
                lines.append(
                    f"gathered over {axis.name}, for want of a rule: {', '.join(f'{name} x {n}' for name, n in axis.gathered.most_common())}"
                )
        return "\n".join(lines)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let parts of the model run inside as the whole does."""
        with contextlib.nullcontext() if self._stand_ins is None else self._stand_ins.running():
            yield

    @contextlib.contextmanager
    def everything(self, write: bool = False) -> Iterator[None]:
        """Have whole parameters in the model inside, which then runs as it is; with `write` what is changed there stays. Collective."""
        with contextlib.ExitStack() as stack:
            if self._stand_ins is not None:
                stack.enter_context(self._stand_ins.absent())
            if self.tensor is not None:
                stack.enter_context(self.tensor.everything(write))
            yield

    def close(self) -> None:
        """Let the model run as it is; its parameters stay parts."""
        if self._stand_ins is not None:
            self._stand_ins.close()


def _digest(digest: int, tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, digest)


def _require_no_batch_norm(module: nn.Module) -> None:
    found = [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if found:
        raise ConfigError(f"cp: {', '.join(found)} would take the statistics of parts of sequences. Use a LayerNorm or GroupNorm, or leave cp out.")
