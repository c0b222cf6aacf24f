"""Verifying a checkpoint: every part of every tensor is read and its sha256 compared, whatever layout saved it."""

from __future__ import annotations

from pathlib import Path

from ringfold.collectives.errors import Corrupt, Incomplete
from ringfold.runtime.checkpoint.manifest import NAME, Manifest, complete_checkpoints
from ringfold.runtime.checkpoint.tensor_file import read_each


def subjects(directory: Path) -> list[Path]:
    """Return the checkpoint that a folder is, or those inside it by name.

    Raises:
        Incomplete: there is none.
    """
    if (directory / NAME).exists():
        return [directory]
    if not directory.is_dir():
        raise Incomplete(f"there is no folder {directory}")
    found = sorted(complete_checkpoints(directory))
    if not found:
        raise Incomplete(f"{directory} is no checkpoint and holds none that is complete")
    return found


def damages(path: Path) -> tuple[list[str], int, int]:
    """Return (what is wrong, one line for each file or tensor; how many parts were right; their bytes). One tensor is in memory at a time."""
    try:
        files = Manifest.read(path).files
    except (Corrupt, Incomplete) as error:
        return [str(error)], 0, 0
    problems, right, nbytes = [], 0, 0
    for file, parts in files.items():
        expected = {part.key(tensor): part.sha256 for _, tensor, part in parts}
        try:
            for _, values in read_each(path / file, expected):
                right += 1
                nbytes += values.numel() * values.element_size()
        except (Corrupt, Incomplete) as error:
            problems.append(str(error))
    return problems, right, nbytes
