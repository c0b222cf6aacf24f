"""`ringfold run` as a user sees it: what the ranks are given, what comes back, and how signals travel."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from ringfold.launch import machine
from ringfold.launch.run import AGAIN_S

from tests.cli.launching import SAY, Pids, command, finish, is_alive, run, script, start, wait_until


def test_the_ranks_are_told_their_place(tmp_path: Path) -> None:
    path = script(tmp_path, "import json; print(json.dumps(dict(os.environ)))")
    environ = {"RINGFOLD_RANK": "77", "RINGFOLD_LAYOUT": "dp77", "RINGFOLD_QUIET": "1", "OMP_NUM_THREADS": ""}
    words = ["run", "-n", "3", "--layout", "dp3", "--timeout", "2.5", "--transport", "tcp", "--log-dir", str(tmp_path / "logs"), path]
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    del environ["OMP_NUM_THREADS"]
    code, out, _ = run(*words, env=inherited | environ)
    assert code == 0
    seen = {int(line[1]): json.loads(line[4:]) for line in out.splitlines()}
    assert sorted(seen) == [0, 1, 2]
    for rank, values in seen.items():
        for name in ("RINGFOLD_RANK", "RINGFOLD_LOCAL_RANK", "RANK", "LOCAL_RANK"):
            assert values[name] == str(rank)
        for name in ("RINGFOLD_WORLD_SIZE", "RINGFOLD_LOCAL_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            assert values[name] == "3"
        assert values["RINGFOLD_LAYOUT"] == "dp3"
        assert values["RINGFOLD_TIMEOUT_S"] == "2.5"
        assert values["RINGFOLD_TRANSPORT"] == "tcp"
        assert values["RINGFOLD_LOG_DIR"] == str(tmp_path / "logs")
        assert values["RINGFOLD_QUIET"] == "1"
        assert values["PYTHONUNBUFFERED"] == "1"
        assert values["OMP_NUM_THREADS"] == str(max(1, machine.cores() // 3))
    for name in ("RINGFOLD_SECRET", "RINGFOLD_JOB", "RINGFOLD_STORE"):
        assert len({values[name] for values in seen.values()}) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d+", seen[0]["RINGFOLD_STORE"])
    assert len(seen[0]["RINGFOLD_SECRET"]) == 64
    assert (tmp_path / "logs" / "rank-2.log").read_text() == "".join(line[4:] + "\n" for line in out.splitlines() if line[1] == "2")


def test_every_job_has_its_own_secret_and_one_rank_alone_needs_none(tmp_path: Path) -> None:
    path = script(tmp_path, "print(os.environ.get('RINGFOLD_SECRET'), os.environ['RINGFOLD_JOB'])")
    first, second = (set(run("run", "-n", "2", path)[1].split()[1::3]) for _ in range(2))
    assert len(first) == len(second) == 1
    assert first != second
    assert run("run", path)[1].split()[0] == "None"


def test_the_users_omp_num_threads_stays_unless_the_option_is_given(tmp_path: Path) -> None:
    path = script(tmp_path, "print(os.environ['OMP_NUM_THREADS'])")
    environ = os.environ | {"OMP_NUM_THREADS": "3"}
    assert run("run", path, env=environ)[1] == "3\n"
    assert run("run", "--omp-threads", "5", path, env=environ)[1] == "5\n"


def test_a_worker_finds_its_job_and_its_page(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        from ringfold.collectives.environment import Job
        from ringfold.collectives.page import Page
        from ringfold.collectives.store import Store
        job = Job.from_environment()
        page = Page.attach(job.page_fd)
        store = Store(job.store, job.secret, 5.0)
        store.set(f"key {job.rank}", b"hello")
        assert store.get(f"key {1 - job.rank}", 5.0) == b"hello"
        print(job.source, page.read().rank == job.rank, job.secret.hex() == "")
        """,
    )
    code, out, err = run("run", "-n", "2", path)
    assert (code, sorted(out.splitlines()), err) == (0, ["[0] ringfold True False", "[1] ringfold True False"], "")


