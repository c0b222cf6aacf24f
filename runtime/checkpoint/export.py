"""Exporting the model of a checkpoint as one safetensors file, which plain PyTorch and Hugging Face read; one tensor is in memory at a time.

Tied tensors are stored once, under the first of their names, as Hugging Face does. The others are in the file's metadata in the way of
`safetensors.torch.save_model`, {other name: first name}: its `load_model` ties them again, and so does `from_pretrained` of a model that ties
them. With plain PyTorch: `model.load_state_dict(load_file(path), strict=False)`.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from ringfold.collectives.errors import CheckpointError, Corrupt
from ringfold.runtime.checkpoint.assembly import read_ranges, whole
from ringfold.runtime.checkpoint.folder import one_before, sync_folder
from ringfold.runtime.checkpoint.manifest import Manifest, Section
from ringfold.runtime.checkpoint.tensor_file import LazyTensor, TensorFile
from ringfold.runtime.checkpoint.tree import tensor_names


def export(path: Path, target: Path, dtype: torch.dtype | None = None) -> tuple[int, int, list[str]]:
    """Write the model of the checkpoint `path` to the new file `target`; return (tensors, bytes, names of what is no tensor and left out).

    dtype: what floating-point tensors are converted to; others stay.

    Raises:
        CheckpointError: the file exists or cannot be written.
        Corrupt, Incomplete: the checkpoint is damaged. Nothing is left of the file.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; remove it, or export to another file")
    manifest = Manifest.read(path)
    if "model" not in manifest.sections:
        raise Corrupt(f"the manifest of {path} has no section 'model'.")
    section = manifest.sections["model"]
    names = tensor_names(section.tree)
    first: dict[str, str] = {}
    for name, stored in names.items():
        if stored is not None:
            first.setdefault(stored, name)
    tied = {name: first[stored] for name, stored in names.items() if stored is not None and first[stored] != name}
    tensors = {name: _lazy(path, manifest, section, stored, dtype) for stored, name in first.items()}
    file = TensorFile(tensors, notes=tied)
    unfinished = target.with_name(f".{target.name}.partial")
    try:
        unfinished.unlink(missing_ok=True)
        file.write(unfinished)
        os.rename(unfinished, target)
        sync_folder(target.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"exporting to {target} failed: {error.strerror or error} ({error.filename or target})") from error
    except CheckpointError as error:
        raise type(error)(f"{error}\n{one_before(path, manifest.age)}") from None
    finally:
        if target.parent.is_dir():
            unfinished.unlink(missing_ok=True)
    return len(tensors), file.nbytes, [name for name, stored in names.items() if stored is None]


def _lazy(path: Path, manifest: Manifest, section: Section, stored: str, dtype: torch.dtype | None) -> LazyTensor:
    entry = section.tensors[stored]
    saved: torch.dtype = getattr(torch, entry.dtype)
    given = dtype if dtype is not None and saved.is_floating_point else saved
    return LazyTensor(given, entry.placement.shape, partial(_made, path, manifest, section, stored, given))


def _made(path: Path, manifest: Manifest, section: Section, stored: str, dtype: torch.dtype) -> torch.Tensor:
    one = whole(stored, section.tensors[stored])
    return read_ranges(path, section.tensors, manifest.sizes, [one])[one].to(dtype)
