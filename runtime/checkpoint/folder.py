"""The folders of checkpoints on disk: one is made hidden, moved into place, and removed, so that what is visible is always whole.

    .step-300.1f9c02ab.partial/  ->  step-300/        the one that it replaces is step-300.replaced/ meanwhile
    step-100/  ->  .step-100.removed/  ->  gone

Each rename is atomic; a folder cannot be renamed over a full one, hence the second name. What a killed save leaves behind is hidden or has
a second name, and the next save clears it up. Only rank 0 does any of this.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from ringfold.collectives.errors import CheckpointError
from ringfold.runtime.checkpoint.manifest import NAME, Manifest, complete_checkpoints

_REPLACED = ".replaced"


def make_partial(target: Path) -> Path:
    """Make the hidden folder in which `target` will be written; its name was never there before, so no host remembers that it is absent."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    return partial


def move_into_place(partial: Path, target: Path) -> None:
    """Rename the finished folder to its name and make that durable; the checkpoint that it replaces stays visible beside it until then."""
    replaced = target.with_name(target.name + _REPLACED)
    sync_folder(partial)
    if (target / NAME).exists():
        os.rename(target, replaced)
    os.rename(partial, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_old(newest: Path, keep: int) -> None:
    """Remove all but the last `keep` saved of the checkpoints beside `newest`, itself included, that are named step-NUMBER."""
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


def remove_leftovers(folder: Path) -> None:
    """Clear up after a save that was killed: remove what it had not finished, and put back what it was about to replace."""
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.removed"), *folder.glob(f"*{_REPLACED}")]:
        original = path.with_name(path.name.removesuffix(_REPLACED))
        if original != path and not original.exists():
            os.rename(path, original)
        else:
            shutil.rmtree(path, ignore_errors=True)


def free_nbytes(folder: Path) -> int:
    """Return how much the file system of the nearest existing folder can still take."""
    space = os.statvfs(next(one for one in (folder, *folder.parents) if one.exists()))
    return space.f_bavail * space.f_frsize


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def one_before(path: Path, age: tuple[str, int] | None) -> str:
    """Return a sentence that names the newest complete checkpoint beside `path` that was saved before `age`, if there is one."""
    ages = {}
    for other in complete_checkpoints(path.parent) if path.parent.is_dir() else ():
        try:
            manifest = Manifest.read(other)
        except CheckpointError:
            continue
        if other != path and (age is None or manifest.age < age) and all((other / file).exists() for file in manifest.files):
            ages[other] = manifest.age
    if not ages:
        return f"There is no complete checkpoint before it in {path.parent}."
    return f"The newest complete checkpoint before it is {max(ages, key=ages.__getitem__)}: pass that folder."
