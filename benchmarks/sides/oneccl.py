"""oneCCL on host memory through oneccl.cpp. Its average is only for devices: here it is a sum and a division, both timed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from ringfold.benchmarks.sides.side import Call, Place, Side
from torch import Tensor
from torch._C._distributed_c10d import FileStore

__all__ = ["OneCcl"]

# ccl::datatype and ccl::reduction
_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int16: 2,
    torch.int32: 4,
    torch.int64: 6,
    torch.float16: 8,
    torch.float32: 9,
    torch.float64: 10,
    torch.bfloat16: 11,
}
_REDUCTIONS = {"sum": 0, "avg": 0, "prod": 1, "min": 2, "max": 3}
_Pointer, _Size = ctypes.c_void_p, ctypes.c_size_t


class OneCcl(Side):
    def __init__(self, place: Place) -> None:
        self.rank, self.size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
        self.library = ctypes.CDLL(str(Path(sys.prefix) / "lib" / "liboneccl_of_ringfold.so"))
        store = FileStore(str(place.folder / "oneccl"), self.size)
        store.set_timeout(timedelta(seconds=60))
        address = ctypes.create_string_buffer(self.library.oneccl_address_size())
        if self.rank == 0:
            self._now("oneccl_address", address)
            store.set("address", address.raw.hex())
        self._now("oneccl_join", bytes.fromhex(store.get("address").decode()), self.size, self.rank)
        self._now("oneccl_barrier")

    def version(self) -> str:
        return f"oneCCL {importlib.metadata.version('oneccl-cpu')}"

    def close(self) -> None:
        self._now("oneccl_leave")

    def _call(self, name: str, *arguments: object) -> Call:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p

        def call() -> None:
            failure = function(*arguments)
            if failure is not None:
                raise RuntimeError(f"{name}: {failure.decode(errors='replace')}")

        return call

    def _now(self, name: str, *arguments: object) -> None:
        self._call(name, *arguments)()

    def all_reduce(self, tensor: Tensor, reduction: str) -> Call:
        arguments = (_Pointer(tensor.data_ptr()), _Size(tensor.numel()), _TYPES[tensor.dtype], _REDUCTIONS[reduction])
        return self.averaged(self._call("oneccl_all_reduce", *arguments), tensor, reduction)

    def reduce_scatter(self, output: Tensor, input: Tensor, reduction: str) -> Call:
        arguments = (_Pointer(output.data_ptr()), _Pointer(input.data_ptr()), _Size(output.numel()), _TYPES[output.dtype], _REDUCTIONS[reduction])
        return self.averaged(self._call("oneccl_reduce_scatter", *arguments), output, reduction)

    def all_gather(self, output: Tensor, input: Tensor) -> Call:
        return self._call("oneccl_all_gather", _Pointer(output.data_ptr()), _Pointer(input.data_ptr()), _Size(input.numel()), _TYPES[input.dtype])

    def broadcast(self, tensor: Tensor, root: int) -> Call:
        return self._call("oneccl_broadcast", _Pointer(tensor.data_ptr()), _Size(tensor.numel()), _TYPES[tensor.dtype], root)

    def reduce(self, tensor: Tensor, root: int, reduction: str) -> Call:
        arguments = (_Pointer(tensor.data_ptr()), _Size(tensor.numel()), _TYPES[tensor.dtype], _REDUCTIONS[reduction], root)
        call = self._call("oneccl_reduce", *arguments)
        return self.averaged(call, tensor, reduction) if self.rank == root else call

    def all_to_all(self, output: Tensor, input: Tensor) -> Call:
        piece = _Size(input.numel() // self.size)
        return self._call("oneccl_all_to_all", _Pointer(output.data_ptr()), _Pointer(input.data_ptr()), piece, _TYPES[input.dtype])

    def barrier(self) -> Call:
        return self._call("oneccl_barrier")
