"""One call of a block that is recomputed: run in forward, when nothing that it saves is kept, and once more when backward needs that.

    forward    pack(tensor) -> Slot      the tensor is dropped; the call keeps arguments, surroundings, and copies of buffers that it changed
    backward   unpack(Slot) -> tensor    the first slot that is asked for runs the block again, up to the last tensor to be saved, and fills all

The n-th tensor that the second run saves stands for the n-th of the first one. These are the semantics of torch.utils.checkpoint without
reentrance, which would do but for three things: its hooks hide what a block saves from whoever wants to count it, its errors do not say which block
they are about, and it runs a second time what changes buffers or communicates. As there, checkpoints inside a block are no matter.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.recompute.buffers import BufferCopies
from ringfold.parallel.recompute.ledger import SavedBytes, Stopwatch
from ringfold.parallel.recompute.offload import HostOffload
from ringfold.parallel.recompute.replay import Tape
from ringfold.parallel.recompute.selective import Kept, OtherCourse
from ringfold.parallel.recompute.surroundings import Surroundings
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Call"]


class _Enough(BaseException):
    """Ends the second run once the last tensor is saved. No Exception, which a block might catch."""


@dataclass(eq=False)
class Slot:
    """Stands for a saved tensor in the graph; dies with it, and `value` with it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    value: Tensor | None = None
    task: int = -1  # the backward for which `value` was computed: another one computes it anew

    def fits(self, tensor: Tensor) -> bool:
        return (self.shape, self.dtype, self.device) == (tensor.shape, tensor.dtype, tensor.device)


class _Argument:
    """A tensor that a block was called with, cut off from its graph."""

    def __init__(self, tensor: Tensor, offload: HostOffload | None) -> None:
        self._wants_grad = tensor.requires_grad
        self._held = tensor.detach() if offload is None or isinstance(tensor, torch.nn.Parameter) else offload.pack(tensor)
        self._watched = self._held if isinstance(self._held, Tensor) and not self._held.is_inference() else None
        self._version = -1 if self._watched is None else self._watched._version  # a detached tensor counts the changes of its original

    @property
    def has_changed(self) -> bool:
        return self._watched is not None and self._watched._version != self._version

    def again(self) -> Tensor:
        held = self._held if isinstance(self._held, Tensor) else self._held.fetch()
        return held.detach().requires_grad_(self._wants_grad)


class Call:
    """What is needed to run one call of a block again.

    name: the block's, for errors. kept: keeps outputs of its operations, None for none.
    before: called when a second run is about to begin. stopwatch: a context for each run.
    saved, kept_bytes: told what the first run saves, and what it keeps.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        *,
        surroundings: Surroundings,
        buffers: BufferCopies,
        kept: Kept | None,
        before: Callable[[], None],
        stopwatch: Stopwatch,
        saved: SavedBytes | None,
        kept_bytes: SavedBytes | None,
        offload: HostOffload | None,
    ) -> None:
        self._name = name
        self._forward = forward
        self._surroundings = surroundings
        self._buffers = buffers
        self._kept = kept
        self._kept_bytes = kept_bytes
        self._before = before
        self._stopwatch = stopwatch
        self._saved = saved
        self._offload = offload
        self._tape = Tape()
        self._slots: list[weakref.ref[Slot]] = []
        self._leaves: list[Any] = []
        self._spec: TreeSpec | None = None

    def run(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Run the block for the first time.

        Raises: ConfigError: it changed an argument in place.
        """
        leaves, self._spec = tree_flatten((tuple(arguments), dict(keywords)))
        held: dict[int, _Argument] = {}  # one tensor given twice stays one: attention asks whether query is key
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in held:
                held[id(leaf)] = _Argument(leaf, self._offload)
        self._leaves = [held.get(id(leaf), leaf) for leaf in leaves]
        watched = _watched(arguments, keywords)
        with self._stopwatch(), saved_tensors_hooks(self._pack, self._unpack), self._tape.recording(), self._keeping():
            output = self._forward(*arguments, **keywords)
        changed = [name for name, tensor, version in watched if tensor._version != version]
        if changed:
            raise ConfigError(
                f'recompute: block "{self._name}" changes its {" and ".join(dict.fromkeys(changed))} in place, so that it cannot be run again '
                "from what it was given. Let it work on a copy (is it an inplace=True that comes first, or x += ...?), "
                "or leave it out with Engine(blocks=[...])."
            )
        self._buffers.finish()
        return output

    def _keeping(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._kept is None else self._kept.first_run(lambda: len(self._slots), self._kept_bytes)

    def _pack(self, tensor: Tensor) -> Slot:
        if self._saved is not None:
            self._saved.add(tensor)
        slot = Slot(tensor.shape, tensor.dtype, tensor.device)
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, slot: Slot) -> Tensor:
        task = torch._C._current_graph_task_id()  # -1 outside of any backward
        if slot.value is None or slot.task != task or task < 0:
            self._run_again(task)
        assert slot.value is not None
        return slot.value

    def _run_again(self, task: int) -> None:
        """Fill all slots that are still in a graph."""
        assert self._spec is not None
        self._before()
        if any(leaf.has_changed for leaf in self._leaves if isinstance(leaf, _Argument)):
            raise ConfigError(
                f'recompute: an argument of block "{self._name}" was changed in place between its forward and its backward. '
                "Change a copy, or leave the block out with Engine(blocks=[...])."
            )
        again: dict[int, Tensor] = {}
        for leaf in self._leaves:
            if isinstance(leaf, _Argument) and id(leaf) not in again:
                again[id(leaf)] = leaf.again()
        arguments, keywords = tree_unflatten([again.get(id(leaf), leaf) for leaf in self._leaves], self._spec)
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            tensor = tensor.detach()
            slot = self._slots[count]()
            count += 1
            if slot is not None:
                if not slot.fits(tensor):
                    raise self._other_course(f"tensor {count} that it saves for backward was {_kind(slot)} in forward, and is {_kind(tensor)} now")
                slot.value, slot.task = tensor, task
            if count == len(self._slots):
                raise _Enough
            return tensor

        try:
            with (
                self._stopwatch(),
                self._surroundings.restored(),
                self._buffers.standing_in(),
                self._tape.replaying(),
                torch.enable_grad(),
                saved_tensors_hooks(pack, lambda tensor: tensor),
                contextlib.nullcontext() if self._kept is None else self._kept.second_run(),
            ):
                self._forward(*arguments, **keywords)
        except _Enough:
            return
        except OtherCourse as error:
            raise self._other_course(str(error)) from None
        raise self._other_course(f"it saved {len(self._slots)} tensors for backward in forward, and {count} now")

    def _other_course(self, what: str) -> ConfigError:
        return ConfigError(
            f'recompute: block "{self._name}" did something else when it was run again: {what}. It must depend on nothing but its arguments, '
            "parameters, buffers and torch's random numbers. Leave it out with Engine(blocks=[...])."
        )


def _watched(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[tuple[str, Tensor, int]]:
    """Return each tensor among the arguments, with the argument that it belongs to, and how often it was changed in place."""
    named = [(f"argument {place}", value) for place, value in enumerate(arguments)] + [
        (f"argument {key!r}", value) for key, value in keywords.items()
    ]
    leaves = [(name, leaf) for name, value in named for leaf in tree_leaves(value)]
    return [(name, leaf, leaf._version) for name, leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _kind(of: Slot | Tensor) -> str:
    return f"{tuple(of.shape)} {of.dtype} on {of.device}"
