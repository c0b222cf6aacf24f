"""Trees: a vector goes up or down a tree, so the number of steps grows with log2 n, not with n.

Two variants, with n ranks and a vector of S bytes:

`binomial`, for small broadcasts and reduces. In step k of a broadcast the 2^k ranks that have the vector pass it on: ceil(log2 n) steps, and
    S ceil(log2 n) bytes for the root. A reduce is the same backwards, folding.
`double`, for large vectors. Two binary trees, each for one half (chunk) of the vector, in which every rank is inside one tree at most and a leaf
    of the other, so that with many segments in flight both directions of every link are busy. all_reduce: up and down again, about 4 log2 n steps (up
    and down, one or two steps a level) and 2S bytes a rank. Broadcast and reduce: the root stands above both trees of the others, S bytes.

gather and scatter have no tree: a rank passes on every chunk as a frame of its own, so the root would send no fewer of them than it does directly.

Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35(12), 2009; the numbering
of the binary tree is NCCL 2.4's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from ringfold.collectives.cost import Cost, Topology
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, Step

__all__ = ["all_reduce", "broadcast", "broadcast_binomial", "cost", "reduce", "reduce_binomial"]


@dataclass(frozen=True, slots=True)
class Tree:
    """The parent of every rank, -1 for the root, and the children of every rank in the order in which they are served."""

    parents: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parents: list[int]) -> Tree:
        children = (tuple(child for child, parent in enumerate(parents) if parent == rank) for rank in range(len(parents)))
        return cls(tuple(parents), tuple(children))

    def depth(self) -> int:
        """Return the most steps from the root to any rank."""

        def below(rank: int) -> int:
            return max((1 + below(child) for child in self.children[rank]), default=0)

        return below(self.parents.index(-1))


def _binary_parent(rank: int, size: int) -> int:
    """Return the parent in a binary tree with rank 0 at the top, in which odd ranks are leaves."""
    if rank == 0:
        return -1
    bit = rank & -rank
    parent = (rank ^ bit) | bit << 1
    return parent if parent < size else rank ^ bit


@lru_cache(maxsize=64)
def double_binary(size: int) -> tuple[Tree, Tree]:
    """Return two binary trees of all ranks: the second is the first's mirror image, or with an odd number of ranks its shift by one."""
    first = [_binary_parent(rank, size) for rank in range(size)]
    places = [(rank - 1) % size for rank in range(size)] if size % 2 else [size - 1 - rank for rank in range(size)]
    second = [-1 if first[place] < 0 else places.index(first[place]) for place in places]
    return Tree.of(first), Tree.of(second)


@lru_cache(maxsize=1024)
def below_root(size: int, root: int) -> tuple[Tree, Tree]:
    """Return two trees with the same root, each a binary tree of all other ranks hung below it."""
    trees = []
    for tree in double_binary(size - 1) if size > 1 else (Tree.of([]), Tree.of([])):
        parents = [-1] * size
        for place, parent in enumerate(tree.parents):
            parents[(root + 1 + place) % size] = root if parent < 0 else (root + 1 + parent) % size
        trees.append(Tree.of(parents))
    return trees[0], trees[1]


@lru_cache(maxsize=1024)
def binomial(size: int, root: int) -> Tree:
    """Return the tree in which the child at distance 2^k behind the root has the ranks between it and the next for its own."""
    parents = [-1] * size
    for place in range(1, size):
        parents[(root + place) % size] = (root + (place & (place - 1))) % size
    tree = Tree.of(parents)
    # The farthest child has the most ranks below it and is served first.
    return Tree(tree.parents, tuple(tuple(sorted(of, key=lambda child: -((child - root) % size))) for of in tree.children))


def all_reduce(rank: int, size: int, segments: int) -> Schedule:
    """Return the fold up and the broadcast down both trees, in place in OUTPUT."""
    steps: list[Step] = []
    trees = double_binary(size)
    # A segment comes down no sooner than it went up: by then so many others may have gone up. Where two ranks are neighbours in both
    # trees, what goes up would otherwise queue behind what comes down.
    behind = 2 * max(tree.depth() for tree in trees)
    for turn in range(segments + behind if size > 1 else 0):
        for chunk, tree in enumerate(trees):
            if turn < segments:
                own = Block(Buffer.OUTPUT, chunk, turn)
                steps.extend(_up(tree, rank, own, own))
        for chunk, tree in enumerate(trees):
            if turn >= behind:
                steps.extend(_down(tree, rank, Block(Buffer.OUTPUT, chunk, turn - behind)))
    return Schedule("all_reduce", "tree", rank, size, 2, segments, tuple(steps))


