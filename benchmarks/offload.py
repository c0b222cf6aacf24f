"""The optimizer's step with everything in a file (zero3:nvme), beside dd with direct I/O on the same disk.

    ringfold bench offload --folder DIR

A step reads parameters and AdamW's state, steps, and writes them back: 12 bytes of each parameter each way. dd writes and reads a file as long, one
after the other, and both at once, which is what a step may do. All take turns, several rounds; the step is timed alone, on the gradients of
one backward. With several ranks all step at once on one disk, and the slowest counts.

    ringfold bench offload --train-step --size 30M --folder DIR

Whole train steps on 4 x 128 tokens: the optimizer beside backward, after it (a clip_norm that clips nothing), and zero3 without offload.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import ringfold as rf
import torch
from ringfold.benchmarks._driver import Spread, describe_run, run_on_ranks, slowest, write_json
from ringfold.benchmarks._model import GPT, SIZES, next_byte_loss, random_batches

STEPS = ("beside backward", "after backward", "zero3, no offload")
SIDES = ("ringfold", "dd, write then read", "dd, both at once")
TOKENS = 16
TRAIN_ROWS, TRAIN_TOKENS = 4, 128
BLOCK = 16 << 20


class Disk:
    """Files of `nbytes` that dd writes and reads."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._count = -(-nbytes // BLOCK)
        self._old, self._new = folder / "old", folder / "new"
        self.nbytes = self._count * BLOCK
        self._write(self._old).wait()

    def one_after_the_other(self) -> None:
        self._write(self._new).wait()
        self._read(self._old).wait()

    def both_at_once(self) -> None:
        for process in (self._write(self._new), self._read(self._old)):
            process.wait()

    def _write(self, path: Path) -> subprocess.Popen[bytes]:
        return self._dd("if=/dev/zero", f"of={path}", "oflag=direct", "conv=notrunc")

    def _read(self, path: Path) -> subprocess.Popen[bytes]:
        return self._dd(f"if={path}", "of=/dev/null", "iflag=direct")

    def _dd(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["dd", f"bs={BLOCK}", f"count={self._count}", *arguments], stderr=subprocess.DEVNULL)


def measure(mesh: rf.DeviceMesh, size: str, rounds: int, folder: Path) -> tuple[int, int, dict[str, list[float]]]:
    """Return parameters, bytes that this rank has in its file, and the seconds of each round of each side."""
    engine = rf.Engine(lambda: GPT(SIZES[size], TOKENS), mesh, loss=next_byte_loss, optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    for batch in random_batches(2, 1, TOKENS, seed=mesh.rank):
        engine.train_step(batch)
    nbytes, sharding = engine.memory()["files"], engine._sharding
    assert sharding is not None  # narrows the type: the layout has zero3
    disk = Disk(folder, nbytes * mesh.size) if mesh.rank == 0 else None
    calls: dict[str, Callable[[], None]] = {SIDES[0]: lambda: sharding.step(engine.optimizer, 1.0)}
    calls |= {SIDES[1]: disk.one_after_the_other, SIDES[2]: disk.both_at_once} if disk else dict.fromkeys(SIDES[1:], lambda: None)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side, call in calls.items():
            mesh.world.barrier()
            start = time.perf_counter()
            call()
            (taken,) = slowest(mesh.world, [time.perf_counter() - start])
            if number:  # the first is not counted
                seconds[side].append(taken)
    count = sum(parameter.numel() for parameter in engine.module.parameters())
    engine.close()
    return count, nbytes, seconds


def measure_train_steps(mesh: rf.DeviceMesh, size: str, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Return parameters, and the seconds of each round of each side."""
    in_memory = rf.DeviceMesh(rf.Layout(zero=3), mesh.world)
    engines = {
        side: rf.Engine(
            lambda: GPT(SIZES[size], TRAIN_TOKENS),
            on,
            loss=next_byte_loss,
            optimizer=lambda p: torch.optim.AdamW(p, fused=True),
            clip_norm=clip_norm,
        )
        for side, on, clip_norm in zip(STEPS, (mesh, mesh, in_memory), (None, 1e9, None), strict=True)
    }
    seconds: dict[str, list[float]] = {side: [] for side in STEPS}
    for number, batch in enumerate(random_batches(rounds + 2, TRAIN_ROWS, TRAIN_TOKENS, seed=mesh.rank)):
        first = number % len(STEPS)
        for side in STEPS[first:] + STEPS[:first]:
            mesh.world.barrier()
            engines[side].train_step(batch)
            (taken,) = slowest(mesh.world, [engines[side].seconds])
            if number > 1:  # the first make the state, and learn in which order blocks are used
                seconds[side].append(taken)
    count = sum(parameter.numel() for parameter in engines[STEPS[0]].module.parameters())
    for engine in engines.values():
        engine.close()
    return count, seconds


@click.command()
@click.option("-n", "n", type=click.IntRange(1), help="Start that many ranks; without it, this is one of a job's.")
@click.option("--size", type=click.Choice(list(SIZES)), default="100M", show_default=True, help="Parameters of the model.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of each side, after one that is not counted.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True), help="On the disk.  [default: a temporary folder]")
@click.option("--train-step", "whole", is_flag=True, help="Measure whole train steps instead, beside backward and after it.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all rounds there.")
def main(n: int | None, size: str, rounds: int, folder: Path | None, whole: bool, json_path: Path | None) -> None:
    """Measure the step of an optimizer whose state lies in a file, beside dd on the same disk."""
    if n is not None:
        run_on_ranks("ringfold.benchmarks.offload", n)
    os.environ.setdefault("RINGFOLD_DEVICE", "cpu")
    with tempfile.TemporaryDirectory(prefix="ringfold-bench-", dir=folder) as made:
        mesh = rf.init(rf.Layout(zero=3, offload=f"nvme={made}"))
        show = click.echo if mesh.rank == 0 else lambda _: None
        if whole:
            nbytes, (count, seconds) = 0, measure_train_steps(mesh, size, rounds)
        else:
            count, nbytes, seconds = measure(mesh, size, rounds, Path(made))
        mesh.world.barrier()
    moved = 2 * nbytes * mesh.size
    ours = Spread.of(next(iter(seconds.values()))).median
    show("| side | seconds (lowest to highest) | of the first one's speed |\n|---|---|---|")
    for side, taken in seconds.items():
        spread = Spread.of(taken)
        show(f"| {side} | {spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f}) | {ours / spread.median:.2f} |")
    run = describe_run(mesh.world)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    work = f"{TRAIN_ROWS} x {TRAIN_TOKENS} tokens a rank" if whole else f"{moved} bytes a step, {moved / ours / 1e9:.2f} GB/s"
    show(f"\n{run['machine']}; {versions}; {run['ranks']} ranks, {run['threads_per_rank']} thread(s) each; {count} parameters, {work}")
    show(run["command"])
    if json_path is not None and mesh.rank == 0:
        write_json(json_path, {"benchmark": "offload", **run, "size": size, "parameters": count, "moved_nbytes": moved, "seconds": seconds})
    rf.shutdown()


if __name__ == "__main__":
    main()
