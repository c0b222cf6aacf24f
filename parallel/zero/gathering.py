"""GatheredParameters: parameters lie in shards, and a block's are gathered just ahead of its use (stage 3).

    forward    a block's pre-forward hook gathers it, and begins to gather what comes next; after its forward the parameters are hidden
    backward   what autograd saves of a gathered parameter is packed as (unit, place), so that it keeps nothing; unpacking gathers again

Memory for whole parameters: one of its own for the unit of what is in no block (needed as long as the model runs), and SLOTS as large as
the largest block that the blocks take in turn, least recently used first. What comes next is what came next after the same two blocks last
time; a guess that is wrong costs one gather. All of it follows from the order in which blocks are used, so it is the same
on all ranks if that is. A rank without rows has to call the model as well.

The idea is that of ZeRO-3 and FSDP; the packing of saved tensors replaces their resized storages, which registered memory cannot have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.blocks import NO_BLOCK, find_blocks, parameters_by_block
from ringfold.parallel.bucket import DtypeOf, own_dtype
from ringfold.parallel.traffic import Traffic
from ringfold.parallel.zero.cuts import Cuts
from ringfold.parallel.zero.group import ShardGroup
from ringfold.parallel.zero.initial import Initial
from ringfold.parallel.zero.rest import Rest
from ringfold.parallel.zero.units import Unit
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["GatheredParameters"]

SLOTS = 2  # the block that runs, and the one that comes next


class GatheredParameters:
    """Move the parameters of a module into shards over `group`; add to `cuts` the pieces of this rank, in the order of backward."""

    def __init__(
        self,
        module: nn.Module,
        group: ShardGroup,
        cuts: Cuts,
        rest: Rest,
        initial: Initial,
        *,
        limit_nbytes: int,
        blocks: Sequence[str] | None = None,
        dtype_of: DtypeOf = own_dtype,
    ) -> None:
        self._module = module
        self._group = group
        found = find_blocks(module, blocks)
        self.units: list[Unit] = []
        self._unit_of: dict[nn.Module, Unit] = {}
        for name, named in reversed(parameters_by_block(module, found).items()):
            if named:
                firsts = [unit.buckets[0] for unit in self.units]
                unit = Unit(name, named, group, firsts, limit_nbytes, dtype_of, rest, initial.device)
                self.units.append(unit)
                self._unit_of[module if name == NO_BLOCK else found[name]] = unit
        self._common = self._unit_of.get(module)
        largest = max((unit.nbytes for unit in self.units if unit is not self._common), default=0)
        count = min(SLOTS, sum(unit is not self._common for unit in self.units))
        self._device = initial.device
        rest.reserve(group.whole, sum(unit.nbytes for unit in self.units) // group.size, self._device)
        with initial.using(max([largest, *(parameter.nbytes for parameter in module.parameters())])):  # the first slot gets this memory
            for unit in self.units:
                unit.fill(cuts, initial)
        self._free = [group.whole.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(count)]
        self._common_memory = None if self._common is None else group.whole.empty(self._common.nbytes, dtype=torch.uint8, device=self._device)
        self._holder: dict[int, Unit] = {}  # by address of the memory
        self._used: list[Unit] = []  # blocks that have memory, the one used last at the end
        self._next: dict[tuple[bool, Unit | None, Unit | None], Unit] = {}  # (in backward, a block, the one after it) -> what came next
        self._before: Unit | None = None
        self._latest: Unit | None = None
        self._in_backward = False
        self._is_open_for_all = False
        self._saving: list[saved_tensors_hooks] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks.append(module.register_forward_pre_hook(self._before_model, prepend=True))
        for block in self._unit_of:
            if block is not module:
                self._hooks.append(block.register_forward_pre_hook(self._before_block, prepend=True))
                self._hooks.append(block.register_forward_hook(self._after_block, always_call=True))
        self._hooks.append(module.register_forward_hook(self._after_model, always_call=True))

    def gather(self, block: nn.Module) -> None:
        """Let the parameters of a block be seen, until other blocks need the memory."""
        if block in self._unit_of:
            self._use(self._unit_of[block])

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes that this rank keeps of parameters, and of memory that they are gathered into."""
        lent = [*self._free, *(unit.memory for unit in self._used if unit.memory is not None)]
        common = 0 if self._common_memory is None else self._common_memory.nbytes
        return sum(unit.shards_nbytes for unit in self.units), sum(memory.nbytes for memory in lent) + common

    def traffic(self, micro: int) -> list[Traffic]:
        """Return what a step of so many microbatches sends of parameters, if blocks run one after the other and each of them saves a parameter.

        A backward begins with the last SLOTS blocks in memory, and the next forward with the first.
        """
        blocks = [unit for unit in reversed(self.units) if unit is not self._common]
        forward = ([] if self._common is None else [self._common]) + blocks
        backward = blocks[: max(0, len(blocks) - SLOTS)]
        again = blocks[SLOTS:]
        return [
            self._traffic("parameters in forward", [*forward, *again * (micro - 1)]),
            self._traffic("parameters in backward", backward * micro),
        ]

    def _traffic(self, purpose: str, units: Sequence[Unit]) -> Traffic:
        count = sum(len(unit.buckets) for unit in units)
        return Traffic(purpose, "all_gather", count, sum(unit.nbytes for unit in units), self._group.size)

    def publish(self) -> None:
        """Forget what was gathered: the optimizer has changed the shards.

        Raises:
            ConfigError: parameters lie elsewhere than they were put; all of them are named.
        """
        moved = [name for unit in self.units for name in unit.moved()]
        if moved:
            raise ConfigError(
                f"parameters have left the memory that ZeRO keeps them in: {', '.join(moved)}. Assigning to `.data`, or moving or converting the "
                "model, does that. Change them inside `gathered(write=True)`, or before the model is sharded."
            )
        self._forget()

    @contextmanager
    def everything(self, write: bool = False) -> Iterator[None]:
        """Give every parameter its whole values, in memory of its own, and with `write` take over what was changed; collective."""
        self._forget()
        whole = []
        for unit in self.units:
            unit.begin(self._group.whole.empty(unit.nbytes, dtype=torch.uint8, device=self._device), once=True)
            unit.show()
            whole.append(unit)
        self._is_open_for_all = True
        try:
            yield
        finally:
            self._is_open_for_all = False
            for unit in whole:
                if write:
                    unit.take_over()
                unit.hide()
                unit.give_back()

    def close(self) -> None:
        """Give the parameters whole values in ordinary memory, and take the hooks off; collective."""
        for hook in self._hooks:
            hook.remove()
        self._forget()
        for unit in self.units:
            unit.begin(self._group.whole.empty(unit.nbytes, dtype=torch.uint8, device=self._device), once=True)
            unit.show()
            for parameter in unit.parameters:
                parameter.data = parameter.detach().clone()
            unit.give_back()
        self.units.clear()
        self._unit_of.clear()
        self._free.clear()
        self._common_memory = None

    # -- forward ----------------------------------------------------------------------------------------------------------------------

    def _before_model(self, *_: Any) -> None:
        self._in_backward = False
        saving = saved_tensors_hooks(self._pack, self._unpack)
        saving.__enter__()
        self._saving.append(saving)
        if self._common is not None:
            self._use(self._common)
        self._before = self._latest = None
        self._prefetch()

    def _after_model(self, *_: Any) -> None:
        self._saving.pop().__exit__(None, None, None)

    def _before_block(self, block: nn.Module, *_: Any) -> None:
        self._use(self._unit_of[block])

    def _after_block(self, block: nn.Module, *_: Any) -> None:
        if not self._is_open_for_all:
            self._unit_of[block].hide()

    # -- backward ---------------------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Any:
        unit = self._holder.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if unit is None or self._is_open_for_all:
            return tensor
        return unit, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        unit, dtype, shape, strides, offset = packed
        turns, self._in_backward = not self._in_backward, True
        self._use(unit)
        if turns:
            self._prefetch()
        memory: torch.Tensor = unit.memory.view(dtype)
        return memory.as_strided(shape, strides, offset)

    # -- memory -----------------------------------------------------------------------------------------------------------------------

    def _use(self, unit: Unit) -> None:
        """Have a unit gathered and seen; begin to gather the block that is expected next."""
        if self._is_open_for_all:
            return
        if unit is self._common:
            if unit.memory is None:
                assert self._common_memory is not None  # narrows the type
                unit.begin(self._common_memory)
                self._holder[self._common_memory.untyped_storage().data_ptr()] = unit
                unit.show()
            return
        if unit is self._latest:
            unit.show()
            return
        self._next[self._in_backward, self._before, self._latest] = unit
        self._before, self._latest = self._latest, unit
        self._begin(unit)
        if unit.is_late:
            raise ConfigError(
                f"zero3: {unit.name} is used in backward after the gradients of all its parameters were complete "
                f"({', '.join(slot.name for bucket in unit.trained for slot in bucket.slots)}). The optimizer steps beside backward and may have "
                "changed them. Is it used a second time without a gradient, through `.detach()`? With a clip_norm the step comes after backward."
            )
        unit.show()
        self._prefetch()

    def _prefetch(self) -> None:
        expected = self._next.get((self._in_backward, self._before, self._latest))
        if expected is not None and expected.memory is None:
            self._begin(expected)

    def _begin(self, unit: Unit) -> None:
        if unit.memory is not None:
            self._used.remove(unit)
        else:
            if not self._free:
                self._take_back(next(other for other in self._used if other is not self._latest))
            memory = self._free.pop()
            unit.begin(memory)
            self._holder[memory.untyped_storage().data_ptr()] = unit
        self._used.append(unit)

    def _take_back(self, unit: Unit) -> None:
        self._used.remove(unit)
        unit.hide()
        memory = unit.give_back()
        if memory is not None:
            del self._holder[memory.untyped_storage().data_ptr()]
            self._free.append(memory)

    def _forget(self) -> None:
        for unit in list(self._used):
            self._take_back(unit)
        if self._common is not None and self._common.memory is not None:
            self._common.hide()
            self._common.give_back()
        self._holder.clear()
        self._before = self._latest = None
