"""What torch builds on process groups, over ours: after three steps every parameter is the one that a single process has trained, in float64.

The bound: a value passes through some hundred operations a step, each off by a factor of at most 1 + 2**-53, so 3 x 100 x 1.1e-16 = 3e-14; BOUND
leaves a factor of 30 for cancellation. A missing or repeated contribution is off by more than 1e-3. Sizes are uneven, but for the one dimension
between two layers that torch's tensor parallelism needs even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.harness import run_ranks
from tests.torch_distributed.groups import ringfold_group

ROWS, STEPS, BOUND = 4, 3, 1e-12


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 14), nn.GELU(), nn.Linear(14, 11), nn.GELU(), nn.Linear(11, 5)).double()


def batch(step: int, ranks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(ROWS * ranks, width, dtype=torch.float64, generator=generator) for width in (7, 5))  # type: ignore[return-value]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int, steps: int = STEPS) -> None:
    for step in range(steps):
        x, y = (part.chunk(size)[rank] for part in batch(step, size))
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def oracle(size: int, steps: int = STEPS) -> dict[str, Tensor]:
    """Train alone, on the rows of all ranks."""
    model = make_model()
    optimizer = sgd(model)
    for step in range(steps):
        x, y = batch(step, size)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def agree(named: Any, expected: dict[str, Tensor]) -> None:
    seen = 0
    for name, value in named:
        full = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(full.detach(), expected[name], rtol=BOUND, atol=BOUND)
        seen += 1
    assert seen == len(expected)


def check_ddp(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        expected = oracle(size)
        for options in ({}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, {"static_graph": True}):
            model = DistributedDataParallel(make_model(), **options)
            train(model, sgd(model), rank, size)
            agree(model.module.named_parameters(), expected)
        sharded = DistributedDataParallel(make_model())
        train(sharded, ZeroRedundancyOptimizer(sharded.parameters(), torch.optim.SGD, lr=0.3, momentum=0.9), rank, size)
        agree(sharded.module.named_parameters(), expected)
        hooked = DistributedDataParallel(make_model(), bucket_cap_mb=0.001)
        hooked.register_comm_hook(None, default_hooks.allreduce_hook)
        train(hooked, sgd(hooked), rank, size)
        agree(hooked.module.named_parameters(), expected)


def check_ddp_sparse(folder: str) -> None:
    """Each rank looks up rows of its own and some of the others'."""
    with ringfold_group(folder) as (rank, size):
        torch.manual_seed(0)
        table = nn.Embedding(11, 3, sparse=True).double()
        alone = nn.Embedding(11, 3, _weight=table.weight.detach().clone())
        rows = [torch.tensor([r, r + 1, 10, r]) for r in range(size)]
        model = DistributedDataParallel(table)
        for _ in range(2):  # DDP arranges its buckets anew after the first
            model.zero_grad()
            model(rows[rank]).pow(2).sum().backward()
        (alone(torch.cat(rows)).pow(2).sum() / size).backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), alone.weight.grad, rtol=BOUND, atol=BOUND)


def check_ddp_hooks_and_join(folder: str) -> None:
    """Compressed gradients differ from the exact ones, but not between ranks; with Join a rank may run out of rows."""
    with ringfold_group(folder) as (rank, size):
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5)
        for hook_state, hook in ((None, default_hooks.fp16_compress_hook), (state, powerSGD_hook.powerSGD_hook)):
            model = DistributedDataParallel(make_model().float(), bucket_cap_mb=0.001)
            model.register_comm_hook(hook_state, hook)
            optimizer = sgd(model)
            for step in range(5):
                x, y = (part.float().chunk(size)[rank] for part in batch(step, size))
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
            mine = torch.cat([p.detach().flatten() for p in model.parameters()])
            everyone = torch.empty(size, len(mine))
            dist.all_gather_into_tensor(everyone, mine)
            assert all(torch.equal(other, mine) for other in everyone)
        model = DistributedDataParallel(make_model())
        optimizer = sgd(model)
        with Join([model]):
            for step in range(STEPS + rank):
                optimizer.zero_grad()
                model(batch(step, 1)[0]).sum().backward()
                optimizer.step()
        dist.barrier()


