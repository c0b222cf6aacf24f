"""Checkpoints: how long a save holds up training, and how long it takes to be on disk, beside torch.distributed.checkpoint over gloo.

    ringfold bench checkpoint -n 2 --nbytes 1G --folder DIR

Every rank holds the same model, as in data parallelism, and each writes a share. `sync` waits until it is on disk, `async` returns when the
state may change again. All sides write to the same folder, with fsync, and take turns; a time is that of the slowest rank. Ours is read
back: `#wrong` counts elements that are not those of the moment of the call, for the state is changed while an asynchronous save is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import click
import ringfold as rf
import torch
from ringfold.benchmarks._driver import Nbytes, Spread, describe_run, gloo, run_on_ranks, slowest, write_json
from ringfold.runtime import checkpoint
from torch.distributed.checkpoint import state_dict_saver as dcp

SIDES = ("ringfold sync", "ringfold async", "dcp sync", "dcp async")
TENSOR_NBYTES = 16 << 20
State = dict[str, torch.Tensor]
Wait = Callable[[], object]


def make_state(nbytes: int) -> State:
    """Return tensors of 16 MiB, and one of what is left, that add up to `nbytes`."""
    lengths = [TENSOR_NBYTES] * (nbytes // TENSOR_NBYTES) + [nbytes % TENSOR_NBYTES] * (nbytes % TENSOR_NBYTES > 0)
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.rand(length // 4, generator=generator) for i, length in enumerate(lengths)}


def begin_save(side: str, saver: checkpoint.Saver, folder: Path, state: State) -> Wait:
    """Begin a save, or do it; return what waits for its end."""
    if side.startswith("ringfold"):
        saver.save(folder / "step-1", step=1, model_state=state, asynchronous=side.endswith("async"))
        return saver.wait
    if side == "dcp async":
        writing = dcp.async_save(state, checkpoint_id=folder)
        return writing.result if isinstance(writing, Future) else writing.upload_completion.result
    dcp.save(state, checkpoint_id=folder)
    return lambda: None


def measure(comm: rf.Communicator, side: str, saver: checkpoint.Saver, folder: Path, state: State) -> dict[str, float]:
    """Save once; return the seconds until the call returned and until all was on disk, and how many elements are wrong there."""
    comm.barrier()
    start = time.perf_counter()
    wait = begin_save(side, saver, folder, state)
    blocked_s = time.perf_counter() - start
    for tensor in state.values() if side == "ringfold async" else ():
        tensor += 1
    wait()
    blocked_s, disk_s = slowest(comm, [blocked_s, time.perf_counter() - start])
    wrong = 0
    if side == "ringfold async":
        for tensor in state.values():
            tensor -= 1
    if side.startswith("ringfold") and comm.rank == 0:
        saved = checkpoint.load(folder).model_state()
        # One was added and taken away again: what was saved is the same within its rounding.
        wrong = sum(int(((saved[name] - value).abs() > 2e-7).sum()) for name, value in state.items())
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)
    comm.barrier()
    return {"blocked_s": blocked_s, "disk_s": disk_s, "wrong": wrong}


def row_of(side: str, rounds: list[dict[str, float]], nbytes: int) -> dict[str, Any]:
    return {
        "side": side,
        "nbytes": nbytes,
        "blocked_s": Spread.of([one["blocked_s"] for one in rounds]).median,
        "disk_s": Spread.of([one["disk_s"] for one in rounds]).median,
        "wrong": sum(int(one["wrong"]) for one in rounds),
        "rounds": rounds,
    }


HEADER = """\
| side | blocked s (lowest to highest) | on disk after s (lowest to highest) | MB/s to disk | blocked / its sync | #wrong |
|---|---|---|---|---|---|"""


def line_of(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    blocked = Spread.of([one["blocked_s"] for one in row["rounds"]])
    disk = Spread.of([one["disk_s"] for one in row["rounds"]])
    sync = rows[row["side"].replace("async", "sync")]["disk_s"]
    wrong = row["wrong"] if row["side"].startswith("ringfold") else "-"
    return (
        f"| {row['side']} | {blocked.median:.3f} ({blocked.low:.3f} to {blocked.high:.3f}) | {disk.median:.2f} ({disk.low:.2f} to {disk.high:.2f}) "
        f"| {row['nbytes'] / disk.median / 1e6:.0f} | {blocked.median / sync:.3f} | {wrong} |"
    )


@click.command()
@click.option("-n", "n", type=click.IntRange(1), help="Start that many ranks; without it, this is one of a job's.")
@click.option("--nbytes", type=Nbytes(), default="1G", show_default=True, help="Of the model.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Saves of each side, after one that is not counted.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write.  [default: a temporary folder]")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all rounds there.")
def main(n: int | None, nbytes: int, rounds: int, folder: Path | None, json_path: Path | None) -> None:
    """Measure saves: how long training waits for them, and how long the disk takes, beside torch.distributed.checkpoint."""
    if n is not None:
        run_on_ranks("ringfold.benchmarks.checkpoint", n)
    os.environ.setdefault("RINGFOLD_DEVICE", "cpu")
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    comm = rf.init().world
    show = click.echo if comm.rank == 0 else lambda _: None
    made = Path(comm.broadcast_object(tempfile.mkdtemp(prefix="ringfold-bench-", dir=folder) if comm.rank == 0 else None))
    state, saver = make_state(nbytes), checkpoint.Saver(comm)
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    try:
        with gloo(comm):
            for number in range(rounds + 1):
                for i in range(len(SIDES)):
                    side = SIDES[(i + number) % len(SIDES)]
                    one = measure(comm, side, saver, made / "run", state)
                    if number:
                        measured[side].append(one)
        saver.close()
    finally:
        if comm.rank == 0:
            shutil.rmtree(made, ignore_errors=True)
    rows = {side: row_of(side, of_side, nbytes) for side, of_side in measured.items()}
    run = describe_run(comm)
    show("\n".join([HEADER, *(line_of(row, rows) for row in rows.values())]))
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    show(f"\n{run['machine']}; {versions}; {run['ranks']} ranks, {run['threads_per_rank']} thread(s) each; {nbytes} bytes\n{run['command']}")
    if json_path is not None and comm.rank == 0:
        write_json(json_path, {"benchmark": "checkpoint", **run, "rows": list(rows.values())})
    rf.shutdown()
    if any(row["wrong"] for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
