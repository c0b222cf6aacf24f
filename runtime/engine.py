"""Engine: one training step, the same call for every layout.

    passes     forward and backward of each microbatch, gradients summed over ranks (passes.py)
    update     norm, clip and the optimizer's step, on the parameters or on this rank's pieces (update.py), then the scheduler

So the gradient is that of the mean over the global batch, whatever the number of ranks and microbatches and however unevenly rows and valid
targets fall on them. A rank without rows contributes zero and still takes part.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.mixed_precision.casting import Casting
from ringfold.mixed_precision.fp8 import Fp8
from ringfold.mixed_precision.linears import QuantisedLinears
from ringfold.mixed_precision.loss_scaler import LossScaler
from ringfold.mixed_precision.precision import Precision
from ringfold.parallel.batch_norm import synchronise_batch_norm
from ringfold.parallel.blocks import find_blocks
from ringfold.parallel.bucket import own_dtype
from ringfold.parallel.buckets import GradientBuckets
from ringfold.parallel.deferred.model import Deferred
from ringfold.parallel.mesh import DeviceMesh
from ringfold.parallel.recompute.offload import HostOffload
from ringfold.parallel.recompute.recomputation import Recomputation
from ringfold.parallel.reducer import GradientReducer
from ringfold.parallel.sparse import sparse_parameter_names
from ringfold.parallel.tensor.plan import Plan
from ringfold.parallel.traffic import Traffic
from ringfold.parallel.zero.sharding import Sharding
from ringfold.runtime import checkpoint, memory
from ringfold.runtime.activations import activations_nbytes
from ringfold.runtime.batch import Batch
from ringfold.runtime.construction import construct
from ringfold.runtime.data import ShardedData, shard
from ringfold.runtime.division import Division
from ringfold.runtime.evaluation import Metric, evaluate, gather_rows
from ringfold.runtime.exact import ShardRandom, require_no_batch_norm
from ringfold.runtime.explanation import Explanation, ParameterUse, uses_of_parameters
from ringfold.runtime.loss import loss_rule
from ringfold.runtime.model_state import ModelState
from ringfold.runtime.optimizer import make_optimizer, make_scheduler
from ringfold.runtime.passes import Passes
from ringfold.runtime.update import Update
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Engine"]


class Engine:
    """Train a model on the ranks of a mesh.

    `model` is a module, or a function that builds one, of which no rank then holds all under zero3; every rank starts with rank 0's state.
    `loss(output, target)` follows the rule in loss.py. `optimizer` is a function of the list of parameters, `scheduler` one of the optimizer,
    stepped after each train step. `clip_norm` bounds the global gradient norm. `metrics` are functions (output, target) for `eval_step`, which
    return what a loss may return. `plan` says which parameters tp divides (parallel/tensor/plan.py), by default what names and classes tell.
    `blocks` are patterns of the names of the modules that the layout's `recompute` works on, by default the children of containers;
    `recomputation.explain()` tells what became of each. `offload_activations` moves what they save for backward to host memory, on a GPU.
    `fp8` says how that word of the layout chooses its scales.
    Collective, like all its methods but the plain attributes: every rank calls them in the same order.

    `step` is the number of train steps done, `seconds` and `communication_share` the last step's time and the part of it that this rank
    waited for others.

    Raises: ConfigError, with what differs, if ranks hold different models; PrecisionError, LayoutError for what is not built.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        mesh: DeviceMesh,
        *,
        loss: Callable[..., Any],
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        clip_norm: float | None = None,
        metrics: Mapping[str, Metric] | None = None,
        plan: Plan | None = None,
        sync_batch_norm: bool = True,
        bucket_mb: float = 25.0,
        blocks: Sequence[str] | None = None,
        offload_activations: bool = False,
        keep_float32: Sequence[str] = (),
        reduce_dtype: torch.dtype | None = None,
        fp8: Fp8 | None = None,
    ) -> None:
        mesh.layout.require_built()
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm is {clip_norm}, expected a norm above 0, or None for no clipping.")
        if metrics and "loss" in metrics:
            raise ConfigError("metrics: the name 'loss' is taken by the loss itself.")
        self.mesh = mesh
        self._comm = mesh["dp"]
        precision = Precision.named(mesh.layout.precision)
        self._cast = precision.cast
        self._exact = mesh.layout.exact
        self._micro = mesh.layout.micro if self._exact is None else self._exact // self._comm.size
        self._rule = loss_rule(loss)
        self._metrics = dict(metrics or {})
        built = construct(model, mesh.world, mesh.device, precision, in_shards=mesh.layout.zero == 3 and mesh.layout.tp == 1)
        self.module = built.module
        self._division = Division(self.module, mesh, plan)
        self._replicas = mesh["dp", "cp"]  # the ranks that have the same part of the model
        if self._exact is not None:
            require_no_batch_norm(self.module)
        elif sync_batch_norm:
            synchronise_batch_norm(self.module, self._comm)
        self._casting = Casting(self.module, precision.compute, keep_float32) if precision.compute else None
        self._linears: QuantisedLinears | None = None
        if self._casting is not None and precision.quantises:
            self._linears = QuantisedLinears(self.module, find_blocks(self.module, blocks), self._casting, self._replicas, fp8 or Fp8(), mesh.device)
        self._random = ShardRandom(self._comm.broadcast_object(torch.initial_seed()), mesh.device) if self._exact is not None else None
        offload = HostOffload.of_gpu(mesh.device) if offload_activations else None
        self.recomputation = Recomputation(self.module, mesh.layout, mesh.world, blocks=blocks, offload=offload)
        self.recomputation.around = self._division.running
        self._sharding = self._sharded(built.deferred, bucket_mb, blocks, reduce_dtype)
        self._reducer: GradientReducer[Any]
        if self._sharding is not None:
            self.recomputation.before_recompute = self._sharding.gather
            self._reducer = self._sharding.gradients
        else:
            self._reducer = GradientBuckets(
                self.module.named_parameters(), self._replicas, averaged=False, bucket_mb=bucket_mb, sparse=sparse_parameter_names(self.module)
            )
        self._how_built = built.how
        self._state = ModelState(self.module, self._sharding, self._division, mesh.rank)
        self.optimizer = make_optimizer(optimizer, self.module)
        if self._sharding is not None:
            self._sharding.cut(self.optimizer)
        scaler = LossScaler() if precision.scales_loss else None
        is_exact = self._exact is not None
        self._update = Update(
            self.module, self._replicas, self.optimizer, self._sharding, self._division.tensor, clip_norm=clip_norm, scaler=scaler, is_exact=is_exact
        )
        self.scheduler = None if scheduler is None else make_scheduler(scheduler, self.optimizer)
        # Synchronised statistics, and the gathering of blocks, are collectives inside the model: a rank without rows then has to call it too.
        synchronises = any(getattr(part, "communicator", None) is not None for part in self.module.modules())
        self._passes = Passes(
            self.module,
            self._comm,
            self._rule,
            self._reducer,
            micro=self._micro,
            always_calls=synchronises or mesh.layout.zero == 3,
            random=self._random,
            before_final=self._update.begin_beside,
            widens=self._casting is not None,
        )
        self._shards: list[ShardedData] = []
        self._positions: list[dict[str, int]] = []
        self.step = 0
        self.seconds = 0.0
        self.communication_share = 0.0

    def _sharded(
        self, deferred: Deferred | None, bucket_mb: float, blocks: Sequence[str] | None, reduce_dtype: torch.dtype | None
    ) -> Sharding | None:
        """Return the model's shards, which exact sums and master copies need, too: without zero each rank is then a group that shares nothing."""
        layout, is_exact = self.mesh.layout, self._exact is not None
        if not (layout.zero or is_exact or self._casting is not None):
            return None
        return Sharding(
            self.module,
            self._replicas,
            layout.zero or 2,
            averaged=False,
            group_size=layout.zero_group if layout.zero else 1,
            bucket_mb=bucket_mb,
            blocks=blocks,
            exact=is_exact,
            dtype_of=own_dtype if self._casting is None else self._casting.dtype_of,
            reduce_dtype=torch.float32 if is_exact else reduce_dtype,
            one_backward=self._micro == 1,
            offload=layout.offload,
            deferred=deferred,
            device=self.mesh.device,
        )

    @property
    def count(self) -> float:
        """The last step's global count of the loss: valid tokens, rows, or whatever it counts."""
        return self._passes.mean.count

    def train_step(self, batch: Any) -> float:
        """Train on this rank's rows of a global batch and return the global mean loss, the same on every rank.

        Raises: ConfigError for a batch or a loss that does not fit the rules, and on every rank if the global batch has no valid target.
        OutOfMemory, on this rank, with what has the memory and which layouts need less.
        """
        began, waited = time.perf_counter(), self.mesh.seconds_waited
        try:
            loss = self._train_step(batch)
        except (RuntimeError, MemoryError, OSError) as error:
            if not memory.is_out_of_memory(error):
                raise
            shares = self._replicas.size if self._sharding is None else self._sharding.group_size
            raise memory.out_of_memory(error, f"train step {self.step + 1}", self.memory(), self._uses(), self.mesh.layout, shares) from error
        self.seconds = time.perf_counter() - began
        self.communication_share = (self.mesh.seconds_waited - waited) / self.seconds
        return loss

    def _train_step(self, batch: Any) -> float:
        parts = self._passes.microbatches(self._placed(batch))
        if not self.module.training:
            self.module.train()
        self._division.begin_step()
        with self._update.whole():
            loss, factor = self._passes.run(self.step, parts, self.loss_scale)
            is_taken = self._update.step(factor)
        if is_taken and self.scheduler is not None:
            self.scheduler.step()
        self.recomputation.finish_step()
        if self._linears is not None:
            self._linears.finish_step()
        self.step += 1
        self.mesh.world.page.set_progress(self.step)
        return loss

    def eval_step(self, batch: Any) -> dict[str, float]:
        """Return the global means of the loss ("loss") and of every metric over this rank's rows of a global batch."""
        return self.evaluate([batch])

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Return the global means of the loss and of every metric over all rows of several global batches, in evaluation mode.

        Raises: ConfigError: a train step failed when the optimizer had changed a part of the parameters.
        """
        if self._sharding is not None:
            self._sharding.require_whole()
        prepared = (self._placed(batch) for batch in batches)
        return evaluate(self._passes.output, self.module, prepared, self._rule, self._metrics, self._comm, always_calls=self._state.shards_parameters)

    def gather_metric(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, which is the order of the global batch; a 0-dim tensor is one row.

        Raises: ConfigError on every rank if their rows have different shapes or dtypes.
        """
        return gather_rows(rows, self._comm)

    @property
    def grad_norm(self) -> float:
        """The norm of the last step's gradient before clipping; not collective."""
        return self._update.norm

    def grad(self, name: str) -> Tensor | None:
        """Return a copy of the last step's gradient of a parameter, as the optimizer saw it; None if no rank used the parameter.

        Raises: ConfigError if there is no parameter of that name.
        """
        return self._state.grad(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the full model under its own names on rank 0, and an empty dict elsewhere.

        Tensors are the model's own, as torch's are; under zero3, and in bf16, fp16 and fp8, where they are float32, they are copies.
        """
        return self._state.whole()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a full model, the same on every rank, under its own names.

        Raises: RuntimeError, as torch's, if names or shapes differ.
        """
        self._state.load(state)

    def whole_parameters(self, *, write: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `module` has all its parameters whole on every rank: under zero3 the only time outside its own forward.

        With `write` what is changed inside, alike on all ranks, stays. Memory for the whole model is needed meanwhile.
        """
        return self._state.everything(write)

    def memory(self, batch: Any = None) -> dict[str, int]:
        """Return the bytes that this rank keeps between steps, by purpose, and what the system counts for the process; not collective.

        With this rank's rows of a global batch also those of "activations", what the forward of its first microbatch leaves for backward: it is
        run once, nothing is trained, and it is collective.
        """
        found = memory.account(self.module, self._sharding, self._reducer, self.optimizer)
        if batch is not None:
            placed = self._placed(batch)
            part = (self._passes.microbatches(placed) or [placed])[0]
            self.module.train()
            with contextlib.nullcontext() if self._linears is None else self._linears.scales.aside():
                found["activations"] = activations_nbytes(self.module, lambda: self._passes.loss(part))
        return found

    def _placed(self, batch: Any) -> Batch:
        self._division.require_same(batch, self.step + 1)
        return Batch.of(batch).to(self.mesh.device, self._cast)

    def explain(self, batch: Any = None) -> Explanation:
        """Return what the layout makes of the model: dtypes of every parameter, what a step sends, bytes of this rank; print it.

        Collective with a `batch`, as `memory`, and not without one.

        The state that an optimizer keeps is known after the first step where nothing is sharded.
        """
        traffic = self._reducer.traffic() if self._sharding is None else self._sharding.traffic(self._micro)
        if self._linears is not None and self._linears.scales.sent_nbytes and self._replicas.size > 1:
            traffic.append(Traffic("amaxes of fp8", "all_reduce", 1, self._linears.scales.sent_nbytes, self._replicas.size))
        shares, uses = self._replicas.size if self._sharding is None else self._sharding.group_size, self._uses()
        layout = replace(self.mesh.layout, zero=self.mesh.layout.zero or (0 if self._sharding is None else 2))
        predicted = memory.predict(uses, layout, shares)
        traffic += self._division.traffic()
        recomputation = self.recomputation.explain()
        return Explanation(
            str(self.mesh.layout),
            self.mesh.size,
            uses,
            traffic,
            self.memory(batch),
            predicted,
            recomputation,
            self._how_built,
            self._division.explain(),
        )

    def _uses(self) -> list[ParameterUse]:
        return uses_of_parameters(self.module, self._sharding, self._casting, self._linears, self.optimizer)

    def shard(self, source: Any, **options: Any) -> ShardedData:
        """Return this rank's rows of a source of global batches, as `rf.shard`; `save` and `resume` keep its position."""
        data = shard(source, self._comm, shards=self._exact, **options)
        self._shards.append(data)
        if self._positions:
            data.load_state_dict(self._positions.pop(0))
        return data

    def save(self, directory: str | PathLike[str], *, asynchronous: bool = False) -> Path:
        """Write a checkpoint into `directory`: model, optimizer, scheduler, step, random state, and the position in all sharded data.

        Every rank writes a share. If asynchronous, training goes on as soon as that is copied; the next save, and `close`, wait for it.

        Raises: CheckpointError on every rank, of this save or the last asynchronous one; what was there before is still there.
        """
        extra = {
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "data": [data.state_dict() for data in self._shards],
            "loss_scale": None if self._update.scaler is None else self._update.scaler.state_dict(),
            "fp8": None if self._linears is None else self._linears.state_dict(),
            "shard_seed": None if self._random is None else self._random.seed,
            "random": self.mesh.world.all_gather_object(checkpoint.random_state()),
        }
        return self._saver.save(
            directory,
            step=self.step,
            model_state=self._state.parts(),
            optimizer_state=checkpoint.optimizer_state_by_name(self.optimizer, self._state.pieces()),
            extra=extra,
            asynchronous=asynchronous,
        )

    @functools.cached_property
    def _saver(self) -> checkpoint.Saver:
        return checkpoint.Saver(self.mesh.world)

    def resume(self, directory: str | PathLike[str]) -> int:
        """Load a checkpoint, or the newest complete one of a folder of them, into everything that `save` wrote; return its step.

        Random state is restored where the number of ranks is the same.

        Raises: Incomplete, Corrupt, or Incompatible (with all differences, before anything is changed).
        """
        found = checkpoint.load(directory, comm=self.mesh.world)
        self._state.restore(found, self.optimizer)
        extra = found.extra()
        if self.scheduler is not None and extra["scheduler"] is not None:
            self.scheduler.load_state_dict(extra["scheduler"])
        self._positions = list(extra["data"])
        for data in self._shards[: len(self._positions)]:
            data.load_state_dict(self._positions.pop(0))
        if self._update.scaler is not None and extra.get("loss_scale") is not None:
            self._update.scaler.load_state_dict(extra["loss_scale"])
        if self._linears is not None and extra.get("fp8") is not None:
            self._linears.load_state_dict(extra["fp8"])
        if self._random is not None and extra.get("shard_seed") is not None:
            self._random.seed = extra["shard_seed"]
        if len(extra["random"]) == self.mesh.size:
            checkpoint.restore_random_state(extra["random"][self.mesh.rank])
        self.step = found.step
        return self.step

    def close(self) -> None:
        """Take hooks and recomputation off the model, close the communicator of the gradients, and wait for an asynchronous save; collective.

        `rf.shutdown()` does not need it. Raises: CheckpointError, if the last asynchronous save failed.
        """
        self._reducer.close()
        if self._sharding is not None:
            self._sharding.close()
        self.recomputation.close()
        self._division.close()
        if self._linears is not None:
            self._linears.close()
        if self._casting is not None:
            self._casting.close()
        if "_saver" in vars(self):
            self._saver.close()

    @property
    def loss_scale(self) -> float:
        """What the next step's loss is multiplied by, 1 but in fp16; `skipped_steps` counts those whose gradients were not finite."""
        return 1.0 if self._update.scaler is None else self._update.scaler.scale

    @property
    def skipped_steps(self) -> int:
        return 0 if self._update.scaler is None else self._update.scaler.skipped
