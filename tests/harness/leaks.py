"""What a process holds: descriptors, threads, mappings, children, names in shared memory. Taken before and after, the difference is a leak.

Anonymous mappings are not counted: malloc makes and merges them at will. Mapped files (memory files among them) are.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

SETTLE_S = 3.0  # threads and children that were told to end are still there for a moment


@dataclass(frozen=True)
class Resources:
    """Counts by name of everything this process holds now."""

    descriptors: Counter[str]
    threads: Counter[str]
    mappings: Counter[str]
    children: Counter[str]
    shared_memory: Counter[str]

    @classmethod
    def now(cls) -> Resources:
        gc.collect()
        return cls(_descriptors(), _threads(), _mappings(), _children(), _shared_memory())

    def leaked_until(self, after: Resources) -> list[str]:
        """Return one line for each thing that `after` holds and this does not."""
        lines = []
        for kind in fields(self):
            more = getattr(after, kind.name) - getattr(self, kind.name)
            lines += [f"{kind.name}: {count} x {name}" for name, count in sorted(more.items())]
        return lines


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if the block leaves something behind in this process; waits up to SETTLE_S for it to go."""
    before = Resources.now()
    yield
    deadline = time.monotonic() + SETTLE_S
    while leaked := before.leaked_until(Resources.now()):
        if time.monotonic() > deadline:
            raise AssertionError("left behind:\n  " + "\n  ".join(leaked))
        time.sleep(0.02)


def _descriptors() -> Counter[str]:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            # socket:[123] -> socket: the inode of a reopened socket differs and says nothing
            names.append(os.readlink(f"/proc/self/fd/{fd}").partition("[")[0])
    return Counter(name for name in names if not name.startswith(f"/proc/{os.getpid()}/fd"))


def _threads() -> Counter[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return Counter(names)


def _mappings() -> Counter[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = [parts[5] for line in lines if len(parts := line.split(maxsplit=5)) == 6]
    # Libraries are loaded lazily by whoever needs them first, and stay.
    return Counter(name for name in names if name.startswith(("/memfd:", "/dev/shm", "/dev/zero")))


def _shared_memory() -> Counter[str]:
    # The other half of the suite may be starting a benchmark, whose ranks meet in such a folder.
    return Counter(name for name in os.listdir("/dev/shm") if not name.startswith("ringfold-bench-"))


def _children() -> Counter[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                with suppress(OSError):
                    names.append(Path(f"/proc/{pid}/comm").read_text().strip() + f" (pid {pid})")
    return Counter(names)