def check_fsdp1(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
            model = FullyShardedDataParallel(make_model(), sharding_strategy=strategy, device_id=torch.device("cpu"), use_orig_params=True)
            train(model, sgd(model), rank, size)
            with FullyShardedDataParallel.summon_full_params(model):
                agree(model.module.named_parameters(), oracle(size))


def shard(model: nn.Sequential, mesh: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fsdp2(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        for own_memory in (False, True):
            model = shard(make_model(), init_device_mesh("cpu", (size,)))
            model.set_allocate_memory_from_process_group_for_comm(own_memory)
            train(model, sgd(model), rank, size)
            agree(model.named_parameters(), oracle(size))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert norm.full_tensor() > 0


def check_hsdp(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        model = shard(make_model(), init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
        train(model, sgd(model), rank, size)
        agree(model.named_parameters(), oracle(size))


def check_tensor_parallel(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
        model = parallelize_module(make_model(), mesh["tp"], plan)
        model = fully_shard(model, mesh=mesh["dp"])
        train(model, sgd(model), mesh["dp"].get_local_rank(), size // 2)
        agree(model.named_parameters(), oracle(size // 2))
        assert rank == dist.get_rank()


def check_dtensor(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        mesh = init_device_mesh("cpu", (size,))
        whole = torch.arange(7.0 * 5).view(7, 5)
        for placement in (Shard(0), Shard(1), Replicate()):
            tensor = distribute_tensor(whole, mesh, [placement])
            assert torch.equal(tensor.full_tensor(), whole)
            for other in (Shard(0), Shard(1), Replicate()):
                assert torch.equal(tensor.redistribute(placements=[other]).full_tensor(), whole)
        partial = DTensor.from_local(whole * (rank + 1), mesh, [Partial()])
        total = whole * (size * (size + 1) // 2)
        assert torch.equal(partial.full_tensor(), total)
        assert torch.equal(partial.redistribute(placements=[Shard(0)]).full_tensor(), total)
        left, right = distribute_tensor(whole, mesh, [Shard(1)]), distribute_tensor(whole.t().contiguous(), mesh, [Shard(0)])
        assert torch.equal((left @ right).full_tensor(), whole @ whole.t())


def exchange(x: Tensor) -> Tensor:
    """Use each functional collective once; x has as many rows as there are ranks."""
    group, size = dist.group.WORLD, dist.get_world_size()
    total = funcol.all_reduce(x, "sum", group)
    rows = funcol.reduce_scatter_tensor(total * x, "avg", 0, group)
    everyone = funcol.all_gather_tensor(rows, 0, group)
    swapped = funcol.all_to_all_single(everyone + x, [1] * size, [1] * size, group)
    return funcol.broadcast(swapped * 2, 1, group) + swapped


def exchanged(rank: int, inputs: list[Tensor]) -> Tensor:
    """Return what `exchange` gives this rank, worked out from everybody's inputs."""
    size, total = len(inputs), sum(inputs)
    everyone = torch.stack([sum(total[r] * x[r] for x in inputs) / size for r in range(size)])
    swapped = [torch.stack([(everyone + inputs[source])[r] for source in range(size)]) for r in range(size)]
    return swapped[1] * 2 + swapped[rank]


def check_functional_and_compiled(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        inputs = [torch.arange(size * 5.0, dtype=torch.float64).view(size, 5) * size + r for r in range(size)]
        expected = exchanged(rank, inputs)
        torch.testing.assert_close(exchange(inputs[rank]), expected, rtol=BOUND, atol=0)
        compiled = torch.compile(exchange, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs[rank]), expected, rtol=BOUND, atol=0)

        @torch.compile(backend="aot_eager")  # type: ignore[untyped-decorator]
        def in_place(x: Tensor) -> Tensor:
            y = x + 1
            dist.all_reduce(y)
            return y * 2

        assert torch.equal(in_place(inputs[rank]), (sum(inputs) + size) * 2)
        several = funcol.all_reduce_coalesced([x.clone() for x in (inputs[rank], inputs[rank][0])], "max", dist.group.WORLD)
        assert torch.equal(several[1], inputs[-1][0])
        gathered = funcol.all_gather_into_tensor_coalesced([inputs[rank], inputs[rank][:1]], dist.group.WORLD)
        assert torch.equal(gathered[0], torch.cat(inputs))

        model = DistributedDataParallel(make_model())
        train(torch.compile(model, backend="aot_eager"), sgd(model), rank, size)
        agree(model.module.named_parameters(), oracle(size))


def check_checkpoint(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        mesh = init_device_mesh("cpu", (size,))
        model = shard(make_model(), mesh)
        optimizer = sgd(model)
        train(model, optimizer, rank, size)
        dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/now")
        # A group of its own: the saving thread communicates while training goes on.
        saved = dcp.async_save({"model": model.state_dict()}, checkpoint_id=f"{folder}/later", process_group=dist.new_group())
        train(model, optimizer, rank, size)
        saved.result(timeout=60)
        for checkpoint in ("now", "later"):
            other = shard(make_model(), mesh)
            state = {"model": other.state_dict()}
            dcp.load(state, checkpoint_id=f"{folder}/{checkpoint}")
            agree(other.named_parameters(), oracle(size))


def check_pipeline(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        x, y = batch(0, size)
        microbatches = 6
        alone = make_model()
        for rows, targets in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            (F.mse_loss(alone(rows), targets) / microbatches).backward()
        grads = {name: p.grad for name, p in alone.named_parameters()}
        cpu = torch.device("cpu")
        for schedule, each in ((ScheduleGPipe, 1), (Schedule1F1B, 1), (ScheduleInterleaved1F1B, 2)):
            stages = size * each
            cuts = [round(i * 5 / stages) for i in range(stages + 1)] if each == 1 else [0, 1, 2, 3, 4, 5, 5]
            model = make_model()
            parts = [model[cuts[i] : cuts[i + 1]] if cuts[i] < cuts[i + 1] else nn.Identity() for i in range(stages)]
            mine = range(rank, stages, size)
            built = [PipelineStage(parts[i], i, stages, cpu) for i in mine]
            runner = schedule(built if each > 1 else built[0], microbatches, loss_fn=F.mse_loss)  # type: ignore[arg-type]
            arguments = (x,) if rank == 0 else ()
            runner.step(*arguments, target=y if stages - 1 in mine else None)
            own = {id(p) for i in mine for p in parts[i].parameters()}
            named = [(name, p.grad) for name, p in model.named_parameters() if id(p) in own]
            agree(named, {name: grads[name] for name, _ in named})  # type: ignore[misc]


def of_size(size: int, *checks: Callable[[str], None]) -> Iterator[Any]:
    for check in checks:
        yield pytest.param(check, size, id=check.__name__.removeprefix("check_"))


@pytest.mark.parametrize(
    ("check", "size"),
    [
        *of_size(3, check_ddp, check_ddp_sparse, check_ddp_hooks_and_join, check_fsdp1, check_fsdp2, check_dtensor, check_functional_and_compiled),
        *of_size(3, check_checkpoint, check_pipeline),
        *of_size(4, check_hsdp, check_tensor_parallel),
    ],
)
def test_torchs_own_parallelism_trains_as_one_process_would(check: Callable[[str], None], size: int, tmp_path: Any) -> None:
    run_ranks(size, check, str(tmp_path), timeout_s=90, joined=False)
