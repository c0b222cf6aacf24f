"""Recomputation: which blocks of a model forget what they compute in forward, and compute it again in backward.

    recompute:full          every block; between forward and backward it keeps its arguments only
    recompute:selective     every block, but for the outputs of matmuls and the like (selective.py)
    recompute:budget=BYTES  as many blocks are kept as fit, and the rest is recomputed in the least time (budget.py)

No bit of loss, gradients or weights depends on it: dropout draws the same numbers again, running statistics are updated once, and collectives
of a forward are issued once. It pays with the time of one more forward, a third more arithmetic at most.

A budget is for what blocks hold between forward and backward: the arguments of all, and what the kept ones save. Not in it are what
lies outside of blocks, and what the one block saves that is being recomputed. The first train step recomputes every block, and
measures what each would save and how long it takes; from then on the choice is fixed, and the same on every rank. So the first step should be as
large as any: a larger microbatch later keeps more than was measured.

A block is recomputed in training mode with gradients enabled; elsewhere its forward is what it was.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.blocks import find_blocks
from ringfold.parallel.layout import Layout
from ringfold.parallel.recompute.budget import choose_kept
from ringfold.parallel.recompute.buffers import Buffers
from ringfold.parallel.recompute.call import Call
from ringfold.parallel.recompute.ledger import Account, Arguments, SavedBytes
from ringfold.parallel.recompute.offload import HostOffload
from ringfold.parallel.recompute.selective import Kept
from ringfold.parallel.recompute.surroundings import Surroundings
from ringfold.parallel.recompute.uncompiled import leave_uncompiled
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Recomputation"]


class Recomputation:
    """Recompute the blocks of a model as its layout says; without a word there, and without `offload`, nothing is changed.

    blocks: patterns of the names of blocks (see `find_blocks`). offload: where kept activations wait. Each block's `forward` is replaced by one
    that does this, so names, hooks and classes stay; a copy of the model (deepcopy, pickle) is without it. Of two for one model the later one counts.

    `before_recompute`, if it is set, is called with a block each time before its forward runs again in backward. Hooks of the block itself do
    not run then, those of modules in it do. `around` makes a context for that.

    Raises: ConfigError: the model has no blocks. And when the model runs: a block changes its arguments in place, or does something else the
    second time.
    """

    before_recompute: Callable[[nn.Module], None] | None = None
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def __init__(
        self, module: nn.Module, layout: Layout, comm: Communicator, *, blocks: Sequence[str] | None = None, offload: HostOffload | None = None
    ) -> None:
        self._word = layout.recompute
        self._budget = layout.recompute_budget
        self._comm = comm
        self._offload = offload
        self._measuring = self._word is not None
        self._arguments = Arguments()
        self._agreed: dict[str, tuple[int, float]] = {}  # the bytes and seconds of the budget, of all ranks
        wanted = self._word is not None or offload is not None
        self._blocks = {name: _Block(name, part, self) for name, part in find_blocks(module, blocks).items()} if wanted else {}
        if wanted and not self._blocks:
            raise ConfigError(
                f"{self._title}: the model has no blocks: no nn.ModuleList, nn.ModuleDict or nn.Sequential with modules that have parameters. "
                'Name them with Engine(blocks=["encoder.*", ...]).'
            )
        for block in self._blocks.values():
            block.install()

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The names of the blocks that are recomputed now."""
        return tuple(name for name, block in self._blocks.items() if not block.is_kept)

    def finish_step(self) -> None:
        """End a train step: after the first one, choose by what was measured. Collective then, if there is a budget.

        Raises: ConfigError, on every rank: the budget is smaller than what is left when every block is recomputed.
        """
        if not self._measuring:
            return
        self._measuring = False
        if self._budget is None:
            return
        mine = self._arguments.nbytes, {name: (block.account.nbytes, block.account.seconds) for name, block in self._blocks.items()}
        every: list[tuple[int, Mapping[str, tuple[int, float]]]] = self._comm.all_gather_object(mine)
        arguments = self._arguments.nbytes = max(nbytes for nbytes, _ in every)
        if arguments > self._budget:
            raise ConfigError(
                f"{self._title}: with every block recomputed, the arguments of the {len(self._blocks)} blocks alone take {_text(arguments)}. "
                f"Use recompute:budget={arguments} or more, recompute:full, or more microbatches."
            )
        self._agreed = {name: (max(costs[name][0] for _, costs in every), max(costs[name][1] for _, costs in every)) for name in self._blocks}
        for name in choose_kept(self._agreed, self._budget - arguments):
            self._blocks[name].is_kept = True

    def explain(self) -> str:
        """Return a table of the blocks: kept or recomputed, the bytes it would save and those it holds, and the seconds to run it again.

        Bytes are those of the fullest moment of the first train step, arguments apart; with a budget, those of the rank that has most.
        """
        if self._word is None:
            return "recompute: off" if self._offload is None else f"recompute: off; {len(self._blocks)} blocks keep what they save in host memory"
        if self._measuring:
            return f"{self._title}: {len(self._blocks)} blocks, all recomputed; measured in the first train step"
        rows = [("block", "in backward", "would hold", "holds", "to run again")]
        total = held_total = 0
        for name, block in self._blocks.items():
            nbytes, seconds = self._agreed.get(name) or (block.account.nbytes, block.account.seconds)
            held = nbytes if block.is_kept else block.account.kept_nbytes
            total, held_total = total + nbytes, held_total + held
            rows.append((name, "kept" if block.is_kept else "recomputed", _text(nbytes), _text(held), f"{seconds * 1e3:.3f} ms"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        head = f"{self._title}: blocks hold {_text(held_total)} of {_text(total)}, and {_text(self._arguments.nbytes)} of arguments"
        return "\n  ".join([head, *lines])

    def close(self) -> None:
        """Give the blocks their own forward back. Graphs that are still alive can run backward."""
        for block in self._blocks.values():
            block.remove()

    @property
    def _title(self) -> str:
        return "offload_activations" if self._word is None else f"recompute:{self._word}"

    def run(self, block: _Block, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a block such that backward computes again what it needs."""
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        saved, kept = (SavedBytes(block.module, tensors), SavedBytes(block.module, tensors)) if self._measuring else (None, None)
        call = Call(
            block.name,
            block.forward,
            surroundings=Surroundings(dict.fromkeys(t.device for t in (*tensors, *block.module.parameters())), self.around),
            buffers=block.buffers.copy(),
            kept=Kept() if self._word == "selective" else None,
            before=functools.partial(self._about_to_recompute, block.module),
            stopwatch=block.account.stopwatch(block.device) if self._measuring else contextlib.nullcontext,
            saved=saved,
            kept_bytes=kept,
            offload=self._offload,
        )
        output = call.run(arguments, keywords)
        if saved is not None and kept is not None:
            booked = saved.nbytes, kept.nbytes
            block.account.open(*booked)
            weakref.finalize(call, block.account.close, *booked).atexit = False
            weakref.finalize(call, self._arguments.close, self._arguments.open(tensors)).atexit = False
        return output

    def _about_to_recompute(self, module: nn.Module) -> None:
        if self.before_recompute is not None:
            self.before_recompute(module)


class _Block:
    """What stands in a block's `forward`."""

    def __init__(self, name: str, module: nn.Module, owner: Recomputation) -> None:
        self.name = name
        self.module = module
        earlier = vars(module).get("forward")
        if isinstance(earlier, _Block):
            earlier.remove()
        self.forward = module.forward
        self.is_kept = owner._word is None
        self.account = Account()
        self.buffers = Buffers(module, name)
        self._owner = owner
        self._had_own = "forward" in vars(module)  # a forward of the object, not of its class
        functools.update_wrapper(self, self.forward, updated=())  # for those who ask for its signature

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def install(self) -> None:
        self.module.forward = self

    def remove(self) -> None:
        if vars(self.module).get("forward") is self:
            if self._had_own:
                self.module.forward = self.forward
            else:
                del self.module.forward

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        owner = self._owner
        if not torch.is_grad_enabled() or not self.module.training:
            return self.forward(*arguments, **keywords)
        if not self.is_kept:
            return owner.run(self, arguments, keywords)
        with contextlib.nullcontext() if owner._offload is None else owner._offload.hooks(self.module):
            return self.forward(*arguments, **keywords)

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a copy of the model plain: there the place of this object is taken by the copied block's own forward."""
        return _itself, (self.forward,)


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _text(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"


leave_uncompiled(*(module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")))
