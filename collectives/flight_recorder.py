"""The last 1,024 operations of a rank, written down when its job goes wrong.

Every rank's page holds them at any time. When an operation ends with PeerLost, CollectiveTimeout or CollectiveMismatch the rank writes its own page
to `rank<N>.json`, and that of the rank at fault if it is on the same host, since that one may be dead. Reading needs no torch.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringfold.collectives.codes import ALGORITHMS, DTYPES, OPERATIONS, REDUCTIONS
from ringfold.collectives.environment import FLIGHT_DIR
from ringfold.collectives.page import OperationRecord, Page

__all__ = ["directory", "document", "write"]

_NAMES = {kind: {code: name for name, code in table.items()} for kind, table in (("op", OPERATIONS), ("dtype", DTYPES), ("reduction", REDUCTIONS))}
_ALGORITHM_NAMES = {code: name for name, code in ALGORITHMS.items()}


def directory(job_id: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return where a job's recordings go: RINGFOLD_FLIGHT_DIR, else a folder of this user and job in the folder for temporary files."""
    named = "".join(c if c.isalnum() or c in "-_." else "-" for c in job_id)
    return Path(environ.get(FLIGHT_DIR) or Path(tempfile.gettempdir()) / f"ringfold-{os.geteuid()}-{named}")


def document(page: Page, why: str, communicators: Mapping[int, str]) -> dict[str, Any]:
    """Return what a page says, in names; times are seconds before now, the newest operation is the last."""
    now_ns, state = time.monotonic_ns(), page.read()
    return {
        "why": why,
        "rank": state.rank,
        "pid": state.pid,
        "state": state.state.name.lower(),
        "heartbeat_s_ago": _ago(now_ns, state.heartbeat_ns),
        "progress": {"step": state.progress_step, "s_ago": _ago(now_ns, state.progress_ns)},
        "failure": None if state.failure is None else asdict(state.failure),
        "counters": {name: asdict(counter) for name, counter in page.counters().items()},
        "operations": [_operation(record, now_ns, communicators) for record in page.operations()],
    }


def write(page: Page, folder: Path, why: str, communicators: Mapping[int, str]) -> Path:
    """Write a page to `rank<N>.json` in the folder, replacing what is there at once, and return the file.

    Raises: OSError.
    """
    content = document(page, why, communicators)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"rank{content['rank']}.json"
    part = folder / f".rank{content['rank']}.{os.getpid()}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(path)
    return path


def _operation(record: OperationRecord, now_ns: int, communicators: Mapping[int, str]) -> dict[str, Any]:
    return {
        "index": record.index,
        "axis": communicators.get(record.comm, f"{record.comm:08x}"),
        "seq": record.seq,
        **{kind: names.get(getattr(record, kind), "unknown") for kind, names in _NAMES.items()},
        "algorithm": _ALGORITHM_NAMES.get(record.algorithm, "unknown"),
        "count": record.count,
        "nbytes": record.nbytes,
        "state": record.state.name.lower(),
        "issued_s_ago": _ago(now_ns, record.start_ns),
        "ended_s_ago": _ago(now_ns, record.end_ns),
        "step": f"{record.step} of {record.steps}",
        "waiting_for": record.waiting_for if record.waiting_for >= 0 else None,
        "site": record.site,
    }


def _ago(now_ns: int, at_ns: int) -> float | None:
    return round((now_ns - at_ns) / 1e9, 6) if at_ns else None
