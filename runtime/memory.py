"""Memory: the bytes that a rank keeps between train steps, by purpose, and what the system says; and what to do when there is not enough.

Counted are storages, each once. What is gone between steps (activations, gradients on their way into a bucket) is not in it, but it is in
the peak that the system has seen. Registered memory is shared with the other ranks of a host, so the process's share of it is what counts:
the proportional set size of Linux.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ringfold.collectives.errors import LayoutError, OutOfMemory
from ringfold.parallel.layout import Layout
from ringfold.parallel.reducer import GradientReducer
from ringfold.parallel.zero.sharding import Sharding
from ringfold.runtime.explanation import ParameterUse
from torch import Tensor, nn

__all__ = ["account", "is_out_of_memory", "out_of_memory", "predict", "proportional_set_size"]

PURPOSES = ("parameters", "masters", "gradients", "gradient buffers", "gathered blocks", "offload", "optimizer state", "buffers")
AS_SMALL = 0.8  # of what a rank had when it failed: a layout that needs no more than this is taken to fit


def account(module: nn.Module, sharding: Sharding | None, reducer: GradientReducer[Any], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return bytes by purpose: PURPOSES, files, process.

    `offload` is memory through which passes what lies in files; `files` are no memory, and neither is what of the state lies there.
    """
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    found = dict.fromkeys((*PURPOSES, "files"), 0)
    if sharding is None:
        own = [p.grad for p in module.parameters() if p.grad is not None]
        found["parameters"] = _storages(module.parameters())
        found["gradients"] = sum(reducer.nbytes_of_each) or _storages(own)
    else:
        state = [value for value in state if not sharding.lies_in_file(value)]
        found |= sharding.nbytes()
        if sharding.stage < 3:
            found["parameters"] += _storages(p for p in module.parameters() if not p.requires_grad)
    found["optimizer state"] = _storages(state)
    found["buffers"] = _storages(module.buffers())
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    found["process"] = torch.cuda.memory_allocated(device) if device.type == "cuda" else proportional_set_size()
    return found


def predict(uses: Sequence[ParameterUse], layout: Layout, ranks: int) -> dict[str, float]:
    """Return the bytes of parameters, masters, gradients and optimizer state that a layout leaves on each of `ranks` ranks that share them.

    By the formulas of ZeRO (arXiv:1910.02054), for each parameter in its own dtypes. Padding, and memory that is lent, are not in it; what is
    offloaded is not, if it goes to files.
    """
    stage, in_files = layout.zero, (layout.offload or "").startswith("nvme")
    found = dict.fromkeys(("parameters", "masters", "gradients", "optimizer state"), 0.0)
    for use in uses:
        shares_state = ranks if stage else 1
        has_master = use.computed != use.trained
        if not (stage == 3 and in_files):
            found["parameters"] += use.numel * use.computed.itemsize / (ranks if stage == 3 else 1)
        if has_master and not in_files:
            found["masters"] += use.numel * use.trained.itemsize / shares_state
        if use.kept is not None:
            found["gradients"] += use.numel * use.kept.itemsize / (ranks if stage > 1 or (stage and has_master) or layout.exact else 1)
        if not in_files:
            found["optimizer state"] += use.numel * sum(dtype.itemsize for dtype in use.state.values()) / shares_state
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be had, by whichever allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in ("can't allocate memory", "Cannot allocate memory"))


def out_of_memory(error: BaseException, where: str, account: dict[str, int], uses: Sequence[ParameterUse], layout: Layout, ranks: int) -> OutOfMemory:
    """Return an error that says what has grown, and which words of the layout would need less."""
    kept = {purpose: account[purpose] for purpose in PURPOSES if account[purpose]}
    total = max(account["process"], sum(kept.values()))
    rest = total - sum(kept.values())  # what a step needs and drops, and the program itself
    listed = [f"{purpose} {_gib(nbytes)}" for purpose, nbytes in sorted(kept.items(), key=lambda pair: -pair[1])]
    listed.append(f"activations and all else {_gib(rest)}")
    now = sum(predict(uses, layout, ranks).values())
    lines = [f"{where}: out of memory ({str(error).splitlines()[0][:200]}). This rank has {_gib(total)}: {', '.join(listed)}."]
    smaller = []
    for words, other in _alternatives(layout, ranks):
        needed = total - now + sum(predict(_in_precision(uses, layout, other), other, ranks).values())
        if needed <= AS_SMALL * total:
            smaller.append(f"{words} ({_gib(needed)})")
    if smaller:
        lines.append(f"With the same activations a rank would need less with {', '.join(smaller)}.")
    if layout.recompute is None:
        lines.append("If activations are what is large: recompute, or a larger microN.")
    elif rest > AS_SMALL * total:
        lines.append("Activations are what is large, although they are recomputed: a larger microN, or fewer rows.")
    return OutOfMemory("\n  ".join(lines))


def _alternatives(layout: Layout, ranks: int) -> Iterable[tuple[str, Layout]]:
    """Yield words to put into the layout, the least change first."""
    stages = [stage for stage in (1, 2, 3) if stage > layout.zero and ranks > 1]
    changes: list[tuple[str, dict[str, Any]]] = [(f"zero{stage}", {"zero": stage}) for stage in stages]
    if layout.precision == "fp32":
        changes += [("bf16", {"precision": "bf16"}), *((f"bf16 zero{stage}", {"precision": "bf16", "zero": stage}) for stage in stages)]
    changes += [("zero3:nvme=DIR", {"zero": 3, "offload": "nvme=DIR"})] if not (layout.offload or "").startswith("nvme") else []
    for words, change in changes:
        try:
            yield words, replace(layout, **change)
        except LayoutError:
            continue


def _in_precision(uses: Sequence[ParameterUse], old: Layout, new: Layout) -> list[ParameterUse]:
    if new.precision == old.precision:
        return list(uses)
    return [replace(use, computed=torch.bfloat16, kept=use.kept and torch.bfloat16) for use in uses]


def proportional_set_size() -> int:
    """Return the bytes of this process, memory that n processes share counted to 1/n."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Pss")


def _storages(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
