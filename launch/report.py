"""The verdict on a job: the first rank that failed, not the first that noticed.

Each rank's page may hold a failure with its time, and whether the exception only says that another rank ended or hung (a *consequence*).
A rank that died without a record, by a signal for example, failed when it was reaped. So:

    1  of the failures that are no consequence, the earliest is the culprit
    2  if all are consequences, the culprit is whom they waited for: a rank that is stopped, or ended without an error, or is silent
    3  else the rank whose failure was the earliest

Ends that the launcher itself brought about are no failures. Nothing here touches a process: `Outcome`s go in, a `Verdict` comes out.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ringfold.collectives.codes import DTYPES, OPERATIONS
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.page import Failure, OperationRecord, OperationState, Page

SILENT_S = 5.0  # the heart beats several times a second, from a native thread
BAD_INPUT = ConfigError.exit_code
TRACE_LINES = 40
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class Sight:
    """What a rank was doing at one moment, from its page and from the kernel."""

    process_state: str  # the kernel's letter; "" when it had ended
    heartbeat_age_s: float | None  # None: it never beat
    operation: OperationRecord | None  # the oldest in flight, else the last


@dataclass(frozen=True)
class Outcome:
    """How one rank ended; `returncode` as in subprocess, None for a rank that even SIGKILL has not ended."""

    rank: int
    pid: int
    returncode: int | None
    ended_ns: int | None
    signalled_ns: int | None  # when the launcher first asked it to end
    failure: Failure | None
    seen: Sight  # when the job's first failure was noticed
    stderr_tail: tuple[str, ...] = ()
    log: str | None = None

    @property
    def failed_ns(self) -> int | None:
        """When this rank failed by itself, or None if it did not, or was ended by the launcher."""
        if self.failure and (self.signalled_ns is None or self.failure.failure_ns < self.signalled_ns):
            return self.failure.failure_ns
        if self.returncode and self.ended_ns and self.signalled_ns is None:
            return self.ended_ns
        return None

    @property
    def is_consequence(self) -> bool:
        """Whether its exception says that another rank ended or hung."""
        return self.failure is not None and self.failure.is_consequence

    @property
    def ended_as(self) -> str:
        """The end in words: `exit code 3`, `SIGKILL`."""
        if self.returncode is None:
            return "still alive"
        return signal_name(-self.returncode) if self.returncode < 0 else f"exit code {self.returncode}"


@dataclass(frozen=True)
class Verdict:
    """The culprit, why it is the culprit, and what the job's exit code is."""

    culprit: Outcome
    why: str  # one clause: "raised ValueError", "was killed by SIGKILL", "is stopped"
    failed_ns: int
    exit_code: int


def judge(outcomes: Sequence[Outcome]) -> Verdict | None:
    """Return the verdict, or None if no rank failed by itself."""
    failed = sorted((outcome.failed_ns, outcome.rank, outcome) for outcome in outcomes if outcome.failed_ns is not None)
    if not failed:
        return None
    for failed_ns, _, outcome in failed:
        if not outcome.is_consequence:
            return Verdict(outcome, _how_it_failed(outcome), failed_ns, exit_code(outcome.returncode))
    first_ns, _, first = failed[0]
    code = exit_code(first.returncode)
    blamed = collections.Counter(
        outcome.seen.operation.waiting_for for _, _, outcome in failed if outcome.seen.operation and outcome.seen.operation.waiting_for >= 0
    )
    # Whoever most wait for comes first, then everyone else who did not fail.
    order = [rank for rank, _ in blamed.most_common()] + [outcome.rank for outcome in outcomes]
    by_rank = {outcome.rank: outcome for outcome in outcomes if outcome.failed_ns is None}
    absent = [by_rank[rank] for rank in dict.fromkeys(order) if rank in by_rank]
    for test in (_is_stopped, _is_gone, _is_silent):
        for outcome in absent:
            if why := test(outcome):
                return Verdict(outcome, why, first_ns, code)
    for outcome in absent:
        if blamed[outcome.rank]:
            return Verdict(outcome, "did not arrive where the others waited for it", first_ns, code)
    return Verdict(first, _how_it_failed(first), first_ns, code)


