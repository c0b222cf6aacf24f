"""Writing a checkpoint: every rank its share, whole or not at all.

    .step-300.1f9c02ab.partial/  model-00001-of-00004.safetensors ...  extra.safetensors  manifest.json    each fsynced, the manifest last
    -> rename to step-300/, fsync the folder, then remove what is older than the newest `keep`

A crash at any moment leaves the earlier checkpoints as they were, and at most a hidden folder that the next save removes. One job at a
time may save into a folder. `prepare` works out who writes what (plan.py), `Job.write` writes.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from ringfold.collectives.errors import CheckpointError
from ringfold.runtime.checkpoint.agreement import Ranks, on_all_ranks, on_rank_0
from ringfold.runtime.checkpoint.folder import free_nbytes, make_partial, move_into_place, remove_leftovers, remove_old
from ringfold.runtime.checkpoint.host_copy import HostCopy
from ringfold.runtime.checkpoint.manifest import NAME, Manifest, Part, Section, TensorEntry
from ringfold.runtime.checkpoint.optimizer import merge_optimizer_trees
from ringfold.runtime.checkpoint.part import TensorPart
from ringfold.runtime.checkpoint.plan import Catalogue, Plan, Written, make_plan
from ringfold.runtime.checkpoint.tensor_file import TensorFile, require_storable
from ringfold.runtime.checkpoint.tree import Leaf, encode

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NBYTES_BESIDE_A_TENSOR = 768  # generous: its entries in the manifest and in its file's header, with a name of 60 letters, take 600
_SEEN_WITHIN_S = 2.0  # network file systems show what another host has made after a moment

Hashes = dict[tuple[str, str], str]


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

    `model_state` is the state by global name, `optimizer_state` is `optimizer_state_by_name`'s, `extra` any tree of tensors, numbers and
    text (scheduler, random and data state). With `comm` all its ranks call and wait for the end, and each writes a share. An ordinary tensor
    is the same on all ranks that have it; a TensorPart is a piece of one, or of a local tensor, and the pieces of all ranks cover it. Where
    other values differ, those of the first rank that has them count. A checkpoint of that name is replaced. Of the complete checkpoints beside
    it that are named step-NUMBER the last `keep` saved stay; other names are never removed.

    Raises:
        CheckpointError: on every rank; the disk is full or cannot be written, or the state cannot be saved. Nothing has changed.
    """
    return prepare(directory, step, {"model": model_state, "optimizer": optimizer_state, "extra": extra}, comm, keep).write(comm)


