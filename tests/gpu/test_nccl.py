"""What of NCCL one GPU can show: a job's store serves it, and its collectives, of one rank, give what one process computes.

Several GPUs have not been at hand: the rounds of schedules (tests/unit/test_rounds.py) and the arguments of collectives
(tests/torch_distributed/test_run_collective.py) are tested on CPUs.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from ringfold.collectives.store import Store, StoreServer
from ringfold.collectives.transport import Request

pytestmark = pytest.mark.gpu

SECRET = b"a secret of more than sixteen bytes"


def test_nccl_meets_through_the_jobs_store_and_its_collectives_of_one_rank_are_right() -> None:
    import torch.distributed as dist
    from ringfold.collectives.cuda.nccl import JobStore, run_collective, why_not_native

    device = torch.device("cuda", 0)
    with StoreServer(SECRET) as server, Store(server.address, SECRET, 20.0) as client:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=20)
        store = JobStore(client, "test/", 20.0)
        group = dist.ProcessGroupNCCL(store, 0, 1, options)
        group.eager_connect_single_device(device)
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
            values = torch.arange(1001, device=device).remainder(2).to(dtype)
            for op in ("all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather"):
                for reduction in ("sum", "prod", "max") + (() if dtype is torch.bool else ("avg",)):
                    vector = values.clone()
                    output = vector if op in ("all_reduce", "reduce", "broadcast") else torch.zeros_like(values)
                    counts = (1001,)
                    inputs, outputs = (counts if op == "reduce_scatter" else None), (counts if op == "all_gather" else None)
                    request = Request(op, reduction, dtype, 1001, vector, output, inputs, outputs, root=0)
                    if why_not_native(request) is None:
                        run_collective(group, request, 0, 1)
                        torch.cuda.synchronize()
                        assert torch.equal(output, values), f"{op} {dtype} {reduction}"
        sent, received = torch.arange(9.0, device=device), torch.zeros(9, device=device)
        group._start_coalescing()
        group.send([sent.view(torch.uint8)], 0, 0)
        group.recv([received.view(torch.uint8)], 0, 0)
        group._end_coalescing().wait()
        torch.cuda.synchronize()
        assert torch.equal(sent, received)
        group.shutdown()
