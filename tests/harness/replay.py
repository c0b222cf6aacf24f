"""Run a simulated execution again on real numbers, whatever the operation, and check every element of every vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ringfold.collectives.schedule import FULL_BUFFERS, ONE_VECTOR, ROOT_ONLY, Block, Buffer, Kind, Schedule
from ringfold.collectives.simulator import SimulationResult

__all__ = ["replay"]

Chunks = dict[int, np.ndarray]


def replay(schedules: Sequence[Schedule], result: SimulationResult, lengths: list[list[int]], in_place: bool) -> None:
    """Run the trace of a simulation on random 64-bit integers, whose sums wrap and so are exact, and compare with what numpy says.

    lengths: elements of every [chunk][segment]; of an all_to_all, of rank 0's INPUT chunks, then of rank 1's, and so on.
    """
    first, size = schedules[0], len(schedules)
    random = np.random.default_rng(size)

    def vector(rank: int, buffer: Buffer) -> Chunks:
        if ROOT_ONLY.get(first.op) is buffer and rank != first.root:
            return {}
        is_full = FULL_BUFFERS[first.op][buffer]
        chunks = range(first.chunks) if is_full else [rank]
        return {chunk: random.integers(0, 1 << 63, sum(segments_of(rank, buffer, chunk)), dtype=np.uint64) for chunk in chunks}

    def segments_of(rank: int, buffer: Buffer, chunk: int) -> list[int]:
        if first.op == "all_to_all":
            return lengths[rank * size + chunk if buffer is Buffer.INPUT else chunk * size + rank]
        return lengths[chunk % first.chunks]

    inputs = [vector(rank, Buffer.INPUT) for rank in range(size)]
    given = [{chunk: values.copy() for chunk, values in of_rank.items()} for of_rank in inputs]
    outputs = [vector(rank, Buffer.OUTPUT) for rank in range(size)]
    for rank in range(size):
        if first.op in ONE_VECTOR or (first.op == "reduce" and rank == first.root):
            outputs[rank] = inputs[rank]
        elif in_place and rank in inputs[rank] and rank in outputs[rank]:
            outputs[rank][rank] = inputs[rank][rank]
    longest = max(map(sum, lengths), default=0)
    slots = [random.integers(0, 1 << 63, (schedule.scratch_chunks, longest), dtype=np.uint64) for schedule in schedules]

    def at(rank: int, block: Block) -> np.ndarray:
        memory = (inputs[rank], outputs[rank], slots[rank])[block.buffer][block.chunk]
        segments = segments_of(rank, block.buffer, block.chunk)
        start = sum(segments[: block.segment])
        return memory[start : start + segments[block.segment]]

    def exposed(rank: int, peer: int, block: Block) -> np.ndarray:
        chunk = rank if first.op == "all_to_all" else block.chunk % first.chunks
        return at(peer, Block(Buffer.INPUT, chunk, block.segment))

    for rank, index, sender, sending in result.trace:
        step = schedules[rank].steps[index]
        if step.dst is None:
            continue
        target = at(rank, step.dst)
        src = None if step.src is None else at(rank, step.src)
        if sender >= 0:
            block = schedules[sender].steps[sending].src
            assert block is not None
            incoming = at(sender, block)
            assert incoming.size == target.size
            target[:] = incoming if src is None else src + incoming
        elif step.kind is Kind.COPY:
            target[:] = src
        elif step.kind is Kind.REDUCE:
            target += src
        elif step.kind is Kind.PULL:
            target[:] = exposed(rank, step.peer, step.dst)
        else:
            operands = [exposed(rank, peer, step.dst) for peer in range(size)]
            total = np.add.reduce(operands)
            for place in operands if step.spread else [target if step.peer == -1 else operands[step.peer]]:
                place[:] = total

    for rank in range(size):
        expected = _expected(first.op, given, rank, first.root)
        assert outputs[rank].keys() == expected.keys()
        for chunk, values in outputs[rank].items():
            assert np.array_equal(values, expected[chunk]), f"{first.op} rank {rank} of {size}, chunk {chunk}, {lengths}"
        for chunk, values in inputs[rank].items():
            if values is not outputs[rank].get(chunk):
                assert np.array_equal(values, given[rank][chunk]), f"{first.op} modified INPUT chunk {chunk} of rank {rank}"


def _expected(op: str, given: list[Chunks], rank: int, root: int) -> Chunks:
    """Return what OUTPUT of a rank must hold."""
    size = len(given)
    if op in ("all_reduce", "reduce_scatter", "reduce"):
        chunks = [rank] if op == "reduce_scatter" else given[0]
        total = {chunk: np.add.reduce([of_rank[chunk] for of_rank in given]) for chunk in chunks}
        return total if op != "reduce" or rank == root else {}
    if op in ("all_gather", "gather"):
        return {chunk: given[chunk][chunk] for chunk in range(size)} if op == "all_gather" or rank == root else {}
    if op == "scatter":
        return {rank: given[root][rank]}
    return given[root] if op == "broadcast" else {source: given[source][rank] for source in range(size)}
