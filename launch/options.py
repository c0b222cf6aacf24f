"""What `ringfold run` was asked for: everything is checked before anything is started, and all problems are told at once.

The only import of launch from above collectives is here: a `--layout` is checked by `ringfold.parallel.layout`, which is pure Python.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal, get_args

from ringfold.collectives.environment import Transport
from ringfold.collectives.errors import ConfigError, LayoutError, nearest

MAX_RANKS = 1024  # on one host; a larger number is a typing error, and would take the machine down with it
_FDS_PER_RANK = 6  # page, two pipes, a store connection, and a page and a pipe in passing


@dataclass(frozen=True)
class Target:
    """What every rank runs: a Python script, a module, or any executable, with its own arguments."""

    kind: Literal["script", "module", "executable"]
    name: str
    arguments: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """Return the argument vector of a rank."""
        start = {"script": [sys.executable], "module": [sys.executable, "-m"], "executable": []}[self.kind]
        return [*start, self.name, *self.arguments]


@dataclass(frozen=True)
class RunOptions:
    """A job that can be started."""

    target: Target
    world_size: int = 1
    layout: str | None = None
    timeout_s: float | None = None
    transport: Transport | None = None
    interface: str | None = None
    log_dir: Path | None = None
    report: Path | None = None
    omp_threads: int | None = None
    verbose: bool = False


@dataclass
class _Checked:
    """Turns texts into values and collects what is wrong with them."""

    problems: list[str] = field(default_factory=list)

    def whole_number(self, option: str, text: str | None, highest: int, of: str) -> int | None:
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
            self.problems.append(f"{option} {text}: expected a whole number of {of}, at least 1; for example {option} 2")
            return None
        if int(text) > highest:
            self.problems.append(f"{option} {text}: expected at most {highest} {of} on one host")
            return None
        return int(text)

    def seconds(self, option: str, text: str | None) -> float | None:
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            self.problems.append(f"{option} {text}: expected a number of seconds above 0; for example {option} 60")
            return None
        return value

    def transport(self, text: str | None) -> Transport | None:
        offered = [name for name in get_args(Transport) if name != "mpi"]
        for name in offered:
            if text == name:
                return name  # type: ignore[no-any-return]
        if text == "mpi":
            self.problems.append("--transport mpi: ranks over MPI are started by it: RINGFOLD_TRANSPORT=mpi mpirun -n N python train.py")
        elif text is not None:
            meant = nearest(text, offered)
            suggestion = f"; did you mean {meant}?" if meant else ""
            self.problems.append(f"--transport {text}: expected one of {', '.join(offered)}{suggestion}")
        return None

    def interface(self, text: str | None) -> None:
        if text is None:
            return
        from ringfold.collectives import interfaces

        try:
            interfaces.choose(text)
        except ConfigError as error:
            self.problems.append(f"--{error}")

    def layout(self, text: str | None, world_size: int | None) -> None:
        if text is None:
            return
        from ringfold.parallel.layout import Layout

        try:
            layout = Layout.parse(text)
            layout.require_built()
        except LayoutError as error:
            self.problems.append(f"--layout: {error}")
            return
        if world_size is not None:
            self.problems += [f'--layout "{text}": {problem}' for problem in layout.check(world_size)]

    def folder_to_make(self, option: str, text: str | None) -> Path | None:
        if text is None:
            return None
        existing = path = Path(text).absolute()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            self.problems.append(f"{option} {text}: {existing} is a file, expected a folder")
        elif not os.access(existing, os.W_OK | os.X_OK):
            self.problems.append(f"{option} {text}: {existing} cannot be written to")
        return path

    def file_to_write(self, option: str, text: str | None) -> Path | None:
        if text is None:
            return None
        path = Path(text).absolute()
        if path.is_dir():
            self.problems.append(f"{option} {text}: is a folder, expected the name of a file to write")
        elif not path.parent.is_dir():
            self.problems.append(f"{option} {text}: there is no folder {path.parent}")
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            self.problems.append(f"{option} {text}: {path.parent} cannot be written to")
        return path

    def target(self, target: Target | None) -> None:
        if target is None:
            self.problems.append("nothing to run: give a script.py, -m MODULE, or -- EXECUTABLE after the options")
        else:
            self.problems += {"script": _script_problems, "module": _module_problems, "executable": _executable_problems}[target.kind](target.name)

    def descriptors(self, world_size: int | None) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 64 + _FDS_PER_RANK * (world_size or 1)
        if hard != resource.RLIM_INFINITY and needed > hard:
            self.problems.append(f"-n {world_size}: the launcher needs {needed} open files and may have {hard}; raise `ulimit -Hn`")
        elif soft != resource.RLIM_INFINITY and needed > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_options(
    target: Target | None,
    *,
    n: str | None = None,
    layout: str | None = None,
    timeout: str | None = None,
    transport: str | None = None,
    interface: str | None = None,
    log_dir: str | None = None,
    report: str | None = None,
    omp_threads: str | None = None,
    verbose: bool = False,
) -> RunOptions:
    """Check the texts of the command line; nothing is started, written or imported from the user's code.

    Raises: ConfigError, with every problem.
    """
    checked = _Checked()
    world_size = checked.whole_number("-n", n or "1", MAX_RANKS, "ranks")
    checked.layout(layout, world_size)
    timeout_s = checked.seconds("--timeout", timeout)
    transport_name = checked.transport(transport)
    checked.interface(interface)
    log_folder = checked.folder_to_make("--log-dir", log_dir)
    report_path = checked.file_to_write("--report", report)
    threads = checked.whole_number("--omp-threads", omp_threads, 4096, "threads")
    checked.descriptors(world_size)
    checked.target(target)
    if checked.problems or target is None or world_size is None:
        raise ConfigError(listed(checked.problems))
    return RunOptions(target, world_size, layout, timeout_s, transport_name, interface, log_folder, report_path, threads, verbose)


def listed(problems: Sequence[str]) -> str:
    """Return one problem as it is, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems, nothing was started:\n" + "\n".join("  " + problem.replace("\n", "\n    ") for problem in problems)


