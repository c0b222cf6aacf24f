"""The manifest of a checkpoint: what it holds, where each tensor's bytes lie, and that it is complete.

It is written last, so a directory with a manifest is a whole checkpoint. A section (model, optimizer, extra) is a tree (tree.py)
and the tensors it names. A tensor is its dtype, its Placement (global name, shape, axes) and its parts: the local tensors, each in
one file, of the coordinates that together hold it. A local tensor may itself be in pieces, which are ranges of it flattened; a whole one
lies in its file under the global name, in its own shape. The reader puts any parts together, so what one layout saves another one loads.
Version 1 had neither ranges nor the number of ranks.
The manifest carries its own sha256, because learning rates and positions are in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfold.collectives.errors import ConfigError, Corrupt, Incompatible, Incomplete
from ringfold.parallel.placement import Placement

NAME = "manifest.json"
FORMAT = "ringfold checkpoint"
VERSION = 2
_READABLE = (1, 2)


@dataclass(frozen=True)
class Part:
    """The local tensor of the rank at `coordinate`, or `range` (start, stop) of it flattened: in which file, and the sha256 of its bytes."""

    file: str
    coordinate: dict[str, int]
    sha256: str
    range: tuple[int, int] | None = None

    def key(self, name: str) -> str:
        """Return how the file calls this part of the tensor `name`."""
        return part_key(name, self.range)

    def to_json(self) -> dict[str, Any]:
        """Return this part as JSON's types."""
        value: dict[str, Any] = {"file": self.file, "coordinate": self.coordinate, "sha256": self.sha256}
        return value if self.range is None else {**value, "range": list(self.range)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Part:
        """Return the part that `to_json` gave."""
        return cls(value["file"], value["coordinate"], value["sha256"], tuple(value["range"]) if "range" in value else None)


def part_key(name: str, range: tuple[int, int] | None) -> str:
    """Return the name in its file of a range of the tensor `name`, or of all of it."""
    return name if range is None else f"{name}[{range[0]}:{range[1]}]"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the whole model, wherever its bytes are. `dtype` is torch's name without the prefix."""

    dtype: str
    placement: Placement
    parts: list[Part]

    def to_json(self) -> dict[str, Any]:
        """Return this entry as JSON's types."""
        placement = json.loads(self.placement.to_json())
        return {"dtype": self.dtype, "placement": placement, "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorEntry:
        """Return the entry that `to_json` gave."""
        placement = Placement.from_json(json.dumps(value["placement"]))
        return cls(value["dtype"], placement, [Part.from_json(part) for part in value["parts"]])


@dataclass(frozen=True)
class Section:
    """A tree and the tensors it names."""

    tree: Any
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors' bytes.

    `saved` is UTC in ISO 8601 with microseconds, so text order is time order; `sizes` are the axes of the mesh that wrote parts, `ranks` how
    many ranks saved it.
    """

    step: int
    saved: str
    versions: dict[str, str]
    sizes: dict[str, int]
    sections: dict[str, Section]
    ranks: int = 1

    @property
    def files(self) -> dict[str, list[tuple[str, str, Part]]]:
        """Return, for each file, (section, tensor, part) of everything that it holds."""
        found: dict[str, list[tuple[str, str, Part]]] = {}
        for name, section in self.sections.items():
            for tensor, entry in section.tensors.items():
                for part in entry.parts:
                    found.setdefault(part.file, []).append((name, tensor, part))
        return found

    @property
    def age(self) -> tuple[str, int]:
        """Return what orders checkpoints: the one saved last is the greatest."""
        return self.saved, self.step

    def to_json(self) -> str:
        """Return the text of the file."""
        sections = {
            name: {"tree": section.tree, "tensors": {tensor: entry.to_json() for tensor, entry in section.tensors.items()}}
            for name, section in self.sections.items()
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "saved": self.saved,
            "versions": self.versions,
            "sizes": self.sizes,
            "ranks": self.ranks,
            "sections": sections,
        }
        return json.dumps({**content, "sha256": _digest(content)}, indent=1)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check the manifest of a checkpoint.

        Raises:
            Incomplete: there is none.
            Corrupt: it is not what was written.
            Incompatible: it is of a version of the format that this ringfold does not know.
        """
        path = directory / NAME
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise Incomplete(f"{directory} has no {NAME}: it is not a checkpoint, or saving it did not finish") from None
        except (OSError, ValueError) as error:
            raise Corrupt(f"{path} cannot be read: {error}.") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise Corrupt(f"{path} is not the manifest of a ringfold checkpoint.")
        if content.get("version") not in _READABLE:
            readable = " and ".join(map(str, _READABLE))
            raise Incompatible(f"{path} is version {content.get('version')} of the format; this ringfold reads {readable}. Use a newer ringfold.")
        if content.pop("sha256", None) != _digest(content):
            raise Corrupt(f"{path} does not hold what was written: its own sha256 differs.")
        try:
            sections = {
                name: Section(section["tree"], {key: TensorEntry.from_json(entry) for key, entry in section["tensors"].items()})
                for name, section in content["sections"].items()
            }
            return cls(content["step"], content["saved"], content["versions"], content["sizes"], sections, content.get("ranks", 1))
        except (KeyError, TypeError, ConfigError) as error:
            raise Corrupt(f"{path} is whole but makes no sense: {error!r}.") from None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the folders directly inside `folder` that hold a manifest, in no order; hidden ones are being written or removed."""
    return [path.parent for path in folder.glob(f"*/{NAME}") if not path.parent.name.startswith(".")]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
