"""Reading a checkpoint: the newest complete one of a folder, checked before anything is changed.

Every rank reads from the files what it wants itself (all must see the folder), agrees with the others on which checkpoint it is, and raises
if any of them cannot go on. What is wanted says how: a module takes whole tensors, a mapping of TensorParts takes these ranges, an optimizer
of pieces takes its pieces (piece.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from ringfold.collectives.errors import Corrupt, Incompatible, Incomplete
from ringfold.runtime.checkpoint.agreement import Ranks, on_all_ranks, on_rank_0
from ringfold.runtime.checkpoint.assembly import Range, read_ranges, whole
from ringfold.runtime.checkpoint.differences import listed, model_differences
from ringfold.runtime.checkpoint.folder import one_before
from ringfold.runtime.checkpoint.manifest import NAME, Manifest, Section, complete_checkpoints
from ringfold.runtime.checkpoint.optimizer import group_of_each, load_optimizer_state, optimizer_differences
from ringfold.runtime.checkpoint.part import TensorPart
from ringfold.runtime.checkpoint.piece import Named, Piece, is_elementwise, pieces_of
from ringfold.runtime.checkpoint.tree import decode

Wanted = torch.nn.Module | Mapping[str, Any]
T = TypeVar("T")


def load(directory: str | PathLike[str], *, comm: Ranks | None = None) -> Checkpoint:
    """Open `directory` if it is a checkpoint, else the newest complete checkpoint inside it. No tensor is read yet.

    With `comm` all its ranks call; rank 0 chooses, and an error of any rank is raised on all.

    Raises:
        Incomplete: there is no complete checkpoint.
        Corrupt: a manifest is not what was written.
        Incompatible: another version of the format.
    """
    folder = Path(directory).absolute()
    path = folder / on_rank_0(comm, lambda: str(_newest(folder).relative_to(folder)))
    return Checkpoint(path, on_all_ranks(comm, lambda: _manifest(path)), comm)


class Checkpoint:
    """A complete checkpoint on disk. Tensors are read, and their hashes checked, when they are asked for.

    Opened with a communicator, its methods are collective: all ranks call them, and an error of one is raised on all. An error of a damaged
    checkpoint names the newest complete one before it.
    """

    def __init__(self, path: Path, manifest: Manifest, comm: Ranks | None = None) -> None:
        self.path = path
        self.step = manifest.step
        self._manifest = manifest
        self._comm = comm

    def load_model(self, model: Wanted, *, cast: bool = False) -> None:
        """Copy the saved values into a module's own parameters and buffers, or into the tensors and TensorParts of a mapping by name.

        A mapping names everything that was saved; a tensor of which this rank wants nothing is there with an empty part.
        cast: convert floating-point values to the dtype that is there.

        Raises:
            Incompatible: the state is another model's; every difference is listed, and nothing has been changed.
            Corrupt, Incomplete: the bytes of a tensor are not those that were saved; nothing has been changed.
        """
        _fill(model, self._on_all(lambda: self._read_model(model, cast)))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, named: Named, *, cast: bool = False) -> None:
        """Put the saved state of every parameter, by its name, and the options of every group into `optimizer`.

        named: pairs (name, parameter), or (name, Piece) for what holds a piece of it; see load_optimizer_state for `cast`.

        Raises:
            Incompatible: the groups are of other parameters, or no optimizer was saved; nothing has been changed.
            Corrupt, Incomplete: the bytes of a tensor are not those that were saved; nothing has been changed.
        """
        pairs = list(named)
        known = self._known(optimizer, pairs)
        state = self._on_all(lambda: self._read_optimizer(optimizer, pairs, known, cast))
        load_optimizer_state(optimizer, pairs, state, cast=cast)

    def restore(self, model: Wanted, optimizer: torch.optim.Optimizer, named: Named | None = None, *, cast: bool = False) -> None:
        """Load model and optimizer, both or neither; `named` is by default what the module names.

        Raises:
            Incompatible, Corrupt, Incomplete: as load_model and load_optimizer; neither has been changed.
        """
        if named is None:
            named = model.named_parameters() if isinstance(model, torch.nn.Module) else model.items()
        pairs = list(named)
        known = self._known(optimizer, pairs)

        def read() -> tuple[dict[str, Any], Mapping[str, Any]]:
            return self._read_model(model, cast), self._read_optimizer(optimizer, pairs, known, cast)

        model_state, optimizer_state = self._on_all(read)
        _fill(model, model_state)
        load_optimizer_state(optimizer, pairs, optimizer_state, cast=cast)

    def model_state(self) -> dict[str, Any]:
        """Return the whole saved model state, in new memory on the CPU; tied names give one tensor."""
        return self._on_all(lambda: self._read("model"))  # type: ignore[no-any-return]

    def optimizer_state(self) -> dict[str, Any] | None:
        """Return the whole saved optimizer state by parameter name, or None if none was saved."""
        return self._on_all(lambda: self._read("optimizer"))  # type: ignore[no-any-return]

    def extra(self) -> dict[str, Any]:
        """Return what was saved beside model and optimizer."""
        return self._on_all(lambda: self._read("extra")) or {}

    def _on_all(self, operation: Callable[[], T]) -> T:
        def advised() -> T:
            try:
                return operation()
            except (Corrupt, Incomplete) as error:
                raise type(error)(f"{error}\n{one_before(self.path, self._manifest.age)}") from None

        return on_all_ranks(self._comm, advised)

    def _section(self, name: str) -> Section:
        try:
            return self._manifest.sections[name]
        except KeyError:
            raise Corrupt(f"the manifest of {self.path} has no section {name!r}.") from None

    def _read(self, name: str) -> Any:
        section = self._section(name)
        return decode(section.tree, self._whole(section, section.tensors).__getitem__)

    def _whole(self, section: Section, names: Any) -> dict[str, torch.Tensor]:
        ranges = {name: whole(name, section.tensors[name]) for name in names}
        found = read_ranges(self.path, section.tensors, self._manifest.sizes, ranges.values())
        return {name: found[one].view(section.tensors[name].placement.shape) for name, one in ranges.items()}

    def _read_model(self, model: Wanted, cast: bool) -> dict[str, Any]:
        section = self._section("model")
        wanted = model.state_dict() if isinstance(model, torch.nn.Module) else model
        if differences := model_differences(section, wanted, cast):
            raise Incompatible(listed(f"{self.path} was saved from another model", differences))
        stored = {name: child["$tensor"] for name, child in section.tree.items() if isinstance(wanted[name], torch.Tensor | TensorPart)}
        ranges = {}
        for name, tensor in stored.items():
            value = wanted[name]
            if isinstance(value, TensorPart):
                ranges[name] = Range(tensor, value.local, value.start, value.stop)
            else:
                ranges[name] = whole(tensor, section.tensors[tensor])
        found = read_ranges(self.path, section.tensors, self._manifest.sizes, set(ranges.values()))
        state: dict[str, Any] = {}
        for name, child in section.tree.items():
            if name in ranges:
                value = wanted[name]
                state[name] = found[ranges[name]] if isinstance(value, TensorPart) else found[ranges[name]].view(value.shape)
            else:
                state[name] = decode(child, lambda tensor: self._whole(section, [tensor])[tensor])
        return state

    def _known(self, optimizer: torch.optim.Optimizer, named: Named) -> set[str]:
        """Return the names that any rank's optimizer has a piece of."""
        mine = on_all_ranks(self._comm, lambda: list(group_of_each(optimizer, named)))
        everyone = [mine] if self._comm is None or self._comm.size == 1 else self._comm.all_gather_object(mine)
        return {name for names in everyone for name in names}

    def _read_optimizer(self, optimizer: torch.optim.Optimizer, named: Named, known: set[str], cast: bool) -> Mapping[str, Any]:
        section = self._section("optimizer")
        tree = section.tree
        if tree is None:
            raise Incompatible(f"{self.path} holds no optimizer state; only its model can be loaded")
        groups = group_of_each(optimizer, named)
        pieces = {name: piece for name, piece in pieces_of(named) if name in groups}
        forms = decode(tree.get("parameters", {}), dict[str, torch.Tensor]().__getitem__)
        saved = {"param_groups": tree["param_groups"], "parameters": forms}
        if differences := optimizer_differences(saved, pieces, groups, known, cast):
            raise Incompatible(listed(f"{self.path} was saved with another optimizer", differences))
        mine = {name: tree["state"][name] for name in pieces if name in tree["state"]}
        cut = {(name, key): one for name, entries in mine.items() for key, one in _cuts(entries, pieces[name], section).items()}
        rest = {name: {key: child for key, child in entries.items() if (name, key) not in cut} for name, entries in mine.items()}
        ranges: dict[str, Range] = {}

        def note(name: str) -> torch.Tensor:
            ranges[name] = whole(name, section.tensors[name])
            return torch.empty(0, device="cpu")

        decode([tree["param_groups"], rest], note)
        found = read_ranges(self.path, section.tensors, self._manifest.sizes, {*cut.values(), *ranges.values()})

        def tensor(name: str) -> torch.Tensor:
            return found[ranges[name]].view(section.tensors[name].placement.shape)

        state = decode(rest, tensor)
        for (name, key), one in cut.items():
            state[name][key] = TensorPart(found[one], pieces[name].of, one.start)
        return {"state": state, "param_groups": decode(tree["param_groups"], tensor), "parameters": forms}