@dataclass(frozen=True)
class Job:
    """A save that is planned: this rank's tensors by file, and what all ranks together will have written.

    `failure` is what has already gone wrong on this rank alone; all ranks raise it when they write.
    """

    target: Path
    step: int
    keep: int
    plan: Plan
    files: Mapping[str, Mapping[str, torch.Tensor]]
    failure: CheckpointError | None = None

    def copied(self, memory: HostCopy) -> Job:
        """Return the same job on copies of its tensors."""
        return replace(self, files=memory.take(self.files))

    def write(self, comm: Ranks | None) -> Path:
        """Write the checkpoint and return its path; collective. Raises as `save`."""
        partial = self.target.with_name(on_rank_0(comm, self._begin))
        try:
            hashes = on_all_ranks(comm, lambda: self._write_files(partial))
            everyone = [hashes] if comm is None or comm.size == 1 else comm.gather_object(hashes)
            on_rank_0(comm, lambda: self._commit(partial, everyone or [], 1 if comm is None else comm.size))
        except BaseException:
            if comm is None or comm.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return self.target

    @property
    def _nbytes(self) -> int:
        return self.plan.nbytes + len(self.plan.written) * _NBYTES_BESIDE_A_TENSOR

    def _begin(self) -> str:
        target = self.target
        if target.exists() and not (target / NAME).exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} exists and is not a checkpoint; save to a folder inside it, such as {target}/step-{self.step}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent)
            if self._nbytes > free_nbytes(target.parent):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial = make_partial(target)
        except OSError as error:
            raise self._failed(error) from error
        return partial.name

    def _write_files(self, partial: Path) -> Hashes:
        if self.failure is not None:
            raise self.failure
        self._require_visible(partial)
        hashes: Hashes = {}
        try:
            for file, tensors in self.files.items():
                hashes |= {(file, key): sha256 for key, sha256 in TensorFile(tensors).write(partial / file).items()}
        except OSError as error:
            raise self._failed(error) from error
        return hashes

    def _require_visible(self, partial: Path) -> None:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not partial.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"saving step {self.step} failed: host {socket.gethostname()} cannot see {partial}, which rank 0 has made there. "
                    "Save to a folder that all hosts share, by the same name."
                )
            time.sleep(0.05)

    def _commit(self, partial: Path, everyone: list[Hashes], ranks: int) -> None:
        try:
            saved = datetime.now(UTC).isoformat(timespec="microseconds")
            versions = {"ringfold": metadata.version("ringfold"), "torch": torch.__version__}
            manifest = Manifest(self.step, saved, versions, self.plan.sizes, self._sections(everyone), ranks)
            with open(partial / NAME, "x") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            move_into_place(partial, self.target)
        except OSError as error:
            raise self._failed(error) from error
        try:
            remove_old(self.target, self.keep)
        except OSError as error:
            raise CheckpointError(f"step {self.step} is saved to {self.target}, but an older checkpoint cannot be removed: {error}") from error

    def _sections(self, everyone: list[Hashes]) -> dict[str, Section]:
        entries: dict[str, dict[str, TensorEntry]] = {
            section: {name: TensorEntry(held.dtype, held.local.placement, []) for name, held in tensors.items()}
            for section, tensors in self.plan.tensors.items()
        }
        for one in sorted(self.plan.written, key=lambda one: (tuple(one.coordinate.items()), one.start)):
            file = self.plan.files[one.section, one.rank]
            range = None if one.key == one.tensor else (one.start, one.stop)
            entries[one.section][one.tensor].parts.append(Part(file, dict(one.coordinate), everyone[one.rank][file, one.key], range))
        return {section: Section(self.plan.trees[section], tensors) for section, tensors in entries.items()}

    def _failed(self, error: OSError) -> CheckpointError:
        seen, advice = f"{error.strerror or error} ({error.filename or self.target})", "Save to a folder that can be written."
        if error.errno in _FULL:
            free = free_nbytes(self.target.parent)
            seen = f"the disk is full or a limit is reached ({error.strerror}): {self._nbytes} bytes needed, {free} bytes free"
            advice = "Free space, or save elsewhere."
        return CheckpointError(
            f"saving step {self.step} to {self.target} failed: {seen}. Nothing of it is left, and earlier checkpoints are untouched. {advice}"
        )


def prepare(directory: str | PathLike[str], step: int, trees: Mapping[str, Any], comm: Ranks | None, keep: int) -> Job:
    """Agree with all ranks on who writes what of the trees by section; collective, and nothing is written or copied yet.

    Raises:
        CheckpointError: on every rank; the state cannot be saved.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep} would remove the checkpoint that is being saved; it must be at least 1")

    def catalogued() -> tuple[dict[str, Mapping[str, Leaf]], dict[str, Catalogue]]:
        leaves: dict[str, Mapping[str, Leaf]] = {}
        catalogues = {}
        for name, tree in trees.items():
            leaves[name], value = encode(tree, f"the {name} state of step {step}")
            require_storable({key: leaf.values if isinstance(leaf, TensorPart) else leaf for key, leaf in leaves[name].items()})
            catalogues[name] = Catalogue.of(leaves[name], value)
        return leaves, catalogues

    leaves, catalogues = on_all_ranks(comm, catalogued)
    plan = make_plan(comm, catalogues, {"optimizer": merge_optimizer_trees})
    rank = 0 if comm is None else comm.rank
    files: dict[str, dict[str, torch.Tensor]] = {}
    for one in plan.written:
        if one.rank == rank:
            files.setdefault(plan.files[one.section, rank], {})[one.key] = _elements(leaves[one.section][one.tensor], one)
    if any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()  # it is copied on other streams
    return Job(Path(directory).absolute(), step, keep, plan, files)


def _elements(leaf: Leaf, one: Written) -> torch.Tensor:
    """Return what is to be written of a leaf: a whole tensor in its own shape, a range of it flattened; a view where it is contiguous."""
    values, first = (leaf.values, leaf.start) if isinstance(leaf, TensorPart) else (leaf, 0)
    if one.key == one.tensor:
        return values.reshape(leaf.local.shape if isinstance(leaf, TensorPart) else leaf.shape)
    return values.detach().resolve_conj().resolve_neg().reshape(-1)[one.start - first : one.stop - first]
