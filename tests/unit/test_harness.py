"""The harness itself: what it reports when ranks return, raise, die, hang, or leave something behind."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.hosts import wait_until_gone
from tests.harness import RankError, RanksHung, run_ranks, spawn_ranks
from tests.harness.cgroups import MemoryGroups, missing_feature
from tests.harness.compare import FLOATS, assert_bitwise_equal, assert_close_ulp, assert_fold, fold_bound, reference
from tests.harness.leaks import no_leaks


def rank_of_environment() -> int:
    return int(os.environ["RINGFOLD_RANK"])


def double_of_rank(offset: int) -> int:
    return 2 * rank_of_environment() + offset


def raise_in_two(kind_of_first: type[Exception]) -> None:
    if rank_of_environment() == 1:
        raise kind_of_first("rank 1 saw it")
    if rank_of_environment() == 2:
        time.sleep(0.1)
        raise ValueError("rank 2 is the reason")


class PeerLost(Exception):
    """Stands for ringfold's: consequences are told by name."""


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def raise_unpicklable() -> None:
    raise Unpicklable(1, 2)


def fail_an_assertion() -> None:
    answer = 41
    assert answer == 42


def exit_early() -> None:
    if rank_of_environment() == 1:
        os._exit(3)


def die_by_signal() -> None:
    if rank_of_environment() == 0:
        os.kill(os.getpid(), signal.SIGSEGV)


def hang_here_for_the_test() -> None:
    if rank_of_environment() == 1:
        threading.Event().wait()


def leave_a_child() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


def print_and_wait() -> None:
    print("ready")
    threading.Event().wait()


def return_a_lock() -> object:
    return threading.Lock()


def describe_process() -> tuple[int, int, int, str]:
    return os.getsid(0), os.getpid(), len(os.listdir("/proc/self/task")), os.environ["OMP_NUM_THREADS"]


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, double_of_rank, 5, joined=False) == [5, 7, 9]


def test_a_rank_leads_its_own_session_with_one_thread() -> None:
    for sid, pid, threads, omp in run_ranks(2, describe_process, joined=False):
        assert (sid, threads, omp) == (pid, 1, "1")


def test_forking_ranks_takes_milliseconds_not_imports() -> None:
    run_ranks(1, double_of_rank, 0, joined=False)
    start = time.monotonic()
    for _ in range(5):
        run_ranks(2, double_of_rank, 0, joined=False)
    assert time.monotonic() - start < 5 * 0.8  # importing torch alone takes longer


def test_the_first_real_failure_is_raised_and_not_its_consequence() -> None:
    with pytest.raises(ValueError, match="rank 2 is the reason") as caught:
        run_ranks(3, raise_in_two, PeerLost, joined=False)
    notes = "\n".join(caught.value.__notes__)
    assert "the first failure: rank 2" in notes
    assert "in raise_in_two" in notes
    assert "rank 1 saw it" in notes


def test_the_first_of_two_real_failures_is_raised() -> None:
    with pytest.raises(KeyError, match="rank 1 saw it"):
        run_ranks(3, raise_in_two, KeyError, joined=False)


def test_an_exception_that_cannot_be_pickled_still_arrives() -> None:
    with pytest.raises(RankError, match="Unpicklable: 1 and 2"):
        run_ranks(2, raise_unpicklable, joined=False)


def test_a_bare_assertion_shows_its_locals() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(1, fail_an_assertion, joined=False)
    assert "answer = 41" in "\n".join(caught.value.__notes__)


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(RankError, match="cannot be pickled"):
        run_ranks(1, return_a_lock, joined=False)


def test_an_early_exit_names_rank_and_status() -> None:
    with pytest.raises(RankError, match=r"rank 1 .* exited with status 3"):
        run_ranks(2, exit_early, joined=False)


def test_a_signal_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 0 .* killed by SIGSEGV"):
        run_ranks(2, die_by_signal, joined=False)


def test_a_hang_shows_who_hung_and_where() -> None:
    start = time.monotonic()
    with pytest.raises(RanksHung, match=r"1 of 3 ranks did not end") as caught:
        run_ranks(3, hang_here_for_the_test, joined=False, timeout_s=1.0)
    assert time.monotonic() - start < 4
    assert "rank 1" in str(caught.value)
    assert "hang_here_for_the_test" in str(caught.value)


