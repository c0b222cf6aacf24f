"""Memory of a rank under each layout: bytes of parameters, gradients and AdamW state, as ringfold counts them and as the system does.

    ringfold bench memory -n 4

For each layout a job is started: a model is built, trained for two steps on a short sequence, and what a rank then holds is read: `counted` from the
tensors, `process` the proportional set size less that of the same rank before the model was built (memory that ranks share counts once in
all). The bound is that of ZeRO (4P + 4P + 8P/N, 4P + 12P/N, 16P/N; in bf16 2P + 2P + 12P/N, 2P + 14P/N, 16P/N), two buckets and three
blocks. The worst rank of each is shown, in MiB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import ringfold as rf
import torch
from ringfold.benchmarks._driver import describe_run, write_json
from ringfold.benchmarks._model import GPT, SIZES, next_byte_loss, random_batches
from ringfold.runtime.memory import proportional_set_size

LAYOUTS = ("zero0", "zero1", "zero2", "zero3", "bf16", "bf16 zero1", "bf16 zero2", "bf16 zero3")
TOKENS = 16
BUCKET_MB = 25.0


def settle() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def bound(layout: str, count: int, ranks: int, block: int) -> float:
    """Return the most bytes that parameters, gradients and state may take."""
    stage = int(layout[layout.index("zero") + 4]) if "zero" in layout else 0
    n = ranks
    if "bf16" in layout:
        element, kept = 2, (16.0, 4 + 12 / n, 2 + 14 / n, 16 / n)[stage]
    else:
        element, kept = 4, (16.0, 8 + 8 / n, 4 + 12 / n, 16 / n)[stage]
    return count * kept + 2 * BUCKET_MB * 2**20 + 3 * block * element


def measure(world: rf.Communicator, layout: str, size: str) -> dict[str, Any]:
    """Train two steps and return what the worst rank holds."""
    mesh = rf.DeviceMesh(rf.Layout.parse(layout), world)
    world.barrier()
    settle()
    before = proportional_set_size()
    engine = rf.Engine(
        lambda: GPT(SIZES[size], TOKENS), mesh, loss=next_byte_loss, optimizer=lambda p: torch.optim.AdamW(p, fused=True), bucket_mb=BUCKET_MB
    )
    for batch in random_batches(2, 1, TOKENS, seed=world.rank):
        engine.train_step(batch)
    settle()
    world.barrier()  # all ranks read while all hold what they hold
    account = engine.memory()
    world.barrier()
    process = account.pop("process") - before
    count = sum(parameter.numel() for parameter in engine.module.parameters())
    block = sum(parameter.numel() for parameter in engine.module.get_submodule("blocks.0").parameters())
    everybody = world.all_gather_object((account, process))
    engine.close()
    mesh.close()
    counted = max((theirs for theirs, _ in everybody), key=lambda theirs: sum(theirs.values()))
    return {
        "layout": layout,
        "parameters": count,
        "counted": counted,
        "counted_nbytes": sum(counted.values()),
        "process_nbytes": max(process for _, process in everybody),
        "bound_nbytes": bound(layout, count, world.size, block),
    }


HEADER = """\
| layout | parameters | masters | gradients | state | lent and buffers | counted | process | bound |
|---|---|---|---|---|---|---|---|---|"""


def line_of(row: dict[str, Any]) -> str:
    counted = row["counted"]
    lent = counted["gradient buffers"] + counted["gathered blocks"] + counted["buffers"]
    cells = [counted["parameters"], counted["masters"], counted["gradients"], counted["optimizer state"], lent]
    cells += [row["counted_nbytes"], row["process_nbytes"], row["bound_nbytes"]]
    return f"| {row['layout']} | " + " | ".join(f"{cell / 2**20:.0f}" for cell in cells) + " |"


@click.command()
@click.option("-n", "n", type=click.IntRange(1), help="Start that many ranks; without it, this is one of a job's.")
@click.option("--size", type=click.Choice(list(SIZES)), default="100M", show_default=True, help="Parameters of the model.")
@click.option("--layout", "layouts", multiple=True, default=LAYOUTS, show_default=True, help="A layout; may be given several times.")
@click.option("--quick", is_flag=True, help="A smoke run: the tiny model.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures there.")
def main(n: int | None, size: str, layouts: tuple[str, ...], quick: bool, json_path: Path | None) -> None:
    """Measure the memory of a rank under each layout, in a job of its own."""
    size = "tiny" if quick else size
    if n is None:
        measure_here(layouts[0], size, json_path)
        return
    click.echo(HEADER)
    rows, run = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            path = Path(folder) / "row.json"
            job = [sys.executable, "-m", "ringfold", "run", "-n", str(n), "-m", "ringfold.benchmarks.memory"]
            done = subprocess.run([*job, "--size", size, "--layout", layout, "--json", str(path)], capture_output=True, text=True)
            if done.returncode:
                raise click.ClickException(f"{layout}: {done.stdout}{done.stderr}")
            run = json.loads(path.read_text())
            rows.append(run.pop("row"))
            click.echo(line_of(rows[-1]))
    run["command"] = f"ringfold bench memory -n {n} --size {size}"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    click.echo(f"\nMiB; {rows[0]['parameters']} parameters; {run['machine']}; {versions}; {n} ranks\n{run['command']}")
    if json_path is not None:
        write_json(json_path, {**run, "size": size, "rows": rows})


def measure_here(layout: str, size: str, json_path: Path | None) -> None:
    """Be a rank of the job of one layout."""
    os.environ.setdefault("RINGFOLD_DEVICE", "cpu")
    world = rf.init().world
    measure(world, "zero1", "tiny")  # what torch loads at its first step is not the model's
    row = measure(world, layout, size)
    run = describe_run(world)
    if json_path is not None and world.rank == 0:
        write_json(json_path, {"benchmark": "memory", **run, "row": row})
    rf.shutdown()


if __name__ == "__main__":
    main()