def test_a_rank_that_loses_another_while_it_joins_says_so_in_one_line(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import ringfold as rf
        from ringfold.collectives import communicator
        measure = communicator.measure_links

        def fail(world):
            if world.rank == 0:
                raise ValueError("before the others had joined")
            return measure(world)

        communicator.measure_links = fail
        rf.init()
        """,
    )
    code, out, err = run("run", "-n", "2", path)
    assert code == 1
    assert "rank 0 of 2" in err
    assert "ValueError: before the others had joined" in err
    lost = [line for line in (out + err).splitlines() if line.startswith("[1] ")]
    assert lost[0].startswith("[1] PeerLost: ")
    assert not any("Traceback" in line for line in lost)


def test_modules_and_executables_run_too(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("import sys; print(__name__, sys.argv[1:])")
    assert run("run", "-m", "trainer", "--lr", "3", cwd=tmp_path)[:2] == (0, "__main__ ['--lr', '3']\n")
    code, out, _ = run("run", "-n", "2", "--", "sh", "-c", "echo $RANK $0", "-n")
    assert (code, sorted(out.splitlines())) == (0, ["[0] 0 -n", "[1] 1 -n"])


def test_only_rank_0_reads_standard_input(tmp_path: Path) -> None:
    path = script(tmp_path, "print(repr(sys.stdin.read()))")
    process = start("run", "-n", "2", path, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("typed")
    process.stdin.close()
    process.stdin = None
    code, out, _ = finish(process)
    assert (code, sorted(out.splitlines())) == (0, ["[0] 'typed'", "[1] ''"])


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("sys.exit(3)", 3, "exit code 3"),
        ("raise ValueError('bad loss')", 1, "ValueError: bad loss"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "SIGTERM"),
        ("os._exit(255)", 255, "exit code 255"),
    ],
)
def test_the_exit_code_is_the_culprits_own(tmp_path: Path, end: str, code: int, words: str) -> None:
    path = script(tmp_path, f"if RANK == 1: {end}\ntime.sleep(0.05)")
    seen, _, err = run("run", "-n", "2", path)
    assert seen == code
    block = err[err.index("──") :]
    assert "rank 1 of 2" in block
    assert words in block


def test_lines_of_many_ranks_are_never_torn_also_for_a_slow_reader(tmp_path: Path) -> None:
    lines = 300
    path = script(
        tmp_path,
        f"""
        import random
        text = b"".join(b"%d:%d:" % (RANK, line) + b"x" * (line % 701) + b"|\\n" for line in range({lines}))
        while text:
            cut = random.randrange(1, 3000)
            for fd in (1, 2):
                os.write(fd, text[:cut])
            text = text[cut:]
        """,
    )
    process = start("run", "-n", "4", path, text=False, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    data = b""
    while part := os.read(process.stdout.fileno(), 777):
        data += part
    assert process.wait(20) == 0
    seen = [re.fullmatch(rb"\[(\d)\] (\d):(\d+):(x*)\|", line) for line in data.splitlines()]
    assert len(seen) == 4 * 2 * lines
    assert all(match and match[1] == match[2] and len(match[4]) == int(match[3]) % 701 for match in seen)


def test_the_launchers_reader_going_away_ends_the_job(tmp_path: Path) -> None:
    path = script(tmp_path, "while True: print('y' * 50)")
    process = start("run", "-n", "2", path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE


def test_ctrl_c_works_while_nobody_reads_the_output(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    path = script(tmp_path, f"{SAY}\nsay({str(pids.folder)!r}, f'rank{{RANK}}')\nwhile True: print('y' * 5000)")
    process = start("run", "-n", "2", path)
    ranks = pids.wait("rank0", "rank1")
    wait_until(lambda: all(machine.process_state(pid) == "S" for pid in ranks.values()), "the ranks wait for room in their pipes")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert not any(is_alive(pid) for pid in ranks.values())
    finish(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_the_ranks_may_end_in_peace(tmp_path: Path, number: signal.Signals) -> None:
    pids = Pids(tmp_path / "pids")
    path = script(
        tmp_path,
        f"""
        {SAY.replace(chr(10), chr(10) + " " * 8)}
        def leave(number, frame):
            print("saved", number)
            sys.exit(0)
        signal.signal({number.value}, leave)
        say({str(pids.folder)!r}, f"rank{{RANK}}")
        while True: signal.pause()
        """,
    )
    process = start("run", "-n", "3", path)
    pids.wait("rank0", "rank1", "rank2")
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert sorted(out.splitlines()) == [f"[{rank}] saved {number.value}" for rank in range(3)]
    assert f"ended by {number.name}" in err
    assert "──" not in err


def stubborn(folder: Path, pids: Pids) -> str:
    return script(
        folder,
        f"""
        {SAY.replace(chr(10), chr(10) + " " * 8)}
        def stay(number, frame):
            say({str(pids.folder)!r}, f"asked{{RANK}}")
        signal.signal(signal.SIGINT, stay)
        signal.signal(signal.SIGTERM, stay)
        say({str(pids.folder)!r}, f"rank{{RANK}}")
        while True: signal.pause()
        """,
    )


def test_a_second_ctrl_c_kills_at_once_but_an_echo_of_the_first_does_not(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    process = start("run", "-n", "2", stubborn(tmp_path, pids))
    ranks = pids.wait("rank0", "rank1")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    pids.wait("asked0", "asked1")
    assert process.poll() is None
    assert all(is_alive(pid) for pid in ranks.values())

    time.sleep(AGAIN_S)  # not for order: what is asked sooner than this counts as the echo
    process.send_signal(signal.SIGINT)
    process.wait(3.0)  # sooner than the grace of five seconds
    assert process.returncode == 130
    assert not any(is_alive(pid) for pid in ranks.values())
    finish(process)


@pytest.mark.slow
def test_ranks_that_ignore_the_signal_are_killed_after_five_seconds(tmp_path: Path) -> None:
    pids = Pids(tmp_path / "pids")
    process = start("run", "-n", "2", stubborn(tmp_path, pids))
    ranks = pids.wait("rank0", "rank1")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    assert not any(is_alive(pid) for pid in ranks.values())


def test_on_a_terminal_rank_0_has_one_of_its_own_and_ctrl_c_reaches_only_the_launcher(tmp_path: Path) -> None:
    path = script(tmp_path, "print(sys.stdout.isatty(), os.get_terminal_size().columns if sys.stdout.isatty() else 0)\ntime.sleep(30)")
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (40, 90))
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm"}
    process = subprocess.Popen(command("run", "-n", "2", path), stdin=writer, stdout=writer, stderr=writer, env=environ, start_new_session=True)
    os.close(writer)
    text = b""
    while b"True 86\r\n" not in text or b"False 0\r\n" not in text:
        text += os.read(reader, 1000)
    assert b"\x1b[36m[0]\x1b[0m True 86\r\n" in text
    assert b"\x1b[33m[1]\x1b[0m False 0\r\n" in text
    os.killpg(process.pid, signal.SIGINT)
    while b"ended by SIGINT" not in text:
        text += os.read(reader, 1000)
    assert process.wait(20) == 130
    os.close(reader)


def test_a_report_is_written_however_the_job_ends(tmp_path: Path) -> None:
    path = script(tmp_path, "print('x'); sys.exit(int(sys.argv[1]) * RANK)")
    for argument, ended in ((0, "finished"), (4, "failed")):
        code, _, _ = run("run", "-n", "3", "--report", str(tmp_path / "report.json"), path, str(argument))
        document = json.loads((tmp_path / "report.json").read_text())
        assert (document["ended"], document["exit_code"], document["world_size"]) == (ended, code, 3)
        assert [rank["rank"] for rank in document["ranks"]] == [0, 1, 2]
        assert (document["culprit"] is None) == (ended == "finished")