def exit_code(returncode: int | None) -> int:
    """Return what a shell would say: 128 + the number of a signal; never 0 for a rank that is blamed."""
    if returncode is None:
        return 1
    return 128 - returncode if returncode < 0 else returncode or 1


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def see(page: Page, process_state: str, now_ns: int) -> Sight:
    """Read from the page what its rank is doing."""
    try:
        heartbeat_ns = page.read().heartbeat_ns
        records = page.operations()
    except ValueError:
        return Sight(process_state, None, None)  # the rank wrote over its page
    flying = [record for record in records if record.state in (OperationState.ISSUED, OperationState.STARTED)]
    operation = flying[0] if flying else records[-1] if records else None
    return Sight(process_state, (now_ns - heartbeat_ns) / _SECOND_NS if heartbeat_ns else None, operation)


def failure_of(page: Page) -> Failure | None:
    """Read the failure from a page, which its rank may have written over."""
    try:
        return page.read().failure
    except ValueError:
        return None


def describe_operation(record: OperationRecord, at_ns: int) -> str:
    """Return `all_reduce #412 (float32 x 1048576), started 0.3 s before, waiting for rank 1`."""
    what = f"{_name(OPERATIONS, record.op)} #{record.seq}"
    if record.count:
        what += f" ({_name(DTYPES, record.dtype)} x {record.count})"
    if record.site:
        what += f" at {record.site}"
    if record.state == OperationState.DONE:
        what += f", done {_seconds(at_ns - record.end_ns)} before"
    elif record.start_ns:
        what += f", started {_seconds(at_ns - record.start_ns)} before"
    if record.state != OperationState.DONE and record.waiting_for >= 0:
        what += f", waiting for rank {record.waiting_for}"
    return what


def block(verdict: Verdict, outcomes: Sequence[Outcome], duration_s: float, columns: int = 100) -> str:
    """Return the verdict for people: one block of text, or for bad input that a rank has found the error alone."""
    culprit = verdict.culprit
    if culprit.failure and culprit.returncode == BAD_INPUT:
        same = [o.rank for o in outcomes if o.failure and o.failure.message == culprit.failure.message]
        whose = "" if len(same) == len(outcomes) else f"\n  on rank{'s' * (len(same) > 1)} {', '.join(map(str, same))} of {len(outcomes)}"
        return f"{culprit.failure.type.removeprefix('ringfold.')}: {culprit.failure.message}{whose}"
    rule = "─" * min(columns, 100)
    lines = [
        rule,
        f"ringfold: the job failed after {duration_s:.1f} s: rank {culprit.rank} of {len(outcomes)} {verdict.why}",
        f"  host {socket.gethostname()}, pid {culprit.pid}" + ("" if culprit.ended_as in verdict.why else f", {culprit.ended_as}"),
        "",
    ]
    if culprit.failure:
        trace = culprit.failure.traceback.rstrip() or f"{culprit.failure.type}: {culprit.failure.message}"
        shown = trace.splitlines()
        if len(shown) > TRACE_LINES:
            shown = [shown[0], f"  ... {len(shown) - TRACE_LINES} lines ...", *shown[1 - TRACE_LINES :]]
        lines += ["  " + line for line in shown] + [""]
    elif culprit.stderr_tail:
        lines += ["  its last lines on standard error:"] + ["    " + line for line in culprit.stderr_tail] + [""]
    if culprit.seen.operation:
        lines.append(f"  last operation   {describe_operation(culprit.seen.operation, verdict.failed_ns)}")
    if culprit.log:
        lines.append(f"  log              {culprit.log}")
    others = [outcome for outcome in outcomes if outcome.rank != culprit.rank]
    for which, text in _grouped((f"{outcome.rank}", _line(outcome, verdict)) for outcome in others):
        lines.append(f"  {which:<15}  {text}")
    return "\n".join([*lines, rule])


def emphasised(text: str) -> str:
    """Return the block for a terminal: the sentence that counts in bold red."""
    return "\n".join(f"\x1b[1;31m{line}\x1b[0m" if line.startswith("ringfold:") else line for line in text.splitlines())