def test_orphans_are_reported_and_killed() -> None:
    with spawn_ranks(1, leave_a_child, joined=False) as ranks:
        (outcome,) = ranks.wait(20)
    assert outcome.orphans == (outcome.value,)
    deadline = time.monotonic() + 2
    while os.path.exists(f"/proc/{outcome.value}/exe") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{outcome.value}/exe")


def test_kill_strikes_one_rank_and_times_are_comparable() -> None:
    with spawn_ranks(2, print_and_wait, joined=False) as ranks:
        for rank in range(2):
            ranks.wait_for_line(rank, "ready")
        killed_ns = ranks.kill(1)
        first, second = ranks.wait(timeout_s=0.5)
    assert first.hung
    assert second.exit_status == -signal.SIGKILL
    assert 0 <= second.ended_ns - killed_ns < 1_000_000_000


@pytest.mark.usefixtures("leaks")
def test_nothing_is_left_behind() -> None:
    run_ranks(2, double_of_rank, 0, joined=False)
    with pytest.raises(RanksHung):
        run_ranks(2, hang_here_for_the_test, joined=False, timeout_s=0.3)


def test_a_lambda_is_refused() -> None:
    with pytest.raises(TypeError, match="top of a test module"):
        run_ranks(1, lambda: None, joined=False)


def test_the_leak_check_sees_each_kind_of_leak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.harness.leaks.SETTLE_S", 0.1)
    stop = threading.Event()
    memory = open(os.memfd_create("test"), "wb+")  # noqa: SIM115
    memory.truncate(4096)
    leaked: list[Any] = []
    makers: dict[str, Callable[[], Any]] = {
        "descriptors": lambda: leaked.append(open(tmp_path / "file", "w")),  # noqa: SIM115
        "threads": lambda: threading.Thread(target=stop.wait, daemon=True).start(),
        "mappings": lambda: leaked.append(mmap.mmap(memory.fileno(), 4096)),
        "children": lambda: leaked.append(subprocess.Popen(["sleep", "60"])),
    }
    for kind, make in makers.items():
        with pytest.raises(AssertionError, match=kind), no_leaks():
            make()
    stop.set()
    leaked[0].close()
    leaked[1].close()
    leaked[2].kill()
    leaked[2].wait(10)
    memory.close()


def test_a_fold_in_any_order_is_within_its_bound_and_a_missing_value_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in FLOATS:
        inputs = torch.randn(5, 1001, generator=generator, dtype=torch.float64).to(dtype)
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
            total = inputs[order[0]].clone()
            for rank in order[1:]:
                total += inputs[rank]
            assert_fold(total, reference("sum", inputs), fold_bound("sum", inputs), f"{dtype}")
        total -= inputs[3]
        with pytest.raises(AssertionError, match="elements wrong"):
            assert_fold(total, reference("sum", inputs), fold_bound("sum", inputs), f"{dtype}")


def test_bit_equality_tells_zero_from_minus_zero_and_knows_nan() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert_bitwise_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match="first is element 1"):
        assert_bitwise_equal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))


def test_ulps_are_counted_in_the_narrow_type() -> None:
    one = torch.tensor([1.0], dtype=torch.float32)
    assert_close_ulp(torch.nextafter(one, 2 * one), one.double(), 1)
    with pytest.raises(AssertionError, match=r"2\.0 ulp"):
        assert_close_ulp(one + 2 * torch.finfo(torch.float32).eps, one.double(), 1)


HOLDER = """
import subprocess
from tests.harness.cgroups import MemoryGroups
groups = MemoryGroups(1)
enter = ["sh", "-c", 'echo 0 >"$0"; echo in; exec tail -f /dev/null', f"{groups.prefix}0/cgroup.procs"]
with subprocess.Popen(enter, stdout=subprocess.PIPE) as left:
    left.stdout.readline()
    print(left.pid, f"{groups.prefix}0", flush=True)
    input()
"""


def test_the_control_groups_of_a_killed_test_are_swept_by_the_next_with_what_is_in_them() -> None:
    reason = missing_feature()
    if reason is not None:
        pytest.skip(reason)
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid, folder = holder.stdout.readline().split()
        assert (Path(folder) / "cgroup.procs").read_text().split() == [pid]
        os.kill(holder.pid, signal.SIGKILL)
    with MemoryGroups(1):
        assert not Path(folder).exists()
    assert not wait_until_gone([int(pid)])
