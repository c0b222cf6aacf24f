"""Whatever ends, and however, nothing stays alive, nothing is given away, and the right rank is blamed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from ringfold.launch import warden as module
from ringfold.launch.options import RunOptions, Target
from ringfold.launch.run import run_job
from ringfold.launch.warden import Warden, marked

from tests.cli.launching import SAY, Pids, children, finish, is_alive, run, script, start, wait_until

# Every rank starts a child that holds its output, one in a group of its own, and one that has left for a session of its own.
FAMILY = """
import subprocess
child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.pause()"
for name, extra in (("child", {}), ("grouped", {"process_group": 0}), ("daemon", {"start_new_session": True})):
    say(PIDS, f"{name}{RANK}", subprocess.Popen([sys.executable, "-S", "-c", child], **extra).pid)
say(PIDS, f"rank{RANK}")
"""


def family(pids: Pids, then: str) -> str:
    return f"PIDS = {str(pids.folder)!r}\n{SAY}\n{FAMILY}\n{textwrap.dedent(then)}"


def everyone(pids: Pids, size: int) -> dict[str, int]:
    return pids.wait(*(f"{name}{rank}" for name in ("rank", "child", "grouped", "daemon") for rank in range(size)))


def all_dead(processes: dict[str, int]) -> bool:
    return not any(is_alive(pid) for pid in processes.values())


def warden_of(launcher: subprocess.Popen[str]) -> int:
    return next(pid for pid in children(launcher.pid) if b"warden.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_kill_9_of_a_rank_ends_the_others_and_everything_they_started(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    process = start("run", "-n", "3", script(tmp_path, family(pids, "signal.pause()")))
    processes = everyone(pids, 3)
    started = time.monotonic()
    os.kill(processes["rank1"], signal.SIGKILL)
    code, _, err = finish(process)
    assert time.monotonic() - started < 5  # 1 s to notice, then SIGTERM
    assert code == 137
    assert all_dead(processes)
    assert "rank 1 of 3 was killed by SIGKILL" in err


def test_a_grandchild_that_holds_the_output_dies_with_its_rank_while_the_others_go_on(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    path = script(tmp_path, family(pids, "if RANK != 1: signal.pause()"))
    process = start("run", "-n", "2", path)
    processes = everyone(pids, 2)
    wait_until(lambda: not is_alive(processes["rank1"]) and not is_alive(processes["child1"]), "rank 1's child is dead")
    assert is_alive(processes["rank0"])
    assert is_alive(processes["child0"])
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert all_dead(processes)


def test_a_job_that_succeeds_leaves_nothing_behind_either(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    code, _, err = run("run", "-n", "2", script(tmp_path, family(pids, "print('done')")))
    assert (code, err) == (0, "")
    assert all_dead(everyone(pids, 2))


@pytest.mark.parametrize("and_the_warden", [False, True])
def test_kill_9_of_the_launcher_ends_every_rank(tmp_path: Path, and_the_warden: bool) -> None:
    pids = Pids(tmp_path / "pids")
    process = start("run", "-n", "2", script(tmp_path, family(pids, "signal.pause()")), start_new_session=True)
    processes = everyone(pids, 2)
    warden = warden_of(process)
    try:
        if and_the_warden:
            os.kill(warden, signal.SIGKILL)
            processes = {name: pid for name, pid in processes.items() if name.startswith("rank")}
        os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: all_dead(processes) and not is_alive(warden), "nothing of the job is alive", timeout_s=2.0)
    finally:
        for pid in everyone(pids, 2).values():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    finish(process)


def test_kill_9_of_the_launcher_ends_stopped_ranks_too(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    process = start("run", "-n", "2", script(tmp_path, family(pids, "os.kill(os.getpid(), signal.SIGSTOP)")))
    processes = everyone(pids, 2)
    process.kill()
    wait_until(lambda: all_dead(processes), "nothing of the job is alive", timeout_s=2.0)
    finish(process)


def test_a_job_inside_a_job_dies_with_the_outer_one(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    inner = script(tmp_path, f"PIDS = {str(pids.folder)!r}\n{SAY}\nsay(PIDS, f'inner{{RANK}}')\nsignal.pause()", "inner.py")
    outer = script(tmp_path, f"os.execv(sys.executable, [sys.executable, '-m', 'ringfold', 'run', '-n', '2', {inner!r}])", "outer.py")
    process = start("run", outer)
    processes = pids.wait("inner0", "inner1")
    process.kill()
    wait_until(lambda: all_dead(processes), "the inner ranks are dead", timeout_s=3.0)
    finish(process)


def test_no_secret_is_on_a_command_line(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    process = start("run", "-n", "2", script(tmp_path, family(pids, "signal.pause()")))
    processes = everyone(pids, 2)
    variables = dict(entry.partition(b"=")[::2] for entry in Path(f"/proc/{processes['rank0']}/environ").read_bytes().split(b"\0"))
    secret, job = variables[b"RINGFOLD_SECRET"], variables[b"RINGFOLD_JOB"]
    assert len(secret) == 64
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            assert secret not in words
            assert job not in words
    # Nor does the warden need to know it, or what any rank prints.
    assert secret not in Path(f"/proc/{warden_of(process)}/environ").read_bytes()
    process.send_signal(signal.SIGTERM)
    finish(process)


def test_a_job_leaves_no_descriptor_and_no_child_in_the_process_that_ran_it(tmp_path: Path) -> None:
    options = RunOptions(Target("script", script(tmp_path, "sys.exit(3 if RANK else 0)")), world_size=3)
    run_job(options)
    descriptors, offspring = sorted(os.listdir("/proc/self/fd")), children(os.getpid())
    for _ in range(3):
        assert run_job(options) == 3
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert children(os.getpid()) == offspring


FAIL = """
from ringfold.collectives.errors import PeerLost, CollectiveTimeout
from ringfold.collectives.page import Page
page = Page.attach(int(os.environ['RINGFOLD_PAGE_FD']))
def fail(exception, code):
    page.write_failure(exception)
    sys.stderr.write(f"{type(exception).__name__}\\n")
    os._exit(code)
