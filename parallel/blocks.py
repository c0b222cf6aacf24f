"""Blocks: the modules by which a model is gathered, recomputed and cut into stages.

    GPT(embed, blocks = ModuleList[Block, Block, ...], norm)   ->   blocks.0, blocks.1, ...

A block's parameters are used only while its `forward` runs. That is what a child of an nn.ModuleList, nn.ModuleDict or nn.Sequential
nearly always is, and these are taken by themselves, outermost first; others are named by pattern. A parameter that several blocks share,
or that lies in none, belongs to no block: it is needed as long as the whole model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from ringfold.collectives.errors import ConfigError, nearest
from torch import nn

__all__ = ["find_blocks", "parameters_by_block"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
NO_BLOCK = ""


def find_blocks(module: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the blocks of a model by name, in the order of its modules; none lies inside another.

    patterns: shell patterns of module names (`"encoder.layers.*"`), instead of the children of containers.

    Raises:
        ConfigError: a pattern fits no module with parameters; all such patterns are named.
    """
    if patterns is None:
        return dict(_children_of_containers(module, ""))
    named = {name: part for name, part in module.named_modules() if name and _has_parameters(part)}
    lost = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]
    if lost:
        advice = [f"{pattern!r}" + (f" (did you mean {meant!r}?)" if (meant := nearest(pattern, named)) else "") for pattern in lost]
        raise ConfigError(f"blocks: no module with parameters is called {', '.join(advice)}. The model has {', '.join(named)}.")
    chosen = {name: part for name, part in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return {name: part for name, part in chosen.items() if not any(name.startswith(f"{outer}.") for outer in chosen)}


def parameters_by_block(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the named parameters of each block, those of no block first under ""; each parameter once, under its first name."""
    owners: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(next((block for block in blocks if name.startswith(f"{block}.")), NO_BLOCK))
    found: dict[str, list[tuple[str, nn.Parameter]]] = {NO_BLOCK: [], **{name: [] for name in blocks}}
    for name, parameter in module.named_parameters():
        mine = owners[id(parameter)]
        found[next(iter(mine)) if len(mine) == 1 else NO_BLOCK].append((name, parameter))
    return found


def _children_of_containers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, CONTAINERS) or not isinstance(module, CONTAINERS):
            yield from _children_of_containers(child, f"{path}.")
        elif _has_parameters(child):
            yield path, child


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
