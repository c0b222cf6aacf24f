"""One file of tensors in the safetensors format: written in a stream, read with its hashes checked.

    u64 length of the header | header: JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes, little endian

The safetensors package reads these files (and so does everybody else); writing is done here, because its writer needs a second copy
of every tensor in memory, reports a full disk as text and does not hash what it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from ringfold.collectives.errors import CheckpointError, Corrupt, Incomplete
from safetensors import SafetensorError, safe_open

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HASHED_BESIDE_NBYTES = 1 << 20
_WRITE_NBYTES = 16 << 20  # Tensors on an accelerator or with gaps are copied one at a time; files are written in pieces of this size.


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, and forgotten then."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


class TensorFile:
    """The plan of a file: its header, its order and its size are known before a byte is written. `notes` are texts for its header."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | LazyTensor], notes: Mapping[str, str] | None = None) -> None:
        require_storable({name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)})
        # Wide elements first, so that every tensor lies at a multiple of its element size.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(notes or {})}}
        offset = 0
        for name, tensor in self._tensors.items():
            nbytes = prod(tensor.shape) * tensor.dtype.itemsize
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self._header) + offset

    def write(self, path: Path) -> dict[str, str]:
        """Write and fsync a new file; return the sha256 of each tensor's bytes. Raises OSError."""
        hashes = {}
        with open(path, "xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(self._header))
            for name, tensor in self._tensors.items():
                # No name for the bytes: a tensor that is made is gone before the next is.
                hashes[name] = _write_hashed(file.fileno(), tensor_bytes(tensor.make() if isinstance(tensor, LazyTensor) else tensor))
            os.fsync(file.fileno())
        return hashes


def require_storable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError with all tensors that a file cannot hold."""
    unsupported = [
        f"{name}: {tensor.layout} {tensor.dtype}, {tensor.device.type}"
        for name, tensor in tensors.items()
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided or tensor.is_meta
    ]
    if unsupported:
        raise CheckpointError("these tensors have no place in a safetensors file:\n  " + "\n  ".join(unsupported))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements of a tensor in row-major order as bytes; a view where it is contiguous on the CPU."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).cpu().numpy().data


def read_tensors(path: Path, expected: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the named tensors of a file, each checked against its sha256. Raises as `read_each`."""
    # In memory of torch's own, which is aligned: from where it lies in a file a tensor is slower, and some processors round its sums otherwise.
    return {name: tensor.clone() for name, tensor in read_each(path, expected)}


def read_each(path: Path, expected: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for those of the named tensors of a file that have their sha256. A tensor lies in the file's memory: copy it.

    Raises:
        Incomplete: the file is not there.
        Corrupt: after the last one; bytes are not those that were written. All the tensors concerned are named.
    """
    if not path.exists():
        raise Incomplete(f"{path} is missing; it held {_some(list(expected))}.")
    damaged = []
    try:
        with safe_open(path, framework="pt") as file:
            for name, sha256 in expected.items():
                tensor = file.get_tensor(name)
                if hashlib.sha256(tensor_bytes(tensor)).hexdigest() == sha256:
                    yield name, tensor
                else:
                    damaged.append(name)
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{path} cannot be read ({error}); it held {_some(list(expected))}.") from None
    if damaged:
        raise Corrupt(f"{path} does not hold what was written: the sha256 differs of {_some(damaged)}.")


def _write_hashed(descriptor: int, data: memoryview) -> str:
    """Write the bytes and return their sha256; of many bytes in a thread beside, for it takes as long as writing and needs another core only."""
    digest = hashlib.sha256()
    if len(data) < _HASHED_BESIDE_NBYTES:
        digest.update(data)
        _write_all(descriptor, data)
        return digest.hexdigest()
    # Not of an executor: those take no more work once the main thread has ended, and an asynchronous save may outlive it.
    hashing = threading.Thread(target=digest.update, args=(data,), name="checkpoint")
    hashing.start()
    try:
        _write_all(descriptor, data)
    finally:
        hashing.join()
    return digest.hexdigest()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        written = os.write(descriptor, data[:_WRITE_NBYTES])
        data = data[written:]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
