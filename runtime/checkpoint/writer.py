"""Writing a checkpoint: whole or not at all.

    .step-300.partial/  model.safetensors  optimizer.safetensors  extra.safetensors  manifest.json   each fsynced, the manifest last
    -> rename to step-300/, fsync the folder, then remove what is older than the newest `keep`

A crash at any moment leaves the earlier checkpoints as they were, and at most a hidden folder that the next save removes. Rank 0
writes, from the full state; one job at a time may save into a folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from ringfold.collectives.errors import CheckpointError
from ringfold.parallel.placement import Placement
from ringfold.runtime.checkpoint.agreement import Ranks, on_rank_0
from ringfold.runtime.checkpoint.manifest import NAME, Manifest, Part, Section, TensorEntry, complete_checkpoints
from ringfold.runtime.checkpoint.tensor_file import TensorFile
from ringfold.runtime.checkpoint.tree import encode

_REPLACED = ".replaced"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MANIFEST_NBYTES_PER_TENSOR = 512  # generous: an entry of a 4-dim tensor with a 60-letter name takes 400


def save(
    directory: str | PathLike[str],
    *,
    step: int,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    comm: Ranks | None = None,
    keep: int = 3,
) -> Path:
    """Save one checkpoint as `directory` (for example run/step-300) and return its absolute path.

    `model_state` is the full state by global name, `optimizer_state` is `optimizer_state_by_name`'s, `extra` any tree of tensors,
    numbers and text (scheduler, random and data state). With `comm` all its ranks call, only rank 0's state is looked at, and all
    wait for the end. A checkpoint of that name is replaced. Of the complete checkpoints beside it that are named step-NUMBER the last
    `keep` saved stay; other names are never removed.

    Raises:
        CheckpointError: on every rank; the disk is full or cannot be written, or the state cannot be saved. Nothing has changed.
    """
    target = Path(directory).absolute()

    def write() -> str:
        if keep < 1:
            raise CheckpointError(f"keep={keep} would remove the checkpoint that is being saved; it must be at least 1")
        if target.exists() and not (target / NAME).exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} exists and is not a checkpoint; save to a folder inside it, such as {target}/step-{step}")
        _write(target, step, {"model": model_state, "optimizer": optimizer_state, "extra": extra})
        try:
            _remove_old(target, keep)
        except OSError as error:
            raise CheckpointError(f"step {step} is saved to {target}, but an older checkpoint cannot be removed: {error}") from error
        return str(target)

    return Path(on_rank_0(comm, write))


def _write(target: Path, step: int, trees: Mapping[str, Any]) -> None:
    encoded = {name: encode(tree, f"the {name} state of step {step}") for name, tree in trees.items()}
    files = {name: TensorFile(tensors) for name, (tensors, _) in encoded.items() if tensors}
    count = sum(len(tensors) for tensors, _ in encoded.values())
    nbytes = sum(file.nbytes for file in files.values()) + count * _MANIFEST_NBYTES_PER_TENSOR
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        if nbytes > _free_nbytes(target.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        try:
            sections = {}
            for name, (tensors, tree) in encoded.items():
                hashes = files[name].write(partial / _file_name(name)) if name in files else {}
                sections[name] = Section(tree, {key: _entry(name, key, tensor, hashes[key]) for key, tensor in tensors.items()})
            saved = datetime.now(UTC).isoformat(timespec="microseconds")
            manifest = Manifest(step, saved, {"ringfold": metadata.version("ringfold"), "torch": torch.__version__}, {}, sections)
            with open(partial / NAME, "x") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(partial)
            _move_into_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(_why(error, target, step, nbytes)) from error


def _why(error: OSError, target: Path, step: int, nbytes: int) -> str:
    seen, advice = f"{error.strerror or error} ({error.filename or target})", "Save to a folder that can be written."
    if error.errno in _FULL:
        free = _free_nbytes(next(folder for folder in target.parents if folder.exists()))
        seen = f"the disk is full or a limit is reached ({error.strerror}): {nbytes} bytes needed, {free} bytes free"
        advice = "Free space, or save elsewhere."
    return f"saving step {step} to {target} failed: {seen}. Nothing of it is left, and earlier checkpoints are untouched. {advice}"


def _entry(section: str, name: str, tensor: torch.Tensor, sha256: str) -> TensorEntry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(dtype, Placement(name, tuple(tensor.shape)), [Part(_file_name(section), {}, sha256)])


def _file_name(section: str) -> str:
    return f"{section}.safetensors"


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename atomically. A folder cannot be renamed over a full one: the checkpoint replaced stays visible beside it until that is done."""
    replaced = target.with_name(target.name + _REPLACED)
    if (target / NAME).exists():
        os.rename(target, replaced)
    os.rename(partial, target)
    _sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_old(newest: Path, keep: int) -> None:
    ages = {}
    for path in complete_checkpoints(newest.parent):
        if re.fullmatch(r"step-\d+", path.name) and path != newest:
            try:
                ages[path] = Manifest.read(path).age
            except CheckpointError:
                continue  # not ours to judge, and no reason for the save to fail
    kept_beside_newest = keep - 1
    for path in sorted(ages, key=ages.__getitem__)[: max(0, len(ages) - kept_beside_newest)]:
        hidden = path.with_name(f".{path.name}.removed")
        os.rename(path, hidden)  # so that a crash while removing leaves no checkpoint with files missing
        shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Clear up after a save that was killed: remove what it had not finished, and put back what it was about to replace."""
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.removed"), *folder.glob(f"*{_REPLACED}")]:
        original = path.with_name(path.name.removesuffix(_REPLACED))
        if original != path and not original.exists():
            os.rename(path, original)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _free_nbytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
