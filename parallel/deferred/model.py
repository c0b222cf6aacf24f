"""Deferred: a model that is built without being computed, and whose parameters are then computed one at a time, each bit for bit as always.

    deferred = record(function)          runs it; what would take memory is a fake tensor, and operations on that are written down
    deferred.prepare()                   draws the random numbers in their order, each time into memory that is dropped, and notes where each begins
    deferred.value_of(parameter)         repeats the operations that the parameter's values come from, and no others

An operation is known by the storages it reads and writes. A storage's values come from those that wrote it, back to the last one that wrote all of
it (so an initialisation that another one replaced costs nothing but its random numbers), and from those that what they read comes from.

What cannot be written down (a value that decides something, memory that something other than a module holds, operations whose use of random numbers
depends on values) makes `record` give up: it returns the reason, with random states as they were, and the function is called as usual.
"""

from __future__ import annotations

import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ringfold.parallel.deferred.log import START, GaveUp, Log, Origin, View
from ringfold.parallel.deferred.recorder import Recorder, adapted_torch, swap
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Deferred", "record"]

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Deferred:
    """A module whose parameters are on the meta device, and how they are computed; made by `record`."""

    def __init__(
        self, module: nn.Module, log: Log, targets: dict[int, View], ends: dict[torch.Generator, Origin], restore_random: Callable[[], None]
    ) -> None:
        self.module = module
        self.abandon = restore_random  # puts random states back as they were before, so that the function may be called as usual
        self._log = log
        self._targets = targets  # by id of the tensor
        self._ends = ends  # of the generators, when the function had ended
        self._sources = {view.storage: log.sources(view.storage) for view in targets.values()}

    def prepare(self) -> None:
        """Draw all random numbers once, and leave the generators where building would have left them."""
        alive = {index for sources in self._sources.values() for index in sources}
        draws = [operation for operation in self._log.operations if operation.generator is not None]
        views = [leaf for operation in draws for leaf in tree_leaves((operation.args, operation.kwargs)) if isinstance(leaf, View)]
        # One memory for all: in what they leave free the states below would settle, and the next one would not fit there.
        memory = torch.UntypedStorage(max((self._log.nbytes[view.storage] for view in views), default=0))

        def scratch(value: Any) -> Any:
            return _seen(memory, value) if isinstance(value, View) else value

        returned_to = {origin for origin in (*(operation.origin for operation in draws), *self._ends.values()) if isinstance(origin, int)}
        after = {START: torch.default_generator.get_state()}

        def enter(generator: torch.Generator, origin: Origin) -> None:
            if origin is not None:
                generator.set_state(after[origin] if isinstance(origin, int) else origin)

        for index, operation in enumerate(self._log.operations):
            generator = operation.generator
            if generator is None:
                continue
            enter(generator, operation.origin)
            if index in alive:
                operation.state = generator.get_state()
            operation.call(*tree_map(scratch, operation.args), **tree_map(scratch, operation.kwargs))
            if index in returned_to:
                after[index] = generator.get_state()
        for generator, origin in self._ends.items():
            enter(generator, origin)

    def value_of(self, tensor: Tensor) -> Tensor:
        """Return a parameter's or buffer's first values in new memory, with its strides; `prepare` comes first."""
        if not tensor.is_meta:
            return tensor.detach().clone()
        view = self._targets[id(tensor)]
        storages: dict[int, torch.UntypedStorage] = {}

        def real(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            if value.storage not in storages:
                storages[value.storage] = torch.UntypedStorage(self._log.nbytes[value.storage])
            return _seen(storages[value.storage], value)

        with torch.no_grad():
            for index in self._sources[view.storage]:
                operation = self._log.operations[index]
                args, kwargs = tree_map(real, operation.args), tree_map(real, operation.kwargs)
                with _drawing_from(operation.generator, operation.state):
                    result = operation.call(*args, **kwargs)
                for output, place in zip((leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), operation.outputs, strict=True):
                    if place is None:
                        continue
                    if (output.stride(), output.storage_offset(), output.untyped_storage().nbytes()) == (
                        place.stride,
                        place.offset,
                        self._log.nbytes[place.storage],
                    ):
                        storages[place.storage] = output.untyped_storage()
                    else:
                        real(place).copy_(output)
        values: Tensor = real(view)
        return values

    def materialise_buffers(self) -> None:
        """Compute all buffers, and tensors that are attributes of modules, alone or in lists, tuples and dicts."""
        made: dict[int, Tensor] = {}

        def real(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_meta and not isinstance(value, nn.Parameter):
                if id(value) not in made:
                    made[id(value)] = self.value_of(value).requires_grad_(value.requires_grad)
                return made[id(value)]
            return value

        for part in self.module.modules():
            part._buffers = {name: real(buffer) for name, buffer in part._buffers.items()}
            for name, value in vars(part).items():
                if name not in _REGISTRIES and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    vars(part)[name] = tree_map(real, value)

    def become(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Let a parameter have these values; it stays the same object, with its attributes."""
        if parameter.is_meta:
            _become(parameter, values)
        else:
            parameter.data = values


def record(function: Callable[[], Any]) -> Deferred | str:
    """Build a model without computing it; return the reason if that cannot be done, with random states as they were before."""
    restore_others = _random_states()
    torch_state = torch.default_generator.get_state()
    recorder = Recorder()

    def restore_random() -> None:
        for generator, state in recorder.first.items():
            generator.set_state(state)
        restore_others()

    try:
        # Fake tensors say that they are on the CPU, where torch.nn.init and others skip what is on the meta device.
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), recorder, adapted_torch(recorder):
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copy.deepcopy does
            module = function()
        deferred = _deferred(module, recorder, restore_random)
        torch.default_generator.set_state(torch_state)
        return deferred
    except Exception as error:  # whatever a builder does when tensors have no values
        reason = str(error) if isinstance(error, GaveUp) else f"{type(error).__name__}: {error}"
    restore_random()
    return reason.splitlines()[0]


def _random_states() -> Callable[[], None]:
    """Return what restores the random states of now."""
    of_python, of_torch, numpy = random.getstate(), torch.default_generator.get_state(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        random.setstate(of_python)
        torch.default_generator.set_state(of_torch)
        if numpy is not None:
            numpy.random.set_state(of_numpy)

    return restore


def _deferred(module: Any, recorder: Recorder, restore_random: Callable[[], None]) -> Deferred:
    if not isinstance(module, nn.Module):
        raise GaveUp(f"{type(module).__name__} is no module")
    if any(constant._version != version for constant, version in recorder.constants):
        raise GaveUp("a tensor of given numbers was changed after it was used")
    ends = {generator: recorder.origin_of(generator) for generator in list(recorder.first)}
    tensors = {id(tensor): tensor for tensor in _tensors_of(module) if isinstance(tensor, FakeTensor)}
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise GaveUp("a part of the module is scripted")
    if any(tensor.is_conj() or tensor.is_neg() for tensor in tensors.values()):
        raise GaveUp("a tensor of the module is a conjugate or negative view")
    registered = {id(parameter) for parameter in module.parameters()}
    if any(isinstance(tensor, nn.Parameter) and key not in registered for key, tensor in tensors.items()):
        raise GaveUp("a parameter is held by a module that has not registered it")
    targets = {key: recorder.view_of(tensor) for key, tensor in tensors.items()}
    if len({view.storage for view in targets.values()}) < len(targets):
        raise GaveUp("two tensors of the module share memory")
    if any(not tensor.is_leaf for tensor in tensors.values()):
        raise GaveUp("an attribute of a module depends on parameters")
    gc.collect()
    held = {view.storage for view in targets.values()}
    for number, storage in recorder.storages.values():
        if torch._C._storage_Use_Count(storage._cdata) > 1 + (number in held):  # by the recorder, and by the module's tensor
            raise GaveUp("something other than a module holds a tensor, or a view of one")
    for tensor in tensors.values():
        _become(tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
    return Deferred(module, recorder.log, targets, ends, restore_random)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers and other tensors that modules hold."""
    for part in module.modules():
        yield from (tensor for registry in (part._parameters, part._buffers) for tensor in registry.values() if tensor is not None)
        for name, value in vars(part).items():
            if name not in _REGISTRIES:
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _become(tensor: Tensor, values: Tensor) -> None:
    """Let a tensor be another, and stay the same object, with the attributes that it was given."""
    own = vars(tensor.fake_mode.from_tensor(torch.empty(0))) if isinstance(tensor, FakeTensor) else {}
    kept = {key: value for key, value in vars(tensor).items() if key not in own and key != "_is_param"}
    if isinstance(tensor, nn.Parameter):
        swap(tensor, nn.Parameter(values, tensor.requires_grad))
    else:
        swap(tensor, values.detach().requires_grad_(tensor.requires_grad))
    vars(tensor).update(kept)


@contextmanager
def _drawing_from(generator: torch.Generator | None, state: Tensor | None) -> Iterator[None]:
    if generator is None:
        yield
        return
    assert state is not None, "prepare() comes first"
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


def _seen(storage: torch.UntypedStorage, view: View) -> Tensor:
    return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.size, view.stride)  # type: ignore[call-overload,no-any-return]
