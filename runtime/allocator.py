"""The C library's allocator, set for training: a train step frees and takes the same large blocks again and again.

glibc gives large blocks back to the kernel when they are freed, and trims its heap, so a step pays for zeroed pages anew: with 10 M parameters
1,300 to 2,800 page faults, and 20 to 90 once `arrange` has it keep them (2 % of the time). Whoever has set something for glibc's allocator,
or uses another one, is left alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

__all__ = ["arrange"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def arrange(environment: Mapping[str, str] = os.environ) -> str:
    """Have glibc's malloc keep what is freed, and return what was done, or why nothing was."""
    own = [name for name in environment if name.startswith("MALLOC_")]
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    if own:
        return f"left as it is: {', '.join(own)} is set"
    preloaded = environment.get("LD_PRELOAD", "")
    other = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preloaded), None)
    if other is not None:
        return f"left as it is: {other} is preloaded"
    if platform.libc_ver()[0] != "glibc":
        return "left as it is: this is not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        return "left as it is: mallopt refused"
    return "keeps what is freed (no mmap for large blocks, no trim; any MALLOC_ variable or GLIBC_TUNABLES turns this off)"