def as_json(
    verdict: Verdict | None,
    outcomes: Sequence[Outcome],
    *,
    ended: Literal["finished", "failed", "interrupted"],
    exit_code: int,
    duration_s: float,
    job_id: str,
    command: Sequence[str],
) -> dict[str, object]:
    """Return the same as a document; times are seconds since the culprit's failure, negative before it."""
    zero_ns = verdict.failed_ns if verdict else None

    def seconds(at_ns: int | None) -> float | None:
        return (at_ns - zero_ns) / _SECOND_NS if at_ns and zero_ns else None

    def rank(outcome: Outcome) -> dict[str, object]:
        operation = outcome.seen.operation
        return {
            "rank": outcome.rank,
            "pid": outcome.pid,
            "exit_code": outcome.returncode if outcome.returncode is None or outcome.returncode >= 0 else None,
            "signal": signal_name(-outcome.returncode) if outcome.returncode and outcome.returncode < 0 else None,
            "ended_by_launcher": outcome.signalled_ns is not None and outcome.failed_ns is None,
            "is_consequence": outcome.is_consequence,
            "failed_s": seconds(outcome.failed_ns),
            "failure": asdict(outcome.failure) if outcome.failure else None,
            "stderr": list(outcome.stderr_tail),
            "operation": asdict(operation) | {"text": describe_operation(operation, zero_ns or operation.end_ns)} if operation else None,
            "process_state": outcome.seen.process_state,
            "heartbeat_age_s": outcome.seen.heartbeat_age_s,
            "log": outcome.log,
        }

    return {
        "job": job_id,
        "host": socket.gethostname(),
        "command": list(command),
        "world_size": len(outcomes),
        "ended": ended,
        "exit_code": exit_code,
        "duration_s": duration_s,
        "culprit": {"rank": verdict.culprit.rank, "why": verdict.why} if verdict else None,
        "ranks": [rank(outcome) for outcome in outcomes],
    }


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write the report at once or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _name(codes: Mapping[str, int], code: int) -> str:
    return next((name for name, known in codes.items() if known == code), f"code {code}")


def _how_it_failed(outcome: Outcome) -> str:
    if outcome.failure:
        return f"failed with {outcome.failure.type}"
    if outcome.returncode is not None and outcome.returncode < 0:
        hint = " (out of memory? see dmesg)" if outcome.returncode == -signal.SIGKILL else ""
        return f"was killed by {signal_name(-outcome.returncode)}{hint}"
    return f"ended with {outcome.ended_as}"


def _is_stopped(outcome: Outcome) -> str:
    return "is stopped (SIGSTOP, or a debugger)" if outcome.seen.process_state in ("T", "t") else ""


def _is_gone(outcome: Outcome) -> str:
    return "had ended, without an error, while others still needed it" if outcome.returncode == 0 and not outcome.signalled_ns else ""


def _is_silent(outcome: Outcome) -> str:
    age_s = outcome.seen.heartbeat_age_s
    return f"has been silent for {age_s:.0f} s" if age_s is not None and age_s > SILENT_S else ""


def _line(outcome: Outcome, verdict: Verdict) -> str:
    """Say in one line how another rank ended, and what it was doing at the time of the failure."""
    if outcome.failed_ns is not None and outcome.failure:
        end = f"{outcome.failure.type} {_seconds(outcome.failed_ns - verdict.failed_ns)} later"
    elif outcome.failed_ns is not None:
        end = f"{outcome.ended_as} {_seconds(outcome.failed_ns - verdict.failed_ns)} later"
    elif outcome.signalled_ns is not None:
        end = "ended by the launcher" if outcome.returncode is not None else "cannot be ended: the kernel holds it"
    else:
        end = "finished"
    parts = [end, _is_stopped(outcome)]
    if outcome.seen.operation:
        is_in_flight = outcome.seen.operation.state != OperationState.DONE
        parts.append(("in " if is_in_flight else "after ") + describe_operation(outcome.seen.operation, verdict.failed_ns))
    return "; ".join(part for part in parts if part)


def _grouped(lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Put ranks that have the same line together: 1,000 lines would hide the one that counts."""
    groups: dict[str, list[str]] = {}
    for rank, text in lines:
        groups.setdefault(text, []).append(rank)
    for text, ranks in groups.items():
        name = "rank " if len(ranks) == 1 else "ranks "
        shown = ", ".join(ranks) if len(ranks) <= 8 else f"{', '.join(ranks[:6])} and {len(ranks) - 6} more"
        yield name + shown, text


def _seconds(span_ns: int) -> str:
    return f"{max(0.0, span_ns / _SECOND_NS):.1f} s" if abs(span_ns) >= 50_000_000 else f"{max(0, span_ns) / 1e6:.1f} ms"
