"""The hosts themselves: nothing of them outlives the test, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from tests.cluster.hosts import Hosts, wait_until_gone
from tests.harness.forkserver import ROOT

HELD = """
import json, sys
from tests.cluster.hosts import Hosts
from tests.cluster.test_hosts import stay
hosts = Hosts(2)
ranks = hosts.spawn([0, 1], stay, joined=False)
for rank in range(2):
    ranks.wait_for_line(rank, "there")
print(json.dumps([*hosts.pids, *ranks.pids]), flush=True)
sys.stdin.read()
"""


def stay() -> None:
    print(f"there {os.uname().nodename}")
    while True:
        signal.pause()


def test_a_killed_test_leaves_no_process_and_so_no_namespace(hosts: Hosts) -> None:  # noqa: ARG001  # for its skip
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HELD], cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        pids = json.loads(held.stdout.readline())
        spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
        assert len(pids) == 5
        assert len(spaces) == 3
        held.kill()
        assert wait_until_gone(pids) == []


def test_closed_hosts_are_gone(hosts: Hosts) -> None:
    pids = hosts.pids
    assert len({os.readlink(f"/proc/{pid}/ns/net") for pid in [*pids, os.getpid()]}) == 4
    began = time.monotonic()
    hosts.close()
    assert wait_until_gone(pids) == []
    assert time.monotonic() - began < 2
