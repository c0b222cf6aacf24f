"""State trees as JSON: what an optimizer, a scheduler or a user keeps, without pickle.

    {"betas": (0.9, 0.99), "state": {"w": {"step": tensor}}}
    -> tensors  {"state.w.step": tensor}
       value    {"betas": {"$tuple": [0.9, 0.99]}, "state": {"w": {"step": {"$tensor": "state.w.step"}}}}

Tensors and arrays get names from their path and go elsewhere; two entries that are the same memory get one name, so tied tensors are
stored once and come back tied. A TensorPart is named as the tensor that it is a part of. JSON has no tuples, no keys but strings, no
infinities: these are objects with one key that begins with "$". Anything else (functions, objects) is refused by path, because bringing it
back would need code from the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ringfold.collectives.errors import CheckpointError, Corrupt
from ringfold.runtime.checkpoint.part import TensorPart

Leaf = torch.Tensor | TensorPart


def encode(tree: Any, what: str) -> tuple[dict[str, Leaf], Any]:
    """Return (tensors by name, JSON value) of a tree; `what` names it in errors. The tensors are the tree's own, not copies.

    Raises:
        CheckpointError: the tree holds values that neither JSON nor tensors can say; all of them are listed.
    """
    encoder = _Encoder()
    value = encoder.encode(tree, "")
    if encoder.refused:
        listed = "\n  ".join(encoder.refused)
        raise CheckpointError(
            f"{what} cannot be saved without pickle, because it holds\n  {listed}\n"
            "  Save tensors, arrays, numbers, strings, None, and dicts, lists and tuples of them."
        )
    return encoder.tensors, value


def decode(value: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Return the tree of a JSON value; `tensor` gives each named tensor, and gives the same one for the same name."""
    if isinstance(value, list):
        return [decode(child, tensor) for child in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag in _DECODERS:
            return _DECODERS[tag](content, tensor)
        if tag.startswith("$"):
            raise Corrupt(f"a checkpoint's manifest holds the unknown tag {tag!r}")
    return {key: decode(child, tensor) for key, child in value.items()}


def merge(values: Sequence[Any]) -> Any:
    """Return what the encoded trees of several ranks say together: mappings and lists are united entry by entry; else the first rank's counts."""
    first = values[0]
    if _is_mapping(first):
        united: dict[str, list[Any]] = {}
        for value in values:
            for key, child in value.items() if _is_mapping(value) else ():
                united.setdefault(key, []).append(child)
        return {key: merge(children) for key, children in united.items()}
    if isinstance(first, list):
        return [merge(children) for children in zip(*(v for v in values if isinstance(v, list) and len(v) == len(first)), strict=True)]
    return first


def tensor_names(value: Any) -> dict[str, str | None]:
    """Return {key: name of its tensor, or None if it holds another value} of an encoded flat mapping, such as a module's state."""
    return {key: child["$tensor"] if isinstance(child, dict) and "$tensor" in child else None for key, child in value.items()}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and not (len(value) == 1 and next(iter(value)).startswith("$"))


_DECODERS: dict[str, Callable[[Any, Callable[[str], torch.Tensor]], Any]] = {
    "$tensor": lambda name, tensor: tensor(name),
    "$array": lambda name, tensor: tensor(name).numpy(),
    "$tuple": lambda items, tensor: tuple(decode(item, tensor) for item in items),
    "$dict": lambda pairs, tensor: {decode(key, tensor): decode(child, tensor) for key, child in pairs},
    "$counter": lambda pairs, tensor: Counter({decode(key, tensor): child for key, child in pairs}),
    "$float": lambda text, _: float(text),
    "$dtype": lambda name, _: getattr(torch, name),
}


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Leaf] = {}
        self.refused: list[str] = []
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, tree: Any, path: str) -> Any:
        if isinstance(tree, Leaf):
            return {"$tensor": self._name(tree, path)}
        if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
            return {"$array": self._name(torch.from_numpy(np.ascontiguousarray(tree)), path)}
        if isinstance(tree, np.generic):
            return self.encode(tree.item(), path)
        if isinstance(tree, float) and not math.isfinite(tree):
            return {"$float": repr(float(tree))}
        if tree is None or isinstance(tree, (bool, int, float, str)):
            return tree
        if isinstance(tree, torch.dtype):
            return {"$dtype": str(tree).removeprefix("torch.")}
        if isinstance(tree, (list, tuple)):
            items = [self.encode(child, _join(path, index)) for index, child in enumerate(tree)]
            return items if isinstance(tree, list) else {"$tuple": items}
        if isinstance(tree, Counter):
            return {"$counter": [[self.encode(key, path), count] for key, count in tree.items()]}
        if isinstance(tree, Mapping):
            # Of a tensor that is in pieces, a rank without one knows nothing: neither that it is tied, nor where it stands.
            tree = {key: child for key, child in tree.items() if not _is_nothing(child)}
            if all(isinstance(key, str) for key in tree) and not (len(tree) == 1 and next(iter(tree)).startswith("$")):
                return {key: self.encode(child, _join(path, key)) for key, child in tree.items()}
            return {"$dict": [[self.encode(key, path), self.encode(child, _join(path, key))] for key, child in tree.items()]}
        self.refused.append(f"{path or 'itself'}: {type(tree).__module__}.{type(tree).__qualname__}")
        return None

    def _name(self, tensor: Leaf, path: str) -> str:
        memory = (*_memory(tensor.values), tensor.local, tensor.start) if isinstance(tensor, TensorPart) else _memory(tensor)
        if memory in self._names:
            return self._names[memory]
        name = path or "tensor"
        while name in self.tensors:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        self.tensors[name] = tensor
        self._names[memory] = name
        return name


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share only if they are one: same memory, seen the same way. Empty tensors are never shared."""
    if tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _is_nothing(value: Any) -> bool:
    return isinstance(value, TensorPart) and value.values.numel() == 0 and 0 not in value.shape


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
