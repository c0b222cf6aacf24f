"""rf.init and rf.shutdown: repeatable, quick, without a trace; and what an uncaught exception leaves in the shared page."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ringfold as rf
import torch
from ringfold.collectives.page import Page

from tests.harness import run_ranks
from tests.harness.leaks import Resources

TIMES = 200
ATTEMPTS = 5
# Ten warm rounds fill allocators and caches; what grows by less than a page a round after that is noise of the allocator, not a mapping.
WARM = 10
GROWTH_NBYTES = 2 * 2**20


def join_and_leave() -> int:
    mesh = rf.init()
    total = torch.ones(3)
    mesh["dp"].all_reduce(total)
    rf.all_reduce(total, "max")
    rf.shutdown()
    return int(total[0])


def repeat() -> dict[str, Any]:
    assert {join_and_leave() for _ in range(WARM)} == {2}
    before, memory = Resources.now(), psutil.Process().memory_info().rss
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        join_and_leave()
        seconds.append(time.perf_counter() - began)
    deadline = time.monotonic() + 3
    while (leaked := before.leaked_until(Resources.now())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {
        "median_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "leaked": leaked,
        "grown_nbytes": psutil.Process().memory_info().rss - memory,
    }


def attempts(transport: str) -> Iterator[list[dict[str, Any]]]:
    """Yield what the ranks of each attempt found; none may leave anything behind.

    A call takes 6 ms of wall time and 5 of processor time. Whatever else runs on this machine, or on the host of a virtual one, delays some now and
    then; what is slow by itself is slow in every attempt.
    """
    for attempt in range(ATTEMPTS):
        ranks = run_ranks(2, repeat, joined=False, transport=transport, timeout_s=100)
        print(attempt, ranks)
        for found in ranks:
            assert found["leaked"] == []
            assert found["grown_nbytes"] < GROWTH_NBYTES
        yield ranks


every_transport = pytest.mark.parametrize("transport", ["shm", "tcp"])


@pytest.mark.quiet
@every_transport
def test_two_hundred_times_in_one_process_are_quick_and_leave_nothing(transport: str) -> None:
    assert any(max(found["median_s"] for found in ranks) < 0.020 for ranks in attempts(transport))


@pytest.mark.slow
@every_transport
def test_each_of_two_hundred_times_is_quick_on_a_quiet_machine(transport: str) -> None:
    assert any(all(found["slowest_s"] < 0.020 for found in ranks) for ranks in attempts(transport))


def count_garbage() -> int:
    join_and_leave()
    gc.disable()
    gc.collect()
    join_and_leave()
    return gc.collect()


def test_joining_and_leaving_makes_no_reference_cycle() -> None:
    # Cycles pile up until a full garbage collection of torch's heap: 60 ms in the middle of somebody's step.
    assert run_ranks(2, count_garbage, joined=False) == [0, 0]


def lay_out(layout: str | None) -> tuple[str, str]:
    try:
        mesh = rf.init(layout)
        same = rf.init() is mesh and rf.init(layout) is mesh
        return f"{mesh.layout} {same}", str(mesh.device)
    except rf.ConfigError as error:
        return type(error).__name__, str(error)
    finally:
        rf.shutdown()
        rf.shutdown()


def test_dp_is_the_size_of_the_world_unless_a_layout_says_otherwise() -> None:
    assert run_ranks(3, lay_out, None, joined=False) == [("dp3 True", "cpu")] * 3
    assert run_ranks(2, lay_out, "micro4", joined=False) == [("dp2 micro4 True", "cpu")] * 2


def test_the_launchers_layout_decides_and_the_same_text_in_the_script_is_fine() -> None:
    launcher = {"RINGFOLD_LAYOUT": "micro2 dp2"}
    assert run_ranks(2, lay_out, None, joined=False, env=launcher) == [("dp2 micro2 True", "cpu")] * 2
    assert run_ranks(2, lay_out, "micro2", joined=False, env=launcher) == [("dp2 micro2 True", "cpu")] * 2


def test_a_layout_that_differs_from_the_launchers_is_an_error_with_both() -> None:
    for kind, message in run_ranks(2, lay_out, "dp2 micro4", joined=False, env={"RINGFOLD_LAYOUT": "dp2 micro2"}):
        assert kind == "ConfigError"
        assert '--layout "dp2 micro2"' in message
        assert 'rf.init("dp2 micro4")' in message


@pytest.mark.parametrize(("layout", "words"), [("dp3", "needs 3 workers, world_size is 2"), ("dp1 pp2", "pp2 is not built"), ("dq2", "dp")])
def test_a_layout_that_cannot_run_is_refused_before_anybody_joins(layout: str, words: str) -> None:
    for kind, message in run_ranks(2, lay_out, layout, joined=False):
        assert kind == "LayoutError"
        assert words in message


def change_layout() -> str:
    rf.init("dp2")
    with pytest.raises(rf.ConfigError) as caught:
        rf.init("dp2 micro2")
    rf.shutdown()
    return f"{rf.init('dp2 micro2').layout}: {caught.value}"


def test_another_layout_needs_a_shutdown_first() -> None:
    for message in run_ranks(2, change_layout, joined=False):
        assert message.startswith('dp2 micro2: rf.init("dp2 micro2"): this process is already laid out as "dp2".')


def fail_in_thread_and_main() -> list[Any]:
    mesh = rf.init()
    page: Page = mesh.world.page
    seen: list[Any] = [page.read().failure]
    quiet, sys.stderr = sys.stderr, None  # type: ignore[assignment]
    try:
        thread = threading.Thread(target=lambda: {}["missing"])
        thread.start()
        thread.join()
    finally:
        sys.stderr = quiet
    failure = page.read().failure
    seen += [failure.type, failure.message, "lambda" in failure.traceback] if failure else []
    sys.excepthook(ValueError, ValueError("later"), None)
    seen.append(page.read().failure == failure)  # the first one stays
    rf.shutdown()
    return seen


def test_an_uncaught_exception_of_any_thread_is_in_the_shared_page() -> None:
    assert run_ranks(2, fail_in_thread_and_main, joined=False) == [[None, "KeyError", "'missing'", True, True]] * 2


def fork_a_child() -> tuple[int, bool, int]:
    mesh = rf.init()
    child = os.fork()
    if child == 0:
        try:
            rf.shutdown()
            sys.excepthook(ValueError, ValueError("the child's"), None)
            rf.all_reduce(torch.ones(1))
        except rf.ConfigError:
            os._exit(7)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    total = torch.ones(1)
    rf.all_reduce(total)
    failed = mesh.world.page.read().failure is not None
    rf.shutdown()
    return status, failed, int(total)


def test_a_forked_child_has_no_mesh_and_does_not_disturb_its_parents() -> None:
    assert run_ranks(2, fork_a_child, joined=False) == [(7, False, 2)] * 2


def no_mesh() -> str:
    with pytest.raises(rf.ConfigError) as caught:
        rf.all_reduce(torch.ones(1))
    return str(caught.value)


def test_without_init_there_is_no_world() -> None:
    assert run_ranks(1, no_mesh, joined=False) == ["no mesh: call rf.init() first."]


def mean_over_ranks(counts: list[int]) -> tuple[float, float]:
    mesh = rf.init()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(float(counts[mesh.rank]), dtype=torch.float64) + mesh.rank
    mean = rf.global_mean((weight * rows).sum(), len(rows))
    mean.backward()
    assert weight.grad is not None
    mesh["dp"].all_reduce(weight.grad, "avg")
    rf.shutdown()
    return mean.item(), weight.grad.item()


def test_global_mean_has_exact_weights_under_averaging() -> None:
    values = torch.cat([torch.arange(float(count), dtype=torch.float64) + rank for rank, count in enumerate([4, 0, 3])])
    expected = (pytest.approx(2 * values.mean().item(), rel=1e-14), pytest.approx(values.mean().item(), rel=1e-14))
    assert run_ranks(3, mean_over_ranks, [4, 0, 3], joined=False) == [expected] * 3
