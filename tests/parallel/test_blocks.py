"""Blocks: what is taken for one by itself, what by pattern, and to which a parameter belongs."""

from __future__ import annotations

import pytest
import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.blocks import find_blocks, parameters_by_block
from torch import nn


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "none": nn.Identity()})
        self.norm = nn.LayerNorm(4)
        self.layers[2][0].weight = self.layers[0][0].weight  # shared by two blocks


def test_children_of_containers_with_parameters_are_the_blocks_even_in_containers_of_containers() -> None:
    assert list(find_blocks(Trunk())) == ["layers.0.0", "layers.1.0", "layers.2.0", "heads.a"]
    assert list(find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))) == ["0", "2"]
    assert list(find_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False))) == ["layers.0", "layers.1"]
    assert find_blocks(nn.Linear(2, 2)) == {}


def test_patterns_name_blocks_and_none_lies_inside_another() -> None:
    assert list(find_blocks(Trunk(), ["layers.*"])) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_blocks(Trunk(), ["embed", "heads*"])) == ["embed", "heads"]
    expected = r"no module with parameters is called 'layer\.\*' \(did you mean 'layers.2'\?\), 'nrom' \(did you mean 'norm'\?\)"
    with pytest.raises(ConfigError, match=expected):
        find_blocks(Trunk(), ["layer.*", "nrom"])


def test_a_parameter_of_several_blocks_or_of_none_belongs_to_no_block() -> None:
    model = Trunk()
    found = parameters_by_block(model, find_blocks(model))
    assert {name: [n for n, _ in named] for name, named in found.items()} == {
        "": ["embed.weight", "layers.0.0.weight", "norm.weight", "norm.bias"],
        "layers.0.0": ["layers.0.0.bias"],
        "layers.1.0": ["layers.1.0.weight", "layers.1.0.bias"],
        "layers.2.0": ["layers.2.0.bias"],
        "heads.a": ["heads.a.weight", "heads.a.bias"],
    }
    assert sum(len(named) for named in found.values()) == len({id(p) for p in model.parameters()})
    assert torch.equal(found["layers.1.0"][0][1], model.layers[1][0].weight)
