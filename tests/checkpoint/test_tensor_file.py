"""runtime/checkpoint/tensor_file.py: every dtype and shape is written as safetensors reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from ringfold.collectives.errors import CheckpointError, Corrupt, Incomplete
from ringfold.runtime.checkpoint.tensor_file import _CODES, TensorFile, read_tensors, tensor_bytes
from safetensors.torch import load_file


def test_every_dtype_and_shape_is_what_safetensors_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for dtype in _CODES:
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (16 * 15,), dtype=torch.uint8)
        whole = bits.view(dtype)[:15].view(5, 3)
        name = str(dtype)
        tensors |= {name: whole, f"{name} turned": whole.t(), f"{name} 0-dim": whole[1, 1], f"{name} empty": whole[:0]}
    path = tmp_path / "x.safetensors"
    plan = TensorFile(tensors)
    hashes = plan.write(path)
    assert path.stat().st_size == plan.nbytes
    by_safetensors, by_us = load_file(path), read_tensors(path, hashes)
    for name, value in tensors.items():
        for read in (by_safetensors[name], by_us[name]):
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            assert bytes(tensor_bytes(read)) == bytes(tensor_bytes(value))
        assert hashes[name] == hashlib.sha256(bytes(tensor_bytes(value))).hexdigest()


def test_conjugate_views_are_written_as_they_are_seen(tmp_path: Path) -> None:
    seen = torch.tensor([1 + 2j, 3 - 4j]).conj()
    path = tmp_path / "x.safetensors"
    assert torch.equal(read_tensors(path, TensorFile({"z": seen}).write(path))["z"], seen)


def test_a_file_of_nothing_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert TensorFile({}).write(path) == {}
    assert load_file(path) == {}


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        TensorFile({"x": torch.zeros(2)}).write(path)


def test_what_the_format_lacks_is_refused_all_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        TensorFile(
            {"s": torch.eye(3).to_sparse(), "m": torch.zeros(2, device="meta"), "c": torch.zeros(2, dtype=torch.complex128), "ok": torch.zeros(1)}
        )
    listed = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed] == ["s", "m", "c"]


def test_all_damaged_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    hashes = TensorFile({name: torch.full((4,), 1.0) for name in "abc"}).write(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    data[-48] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=r"differs of a, c\."):
        read_tensors(path, hashes)
    with pytest.raises(Corrupt, match="other"):
        read_tensors(path, {"other": ""})
    with pytest.raises(Incomplete, match="it held a, b, c"):
        read_tensors(tmp_path / "absent", hashes)
