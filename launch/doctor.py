"""`ringfold doctor`: what works on this machine, and what to do about what does not.

Every line is found out by trying or reading, without importing torch, and none of them is an error: a machine without MPI is a machine
that does not need it. `examine` finds out, `show` prints.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringfold.launch import machine

_GIB = 1 << 30
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@dataclass(frozen=True)
class Finding:
    """One thing, whether it works, what was seen, and what to do if it should work better."""

    area: str
    name: str
    status: Literal["works", "slow", "absent", "broken"]
    seen: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; a check that fails in an unforeseen way is itself a finding."""
    findings = []
    for check in _CHECKS:
        try:
            findings += list(check())
        except Exception as error:
            findings.append(Finding("doctor", check.__name__.lstrip("_"), "broken", f"{type(error).__name__}: {error}"))
    return findings


def show(findings: list[Finding]) -> None:
    """Print the table, then what to do, most serious first."""
    from rich.console import Console
    from rich.table import Table

    colours = {"works": "green", "slow": "yellow", "absent": "dim", "broken": "bold red"}
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    area = ""
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(finding.area if finding.area != area else "", finding.name, f"[{colour}]{finding.status}[/]", finding.seen.replace("[", r"\["))
        area = finding.area
    console.print(table)
    advised = [finding for status in ("broken", "slow", "absent") for finding in findings if finding.status == status and finding.advice]
    if advised:
        console.print("\nWhat to do")
    for finding in advised:
        console.print(f"  {finding.name}: {finding.advice}", markup=False, soft_wrap=True)
    if not any(finding.status == "broken" for finding in findings):
        console.print("\nNothing is broken. Try: ringfold bench all_reduce -n 2", markup=False)


def _software() -> Iterator[Finding]:
    yield Finding("software", "Python", "works", f"{platform.python_version()} ({sys.executable})")
    torch = _version("torch")
    if torch:
        yield Finding("software", "torch", "works", torch)
    else:
        yield Finding("software", "torch", "broken", "not installed", "pip install torch")
    # In a process of its own: a core built for another processor may not raise but crash.
    probe = [sys.executable, "-c", "import ringfold._core as core; print(core.__file__)"]
    loaded = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
    if loaded.returncode == 0:
        yield Finding("software", "C++ core", "works", loaded.stdout.strip())
    else:
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        how = "pip install . again, from the source" if compiler else "install a C++17 compiler (Debian: apt install g++), then pip install ."
        seen = loaded.stderr.strip().rpartition("\n")[2] or f"exit code {loaded.returncode}"
        yield Finding("software", "C++ core", "broken", seen, how)


def _transports() -> Iterator[Finding]:
    try:
        fd = os.memfd_create("ringfold-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.close(fd)
        yield Finding("transports", "shared memory", "works", "memfd, sealed: has no name, needs no /dev/shm and cannot leak")
    except OSError as error:
        advice = "this sandbox forbids memfd_create; allow it, or run with --transport tcp"
        yield Finding("transports", "shared memory", "broken", f"memfd: {error.strerror}", advice)
    yield from _huge_pages()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as dialler:
        listener.bind(f"\0ringfold-doctor-{os.getpid()}")
        listener.listen()
        dialler.connect(listener.getsockname())
        yield Finding("transports", "unix sockets", "works", "abstract")
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(2)
            with socket.create_connection(server.getsockname(), timeout=2):
                server.accept()[0].close()
        yield Finding("transports", "tcp", "works", "127.0.0.1")
    except OSError as error:
        yield Finding("transports", "tcp", "broken", f"127.0.0.1: {error}", "bring the loopback interface up: ip link set lo up")


def _huge_pages() -> Iterator[Finding]:
    try:
        setting = _HUGE_PAGES.read_text()
    except OSError:
        return
    match = re.search(r"\[(\w+)\]", setting)
    chosen = match[1] if match else setting.strip()
    version = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    if chosen == "never" and version >= (6, 1):
        yield Finding("transports", "huge pages", "works", "shared memory: never, but the core collapses pages itself")
    elif chosen in ("never", "deny"):
        advice = f"as root: echo advise > {_HUGE_PAGES}  (fewer page faults in large buffers)"
        yield Finding("transports", "huge pages", "slow", f"shared memory: {chosen}", advice)
    else:
        yield Finding("transports", "huge pages", "works", f"shared memory: {chosen}")


def _machine() -> Iterator[Finding]:
    online, allowed, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), machine.cpu_quota()
    seen = f"{machine.cores()} usable: {online} online, {allowed} in this process's affinity"
    if quota is not None:
        seen += f", a cgroup quota of {quota:g}"
    if machine.cores() < online:
        advice = "more ranks than usable cores take turns; widen the affinity (taskset) or the container's --cpus, or use fewer ranks"
        yield Finding("machine", "cores", "slow", seen, advice)
    else:
        yield Finding("machine", "cores", "works", seen)
    physical, limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), machine.memory_nbytes()
    seen = f"{physical / _GIB:.1f} GiB" + (f", a cgroup limit of {limit / _GIB:.1f} GiB" if limit < physical else "")
    yield Finding("machine", "memory", "works", seen)
    if os.path.isdir("/dev/shm"):
        usage = shutil.disk_usage("/dev/shm")
        small = usage.free < _GIB
        advice = "DataLoader workers use it (ringfold does not): docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm"
        seen = f"{usage.total / _GIB:.1f} GiB, {usage.free / _GIB:.1f} free"
        yield Finding("machine", "/dev/shm", "slow" if small else "works", seen, advice if small else "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= hard < 1024
    yield Finding("machine", "open files", "slow" if few else "works", f"{soft}, at most {hard}", "raise ulimit -Hn" if few else "")


def _gpus() -> Iterator[Finding]:
    nccl = [name for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if _version(name)]
    if nccl:
        yield Finding("GPUs", "NCCL", "works", f"{nccl[0]} {_version(nccl[0])}")
    else:
        yield Finding("GPUs", "NCCL", "absent", "no nvidia-nccl package", "only for GPUs: install a torch built for CUDA")
    has_driver = os.path.exists("/proc/driver/nvidia/version")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        advice = "pip install 'ringfold[gpu]'" if has_driver else ""
        yield Finding("GPUs", "devices", "absent", "nvidia-ml-py is not installed" + ("" if has_driver else ", nor a driver loaded"), advice)
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield Finding("GPUs", "devices", "broken" if has_driver else "absent", str(error), "see nvidia-smi" if has_driver else "")
        return
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            total = nvml.nvmlDeviceGetMemoryInfo(device).total / _GIB
            yield Finding("GPUs", f"device {index}", "works", f"{nvml.nvmlDeviceGetName(device)}, {total:.0f} GiB")
    finally:
        nvml.nvmlShutdown()


def _launchers() -> Iterator[Finding]:
    mpirun, mpi4py = shutil.which("mpirun") or shutil.which("mpiexec"), _version("mpi4py")
    if mpirun or mpi4py:
        seen = ", ".join(part for part in (mpirun and str(mpirun), mpi4py and f"mpi4py {mpi4py}") if part)
        yield Finding("other launchers", "MPI", "works", seen)
    else:
        yield Finding("other launchers", "MPI", "absent", "neither mpirun nor mpi4py", "only to start under mpirun: pip install mpich mpi4py")
    for name, command in (("ssh", "ssh"), ("Slurm", "srun")):
        found = shutil.which(command)
        advice = "" if found else "only for jobs on several hosts"
        yield Finding("other launchers", name, "works" if found else "absent", found or f"no {command}", advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_software, _transports, _machine, _gpus, _launchers)
