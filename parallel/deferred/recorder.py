"""Recorder: runs a function on fake tensors, and writes down what would have happened to real ones."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ringfold.parallel.deferred.log import START, GaveUp, Log, Operation, Origin, View
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Recorder", "adapted_torch", "swap"]

# Made as fake tensors; other factories (arange, linspace, tensors of given numbers) are small, and code likes to read their values.
LARGE = {"empty", "empty_strided", "empty_permuted", "zeros", "ones", "full", "eye"}
UNINITIALISED = {"empty", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "empty_like"}
# Draw as many numbers as the shape says, whatever the values are.
RANDOM = {"normal_", "uniform_", "random_", "exponential_", "log_normal_", "geometric_", "cauchy_", "bernoulli_"}
RANDOM |= {"rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like", "randint_like"}
OVERWRITE = {"normal_", "uniform_", "random_", "exponential_", "log_normal_", "geometric_", "cauchy_", "bernoulli_", "fill_", "zero_", "copy_"}
VALUES_UNREAD = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones", "new_full"}
VALUES_UNREAD |= UNINITIALISED

MARK = 0x5EED << 40  # seeds of states that stand for others


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.constants: list[tuple[Tensor, int]] = []
        self.storages: dict[int, tuple[int, torch.UntypedStorage]] = {}  # with the storage itself, so that its address is not used again
        self.first: dict[torch.Generator, Tensor] = {}  # the states in which generators were found
        self._last: dict[torch.Generator, bytes] = {}  # those seen last
        self._marks: dict[bytes, int] = {}  # states that stand for those after a draw, by its index
        self.origin_of(torch.default_generator)
        self._marks[self._last[torch.default_generator]] = START

    def view_of(self, tensor: Tensor) -> View:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            raise GaveUp("a tensor was made by other means than an operation")
        number = self.storages[storage._cdata][0]
        return View(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def origin_of(self, generator: torch.Generator) -> Origin:
        """Return where a generator's state comes from."""
        with unset_fake_temporarily():
            state = generator.get_state()
        key = ctypes.string_at(state.data_ptr(), state.nbytes)
        self.first.setdefault(generator, state)
        before, self._last[generator] = self._last.get(generator), key
        return None if key == before else self._marks.get(key, state)

    def _mark(self, generator: torch.Generator, index: int) -> None:
        """Give a generator a state that stands for the one after this draw: nothing is drawn now, yet functions read states and set them again."""
        generator.manual_seed(MARK + index)
        self.origin_of(generator)
        self._marks[self._last[generator]] = index

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = call._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        draws = torch.Tag.nondeterministic_seeded in call.tags
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            raise GaveUp(f"{name} on {device}")
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if tensors and draws:
                raise GaveUp(f"{name} draws random numbers into a tensor of given numbers")
            if tensors or not (draws or name in LARGE):
                with unset_fake_temporarily():
                    return call(*args, **kwargs)
        if draws and name not in RANDOM:
            raise GaveUp(f"{name} draws random numbers that may depend on values")
        if "batch_norm" in name:
            raise GaveUp(f"{name} changes running statistics, and its schema does not say so")
        if name in ("set_", "resize_", "set_data"):
            raise GaveUp(f"{name} changes what storage a tensor has")
        result = call(*args, **kwargs)
        if not tensors and any(argument.name == "dtype" for argument in call._schema.arguments):
            kwargs = {**kwargs, "dtype": result.dtype}  # the default may be another one later
        self._write_down(call, name, args, kwargs, result, draws)
        return result

    def _write_down(self, call: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, draws: bool) -> None:
        written = {
            id(value)
            for argument, value in _arguments(call, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in tree_leaves(value)
        }
        if any(_is_real(leaf) and id(leaf) in written for leaf in tree_leaves((args, kwargs))):
            raise GaveUp(f"{name} writes what is not computed yet into a tensor of given numbers")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        changed = {self.view_of(leaf).storage: leaf for leaf in given if id(leaf) in written}
        outputs = [self._new(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = {view.storage for view in outputs if view is not None}
        if not new and not changed:
            return  # a view of what is known
        reads = set() if name in VALUES_UNREAD else {self.view_of(leaf).storage for leaf in given if id(leaf) not in written}
        if draws and reads:
            raise GaveUp(f"{name} draws random numbers that depend on values")
        whole = {number for number, leaf in changed.items() if name in OVERWRITE and number not in reads and _covers_its_storage(leaf)}
        reads |= changed.keys() - whole
        if name in UNINITIALISED:
            return
        operation = Operation(call, tree_map(self._kept, args), tree_map(self._kept, kwargs), outputs, reads, whole | new)
        self._append(operation, new | changed.keys(), draws)

    def draw_whole(self, call: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Write down a function that fills a tensor with random numbers, of which it draws as many as it turns out to need."""
        if not isinstance(tensor, FakeTensor):
            raise GaveUp(f"{call.__name__} draws random numbers into a tensor of given numbers")
        view = self.view_of(tensor)
        whole = {view.storage} if _covers_its_storage(tensor) else set()
        self._append(Operation(call, (view, *args), kwargs, [None], {view.storage} - whole, whole), {view.storage}, draws=True)
        return tensor

    def _append(self, operation: Operation, changed: set[int], draws: bool) -> None:
        if draws:
            operation.generator = operation.kwargs.get("generator") or torch.default_generator
            operation.origin = self.origin_of(operation.generator)
            self._mark(operation.generator, len(self.log.operations))
        for number in changed:
            self.log.writers[number].append(len(self.log.operations))
        self.log.operations.append(operation)

    def _new(self, tensor: Tensor) -> View | None:
        """Take note of a result; return its view if its storage is new."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return None
        self.storages[storage._cdata] = len(self.log.nbytes), storage
        self.log.nbytes.append(storage.nbytes())
        return self.view_of(tensor)

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, FakeTensor):
            return self.view_of(value)
        self.constants.append((value, value._version))
        with unset_fake_temporarily():
            return value.detach()


def swap(one: Tensor, other: Tensor) -> None:
    """Let two tensors be each other, as torch.utils.swap_tensors, which refuses what weak references point to: LSTMs have some, and fake tensors."""
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


@contextmanager
def adapted_torch(recorder: Recorder) -> Iterator[None]:
    """Keep torch.nn.init.trunc_normal_ from looking at what it drew (it draws again what lies outside), and let modules convert fake parameters."""
    adapted: list[tuple[Any, str, Any]] = [(torch.utils, "swap_tensors", swap)]
    name = "_no_grad_trunc_normal_"
    if hasattr(torch.nn.init, name):
        adapted.append((torch.nn.init, name, functools.partial(recorder.draw_whole, getattr(torch.nn.init, name))))
    originals = [getattr(place, name) for place, name, _ in adapted]
    for place, name, ours in adapted:
        setattr(place, name, ours)
    try:
        yield
    finally:
        for (place, name, _), original in zip(adapted, originals, strict=True):
            setattr(place, name, original)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _arguments(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for position, argument in enumerate(call._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _covers_its_storage(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
