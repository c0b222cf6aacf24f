"""Sharding: a model whose optimizer state, gradients and parameters lie in shards (ZeRO; Rajbhandari et al., arXiv:1910.02054).

                 parameters   gradients                optimizer state        bytes of P float32 parameters with Adam on N ranks
    zero1        whole        whole, reduced: 1/N      1/N                    4P + 4P + 8P/N
    zero2        whole        1/N                      1/N                    4P + 12P/N, and two buckets
    zero3        1/N          1/N                      1/N                    16P/N, two buckets, and two blocks beside what is in none

    begin backward -> buckets are reduce-scattered as they fill -> the optimizer steps on this rank's pieces -> parameters are gathered,
    under stage 3 not now, but a block at a time before it is used

A piece is a range of one parameter; a rank has at most one of each. It is a parameter of its own to the optimizer, one-dimensional, and
shares its memory with the parameter's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.bucket import DtypeOf, own_dtype, partition
from ringfold.parallel.buckets import FIRST_BUCKET_MB
from ringfold.parallel.deferred.model import Deferred
from ringfold.parallel.traffic import Traffic
from ringfold.parallel.zero import optimizer as zero_optimizer
from ringfold.parallel.zero.beside import StepBeside
from ringfold.parallel.zero.bucketwise import BucketwiseStep
from ringfold.parallel.zero.cuts import Cuts
from ringfold.parallel.zero.gathering import GatheredParameters
from ringfold.parallel.zero.gradients import BUFFERS, ShardedGradients
from ringfold.parallel.zero.group import ShardGroup
from ringfold.parallel.zero.initial import Initial
from ringfold.parallel.zero.parameters import FlatParameters
from ringfold.parallel.zero.rest import Rest
from torch import nn
from torch.optim import Optimizer

__all__ = ["Sharding"]


class Sharding:
    """Shard what a model needs beside its parameters over `comm`, or over each `group_size` of its ranks; made by all of them together.

    dtype_of: in which precision each parameter is computed with; where that is not its own, what is trained is a master copy of the piece.
    one_backward: there is one in a step, so gradients that have masters may be kept in 16 bits, and are given to the optimizer by `step`.
    deferred: computes the first values of a module that lies on the meta device, where stage 3 wants them on `device`.
    offload: "cpu" or "nvme=DIR", where masters, the optimizer's state and, under stage 3, parameters rest (rest.py).
    reduce_dtype: in which gradients of 16 bits are summed over ranks, their own by default.
    exact: gradients, and `norm`, are the same bits however many ranks there are (a power of two) and whatever the stage and group.
    Every rank holds the same parameters before (`broadcast_state`). `averaged`: gradients are averages over ranks, else sums.

    Raises:
        ConfigError: names, shapes, dtypes or requires_grad differ between ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        stage: int,
        *,
        averaged: bool,
        group_size: int | None = None,
        bucket_mb: float = 25.0,
        blocks: Sequence[str] | None = None,
        exact: bool = False,
        dtype_of: DtypeOf = own_dtype,
        reduce_dtype: torch.dtype | None = None,
        one_backward: bool = False,
        offload: str | None = None,
        deferred: Deferred | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.stage = stage
        named = list(module.named_parameters())
        device = device or (named[0][1].device if named else torch.device("cpu"))
        self._rest = Rest(offload, device)
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._trained_dtypes = {id(parameter): parameter.dtype for _, parameter in named}
        for name, parameter in named:
            parameter.data = parameter.detach().contiguous()  # a piece is then a range of indices, in checkpoints too
            if stage < 3 and not parameter.requires_grad:
                parameter.data = parameter.detach().to(dtype_of(name, parameter))
        self._group = ShardGroup(comm, group_size, exact)
        self.cuts = cuts = Cuts(self._rest)
        limit = int(bucket_mb * 2**20)
        self._parameters: FlatParameters | GatheredParameters
        if stage == 3:
            initial = Initial(comm, device, deferred)
            self._parameters = GatheredParameters(
                module, self._group, cuts, self._rest, initial, limit_nbytes=limit // BUFFERS, blocks=blocks, dtype_of=dtype_of
            )
        else:
            first, align = int(FIRST_BUCKET_MB * 2**20), self._rest.alignment
            buckets = partition(trained, limit, first_nbytes=first, ranks=self._group.size, dtype_of=dtype_of, alignment=align)
            self._parameters = FlatParameters(buckets, self._group, cuts)
        self.gradients = ShardedGradients(
            named,
            {bucket: mine for bucket, mine in cuts.of.items() if bucket.slots[0].parameter.requires_grad},
            self._group,
            averaged,
            accumulates_locally=stage == 1 and not exact and not cuts.have_masters,
            exact=exact,
            reduce_dtype=reduce_dtype,
            narrow=one_backward and cuts.have_masters and not exact and reduce_dtype is None,
            is_apart=self._rest.is_elsewhere,
        )
        self._slot_of = {id(slot.parameter): (slot, bucket) for bucket in cuts.of for slot in bucket.slots}
        self._cut_of = {id(piece.slot.parameter): (piece, mine) for each in cuts.of.values() for piece, mine in each}
        self._bucketwise: BucketwiseStep | None = None
        self._states: zero_optimizer.States = {}
        self._beside: StepBeside | None = None
        self._has_failed = False  # a step beside backward, on this rank
        self._factor = 1.0  # that the optimizer's gradients had, where those that are kept lack it
        self.pieces = [mine for _, mine in self._cut_of.values()]

    @property
    def group_size(self) -> int:
        """The number of ranks that share the model."""
        return self._group.size

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        """Fold what each rank has computed of its own pieces over all that share the model, in place."""
        self._group.shard.all_reduce(tensor, op)

    def sum_over_shards(self, value: float) -> float:
        """Return the sum of a number that each rank has computed of its own pieces."""
        total = torch.tensor([value], dtype=torch.float64, device="cpu")
        self.all_reduce(total)
        return float(total)

    def cut(self, optimizer: Optimizer) -> None:
        """Give an optimizer, built on the model's parameters, the pieces of this rank; its steps then end with the gathering of parameters.

        Raises:
            ConfigError: it is not elementwise.
        """
        whole: dict[int, tuple[nn.Parameter | None, int]] = {id(p): (p, 0) for group in optimizer.param_groups for p in group["params"]}
        mine = {key: (parameter, piece.start) for key, (piece, parameter) in self._cut_of.items()}
        nothing = dict.fromkeys(self._slot_of, (None, 0))
        self._states = zero_optimizer.cut(optimizer, {**whole, **nothing, **mine})
        if self.gradients.is_apart:
            self._bucketwise = step = BucketwiseStep(optimizer, self.cuts, self._rest.file, self._states)
            if self._rest.is_elsewhere and isinstance(self._parameters, GatheredParameters):  # the others' uses of parameters are not seen
                self._beside = StepBeside(step, self._parameters.units, self._gradient_of)
                self.gradients.on_sum = self._beside.take
        optimizer.register_step_post_hook(lambda *_: None if self._bucketwise is not None and self._bucketwise.is_halfway else self.publish())

    def begin_beside(self) -> None:
        """Begin to step on gradients of the backward that comes, as they are summed, if that can be seen to change nothing; `step` ends it."""
        if self._beside is not None:
            self._factor = 1.0
            self._beside.begin()

    def step(self, optimizer: Optimizer, factor: float) -> None:
        """Step on gradients times `factor`."""
        if self._bucketwise is None:
            grads = [piece.grad for piece in self.pieces if piece.grad is not None]
            if factor != 1.0 and grads:
                torch._foreach_mul_(grads, factor)
            optimizer.step()
            return
        if self._beside is not None and self._beside.is_running:
            self._beside.finish()
        else:
            self._factor = factor
            self._bucketwise.step(self._gradient_of)
        self._parameters.publish()

    def _gradient_of(self, piece: nn.Parameter) -> torch.Tensor | None:
        kept = self.gradients.of(piece)
        return None if kept is None else kept.to(piece.device, piece.dtype, copy=True).mul_(self._factor)

    def abandon(self) -> None:
        """Take note that the train step failed."""
        if self._beside is not None and self._beside.abandon():
            self._has_failed = True

    def require_whole(self) -> None:
        """Make sure that no step has changed a part of the parameters; collective if the last one failed beside backward.

        Raises:
            ConfigError: one has, on any rank.
        """
        if self._bucketwise is None:
            return
        if self._has_failed:
            halfway = torch.tensor([self._bucketwise.is_halfway], dtype=torch.int32, device="cpu")
            self._group.whole.all_reduce(halfway, "max")
            self._bucketwise.is_halfway, self._has_failed = bool(halfway), False
        if self._bucketwise.is_halfway:
            raise ConfigError("the last train step failed when the optimizer had changed a part of the parameters. Resume from a checkpoint.")

    def settle(self) -> None:
        """Take note that the optimizer's state, or pieces, were loaded."""
        if self._bucketwise is not None:
            self._bucketwise.settle()
            self._has_failed = False
        self.publish()

    def traffic(self, micro: int) -> list[Traffic]:
        """Return what a step of so many microbatches sends; the norm, and what the loss needs, are not in it."""
        rounds = micro if self.gradients.reduces_every_backward else 1
        found = [each.times(rounds) for each in self.gradients.traffic()] + self._parameters.traffic(micro)
        return [each for each in found if each.count and each.ranks > 1]

    def gradient_dtypes(self, parameter: nn.Parameter) -> tuple[torch.dtype, torch.dtype]:
        """Return in which dtype a parameter's gradient is summed over ranks, and in which it is kept."""
        bucket = self._slot_of[id(parameter)][1]
        return self.gradients.dtype_of(bucket), bucket.dtype if self.gradients.is_narrow else self.trained_dtype(parameter)

    def state_dtypes(self, parameter: nn.Parameter) -> dict[str, torch.dtype]:
        """Return the state that the optimizer keeps for each element of a parameter, as far as this rank knows; `cut` comes first."""
        if id(parameter) in self._cut_of:
            return self._states.get(id(self._cut_of[id(parameter)][1]), {})
        alike = (self._states[id(piece)] for piece in self.pieces if id(piece) in self._states and piece.dtype == self.trained_dtype(parameter))
        return next(alike, {})

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that this rank keeps, by purpose; frozen parameters of stages 1 and 2 are not among them."""
        parameters, gathered = self._parameters.nbytes
        return {
            "parameters": parameters,
            "masters": self.cuts.masters_nbytes,
            "gradients": self.gradients.shards_nbytes,
            "gradient buffers": self.gradients.buffers_nbytes,
            "gathered blocks": gathered,
            "offload": 0 if self._bucketwise is None else self._bucketwise.nbytes,
            "files": 0 if self._rest.file is None else self._rest.file.nbytes,
        }

    def lies_in_file(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor takes no memory."""
        return self._rest.holds(tensor)

    @property
    def has_masters(self) -> bool:
        """Whether what is trained is not what is computed with."""
        return self.cuts.have_masters

    def trained_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Return the dtype of a parameter's pieces, on ranks that have none of it, too."""
        return self._trained_dtypes[id(parameter)]

    def gradient_tensors(self, parameters: Sequence[nn.Parameter] | None = None) -> list[torch.Tensor]:
        """Return the gradients of this rank's pieces of some parameters, of all by default, in the dtypes in which they are kept."""
        keys = self._cut_of if parameters is None else [id(parameter) for parameter in parameters if id(parameter) in self._cut_of]
        return [grad for key in keys if (grad := self.gradients.of(self._cut_of[key][1])) is not None]

    def publish(self) -> None:
        """Let every rank see what has changed in the pieces of any.

        Raises:
            ConfigError: parameters were moved behind its back.
        """
        self.cuts.write_back()
        self._parameters.publish()

    def grad(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return a parameter's whole gradient as the optimizer sees it, in new memory, or None if no rank used it; collective."""
        if not parameter.requires_grad:
            return None
        found = self._gathered(parameter, self.gradients.of)
        return found if found is None or not self.gradients.is_apart else found.mul_(self._factor)

    def value(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter's whole values as they are trained, in new memory; collective."""
        found = self._gathered(parameter, lambda piece: piece)
        return parameter.detach().clone() if found is None else found

    def assign(self, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Train on from these whole values, the same on all ranks; collective."""
        for parameter, value in values.items():
            if id(parameter) in self._cut_of:
                piece, mine = self._cut_of[id(parameter)]
                mine.detach().copy_(value.reshape(-1)[piece.start : piece.stop])
        self.publish()

    def _gathered(self, parameter: nn.Parameter, of_piece: Callable[[nn.Parameter], torch.Tensor | None]) -> torch.Tensor | None:
        """Put together what each rank has for its piece of a parameter; None if it is None everywhere, or the parameter is not cut."""
        if id(parameter) not in self._slot_of:
            return None
        slot, bucket = self._slot_of[id(parameter)]
        gathered = torch.zeros(slot.numel + 1, dtype=self._trained_dtypes[id(parameter)], device=bucket.device)  # and whether there is anything
        if id(parameter) in self._cut_of:
            piece, mine = self._cut_of[id(parameter)]
            values = of_piece(mine)
            if values is not None:
                gathered[piece.start : piece.stop] = values.detach()
                gathered[-1] = 1.0
        self._group.shard.all_reduce(gathered)
        return gathered[:-1].as_strided(slot.shape, slot.strides) if gathered[-1] else None

    def named_pieces(self) -> list[tuple[str, nn.Parameter, int, torch.Size]]:
        """Return (name of the parameter, piece, index of its first element in row-major order, shape of the parameter) of each piece here."""
        return [(piece.slot.name, mine, piece.start, piece.slot.shape) for piece, mine in self._cut_of.values()]

    def gather(self, block: nn.Module) -> None:
        """Let the parameters of a block be seen until another needs the memory, where they are not always."""
        if isinstance(self._parameters, GatheredParameters):
            self._parameters.gather(block)

    def everything(self, write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which every rank has all parameters whole; with `write` what was changed inside, alike on all ranks, stays."""
        if isinstance(self._parameters, GatheredParameters):
            return self._parameters.everything(write)
        return nullcontext()

    def close(self) -> None:
        """Give the model back: parameters in memory of their own, no hooks; collective. The optimizer is of no use afterwards."""
        if self._beside is not None:
            self._beside.close()
        self.gradients.close()
        self._parameters.close()
        self.cuts.clear()
        self._rest.close()
        self._group.close()
