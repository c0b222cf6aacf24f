"""verify: does a layout have the numbers of one process?

    report = rf.verify(make_model, (x, y), F.cross_entropy, "dp4")          print(report); report.ok
    ringfold verify train.py:verified --layout "dp4"                        exits with 1 if it has not

One process of plain PyTorch in float64 (oracle.py) trains three clipped AdamW steps on uneven global batches; the ranks of the layout,
started on this host's CPU, train the same with Engine. Losses, every gradient by its name, the gradient norm, all weights and buffers are
compared, and every rank's weights with rank 0's, bit by bit. The first number that departs is named with both values, and with the cause
where the ratio gives it away.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import torch
from ringfold.collectives.errors import ConfigError, RingfoldError, nearest
from ringfold.parallel.layout import Layout
from ringfold.runtime import context
from ringfold.runtime.batch import Batch
from ringfold.runtime.comparison import Report, compare
from ringfold.runtime.engine import Engine
from ringfold.runtime.float64 import Float64
from ringfold.runtime.local_ranks import run_local_ranks
from ringfold.runtime.oracle import Step, build, check_repeatable, make_optimizer, shape_batches, snapshot, train_plainly
from ringfold.runtime.rows import row_range, take_rows
from torch import Tensor, nn

__all__ = ["Report", "verify"]

Subject = tuple[Callable[[], nn.Module] | nn.Module, Any, Callable[..., Any]]


def verify(
    model_fn: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    loss: Callable[..., Any],
    layout: str | Layout,
    *,
    clip_norm: float | None = None,
    timeout_s: float = 300.0,
) -> Report:
    """Train three steps under a layout and in one process, and return how their numbers compare.

    `batch` is a global batch as `train_step` takes it, of at least dp + 2 rows; it is cut into three. `clip_norm` is half of the first
    gradient's norm by default. Model and loss are sent to other processes by name: functions that a module defines, not lambdas.

    Raises: ConfigError where the check cannot be made; whatever a rank raised.
    """
    for name, value in (("model_fn", model_fn), ("loss", loss), ("batch", batch)):
        _require_importable(name, value)
    return _verify(functools.partial(_given, model_fn, batch, loss), layout, clip_norm, timeout_s)


def _verify(source: Callable[[], Subject], layout: str | Layout, clip_norm: float | None, timeout_s: float) -> Report:
    began = time.perf_counter()
    wanted = Layout.parse(layout) if isinstance(layout, str) else layout
    wanted = replace(wanted, dp=wanted.dp or 2, precision="fp64")
    size = wanted.world_size
    wanted.resolve(size).require_built()
    with Float64():
        model_fn, batch, loss = source()
        model = build(model_fn)
        batches = shape_batches(model, batch, loss, wanted.dp or 1)
        check_repeatable(model, batches[0], loss)
        initial = {name: value.clone() for name, value in model.state_dict().items()}
        expected, clip_norm = train_plainly(model, batches, loss, clip_norm, (wanted.dp or 1) * wanted.micro)
    job = _RankJob(source, str(wanted), batches, initial, clip_norm)
    found, digests = zip(*run_local_ranks(size, _train_rank, job, timeout_s), strict=True)
    return compare(wanted, expected, found[0], list(digests), time.perf_counter() - began)


@dataclass(frozen=True)
class _RankJob:
    """What a rank is to train; the batches are sent, since a script that draws them would draw others."""

    source: Callable[[], Subject]
    layout: str
    batches: list[Batch]
    initial: dict[str, Tensor]
    clip_norm: float


def _train_rank(job: _RankJob) -> tuple[list[Step], list[str]]:
    """Train as one rank of the layout; only rank 0's steps are returned, the others' weights are told by their digests."""
    mesh = context.init(job.layout)
    try:
        with Float64():
            model_fn, _, loss = job.source()
            engine = Engine(functools.partial(build, model_fn), mesh, loss=loss, optimizer=make_optimizer, clip_norm=job.clip_norm)
            engine.load_state_dict(job.initial)
            steps, digests = [], []
            for whole in job.batches:
                mine = take_rows((whole.inputs, whole.target), *row_range(whole.rows, mesh["dp"].rank, mesh["dp"].size))
                value = engine.train_step(mine)
                with engine.whole_parameters():
                    _, weights = snapshot(engine.module)
                grads = {name: _dense(engine.grad(name)) for name, _ in engine.module.named_parameters()}
                digests.append(_digest(weights))
                steps.append(Step(whole.rows, value, engine.grad_norm, grads, weights))
        return (steps if mesh.rank == 0 else []), digests
    finally:
        context.shutdown()


def _dense(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.to_dense().cpu()


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for value in weights.values():
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _given(model_fn: Callable[[], nn.Module] | nn.Module, batch: Any, loss: Callable[..., Any]) -> Subject:
    return model_fn, batch, loss


def _from_script(path: str, function: str) -> Subject:
    """Run a script as a module (not as __main__) and call its function for model_fn, batch and loss."""
    name = f"verified_{Path(path).stem}"  # no other module is called that
    if name not in sys.modules or getattr(sys.modules[name], "__file__", None) != path:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"verify: {path} is not a Python file.")
        sys.path.insert(0, str(Path(path).parent))
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    module = sys.modules[name]
    found = getattr(module, function, None)
    if not callable(found):
        meant = nearest(function, [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")])
        raise ConfigError(f"verify: {path} has no function {function!r}" + (f"; did you mean {meant!r}?" if meant else "."))
    value = found()
    if isinstance(value, Mapping) and set(value) == {"model_fn", "batch", "loss"}:
        return value["model_fn"], value["batch"], value["loss"]
    if isinstance(value, tuple) and len(value) == 3:
        return value
    raise ConfigError(
        f"verify: {path}:{function}() must return (model_fn, batch, loss), or a dict with these three keys; it returned {type(value).__name__}."
    )


def _require_importable(name: str, value: Any) -> None:
    main = sys.modules["__main__"]
    interactive = getattr(value, "__module__", None) == "__main__" and not hasattr(main, "__file__")
    try:
        pickle.dumps(value)
    except Exception as error:
        reason = str(error)
    else:
        if not interactive:
            return
        reason = "it was defined interactively"
    raise ConfigError(
        f"verify: {name} ({getattr(value, '__qualname__', type(value).__name__)}) cannot be sent to other processes ({reason}). "
        "They import functions by name, which a lambda or an inner function does not have: define it with def at the top of a module."
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("subject", metavar="SCRIPT.py:FUNCTION")
@click.option("--layout", required=True, help='What to verify, such as "dp4" or "dp2 micro3".')
@click.option("--clip-norm", type=float, default=None, help="Default: half of the first gradient's norm.")
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="Seconds for all ranks together.")
def main(subject: str, layout: str, clip_norm: float | None, timeout_s: float) -> None:
    """Check that a layout has the numbers of one process.

    FUNCTION in SCRIPT.py returns (model_fn, batch, loss): a function that builds the model, a global batch, and the loss.
    """
    try:
        path, colon, function = subject.rpartition(":")
        if not (colon and path and function.isidentifier()):
            raise ConfigError(f"verify: expected SCRIPT.py:FUNCTION, got {subject!r}.")
        if not Path(path).is_file():
            raise ConfigError(f"verify: there is no file {path}.")
        report = _verify(functools.partial(_from_script, str(Path(path).resolve()), function), layout, clip_norm, timeout_s)
    except RingfoldError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    report.print()
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    # Under its own name, which the ranks can import.
    from ringfold.runtime.verify import main as imported_main

    imported_main(prog_name="ringfold verify")