def broadcast(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the broadcast of one half (chunk, in OUTPUT) of the vector down each of two trees."""
    trees = below_root(size, root)
    steps = [step for s in range(segments) for chunk, tree in enumerate(trees) for step in _down(tree, rank, Block(Buffer.OUTPUT, chunk, s))]
    return Schedule("broadcast", "tree", rank, size, 2, segments, tuple(steps), root=root)


def reduce(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the fold of one half (chunk) of the vector up each of two trees; partial folds lie in SCRATCH, at the root in OUTPUT."""
    return _reduce(rank, size, root, segments, below_root(size, root))


def broadcast_binomial(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the broadcast of the vector (one chunk, in OUTPUT) down a binomial tree."""
    tree = binomial(size, root)
    steps = [step for s in range(segments) for step in _down(tree, rank, Block(Buffer.OUTPUT, 0, s))]
    return Schedule("broadcast", "tree", rank, size, 1, segments, tuple(steps), root=root)


def reduce_binomial(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the fold of the vector (one chunk) up a binomial tree; partial folds lie in SCRATCH, at the root in OUTPUT."""
    return _reduce(rank, size, root, segments, (binomial(size, root),))


def cost(op: str, variant: str, topology: Topology, nbytes: int, segments: int) -> Cost:
    """Return what an operation costs the busiest rank, with root 0."""
    size = topology.size
    if size == 1:
        return Cost(0, 0, 0.0)
    if variant == "binomial":
        trees: tuple[Tree, ...] = (binomial(size, 0),)
    else:
        trees = double_binary(size) if op == "all_reduce" else below_root(size, 0)
    down = [(parent, child) for tree in trees for child, parent in enumerate(tree.parents) if parent >= 0]
    pairs = [(b, a) for a, b in down] if op == "reduce" else down if op == "broadcast" else down + [(b, a) for a, b in down]
    sent = max(Counter(sender for sender, _ in pairs).values())
    rounds = (2 if op == "all_reduce" else 1) * max(tree.depth() for tree in trees)
    if variant == "binomial":
        # All waits for the root, which sends the whole vector to each of its children, but the last of them has nobody to wait for.
        moved, messages = float(nbytes), rounds + (segments - 1) * sent
    else:
        # The last rank has its first segment after all rounds, and one more after each of the others.
        turns = rounds + segments - 1
        moved, messages = turns * nbytes / segments / len(trees), turns * sent
    children = max(len(of) for tree in trees for of in tree.children)
    folded = 0.0 if op == "broadcast" else moved * children
    seconds = topology.seconds(pairs, moved, rounds=rounds, messages=messages, folded_nbytes=folded)
    return Cost(rounds, round(sent * nbytes / len(trees)), seconds)


def _up(tree: Tree, rank: int, own: Block, target: Block) -> list[Step]:
    """Fold what the children send into `own`, in `target`, and send that to the parent."""
    steps = []
    parent = tree.parents[rank]
    children = tree.children[rank][::-1]  # who is served first on the way down comes last on the way up
    for child in children:
        held = own if child == children[0] else target
        steps.append(Step(Kind.RECV_REDUCE, child, src=held, dst=target, final=parent < 0 and child == children[-1]))
    if parent >= 0:
        steps.append(Step(Kind.SEND, parent, src=target if children else own))
    return steps


def _down(tree: Tree, rank: int, block: Block) -> list[Step]:
    """Receive a block from the parent and send it to the children."""
    steps = [Step(Kind.RECV, tree.parents[rank], dst=block)] if tree.parents[rank] >= 0 else []
    return steps + [Step(Kind.SEND, child, src=block) for child in tree.children[rank]]


def _reduce(rank: int, size: int, root: int, segments: int, trees: tuple[Tree, ...]) -> Schedule:
    steps: list[Step] = []
    partial = Buffer.OUTPUT if rank == root else Buffer.SCRATCH
    for s in range(segments):
        for chunk, tree in enumerate(trees):
            steps.extend(_up(tree, rank, Block(Buffer.INPUT, chunk, s), Block(partial, chunk, s)))
    slots = max((chunk + 1 for chunk, tree in enumerate(trees) if tree.children[rank]), default=0) if rank != root else 0
    return Schedule("reduce", "tree", rank, size, len(trees), segments, tuple(steps), scratch_chunks=slots, root=root)
