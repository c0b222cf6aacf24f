"""The layers of docs/design.md, held by reading every import in the sources, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("collectives", "mixed_precision", "parallel", "runtime", "launch")
# part -> the parts it may import (itself always)
BELOW = {
    "collectives": set(),
    "mixed_precision": {"collectives"},
    "parallel": {"collectives"},
    "runtime": {"parallel", "mixed_precision", "collectives"},
    "launch": {"collectives"},
}
# launch checks a layout before it starts anything (layout.py is pure arithmetic), and lists the benchmarks' names.
MAY_IMPORT_LAZILY = {("launch", "ringfold.parallel.layout"), ("launch", "ringfold.benchmarks")}
MAY_IMPORT_TORCH = {
    "collectives/arguments.py",
    "collectives/communicator.py",
    "collectives/measure.py",
    "collectives/work.py",
    "collectives/_native.py",
    "collectives/registered.py",
    "collectives/issue.py",
    "collectives/objects.py",
    "collectives/operand.py",
    "collectives/order.py",
    "collectives/transport.py",
    *(f"collectives/process_group/{name}.py" for name in ("__init__", "bootstrap", "group", "sparse", "staging", "uncompiled", "work")),
    *(f"collectives/cuda/{name}.py" for name in ("__init__", "driver", "nccl", "shared_device", "stream_transport", "window")),
    "collectives/fold.py",
    "collectives/interpreter.py",
    "collectives/mpi.py",
    "collectives/mpi_choice.py",
    "collectives/mpi_requests.py",
}
CORE_IS_IMPORTED_BY = {"collectives/_native.py"}
CALLS_THAT_IMPORT = {"importlib.import_module", "import_module", "__import__"}
FRONT_DOOR = "runtime/ringfold"


@dataclass(frozen=True)
class Import:
    file: str  # relative to the root
    line: int
    module: str  # absolute, with the imported name: "from a.b import c" is a.b.c
    is_lazy: bool  # inside a function
    for_types: bool  # under `if TYPE_CHECKING`: nothing happens at run time

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> Iterator[Import]:
    package = ["ringfold", *Path(file).parent.parts]

    def visit(node: ast.AST, is_lazy: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, is_lazy, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield Import(file, node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name]), is_lazy, for_types)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS_THAT_IMPORT and isinstance(node.args[0], ast.Constant):
            yield Import(file, node.lineno, str(node.args[0].value), is_lazy, for_types)
        is_lazy = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, is_lazy, True)
            for child in node.orelse:
                yield from visit(child, is_lazy, for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy, for_types)

    yield from visit(ast.parse(source), False, False)


def sources() -> dict[str, str]:
    files = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def part_of(module: str) -> str | None:
    """Return which part `ringfold.x.y` belongs to; the front door counts as what is above everything."""
    names = module.split(".")
    if names[0] != "ringfold":
        return None
    return names[1] if len(names) > 1 and names[1] in PARTS else "front door"


def problems(files: dict[str, str]) -> list[str]:
    """Return one line for each import that breaks a layer."""
    found = []
    for file, source in files.items():
        part = file.split("/")[0]
        is_front_door = file.startswith(FRONT_DOOR + "/")
        for one in imports_of(source, file):
            top = one.module.split(".")[0]
            if top in (*PARTS, "benchmarks", "tests", "examples"):
                found.append(f"{one}: the name is ringfold.{one.module}, and nothing below imports benchmarks, tests or examples")
            if one.module.startswith("ringfold._core"):
                if file not in CORE_IS_IMPORTED_BY:
                    found.append(f"{one}: only {', '.join(CORE_IS_IMPORTED_BY)} may")
                continue
            if top == "torch" and (part == "launch" or (part == "collectives" and file not in MAY_IMPORT_TORCH)) and not one.for_types:
                found.append(f"{one}: {part} must start without torch")
            if top == "torch" and is_front_door and not one.is_lazy and not one.for_types:
                found.append(f"{one}: `import ringfold` must not import torch")
            target = part_of(one.module)
            if target is None or target == part or is_front_door:
                continue
            if any(part == who and one.module.startswith(what) and one.is_lazy for who, what in MAY_IMPORT_LAZILY):
                continue
            if target not in BELOW[part]:
                found.append(f"{one}: {part} may import only {sorted(BELOW[part]) or 'nothing of ringfold'}")
    return found


def test_imports_go_down_only() -> None:
    files = sources()
    assert len(files) > len(PARTS)
    found = problems(files)
    assert not found, "\n".join(found)


def reaches_torch(files: dict[str, str], start: str) -> list[str] | None:
    """Return the chain of files by which importing `start` imports torch, or None. Lazy imports do not count: they have not happened."""
    seen, paths = {start}, [[start]]
    for path in paths:
        for one in imports_of(files[path[-1]], path[-1]):
            if one.is_lazy or one.for_types:
                continue
            if one.module.split(".")[0] == "torch":
                return path
            names = one.module.split(".")[1:]
            for depth in range(1, len(names) + 1):
                for file in ("/".join(names[:depth]) + ".py", "/".join([*names[:depth], "__init__.py"])):
                    if file in files and file not in seen and one.module.startswith("ringfold."):
                        seen.add(file)
                        paths.append([*path, file])
    return None


def test_nothing_that_launch_imports_imports_torch() -> None:
    files = sources()
    starts = [file for file in files if file.startswith("launch/")] + ["parallel/layout.py"]
    assert [path for start in starts if (path := reaches_torch(files, start))] == []
    assert reaches_torch(files, "collectives/communicator.py") is not None


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("collectives/store.py", "import torch"),
        ("collectives/select.py", "def f():\n    from torch import Tensor"),
        ("collectives/errors.py", "from ringfold.parallel.layout import Layout"),
        ("collectives/work.py", "from ringfold import _core"),
        ("parallel/buckets.py", "import ringfold._core"),
        ("parallel/buckets.py", "def f():\n    from ringfold.runtime import engine"),
        ("parallel/buckets.py", "from ..runtime.engine import Engine"),
        ("parallel/buckets.py", "from ringfold.mixed_precision.precision import Precision"),
        ("parallel/buckets.py", "from collectives.errors import RingfoldError"),
        ("runtime/engine.py", "import ringfold.launch.cli"),
        ("runtime/engine.py", "import tests.harness"),
        ("runtime/ringfold/__init__.py", "import torch"),
        ("launch/run.py", "def f():\n    import torch.distributed"),
        ("launch/run.py", "from ringfold.parallel.layout import Layout"),
        ("launch/run.py", "def f():\n    from ringfold.parallel.mesh import DeviceMesh"),
        ("launch/run.py", "import importlib\nimportlib.import_module('ringfold.runtime.engine')"),
        ("launch/run.py", "import ringfold"),
    ],
)
def test_each_kind_of_break_is_found(file: str, source: str) -> None:
    assert len(problems({file: source})) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("collectives/_native.py", "import torch\nfrom ringfold import _core"),
        ("collectives/store.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("collectives/store.py", "from .errors import ConnectError"),
        ("launch/run.py", "def f():\n    from ringfold.parallel.layout import Layout"),
        ("runtime/engine.py", "from ringfold.parallel.mesh import DeviceMesh\nfrom ringfold.mixed_precision import precision"),
        ("runtime/ringfold/__init__.py", "def __getattr__(name):\n    from ringfold.launch import cli"),
    ],
)
def test_what_is_allowed_is_not_refused(file: str, source: str) -> None:
    assert not problems({file: source})
