"""Train steps of a GPT: ringfold beside torch DDP over gloo, and beside the same processes that do not communicate at all (the ceiling).

    ringfold bench train_step -n 2
    ringfold bench train_step -n 2 --sides ddp,ddp_ringfold,fsdp,fsdp_ringfold     torch's own parallelism over gloo and over ringfold's backend
    ringfold bench train_step -n 2 --sides zero1,zero2,zero3,ddp,fsdp,fsdp_kept    shards beside DDP and FSDP2 (kept: it does not reshard)
    ringfold bench train_step -n 2 --sides zero3,deepspeed1,deepspeed2,deepspeed3  and beside DeepSpeed's (make peers)

All sides live in the same processes, so they share allocator, threads and machine, and run the same number of steps on the same batches with the
same fused AdamW. They take turns in windows of some seconds, in an order that rotates; a window's time is that of the slowest rank. The table has
the ratio of medians to DDP with the spread of the ratios of windows that ran next to each other, the CPU seconds that a step costs all ranks, and
the bytes of optimizer state that a rank holds.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import ringfold as rf
import torch
import torch.distributed as dist
from ringfold.benchmarks import _deepspeed
from ringfold.benchmarks._driver import Names, Spread, describe_run, gloo, run_on_ranks, slowest, summed, write_json
from ringfold.benchmarks._model import GPT, SIZES, next_byte_loss, random_batches
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

SIDES = (
    *("data_parallel", "engine", "zero1", "zero2", "zero3"),
    *("ddp", "ddp_ringfold", "fsdp", "fsdp_kept", "fsdp_ringfold", *_deepspeed.STAGES, "alone"),
)
DEFAULT_SIDES = "data_parallel,engine,ddp,alone"
WARMUP_STEPS = 4
BATCHES = 8
Batch = tuple[Tensor, Tensor]


@dataclass
class Side:
    """One way to train: `step` does one train step on this rank's rows."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Batch], object]
    samples_per_s: list[float] = field(default_factory=list)
    cpu_s_per_step: list[float] = field(default_factory=list)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4, fused=True)


def torch_group(name: str) -> Any:
    """Return the process group of a side of torch's own: over ringfold, or the default one, which is gloo's."""
    if not name.endswith("_ringfold"):
        return dist.group.WORLD
    import ringfold.collectives.process_group  # noqa: F401  (registers the backend)

    return dist.new_group(backend="ringfold")


