"""The numbers that stand for operations, reductions, dtypes and algorithms: in the C++ core, on the wire and in the shared page.

One table each, by the names that users write. The same numbers are in csrc/common/dtype.h and csrc/executor/codes.h. Imports no torch.
"""

from __future__ import annotations

__all__ = ["ALGORITHMS", "DTYPES", "FOLDING", "MESSAGES", "OPERATIONS", "REDUCTIONS"]

OPERATIONS = {
    "all_reduce": 0,
    "reduce_scatter": 1,
    "all_gather": 2,
    "broadcast": 3,
    "barrier": 4,
    "send": 5,
    "recv": 6,
    "reduce": 7,
    "gather": 8,
    "scatter": 9,
    "all_to_all": 10,
}
MESSAGES = frozenset({"send", "recv"})
FOLDING = frozenset({"all_reduce", "reduce_scatter", "reduce"})  # the result is a fold of all contributions
REDUCTIONS = {"sum": 0, "avg": 1, "min": 2, "max": 3, "prod": 4, "band": 5, "bor": 6, "bxor": 7}
ALGORITHMS = {"none": 0, "ring": 1, "direct": 2, "halving_doubling": 3, "tree": 4, "hierarchical": 5, "native": 6}
DTYPES = {
    "float32": 0,
    "float64": 1,
    "float16": 2,
    "bfloat16": 3,
    "int32": 4,
    "int64": 5,
    "uint8": 6,
    "int8": 7,
    "int16": 8,
    "bool": 9,
}
