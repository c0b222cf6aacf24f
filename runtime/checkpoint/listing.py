"""What a folder holds: each checkpoint with its age, its size and whether it is whole, as the command line shows it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table
from rich.text import Text
from ringfold.collectives.errors import CheckpointError, Incomplete
from ringfold.runtime.checkpoint.manifest import NAME, Manifest
from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class Listed:
    """One folder; `manifest` is None, and `problem` says why, where there is none to read. `problem` is empty for a complete checkpoint."""

    path: Path
    nbytes: int
    manifest: Manifest | None
    problem: str


def list_checkpoints(directory: Path) -> list[Listed]:
    """Return the checkpoints in a folder, or the one that it is, oldest first; then what is not complete. No tensor is read.

    Raises:
        Incomplete: there is no such folder.
    """
    if not directory.is_dir():
        raise Incomplete(f"there is no folder {directory}")
    folders = [directory] if (directory / NAME).exists() else sorted(path for path in directory.iterdir() if _is_one(path))
    found = [_listed(path) for path in folders]
    return sorted(found, key=lambda one: (one.manifest is None, one.manifest.age if one.manifest else ("", 0)))


def table_of(found: list[Listed], now: datetime) -> Table:
    """Return the table that `ringfold checkpoint ls` prints."""
    table = Table("name", "step", "saved (UTC)", "age", "size", "ranks", "state", box=None, pad_edge=False, header_style="bold")
    for number in (1, 3, 4, 5):
        table.columns[number].justify = "right"
    for one in found:
        state = Text("complete", "green") if not one.problem else Text(one.problem, "red")
        if one.manifest is None:
            table.add_row(one.path.name, "", "", "", size_text(one.nbytes), "", state)
        else:
            saved = datetime.fromisoformat(one.manifest.saved).astimezone(UTC)
            step, ranks = str(one.manifest.step), str(one.manifest.ranks)
            table.add_row(
                one.path.name, step, f"{saved:%Y-%m-%d %H:%M:%S}", _age_text((now - saved).total_seconds()), size_text(one.nbytes), ranks, state
            )
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table


def size_text(nbytes: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _is_one(path: Path) -> bool:
    """Whether a folder is, or was to become, a checkpoint: what holds a manifest or tensors."""
    return path.is_dir() and ((path / NAME).exists() or path.name.endswith(".partial") or any(path.glob("*.safetensors")))


def _listed(path: Path) -> Listed:
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    if path.name.startswith("."):
        return Listed(path, nbytes, None, "incomplete: being written or removed, or killed then")
    try:
        manifest = Manifest.read(path)
    except Incomplete:
        return Listed(path, nbytes, None, f"incomplete: no {NAME}")
    except CheckpointError as error:
        return Listed(path, nbytes, None, f"damaged: {error}")
    missing = [file for file in manifest.files if not (path / file).exists()]
    damaged = [file for file in manifest.files if file not in missing and not _opens(path / file)]
    problems = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(damaged)} cut short or overwritten"] * bool(damaged)
    return Listed(path, nbytes, manifest, f"incomplete: {'; '.join(problems)}" if problems else "")


def _opens(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _age_text(seconds: float) -> str:
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
