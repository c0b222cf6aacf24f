"""The codes of operations, reductions, dtypes and algorithms, the same as in csrc, and what torch calls the dtypes.

One table each; errors and the shared page name things by them. The only module of the layer, beside communicator.py and work.py, that imports torch.
"""

from __future__ import annotations

import torch

__all__ = ["DLPACK", "DTYPES", "OPERATIONS", "REDUCTIONS"]

OPERATIONS = {"all_reduce": 0, "reduce_scatter": 1, "all_gather": 2, "broadcast": 3, "barrier": 4, "send": 5, "recv": 6}
REDUCTIONS = {"sum": 0, "avg": 1, "min": 2, "max": 3, "prod": 4}
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.uint8: 6,
    torch.int8: 7,
    torch.int16: 8,
    torch.bool: 9,
}
# DLPack's (type code, bits): what registered memory is exported as. Bool travels as uint8 and is viewed back.
DLPACK = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.bool: (1, 8),
}
