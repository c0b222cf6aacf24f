"""ringfold: run a PyTorch training script under any layout of parallelism, and prove that the numbers are right.

    import ringfold as rf

    mesh = rf.init()
    engine = rf.Engine(model, mesh, loss=F.cross_entropy, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4))
    for batch in engine.shard(loader):
        loss = engine.train_step(batch)

This is the front door: the public names, each imported when it is first used. Importing it imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator as Communicator
    from ringfold.collectives.errors import AuthenticationError as AuthenticationError
    from ringfold.collectives.errors import CheckpointError as CheckpointError
    from ringfold.collectives.errors import CollectiveMismatch as CollectiveMismatch
    from ringfold.collectives.errors import CollectiveTimeout as CollectiveTimeout
    from ringfold.collectives.errors import CommunicationError as CommunicationError
    from ringfold.collectives.errors import ConfigError as ConfigError
    from ringfold.collectives.errors import ConnectError as ConnectError
    from ringfold.collectives.errors import Corrupt as Corrupt
    from ringfold.collectives.errors import Incompatible as Incompatible
    from ringfold.collectives.errors import Incomplete as Incomplete
    from ringfold.collectives.errors import LaunchError as LaunchError
    from ringfold.collectives.errors import LayoutError as LayoutError
    from ringfold.collectives.errors import OutOfMemory as OutOfMemory
    from ringfold.collectives.errors import PeerLost as PeerLost
    from ringfold.collectives.errors import PrecisionError as PrecisionError
    from ringfold.collectives.errors import RingfoldError as RingfoldError
    from ringfold.collectives.work import Work as Work
    from ringfold.mixed_precision.fp8 import Fp8 as Fp8
    from ringfold.parallel.data_parallel import DataParallel as DataParallel
    from ringfold.parallel.layout import Layout as Layout
    from ringfold.parallel.mesh import DeviceMesh as DeviceMesh
    from ringfold.parallel.placement import Placement as Placement
    from ringfold.parallel.zero.model import ZeRO as ZeRO
    from ringfold.runtime.context import all_reduce as all_reduce
    from ringfold.runtime.context import init as init
    from ringfold.runtime.context import shutdown as shutdown
    from ringfold.runtime.data import shard as shard
    from ringfold.runtime.engine import Engine as Engine
    from ringfold.runtime.global_mean import global_mean as global_mean
    from ringfold.runtime.verify import verify as verify

    __version__: str

__all__ = [
    "AuthenticationError",
    "CheckpointError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommunicationError",
    "Communicator",
    "ConfigError",
    "ConnectError",
    "Corrupt",
    "DataParallel",
    "DeviceMesh",
    "Engine",
    "Fp8",
    "Incompatible",
    "Incomplete",
    "LaunchError",
    "Layout",
    "LayoutError",
    "OutOfMemory",
    "PeerLost",
    "Placement",
    "PrecisionError",
    "RingfoldError",
    "Work",
    "ZeRO",
    "__version__",
    "all_reduce",
    "global_mean",
    "init",
    "shard",
    "shutdown",
    "verify",
]

_HOMES = {
    "Communicator": "collectives.communicator",
    "DataParallel": "parallel.data_parallel",
    "DeviceMesh": "parallel.mesh",
    "Engine": "runtime.engine",
    "Fp8": "mixed_precision.fp8",
    "Layout": "parallel.layout",
    "Placement": "parallel.placement",
    "Work": "collectives.work",
    "ZeRO": "parallel.zero.model",
    "all_reduce": "runtime.context",
    "global_mean": "runtime.global_mean",
    "init": "runtime.context",
    "shard": "runtime.data",
    "shutdown": "runtime.context",
    "verify": "runtime.verify",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("ringfold")
    elif name in __all__:
        value = getattr(importlib.import_module(f"ringfold.{_HOMES.get(name, 'collectives.errors')}"), name)
    else:
        raise AttributeError(f"module 'ringfold' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
