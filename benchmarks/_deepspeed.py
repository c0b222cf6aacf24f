"""DeepSpeed's ZeRO as sides of train_step: deepspeed1, deepspeed2, deepspeed3.

`make peers` installs it into an environment of its own, which holds no torch. What is there comes last on this process's path, so DeepSpeed sees our
torch and numpy, and its ranks are those of the other sides. It talks over gloo: its backend for oneCCL needs a binding to torch that no package
index has, and of its own shared memory only an all-reduce for inference makes use.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import warnings
from typing import Any

import torch
from ringfold.benchmarks._libraries import PEERS
from torch import Tensor, nn

__all__ = ["STAGES", "is_installed", "version", "whole_parameters", "zero"]

STAGES = {"deepspeed1": 1, "deepspeed2": 2, "deepspeed3": 3}
_VENV = PEERS / "deepspeed"


def is_installed() -> bool:
    return (_VENV / "ready").exists()


def _library() -> Any:
    site = sysconfig.get_path("purelib", "venv", {"base": str(_VENV)})
    if site not in sys.path:
        sys.path.append(site)
        os.environ["DS_ACCELERATOR"] = "cpu"
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # one for every collective that it issues
        ops = importlib.import_module("deepspeed.ops")
        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs for what ZeRO does not call
    return importlib.import_module("deepspeed")


def version() -> str:
    return str(_library().__version__)


def zero(module: nn.Module, optimizer: torch.optim.Optimizer, stage: int, rows: int) -> Any:
    """Return DeepSpeed's engine for a module and its optimizer; all but the stage is its default, except that it clips nothing, as no side does."""
    settings = {"train_micro_batch_size_per_gpu": rows, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    return _library().initialize(model=module, optimizer=optimizer, config=settings)[0]


def whole_parameters(engine: Any) -> list[Tensor]:
    """Return copies of all parameters; collective under stage 3."""
    parameters = list(engine.parameters())
    with _library().zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]
