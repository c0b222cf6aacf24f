"""Reading a checkpoint: the newest complete one of a folder, checked before anything is changed.

Every rank reads the files itself (all must see the folder), agrees with the others on which checkpoint it is, and raises if any of
them cannot go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError, Corrupt, Incompatible, Incomplete
from ringfold.runtime.checkpoint.agreement import Ranks, on_all_ranks, on_rank_0
from ringfold.runtime.checkpoint.manifest import NAME, Manifest, Section, TensorEntry, complete_checkpoints
from ringfold.runtime.checkpoint.optimizer import load_optimizer_state, optimizer_differences
from ringfold.runtime.checkpoint.tensor_file import read_tensors
from ringfold.runtime.checkpoint.tree import decode, tensor_names


def load(directory: str | PathLike[str], *, comm: Ranks | None = None) -> Checkpoint:
    """Open `directory` if it is a checkpoint, else the newest complete checkpoint inside it. No tensor is read yet.

    With `comm` all its ranks call; rank 0 chooses, and an error of any rank is raised on all.

    Raises:
        Incomplete: there is no complete checkpoint.
        Corrupt: a manifest is not what was written.
        Incompatible: another version of the format.
    """
    folder = Path(directory).absolute()
    path = Path(on_rank_0(comm, lambda: str(_newest(folder))))
    return Checkpoint(path, on_all_ranks(comm, lambda: Manifest.read(path)), comm)


class Checkpoint:
    """A complete checkpoint on disk. Tensors are read, and their hashes checked, when they are asked for.

    Opened with a communicator, its methods are collective: all ranks call them, and an error of one is raised on all.
    """

    def __init__(self, path: Path, manifest: Manifest, comm: Ranks | None = None) -> None:
        self.path = path
        self.step = manifest.step
        self._manifest = manifest
        self._comm = comm

    def load_model(self, module: torch.nn.Module) -> None:
        """Copy the saved values into the module's own parameters and buffers.

        Raises:
            Incompatible: the state is another model's; every difference is listed, and nothing has been changed.
            Corrupt: the bytes of a tensor are not those that were saved; nothing has been changed.
        """

        def read() -> dict[str, Any]:
            self._check_model(module.state_dict())
            state: dict[str, Any] = self._read("model")
            return state

        state = on_all_ranks(self._comm, read)
        module.load_state_dict(state)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Put the saved state of every parameter, by its name, and the options of every group into `optimizer`.

        Raises:
            Incompatible: the groups are of other parameters, or no optimizer was saved; nothing has been changed.
            Corrupt: the bytes of a tensor are not those that were saved; nothing has been changed.
        """
        named = list(named_parameters)

        def read() -> Mapping[str, Any]:
            self._check_optimizer(optimizer, named)
            state: Mapping[str, Any] = self._read("optimizer")
            return state

        load_optimizer_state(optimizer, named, on_all_ranks(self._comm, read))

    def restore(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load model and optimizer, both or neither.

        Raises:
            Incompatible, Corrupt: as load_model and load_optimizer; neither has been changed.
        """
        named = list(module.named_parameters())

        def read() -> tuple[dict[str, Any], Mapping[str, Any]]:
            self._check_model(module.state_dict())
            self._check_optimizer(optimizer, named)
            return self._read("model"), self._read("optimizer")

        model_state, optimizer_state = on_all_ranks(self._comm, read)
        module.load_state_dict(model_state)
        load_optimizer_state(optimizer, named, optimizer_state)

    def model_state(self) -> dict[str, Any]:
        """Return the saved model state, in new memory on the CPU; tied names give one tensor."""
        state: dict[str, Any] = on_all_ranks(self._comm, lambda: self._read("model"))
        return state

    def optimizer_state(self) -> dict[str, Any] | None:
        """Return the saved optimizer state by parameter name, or None if none was saved."""
        state: dict[str, Any] | None = on_all_ranks(self._comm, lambda: self._read("optimizer"))
        return state

    def extra(self) -> dict[str, Any]:
        """Return what was saved beside model and optimizer."""
        return on_all_ranks(self._comm, lambda: self._read("extra")) or {}

    def _section(self, name: str) -> Section:
        try:
            return self._manifest.sections[name]
        except KeyError:
            raise Corrupt(f"the manifest of {self.path} has no section {name!r}. Load another checkpoint.") from None

    def _read(self, name: str) -> Any:
        section = self._section(name)
        tensors = self._read_tensors(section.tensors)
        return decode(section.tree, tensors.__getitem__)

    def _read_tensors(self, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
        hashes: dict[str, dict[str, str]] = {}
        for name, entry in entries.items():
            for part in entry.parts:
                hashes.setdefault(part.file, {})[name] = part.sha256
        files, problems = {}, []
        for file, expected in hashes.items():
            try:
                files[file] = read_tensors(self.path / file, expected)
            except (Corrupt, Incomplete) as error:
                problems.append(error)
        if problems:
            raise type(problems[0])("\n".join(map(str, problems)))
        return {name: self._assembled(name, entry, files) for name, entry in entries.items()}

    def _assembled(self, name: str, entry: TensorEntry, files: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor:
        parts = [(files[part.file][name], part.coordinate) for part in entry.parts]
        dtypes = {str(local.dtype).removeprefix("torch.") for local, _ in parts}
        if dtypes != {entry.dtype}:
            raise Corrupt(f"{self.path}: {name} is {', '.join(sorted(dtypes))} in its file, and {entry.dtype} in the manifest")
        full = parts[0][0] if not entry.placement.axes else torch.zeros(entry.placement.shape, dtype=parts[0][0].dtype)
        try:
            if entry.placement.axes:
                for local, coordinate in parts:
                    entry.placement.put(full, local, coordinate, self._manifest.sizes)
        except (ConfigError, KeyError) as error:
            raise Corrupt(f"{self.path}: the parts of {name} do not fit its placement: {error}") from None
        if tuple(full.shape) != entry.placement.shape:
            raise Corrupt(f"{self.path}: {name} has shape {list(full.shape)} in its file, and {list(entry.placement.shape)} in the manifest")
        return full

    def _check_model(self, state: Mapping[str, Any]) -> None:
        section = self._section("model")
        saved = tensor_names(section.tree)
        differences = [f"missing in the checkpoint: {name} {_form(state[name])}" for name in state if name not in saved]
        differences += [f"not in the model: {name} {_entry_form(section, saved[name])}" for name in saved if name not in state]
        for name in saved:
            if name in state:
                differences += _differences(name, _entry_form(section, saved[name]), _form(state[name]))
        differences += self._untied(state, saved)
        if differences:
            raise Incompatible(_listed(f"{self.path} was saved from another model", differences))

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        tree = self._section("optimizer").tree
        if tree is None:
            raise Incompatible(f"{self.path} holds no optimizer state; only its model can be loaded")
        if differences := optimizer_differences(tree["param_groups"], optimizer, named):
            raise Incompatible(_listed(f"{self.path} was saved with another optimizer", differences))

    def _untied(self, state: Mapping[str, Any], saved: Mapping[str, str | None]) -> list[str]:
        """List tensors that are one in the model and had different values when they were saved."""
        section, differences = self._section("model"), []
        first: dict[tuple[Any, ...], str] = {}
        for name, value in state.items():
            stored = saved.get(name)
            if stored is None or not isinstance(value, torch.Tensor) or value.numel() == 0:
                continue
            known = first.setdefault((value.data_ptr(), value.shape, value.stride()), name)
            hashes = [part.sha256 for part in section.tensors[stored].parts]
            if hashes != [part.sha256 for part in section.tensors[saved[known] or stored].parts]:
                differences.append(f"tied in the model, and different in the checkpoint: {known} and {name}")
        return differences


def _newest(folder: Path) -> Path:
    if (folder / NAME).exists():
        return folder
    if not folder.is_dir():
        raise Incomplete(f"there is no checkpoint at {folder}: no such folder")
    complete = sorted(complete_checkpoints(folder), key=lambda path: Manifest.read(path).age)
    if not complete:
        unfinished = sorted(path.name for path in folder.iterdir() if path.is_dir())
        seen = f" (without a {NAME}: {', '.join(unfinished[:10])})" if unfinished else ""
        raise Incomplete(f"there is no complete checkpoint in {folder}{seen}; give the folder that holds step-NUMBER folders, or one of them")
    return complete[-1]


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "(not a tensor)"


def _entry_form(section: Section, tensor: str | None) -> str:
    if tensor is None:
        return "(not a tensor)"
    entry = section.tensors[tensor]
    return f"{entry.dtype} {list(entry.placement.shape)}"


def _differences(name: str, saved: str, wanted: str) -> list[str]:
    if saved == wanted:
        return []
    saved_dtype, _, saved_shape = saved.partition(" ")
    dtype, _, shape = wanted.partition(" ")
    differences = [f"shape of {name}: {saved_shape} in the checkpoint, {shape} in the model"] if saved_shape != shape else []
    if saved_dtype != dtype:
        differences.append(f"dtype of {name}: {saved_dtype} in the checkpoint, {dtype} in the model")
    return differences


def _listed(what: str, differences: list[str]) -> str:
    lines = "".join(f"\n  {difference}" for difference in differences)
    return f"{what}; they differ in {len(differences)}:{lines}\nBuild what was saved, or begin without it."
