"""Hosts made of namespaces on this machine: each has its own hostname, /etc/hosts, interfaces and System V memory, and cables to switches.

A namespace has no name and no file: it lives as long as the process that holds it, a `cat` whose standard input is a pipe from the test.
So everything is gone as soon as the test process is, however it ends, and nothing of a killed run can be stale. Ranks are forked
from the warm server and move into their host before they join. Needs iproute2 and util-linux, and root or user namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import Ranks, spawn_ranks

SECRET = "0123456789abcdef0123456789abcdef"
MASTER_PORT = 29500
COMMAND_TIMEOUT_S = 10.0
# In the order in which a process must enter them: the user's gives the right to the others.
KINDS = ("user", "uts", "ipc", "net", "mnt")
# struct tcphdr, iphdr and ethhdr, with TCP timestamps: what a shaper counts of a full frame (MTU 1500) and what of it is payload.
BURST_NBYTES = 128 * 1024
FRAME_NBYTES = 1514
PAYLOAD_NBYTES = 1448


def missing_feature() -> str | None:
    """Return what keeps this machine from having such hosts, or None."""
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} here: install iproute2 and util-linux"
    try:
        with Hosts(2) as hosts:
            hosts.cap(0, "1gbit")
    except (RuntimeError, subprocess.SubprocessError) as error:
        return f"this machine does not let us make hosts: {error}"
    return None


@dataclass
class _Space:
    """A process that holds namespaces."""

    keeper: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.keeper.pid

    def close(self) -> None:
        self.keeper.kill()
        self.keeper.communicate()


@dataclass
class Hosts:
    """`number` hosts with an interface eth0 on one switch, and eth1 on another where `networks` is 2; closing ends everything.

    Host i is node{i}, at 10.77.0.{10 + i} and 10.78.0.{10 + i}. It does not know the others' names, and its own means 127.0.1.1 to it, as on Debian.
    """

    number: int
    networks: int = 1
    _resources: ExitStack = field(default_factory=ExitStack, repr=False)
    _hosts: list[_Space] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        with ExitStack() as undo:
            undo.callback(lambda: self._resources.close())
            # One user namespace for all, so that a cable may join any two.
            self._switch = self._start(["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])])
            for network in range(self.networks):
                self._ip(None, f"link add br{network} type bridge", f"link set br{network} up")
            for _ in range(self.number):
                self._hosts.append(self._start([*self._enter(self._switch), "unshare", "--net", "--uts", "--ipc", "--mount"]))
            for host in range(self.number):
                self._furnish(host)
            undo.pop_all()

    def _furnish(self, host: int) -> None:
        """Give a host its loopback, its cables, its name and what the name means to it."""
        self._ip(host, "link set lo up")
        for network in range(self.networks):
            cable = f"h{host}e{network}"
            self._ip(None, f"link add eth{network} netns {self._hosts[host].pid} type veth peer name {cable}")
            self._ip(None, f"link set {cable} master br{network} up")
            self._ip(host, f"addr add {self.address(host, network)}/24 dev eth{network}", f"link set eth{network} up")
        hosts = f"127.0.0.1 localhost\\n127.0.1.1 node{host}\\n"
        bind = f"mount -t tmpfs tmpfs /mnt; printf '{hosts}' >/mnt/hosts; mount --bind /mnt/hosts /etc/hosts"
        self.run(host, "sh", "-ec", f"hostname node{host}; {bind}")

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process that holds a host; the ranks are the harness's."""
        self._resources.close()

    @property
    def pids(self) -> list[int]:
        """The processes that hold the hosts and the switch."""
        return [space.pid for space in (self._switch, *self._hosts)]

    def address(self, host: int, network: int = 0) -> str:
        return f"10.{77 + network}.0.{10 + host}"

    def command(self, host: int, *words: str) -> list[str]:
        """Return the words that run a command on a host."""
        return [*self._enter(self._hosts[host]), "--uts", "--ipc", "--mount", "--wd=" + os.getcwd(), "--", *words]

    def run(self, host: int, *words: str) -> str:
        """Run a command on a host and return what it printed.

        Raises: RuntimeError, with what it said, if it fails.
        """
        return _run(self.command(host, *words))

    def cut(self, host: int, network: int = 0) -> None:
        """Unplug a host's cable at the switch: nobody is told, packets just vanish."""
        self._ip(None, f"link set h{host}e{network} nomaster", f"link set h{host}e{network} up")

    def unplug(self, host: int, network: int = 0) -> None:
        """Unplug a host's cable at the switch: the host's interface loses its carrier."""
        self._ip(None, f"link set h{host}e{network} down")

    def heal(self, host: int, network: int = 0) -> None:
        self._ip(None, f"link set h{host}e{network} master br{network} up")

    def cap(self, host: int, rate: str, network: int = 0) -> None:
        """Let no more than `rate` (tc's words) pass from a host, nor to it; tbf counts whole Ethernet frames.

        The burst is what passes at once after a pause. One of 64 KiB makes the kernel cut every large packet into frames before the shaper,
        which costs more processor time than 1 Gbit/s leaves on a busy machine: 0.4 Gbit/s each way between two hosts instead of 0.95.
        """
        words = ["root", "tbf", "rate", rate, "burst", f"{BURST_NBYTES // 1024}kb", "latency", "50ms"]
        _run([*self._enter(self._switch), "tc", "qdisc", "replace", "dev", f"h{host}e{network}", *words])
        self.run(host, "tc", "qdisc", "replace", "dev", f"eth{network}", *words)

    def uncap(self, host: int, network: int = 0) -> None:
        _run([*self._enter(self._switch), "tc", "qdisc", "del", "dev", f"h{host}e{network}", "root"])
        self.run(host, "tc", "qdisc", "del", "dev", f"eth{network}", "root")

    def environ(self, places: Sequence[int], rank: int) -> dict[str, str]:
        """Return what a launcher would tell rank `rank`, where rank r is on host places[r]."""
        numbers = {
            "RANK": rank,
            "WORLD_SIZE": len(places),
            "LOCAL_RANK": places[:rank].count(places[rank]),
            "LOCAL_WORLD_SIZE": places.count(places[rank]),
            "MASTER_ADDR": self.address(places[0]),
            "MASTER_PORT": MASTER_PORT,
            "RINGFOLD_SECRET": SECRET,
        }
        return {name: str(value) for name, value in numbers.items()}

    def spawn(
        self,
        places: Sequence[int],
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = 30.0,
        env: Mapping[str, str] | Sequence[Mapping[str, str]] = {},
        joined: bool = True,
    ) -> Ranks:
        """Start ranks that call `function(world, *args)`, rank r on host places[r], and return their handle; without `joined`, `function(*args)`.

        env: more variables, for all or for each.
        """
        own = [env] * len(places) if isinstance(env, Mapping) else env
        told = [{**self.environ(places, rank), "RINGFOLD_TIMEOUT_S": str(timeout_s), **own[rank]} for rank in range(len(places))]
        pids = [self._hosts[place].pid for place in places]
        return spawn_ranks(len(places), _on_host, pids, told, joined, function, args, joined=False)

    def _start(self, words: Sequence[str]) -> _Space:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        keeper = subprocess.Popen([*words, "sh", "-c", "echo up && exec cat"], text=True, **pipes)  # type: ignore[call-overload]
        space = _Space(keeper)
        self._resources.callback(space.close)
        if keeper.stdout.readline() != "up\n":
            raise RuntimeError(f"{' '.join(words)}: {keeper.communicate()[1].strip()}")
        return space

    def _enter(self, space: _Space) -> list[str]:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(space.pid), *user, "--net"]

    def _ip(self, host: int | None, *lines: str) -> None:
        """Run commands of ip on a host, or on the switch."""
        space = self._switch if host is None else self._hosts[host]
        _run([*self._enter(space), "ip", "-batch", "-"], "".join(f"{line}\n" for line in lines))