"""


def judged(tmp_path: Path, size: int, body: str) -> tuple[int, dict[str, object], str]:
    report = tmp_path / "report.json"
    path = script(tmp_path, f"PIDS = {str(tmp_path)!r}\n{SAY}\n{FAIL}\n{textwrap.dedent(body)}")
    code, _, err = run("run", "-n", str(size), "--report", str(report), path)
    return code, json.loads(report.read_text()), err


def test_the_culprit_is_blamed_though_the_victim_ends_first(tmp_path: Path) -> None:
    code, document, err = judged(
        tmp_path,
        3,
        """
        def wait_for(name):
            while not os.path.exists(os.path.join(PIDS, name)): time.sleep(0.002)
        if RANK == 1:
            try: raise ValueError("bad loss")
            except ValueError as error: page.write_failure(error)
            say(PIDS, "failed")
            wait_for("victim")
            os._exit(5)
        wait_for("failed")
        if RANK == 0:
            say(PIDS, "victim")
            fail(PeerLost("rank 1 is gone"), 9)
        signal.pause()
        """,
    )
    assert code == 5
    assert document["culprit"] == {"rank": 1, "why": "failed with ValueError"}
    block = err[err.index("──") :]
    assert "ValueError: bad loss" in block
    assert "rank 0           ringfold.PeerLost" in block
    assert "rank 2           ended by the launcher" in block


def test_a_stopped_rank_is_blamed_for_the_timeouts_of_the_others(tmp_path: Path) -> None:
    code, document, err = judged(
        tmp_path,
        2,
        """
        if RANK == 1:
            say(PIDS, "stopping")
            os.kill(os.getpid(), signal.SIGSTOP)
        while not os.path.exists(os.path.join(PIDS, "stopping")): time.sleep(0.002)
        pid = int(open(os.path.join(PIDS, "stopping")).read())
        while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "T": time.sleep(0.002)
        fail(CollectiveTimeout("barrier #0 gave up"), 6)
        """,
    )
    assert code == 6
    assert document["culprit"] == {"rank": 1, "why": "is stopped (SIGSTOP, or a debugger)"}
    assert "rank 0           ringfold.CollectiveTimeout" in err


def test_the_last_operation_of_every_rank_survives_it(tmp_path: Path) -> None:
    code, document, err = judged(
        tmp_path,
        2,
        """
        import struct
        record = struct.Struct("<QIBBBBQQQiHHQB3xI")
        start = time.monotonic_ns() - 300_000_000
        page._memory[32768:32832] = record.pack(0, 0, 0, 0, 0, 2, 1048576, start, 0, 1 - RANK, 3, 6, 4194304, 1, 0)
        page._memory[56:64] = struct.pack("<Q", 1)
        say(PIDS, f"issued{RANK}")
        while not all(os.path.exists(os.path.join(PIDS, f"issued{r}")) for r in (0, 1)): time.sleep(0.002)
        if RANK == 1: os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
        """,
    )
    assert code == 137
    ranks = document["ranks"]
    assert isinstance(ranks, list)
    assert [rank["operation"]["waiting_for"] for rank in ranks] == [1, 0]
    assert "  last operation   all_reduce #0 (float32 x 1048576), started 0." in err
    assert "rank 0           ended by the launcher; in all_reduce #0 (float32 x 1048576), started 0." in err
    assert "waiting for rank 1" in err


def test_a_page_that_its_rank_wrote_over_does_not_harm_the_launcher(tmp_path: Path) -> None:
    code, document, _ = judged(tmp_path, 2, "page._memory[:] = b'\\xff' * len(page._memory)\nos._exit(3 * RANK)")
    assert code == 3
    assert document["exit_code"] == 3


@pytest.mark.slow
def test_a_rank_that_failed_but_does_not_end_is_ended(tmp_path: Path) -> None:
    code, document, _ = judged(tmp_path, 2, "if RANK == 1: page.write_failure(ValueError('stuck'))\nsignal.pause()")
    assert code == 143
    assert document["culprit"] == {"rank": 1, "why": "failed with ValueError"}


def test_a_warden_finds_by_their_environment_processes_that_left_every_group() -> None:
    mark = f"RINGFOLD_JOB=test-{os.getpid()}"
    name, _, value = mark.partition("=")
    code = "import os, signal\nfor _ in range(4):\n    if os.fork() == 0: os.setsid()\nsignal.pause()"
    warden = Warden(mark)
    chain = subprocess.Popen([sys.executable, "-S", "-c", code], env=os.environ | {name: value})
    wait_until(lambda: len(marked(mark.encode())) >= 16, "four forks make 16 processes, most in sessions of their own")
    warden.close()
    assert marked(mark.encode()) == []
    assert chain.wait(5) == -signal.SIGKILL


def test_a_warden_without_words_kills_nobody() -> None:
    process = subprocess.run([sys.executable, "-I", "-S", module.__file__], stdin=subprocess.DEVNULL, timeout=10, check=False)
    assert process.returncode == 0
