"""Train steps of a GPT whose layers are divided: ringfold's `tpN` beside torch's DTensor over gloo, and beside the same parts that do not talk.

    ringfold bench tensor_parallel -n 2

All sides live in the same processes and train on the same rows with the same fused AdamW. They take turns in windows of some seconds, in an order
that rotates; a window's time is that of the slowest rank. The ceiling computes what a rank of `tpN` computes, and tells nobody.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import ringfold as rf
import torch
import torch.nn.functional as F
from ringfold.benchmarks._driver import Spread, describe_run, gloo, run_on_ranks, write_json
from ringfold.benchmarks._model import VOCABULARY, next_byte_loss, random_batches
from ringfold.benchmarks.train_step import WARMUP_STEPS, Side, adamw, run_steps
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

SIDES = ("engine", "dtensor", "alone")
HEADS = 4


class Block(nn.Module):
    """With three products for q, k and v, and views that do not name the number of heads: DTensor's plans need both."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        y_BTD = self.norm_1(x_BTD)
        q, k, v = (part(y_BTD).view(B, T, -1, D // HEADS).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, -1))
        output: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return output


class GPT(nn.Module):
    def __init__(self, dim: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(dim) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary]."""
        logits_BTV: Tensor = self.head(self.norm(self.blocks(self.embed(ids_BT) + self.position[: ids_BT.shape[1]])))
        return logits_BTV


class _Silent:
    """Stands in for a communicator: nothing is sent, and sums are this rank's terms."""

    def empty(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def all_reduce(self, *_: Any, **__: Any) -> None: ...

    def all_gather(self, *_: Any, **__: Any) -> None: ...


def make_side(name: str, mesh: rf.DeviceMesh, build: Callable[[], GPT]) -> Side:
    """Build a side; every one starts from the same parameters."""
    torch.manual_seed(0)
    module = build()
    if name == "dtensor":
        return dtensor_side(module)
    engine = rf.Engine(module, mesh, loss=next_byte_loss, optimizer=adamw)
    if name == "alone":
        assert engine._division.tensor is not None  # the layout has tp
        engine._division.tensor.axis.comm = _Silent()  # type: ignore[assignment]
    return Side(name, module, engine.optimizer, engine.train_step)


def dtensor_side(module: GPT) -> Side:
    mesh = DeviceMesh("cpu", list(range(torch.distributed.get_world_size())))
    columns = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    for block in module.blocks:
        parallelize_module(block, mesh, {**columns, "out": RowwiseParallel(), "down": RowwiseParallel()})
    ends = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(module, mesh, ends)
    parameters = list(module.parameters())
    divided = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    optimizer = adamw([{"params": divided}, {"params": [parameter for parameter in parameters if not isinstance(parameter, DTensor)]}])

    def step(batch: tuple[Tensor, Tensor]) -> float:
        loss = next_byte_loss(module(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Side("dtensor", module, optimizer, step)


def measure(mesh: rf.DeviceMesh, dim: int, layers: int, rows: int, tokens: int, pairs: int, window_s: float) -> list[dict[str, Any]]:
    """Run all sides in turns and return one row for each."""
    comm = mesh.world
    sides = [make_side(name, mesh, lambda: GPT(dim, layers, tokens)) for name in SIDES]
    batches = random_batches(8, rows, tokens, seed=0)
    losses = [side.step(batches[0]) for side in sides]
    if not math.isclose(losses[0], losses[1], rel_tol=1e-4):  # type: ignore[arg-type]
        raise click.ClickException(f"the sides do not train the same model: losses {losses[:2]}")
    warm_s = [run_steps(comm, side, batches, WARMUP_STEPS)[0] for side in sides]
    steps = [max(1, math.ceil(window_s * WARMUP_STEPS / seconds)) for seconds in warm_s]
    for number in range(pairs):
        for i in range(len(sides)):
            place = (i + number) % len(sides)
            seconds, cpu_s = run_steps(comm, sides[place], batches, steps[place])
            sides[place].samples_per_s.append(rows * steps[place] / seconds)
            sides[place].cpu_s_per_step.append(cpu_s / steps[place])
    by_name = {side.name: Spread.of(side.samples_per_s) for side in sides}
    return [
        {
            "side": side.name,
            "samples_per_s": by_name[side.name].median,
            "samples_per_s_low": by_name[side.name].low,
            "samples_per_s_high": by_name[side.name].high,
            "windows": side.samples_per_s,
            "times_dtensor": by_name[side.name].median / by_name["dtensor"].median,
            "share_of_ceiling": by_name[side.name].median / by_name["alone"].median,
            "cpu_s_per_step": Spread.of(side.cpu_s_per_step).median,
        }
        for side in sides
    ]


HEADER = "| side | samples/s (lowest to highest) | times DTensor | of ceiling | CPU s/step |\n|---|---|---|---|---|"


def line_of(row: dict[str, Any]) -> str:
    spread = f"{row['samples_per_s']:.2f} ({row['samples_per_s_low']:.2f} to {row['samples_per_s_high']:.2f})"
    return f"| {row['side']} | {spread} | {row['times_dtensor']:.3f} | {row['share_of_ceiling']:.3f} | {row['cpu_s_per_step']:.3f} |"


@click.command()
@click.option("-n", "n", type=click.IntRange(2, HEADS), help="Start that many ranks; without it, this is one of a job's.")
@click.option("--dim", type=click.IntRange(HEADS), default=128, show_default=True, help="Width of the model; 128 makes 0.9 M parameters.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=4, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--pairs", type=click.IntRange(1), default=11, show_default=True, help="Windows of each side.")
@click.option("--window-s", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Seconds of a window.")
@click.option("--quick", is_flag=True, help="A smoke run: 2 pairs, windows of 0.1 s. Its numbers mean nothing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all windows there.")
def main(n: int | None, dim: int, layers: int, rows: int, tokens: int, pairs: int, window_s: float, quick: bool, json_path: Path | None) -> None:
    """Measure train steps of a GPT whose layers are divided, beside torch's DTensor."""
    if n is not None:
        run_on_ranks("ringfold.benchmarks.tensor_parallel", n)
    if quick:
        pairs, window_s = 2, 0.1
    os.environ.setdefault("RINGFOLD_DEVICE", "cpu")  # all sides are measured there
    world = rf.init()
    mesh = rf.DeviceMesh(rf.Layout.parse(f"dp1 tp{world.size}"), world.world)
    comm = mesh.world
    show = click.echo if comm.rank == 0 else lambda _: None
    with gloo(comm):
        rows_measured = measure(mesh, dim, layers, rows, tokens, pairs, window_s)
    show("\n".join([HEADER, *map(line_of, rows_measured)]))
    run = describe_run(comm)
    settings = {"dim": dim, "layers": layers, "shape": f"{rows}x{tokens}", "pairs": pairs, "window_s": window_s, "optimizer": "AdamW(fused=True)"}
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    show(f"\n{run['machine']}; {versions}; {run['ranks']} ranks, {run['threads_per_rank']} thread(s) each; {chosen}\n{run['command']}")
    if json_path is not None and comm.rank == 0:
        write_json(json_path, {"benchmark": "tensor_parallel", **run, **settings, "rows": rows_measured})
    rf.shutdown()


if __name__ == "__main__":
    main()