def _cuts(entries: Mapping[str, Any], piece: Piece, section: Section) -> dict[str, Range]:
    """Return which range of an entry's tensor a piece takes, for each entry that has a value for each element of the whole parameter."""
    if piece.is_whole:
        return {}
    named = {key: child["$tensor"] for key, child in entries.items() if isinstance(child, dict) and "$tensor" in child}
    return {
        key: Range(tensor, piece.local, piece.start, piece.stop)
        for key, tensor in named.items()
        if is_elementwise(key, section.tensors[tensor].placement.shape, piece.shape)
    }


def _fill(model: Wanted, state: Mapping[str, Any]) -> None:
    if isinstance(model, torch.nn.Module):
        model.load_state_dict(state)
        return
    with torch.no_grad():
        for name, value in model.items():
            target = value.values if isinstance(value, TensorPart) else value
            if isinstance(target, torch.Tensor):
                target.copy_(state[name])


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.read(path)
    except Corrupt as error:
        raise Corrupt(f"{error}\n{one_before(path, None)}") from None


def _newest(folder: Path) -> Path:
    if (folder / NAME).exists():
        return folder
    if not folder.is_dir():
        raise Incomplete(f"there is no checkpoint at {folder}: no such folder")
    complete = sorted(complete_checkpoints(folder), key=lambda path: _manifest(path).age)
    if not complete:
        unfinished = sorted(path.name for path in folder.iterdir() if path.is_dir())
        seen = f" (without a {NAME}: {', '.join(unfinished[:10])})" if unfinished else ""
        raise Incomplete(f"there is no complete checkpoint in {folder}{seen}; give the folder that holds step-NUMBER folders, or one of them")
    return complete[-1]
