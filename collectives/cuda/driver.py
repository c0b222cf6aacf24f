"""The few calls of the CUDA driver that torch does not offer: memory that other processes map, and streams that wait for a word in memory.

By ctypes, since a dozen calls do not justify a package that comes in a version for each CUDA. Pointers and streams are plain integers, those of
torch (`tensor.data_ptr()`, `stream.cuda_stream`); the context is the one that torch has made current.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_size_t, c_ubyte, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from ringfold.collectives.errors import CommunicationError

__all__ = ["HANDLE_NBYTES", "allocate", "close_handle", "export_handle", "free", "is_present", "open_handle", "view", "wait_at_least", "write"]

HANDLE_NBYTES = 64
# CUipcMem_flags and CUstreamWaitValue_flags in cuda.h
_LAZY_ENABLE_PEER_ACCESS = 1
_GREATER_OR_EQUAL = 0


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", c_ubyte * HANDLE_NBYTES),)


@cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(c_uint64), _Handle, c_uint]
    library.cuStreamWriteValue32_v2.argtypes = [c_void_p, c_uint64, c_uint32, c_uint]
    library.cuStreamWaitValue32_v2.argtypes = [c_void_p, c_uint64, c_uint32, c_uint]
    library.cuMemAlloc_v2.argtypes = [ctypes.POINTER(c_uint64), c_size_t]
    library.cuMemFree_v2.argtypes = [c_uint64]
    library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), c_uint64]
    library.cuIpcCloseMemHandle.argtypes = [c_uint64]
    return library


def _check(code: int, what: str) -> None:
    if code:
        text = c_char_p()
        _library().cuGetErrorString(code, byref(text))
        raise CommunicationError(f"{what} failed: {(text.value or b'unknown error').decode()} (CUDA driver error {code})")


def is_present() -> bool:
    """Tell whether there is a driver with these calls; whether the device can carry them out, the first of each says."""
    try:
        _library()
    except (OSError, AttributeError):
        return False
    return True


def allocate(nbytes: int) -> int:
    """Return the address of new memory on the current device. Raises: CommunicationError, if there is none."""
    address = c_uint64()
    _check(_library().cuMemAlloc_v2(byref(address), nbytes), f"allocating {nbytes} bytes of GPU memory to share")
    return address.value


def free(address: int) -> None:
    """Give memory back."""
    _check(_library().cuMemFree_v2(address), "giving back GPU memory")


def export_handle(address: int) -> bytes:
    """Return the HANDLE_NBYTES by which another process opens memory of `allocate`."""
    handle = _Handle()
    _check(_library().cuIpcGetMemHandle(byref(handle), address), "sharing GPU memory")
    return bytes(handle.reserved)


def open_handle(handle: bytes) -> int:
    """Map another process's memory and return its address here."""
    address = c_uint64()
    _check(
        _library().cuIpcOpenMemHandle_v2(byref(address), _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS), "mapping a peer's GPU memory"
    )
    return address.value


def close_handle(address: int) -> None:
    """Unmap what `open_handle` mapped."""
    _check(_library().cuIpcCloseMemHandle(address), "unmapping a peer's GPU memory")


def write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Have the stream write a 32-bit word, after everything that was put on it before is visible."""
    _check(_library().cuStreamWriteValue32_v2(stream.cuda_stream, address, value & 0xFFFFFFFF, 0), "cuStreamWriteValue32")


def wait_at_least(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Have the stream wait until the 32-bit word is `value` or up to 2^31 - 1 after it (words wrap)."""
    _check(_library().cuStreamWaitValue32_v2(stream.cuda_stream, address, value & 0xFFFFFFFF, _GREATER_OR_EQUAL), "cuStreamWaitValue32")


class _Bytes:
    """Memory as numba's and torch's common interface describes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None}


def view(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Return the memory as a tensor of bytes, which does not own it."""
    return torch.as_tensor(_Bytes(address, nbytes), device=device)