def make_side(name: str, mesh: rf.DeviceMesh, build: Callable[[], GPT], rows: int) -> Side:
    """Build a side; every one starts from the same parameters."""
    torch.manual_seed(0)
    module = build()
    if name in _deepspeed.STAGES:
        return deepspeed_side(name, module, rows)
    if name == "engine":
        engine = rf.Engine(module, mesh, loss=next_byte_loss, optimizer=adamw)
        return Side(name, module, engine.optimizer, engine.train_step)
    model: nn.Module = module
    if name == "data_parallel":
        model = rf.DataParallel(module, mesh["dp"])
    elif name.startswith("zero"):
        model = rf.ZeRO(module, mesh["dp"], stage=int(name[-1]))
    elif name.startswith("ddp"):
        model = DistributedDataParallel(module, process_group=torch_group(name), gradient_as_bucket_view=True)
    elif name.startswith("fsdp"):
        torch_mesh = DeviceMesh.from_group(torch_group(name), "cpu")
        for block in module.blocks:
            fully_shard(block, mesh=torch_mesh, reshard_after_forward=name != "fsdp_kept")
        fully_shard(module, mesh=torch_mesh, reshard_after_forward=name != "fsdp_kept")
    optimizer = model.optimizer(adamw) if isinstance(model, rf.ZeRO) else adamw(model.parameters())

    def step(batch: Batch) -> None:
        inputs, target = batch
        next_byte_loss(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(name, model, optimizer, step)


def deepspeed_side(name: str, module: GPT, rows: int) -> Side:
    engine = _deepspeed.zero(module, adamw(module.parameters()), _deepspeed.STAGES[name], rows)

    def step(batch: Batch) -> None:
        inputs, target = batch
        engine.backward(next_byte_loss(engine(inputs), target))
        engine.step()

    return Side(name, engine, engine.optimizer.optimizer, step)


def run_steps(comm: rf.Communicator, side: Side, batches: list[Batch], steps: int) -> tuple[float, float]:
    """Return the seconds of the slowest rank and the CPU seconds of all ranks together."""
    comm.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for number in range(steps):
        side.step(batches[number % len(batches)])
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    return slowest(comm, [seconds])[0], summed(comm, cpu_s)


def difference(side: Side, baseline: Side) -> float:
    """Return the largest difference of a parameter between two sides that did the same steps; collective, for shards are gathered."""
    pairs = zip(whole_parameters(side), whole_parameters(baseline), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def whole_parameters(side: Side) -> list[Tensor]:
    if isinstance(side.module, rf.ZeRO):
        with side.module.whole_parameters():
            return [parameter.detach().clone() for parameter in side.module.parameters()]
    if side.name in _deepspeed.STAGES:
        return _deepspeed.whole_parameters(side.module)
    parameters = (parameter.detach() for parameter in side.module.parameters())
    return [parameter.full_tensor() if isinstance(parameter, DTensor) else parameter for parameter in parameters]


def state_nbytes(side: Side) -> int:
    """Return the bytes of optimizer state on this rank."""
    values = (value for state in side.optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in values)


def measure(mesh: rf.DeviceMesh, names: list[str], size: str, rows: int, tokens: int, pairs: int, window_s: float) -> list[dict[str, Any]]:
    """Run all sides at one shape and return one row for each."""
    comm = mesh.world
    sides = [make_side(name, mesh, lambda: GPT(SIZES[size], tokens), rows) for name in names]
    batches = random_batches(BATCHES, rows, tokens, seed=comm.rank)
    warm_s = [run_steps(comm, side, batches, WARMUP_STEPS)[0] for side in sides]
    apart = {side.name: difference(side, sides[names.index("ddp")]) for side in sides}
    warm_s = [min(before, run_steps(comm, side, batches, WARMUP_STEPS)[0]) for side, before in zip(sides, warm_s, strict=True)]
    steps = max(1, math.ceil(window_s * WARMUP_STEPS / min(warm_s)))  # so that the fastest side's window is long enough
    for number in range(pairs):
        for i in range(len(sides)):
            side = sides[(i + number) % len(sides)]
            seconds, cpu_s = run_steps(comm, side, batches, steps)
            side.samples_per_s.append(comm.size * rows * steps / seconds)
            side.cpu_s_per_step.append(cpu_s / steps)
    return [row_of(side, sides, rows, tokens, steps, apart[side.name]) for side in sides]


def row_of(side: Side, sides: list[Side], rows: int, tokens: int, steps: int, apart: float) -> dict[str, Any]:
    by_name = {other.name: other for other in sides}
    ddp, ceiling = by_name["ddp"], by_name["alone"]
    spread = Spread.of(side.samples_per_s)
    paired = Spread.of([ours / theirs for ours, theirs in zip(side.samples_per_s, ddp.samples_per_s, strict=True)])
    return {
        "shape": f"{rows}x{tokens}",
        "side": side.name,
        "samples_per_s": spread.median,
        "samples_per_s_low": spread.low,
        "samples_per_s_high": spread.high,
        "windows": side.samples_per_s,
        "steps_per_window": steps,
        "times_ddp": spread.median / Spread.of(ddp.samples_per_s).median,
        "times_ddp_low": paired.low,
        "times_ddp_high": paired.high,
        "share_of_ceiling": spread.median / Spread.of(ceiling.samples_per_s).median,
        "cpu_s_per_step": Spread.of(side.cpu_s_per_step).median,
        "state_nbytes": state_nbytes(side),
        "difference_to_ddp": apart if side is not ceiling else None,
    }


HEADER = """\
| rows x tokens | side | samples/s (lowest to highest) | times DDP (of pairs) | of ceiling | CPU s/step | state MiB | parameters off DDP's by |
|---|---|---|---|---|---|---|---|"""


def line_of(row: dict[str, Any]) -> str:
    apart = "-" if row["difference_to_ddp"] is None else f"{row['difference_to_ddp']:.1g}"
    return (
        f"| {row['shape']} | {row['side']} | {row['samples_per_s']:.2f} ({row['samples_per_s_low']:.2f} to {row['samples_per_s_high']:.2f}) "
        f"| {row['times_ddp']:.3f} ({row['times_ddp_low']:.3f} to {row['times_ddp_high']:.3f}) | {row['share_of_ceiling']:.3f} "
        f"| {row['cpu_s_per_step']:.3f} | {row['state_nbytes'] / 2**20:.1f} | {apart} |"
    )


def parse_shapes(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> list[tuple[int, int]]:
    shapes = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise click.BadParameter(f"{text!r}: write rows x tokens, for example 4x128", ctx, param)
        shapes.append((int(match[1]), int(match[2])))
    return shapes


@click.command()
@click.option("-n", "n", type=click.IntRange(1), help="Start that many ranks; without it, this is one of a job's.")
@click.option("--shape", "shapes", multiple=True, default=["4x128", "2x64"], show_default=True, callback=parse_shapes, help="Rows x tokens a rank.")
@click.option("--sides", "names", type=Names(SIDES), default=DEFAULT_SIDES, show_default=True, help="ddp and alone are always among them.")
@click.option("--size", type=click.Choice(list(SIZES)), default="10M", show_default=True, help="Parameters of the model.")
@click.option("--pairs", type=click.IntRange(1), default=11, show_default=True, help="Windows of each side.")
@click.option("--window-s", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Seconds of a window.")
@click.option("--quick", is_flag=True, help="A smoke run: the tiny model, 2 pairs, windows of 0.1 s. Its numbers mean nothing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all windows there.")
def main(
    n: int | None, shapes: list[tuple[int, int]], names: list[str], size: str, pairs: int, window_s: float, quick: bool, json_path: Path | None
) -> None:
    """Measure train steps of a GPT: ringfold beside torch's own parallelism, and beside processes that do not communicate."""
    if n is not None:
        run_on_ranks("ringfold.benchmarks.train_step", n)
    if quick:
        size, pairs, window_s = "tiny", 2, 0.1
    os.environ.setdefault("RINGFOLD_DEVICE", "cpu")  # all sides are measured there
    mesh = rf.init()
    comm = mesh.world
    show = click.echo if comm.rank == 0 else lambda _: None
    missing = [name for name in names if name in _deepspeed.STAGES and not _deepspeed.is_installed()]
    names = [name for name in SIDES if name in {*names, "ddp", "alone"} - {*missing}]
    rows = []
    show(HEADER)
    with gloo(comm):
        for shape in shapes:
            for row in measure(mesh, names, size, *shape, pairs, window_s):
                rows.append(row)
                show(line_of(row))
    run = describe_run(comm)
    if not _deepspeed.STAGES.keys().isdisjoint(names):
        run["versions"]["deepspeed"] = _deepspeed.version()
    settings = {"size": size, "pairs": pairs, "window_s": window_s, "optimizer": "AdamW(fused=True)"}
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    show("".join(f"\nnot installed: {name} (make peers)" for name in missing))
    show(f"{run['machine']}; {versions}; {run['ranks']} ranks, {run['threads_per_rank']} thread(s) each; {chosen}\n{run['command']}")
    if json_path is not None and comm.rank == 0:
        write_json(json_path, {"benchmark": "train_step", **run, **settings, "not_installed": missing, "rows": rows})
    rf.shutdown()


if __name__ == "__main__":
    main()
