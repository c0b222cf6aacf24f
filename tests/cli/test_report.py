"""The verdict names the culprit, not the victim, and says all that is known about it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from ringfold.collectives.page import Failure, OperationRecord, OperationState
from ringfold.launch import report
from ringfold.launch.report import Outcome, Sight

SECOND = 1_000_000_000
T0 = 1000 * SECOND


def operation(seq: int = 412, state: OperationState = OperationState.STARTED, waiting_for: int = -1, op: int = 0) -> OperationRecord:
    start_ns = T0 - 300_000_000
    end_ns = T0 - 100_000_000 if state == OperationState.DONE else 0
    return OperationRecord(seq, 0, op, 0, 0, state, 1048576, start_ns, end_ns, waiting_for, 3, 6, 4194304, 1, seq)


def failure(at_s: float, kind: str = "ValueError", is_consequence: bool = False) -> Failure:
    return Failure(kind, "bad loss", f"Traceback (most recent call last):\n  ...\n{kind}: bad loss\n", T0 + int(at_s * SECOND), is_consequence)


def outcome(
    rank: int,
    returncode: int | None = 0,
    ended_s: float = 1.0,
    record: Failure | None = None,
    signalled_s: float | None = None,
    state: str = "S",
    heartbeat_age_s: float | None = 0.1,
    seen: OperationRecord | None = None,
    **more: object,
) -> Outcome:
    signalled_ns = None if signalled_s is None else T0 + int(signalled_s * SECOND)
    sight = Sight(state, heartbeat_age_s, seen)
    return Outcome(rank, 4000 + rank, returncode, T0 + int(ended_s * SECOND), signalled_ns, record, sight, **more)  # type: ignore[arg-type]


LOST = {"kind": "ringfold.PeerLost", "is_consequence": True}
TIMEOUT = {"kind": "ringfold.CollectiveTimeout", "is_consequence": True}


def test_a_job_in_which_no_rank_failed_has_no_verdict() -> None:
    assert report.judge([outcome(0), outcome(1, -15, signalled_s=0.5)]) is None


def test_the_first_failure_counts_not_the_first_that_was_noticed() -> None:
    verdict = report.judge(
        [
            outcome(0, 1, ended_s=0.2, record=failure(0.1, **LOST)),
            outcome(1, 3, ended_s=0.9, record=failure(0.05)),
            outcome(2, 1, ended_s=0.8, record=failure(0.07)),
        ]
    )
    assert verdict is not None
    assert (verdict.culprit.rank, verdict.exit_code, verdict.why) == (1, 3, "failed with ValueError")


def test_a_rank_killed_by_a_signal_is_the_culprit_though_its_victims_were_reaped_before() -> None:
    verdict = report.judge(
        [outcome(0, 1, ended_s=0.1, record=failure(0.0, **LOST)), outcome(1, -9, ended_s=0.4), outcome(2, 1, record=failure(0.0, **LOST))]
    )
    assert verdict is not None
    assert (verdict.culprit.rank, verdict.exit_code) == (1, 137)
    assert "SIGKILL" in verdict.why


def test_what_the_launcher_ended_is_no_failure_but_what_failed_before_is() -> None:
    ended = outcome(0, -15, ended_s=1.5, signalled_s=1.0)
    verdict = report.judge([ended, outcome(1, -15, ended_s=1.5, signalled_s=1.0, record=failure(0.2)), outcome(2, 7, ended_s=0.4)])
    assert verdict is not None
    assert verdict.culprit.rank == 1
    assert verdict.exit_code == 143


def test_a_record_made_by_the_launchers_own_signal_does_not_count() -> None:
    verdict = report.judge([outcome(0, 1, record=failure(1.2, "KeyboardInterrupt"), signalled_s=1.0), outcome(1, 7, ended_s=0.9)])
    assert verdict is not None
    assert verdict.culprit.rank == 1


@pytest.mark.parametrize(
    ("culprit", "why"),
    [
        (outcome(1, -9, signalled_s=1.0, state="T"), "is stopped"),
        (outcome(1, -9, signalled_s=1.0, heartbeat_age_s=31.4), "has been silent for 31 s"),
        (outcome(1, 0, ended_s=-5.0, state="", heartbeat_age_s=9.0), "had ended, without an error"),
        (outcome(1, -9, signalled_s=1.0), "did not arrive"),
    ],
)
def test_if_all_failures_are_consequences_the_one_they_waited_for_is_blamed(culprit: Outcome, why: str) -> None:
    victims = [
        outcome(0, 1, record=failure(0.2, **TIMEOUT), seen=operation(waiting_for=1)),
        outcome(2, 5, record=failure(0.1, **TIMEOUT), seen=operation(waiting_for=0)),
    ]
    verdict = report.judge([victims[0], culprit, victims[1]])
    assert verdict is not None
    assert verdict.culprit.rank == 1
    assert verdict.why.startswith(why)
    assert verdict.exit_code == 5


def test_if_nothing_else_is_known_the_earliest_consequence_is_blamed() -> None:
    verdict = report.judge([outcome(0, 1, record=failure(0.2, **TIMEOUT)), outcome(1, 4, record=failure(0.1, **TIMEOUT))])
    assert verdict is not None
    assert (verdict.culprit.rank, verdict.exit_code) == (1, 4)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (operation(waiting_for=3), "all_reduce #412 (float32 x 1048576), started 0.3 s before, waiting for rank 3"),
        (operation(7, OperationState.DONE, waiting_for=3), "all_reduce #7 (float32 x 1048576), done 0.1 s before"),
        (operation(op=99), "code 99 #412 (float32 x 1048576), started 0.3 s before"),
    ],
)
def test_an_operation_in_words(record: OperationRecord, text: str) -> None:
    assert report.describe_operation(record, T0) == text


def test_the_block_says_everything_once() -> None:
    outcomes = [
        outcome(0, 1, record=failure(0.02, **LOST), seen=operation(waiting_for=1)),
        outcome(1, 3, record=failure(0.0), seen=operation(411, OperationState.DONE), log="runs/rank-1.log"),
        outcome(2, -15, signalled_s=1.0, seen=operation(waiting_for=1)),
        outcome(3, -15, signalled_s=1.0, seen=operation(waiting_for=1)),
    ]
    verdict = report.judge(outcomes)
    assert verdict is not None
    text = report.block(verdict, outcomes, 12.34, columns=40).splitlines()
    assert text[0] == text[-1] == "─" * 40
    assert text[1] == "ringfold: the job failed after 12.3 s: rank 1 of 4 failed with ValueError"
    assert text[2].endswith("pid 4001, exit code 3")
    assert "  ValueError: bad loss" in text
    assert "  last operation   all_reduce #411 (float32 x 1048576), done 0.1 s before" in text
    assert "  log              runs/rank-1.log" in text
    doing = "in all_reduce #412 (float32 x 1048576), started 0.3 s before, waiting for rank 1"
    assert f"  rank 0           ringfold.PeerLost 20.0 ms later; {doing}" in text
    assert f"  ranks 2, 3       ended by the launcher; {doing}" in text


def test_a_rank_without_a_record_shows_the_end_of_its_standard_error() -> None:
    outcomes = [outcome(0), outcome(1, -signal.SIGSEGV, stderr_tail=("almost", "there"))]
    verdict = report.judge(outcomes)
    assert verdict is not None
    text = report.block(verdict, outcomes, 1.0)
    assert "rank 1 of 2 was killed by SIGSEGV" in text
    assert "    almost\n    there\n" in text


def test_the_document_is_json_and_replaces_the_file_at_once(tmp_path: Path) -> None:
    outcomes = [outcome(0, 1, record=failure(0.5, **LOST), seen=operation(waiting_for=1)), outcome(1, -9, ended_s=0.1)]
    verdict = report.judge(outcomes)
    path = tmp_path / "report.json"
    path.write_text("the one before")
    document = report.as_json(verdict, outcomes, ended="failed", exit_code=137, duration_s=2.5, job_id="j", command=["python", "x.py"])
    report.write_json(path, document)
    read = json.loads(path.read_text())
    assert read["culprit"]["rank"] == 1
    assert read["ranks"][1]["signal"] == "SIGKILL"
    assert read["ranks"][0]["failed_s"] == pytest.approx(0.4)
    assert read["ranks"][0]["operation"]["waiting_for"] == 1
    assert "waiting for rank 1" in read["ranks"][0]["operation"]["text"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