def _script_problems(name: str) -> Iterator[str]:
    path = Path(name)
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            yield f"{name} is a folder without __main__.py, expected a Python script"
    elif not path.exists():
        folder = path.parent
        if not folder.is_dir():
            yield f"no such script: {name} (there is no folder {folder})"
            return
        scripts = [entry.name for entry in folder.iterdir() if entry.suffix == ".py"]
        meant = nearest(path.name, scripts)
        yield f"no such script: {name}" + (f"; did you mean {folder / meant}?" if meant else f" (in {folder.absolute()})")
    elif not os.access(path, os.R_OK):
        yield f"{name} cannot be read"
    elif path.is_file():
        with path.open("rb") as script:
            if script.read(4) == b"\x7fELF":
                yield f"{name} is not a Python script; to run an executable write -- {name}"


def _executable_problems(name: str) -> Iterator[str]:
    if shutil.which(name):
        return
    if os.path.isfile(name) and os.sep in name:
        yield f"{name} is not executable; try chmod +x, or leave the -- out if it is a Python script"
    elif os.sep in name:
        yield f"no such executable: {name}"
    else:
        yield f"no executable {name} on PATH" + (f"; to run the one in this folder write ./{name}" if os.path.isfile(name) else "")


def _module_problems(name: str) -> Iterator[str]:
    """Look the module up part by part, without importing any package on the way."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        yield f"-m {name}: expected the dotted name of a module, not a path; a script is given without -m"
        return
    path: list[str] | None = None
    for depth in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:depth]), path)
        if spec is None:
            inside = f" in {'.'.join(parts[: depth - 1])}" if depth > 1 else ""
            meant = nearest(parts[depth - 1], _modules_in(path)) if path else None
            yield f"-m {name}: there is no module {parts[depth - 1]}{inside}" + (f"; did you mean {meant}?" if meant else "")
            return
        path = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
        if path is None and depth < len(parts):
            yield f"-m {name}: {'.'.join(parts[:depth])} is a module, not a package (a script is given without -m)"
            return
    if path is not None and _find(f"{name}.__main__", path) is None:
        yield f"-m {name}: is a package without __main__.py"


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    """Ask the import system's finders, with the working folder first as `python -m` does."""
    search = path
    for finder in sys.meta_path:
        if path is None and getattr(finder, "__name__", "") == "PathFinder":
            search = [os.getcwd(), *sys.path]
        find_spec = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find_spec(name, search if search is not None else path) if find_spec else None
        if spec is not None:
            return spec
    return None


def _modules_in(path: list[str]) -> list[str]:
    names = []
    for folder in path:
        if os.path.isdir(folder):
            names += [entry.removesuffix(".py") for entry in os.listdir(folder) if entry.endswith(".py") or "." not in entry]
    return [name for name in names if not name.startswith("_")]