def _run(words: Sequence[str], given: str = "") -> str:
    done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _on_host(pids: list[int], told: list[dict[str, str]], joined: bool, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Become a rank on its host: enter its namespaces, and see what its launcher has said."""
    rank = int(os.environ["RINGFOLD_RANK"])
    enter(pids[rank])
    for name in [name for name in os.environ if name.startswith("RINGFOLD_") and name != "RINGFOLD_FLIGHT_DIR"]:
        del os.environ[name]
    os.environ.update(told[rank])
    if not joined:
        return function(*args)
    from ringfold.collectives.communicator import world as join_world
    from ringfold.collectives.environment import Job

    world = join_world(Job.from_environment())
    try:
        return function(world, *args)
    finally:
        world.close()


def enter(pid: int) -> None:
    """Move this process, which has one thread, into the namespaces of another."""
    libc = ctypes.CDLL(None, use_errno=True)
    cwd = os.getcwd()
    with ExitStack() as opened:
        fds = []
        for kind in KINDS:
            path = f"/proc/{pid}/ns/{kind}"
            if os.readlink(path) != os.readlink(f"/proc/self/ns/{kind}"):
                fds.append((kind, os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
                opened.callback(os.close, fds[-1][1])
        for kind, fd in fds:
            if libc.setns(fd, 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace of {pid}: {os.strerror(ctypes.get_errno())}")
    os.chdir(cwd)


def wait_until_gone(pids: Sequence[int], timeout_s: float = 5.0) -> list[int]:
    """Return those processes that are still there (zombies are not) at the deadline."""
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if _is_alive(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
