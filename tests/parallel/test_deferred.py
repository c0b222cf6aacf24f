"""Deferred: parameters that are computed one at a time have the bits they have when the whole model is built, and random numbers go on alike."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from ringfold.benchmarks._model import GPT, SIZES
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.deferred.model import Deferred, record
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine


class Everything(nn.Module):
    """Tied and padded embeddings, scaled weights, masks, tables, plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4, padding_idx=1)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.down = nn.Linear(4, 4)
        self.offset = nn.Parameter(torch.randn(3, 4) * 0.02)
        self.cut = nn.Parameter(torch.rand(8, 6)[2:5, ::2])
        self.frozen = nn.Parameter(torch.full((5,), 2.0), requires_grad=False)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).bool())
        self.register_buffer("table", torch.outer(torch.arange(4.0), torch.linspace(0, 1, 3)), persistent=False)
        self.tables = [torch.zeros(3), {"ones": torch.ones(2) * 3}]
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 5)]
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.startswith("down"):
                with torch.no_grad():
                    parameter.mul_(0.5)

    def _initialise(self, part: nn.Module) -> None:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)


def initialised(initialise: Callable[[Tensor], object]) -> nn.Module:
    layer = nn.Linear(30, 50)
    initialise(layer.weight)
    return layer


def seeded_inside() -> nn.Module:
    torch.manual_seed(3)
    first = nn.Linear(5, 6)
    torch.manual_seed(4)
    return nn.Sequential(first, nn.Linear(6, 7))


def seeded_at_the_end() -> nn.Module:
    layer = nn.Linear(5, 6)
    torch.manual_seed(4)
    return layer


def own_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(8)
    layer = nn.Linear(4, 5)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.uniform_(generator=generator)
    return layer


SAVED = {"weight": torch.linspace(0, 1, 12).view(3, 4), "bias": torch.linspace(1, 2, 3)}


def loaded() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.load_state_dict(SAVED)
    return layer


def seeded_twice_alike() -> nn.Module:
    layers = []
    for _ in range(2):
        torch.manual_seed(5)
        layers.append(nn.Linear(3, 3))
    return nn.Sequential(*layers, nn.Linear(3, 3))


def back_to_a_state() -> nn.Module:
    layers = [nn.Linear(3, 3)]
    state = torch.get_rng_state()
    layers.append(nn.Linear(3, 5))
    with torch.random.fork_rng():
        layers.append(nn.Linear(5, 5))
        torch.manual_seed(11)
        layers.append(nn.Linear(5, 5))
    layers.append(nn.Linear(5, 3))
    torch.set_rng_state(state)
    return nn.Sequential(*layers, nn.Linear(3, 5))


def copied_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    first = nn.Parameter(torch.randn(4, 5, generator=generator))
    other = torch.Generator()
    other.set_state(generator.get_state())
    return nn.ParameterList([first, torch.rand(5, generator=other), torch.randn(3), torch.rand(2, generator=generator)])


def another_default_dtype() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    try:
        return nn.ParameterList([torch.randn(3), torch.arange(3) / 7, torch.full((2,), 0.5)])
    finally:
        torch.set_default_dtype(torch.float32)


def in_parts() -> nn.Module:
    rows, columns = torch.empty(6, 4), torch.empty(4, 6)
    for part in rows.chunk(3):
        nn.init.xavier_uniform_(part)
    columns[:, ::2].zero_()
    columns[:, 1::2].normal_()
    return nn.ParameterList([rows, columns])


def by_linear_algebra() -> nn.Module:
    square = torch.randn(5, 5)
    square[torch.eye(5, dtype=torch.bool)] = 0
    square[square > 1] = 1.0
    q, r = torch.linalg.qr(square)
    return nn.ParameterList([square, q @ r, torch.randn(9).sort()[0].cumsum(0), torch.randn(3, 4).t_().mul_(2)])


def after_a_step() -> nn.Module:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return layer


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(300, 200),
    "gpt": lambda: GPT(SIZES["tiny"], 16),
    "transformer": lambda: nn.Transformer(64, 4, 2, 2, 128, batch_first=True),
    "copied layers": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3),
    "lstm": lambda: nn.LSTM(30, 40, 2, bidirectional=True),
    "images": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3)),
    "everything": Everything,
    "orthogonal": lambda: initialised(nn.init.orthogonal_),
    "truncated normal": lambda: initialised(nn.init.trunc_normal_),
    "sparse": lambda: initialised(lambda weight: nn.init.sparse_(weight, 0.3)),
    "kaiming": lambda: initialised(lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu")),
    "seeded inside": seeded_inside,
    "seeded at the end": seeded_at_the_end,
    "seeded twice alike": seeded_twice_alike,
    "back to a state": back_to_a_state,
    "own generator": own_generator,
    "copied generator": copied_generator,
    "another default dtype": another_default_dtype,
    "in parts": in_parts,
    "by linear algebra": by_linear_algebra,
    "after a step": after_a_step,
    "not contiguous": lambda: nn.ParameterList([torch.randn(4, 5).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]),
    "old constructors": lambda: nn.ParameterList([torch.Tensor(4, 5).uniform_(-1, 1), torch.FloatTensor(3).normal_()]),
    "complex": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "few and many draws": lambda: nn.ParameterList([torch.randn(n) for n in (1, 3, 15, 16, 17, 700, 5)]),
    "empty": lambda: nn.ParameterList([torch.empty(0, 3), torch.randn(2)]),
    "loaded": loaded,
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
    "float64": lambda: nn.Linear(40, 30).double(),
    "bfloat16": lambda: nn.Linear(40, 30).bfloat16(),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_parameter_and_buffer_has_the_bits_of_plain_building(name: str) -> None:
    torch.manual_seed(5)
    plain = BUILDERS[name]()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    deferred = record(BUILDERS[name])
    assert isinstance(deferred, Deferred), deferred
    assert any(parameter.is_meta for parameter in deferred.module.parameters())  # made from given numbers it has values
    deferred.prepare()
    assert torch.equal(torch.get_rng_state(), after), "random numbers go on differently"
    deferred.materialise_buffers()
    identities = [id(parameter) for parameter in deferred.module.parameters()]
    for parameter in reversed(list(deferred.module.parameters())):  # in any order
        parameter.mark = "kept"  # type: ignore[attr-defined]
        deferred.become(parameter, deferred.value_of(parameter))
    assert torch.equal(torch.get_rng_state(), after)
    assert [id(parameter) for parameter in deferred.module.parameters()] == identities
    expected, found = plain.state_dict(keep_vars=True), deferred.module.state_dict(keep_vars=True)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert type(found[key]) is type(value)
        assert torch.equal(found[key], value), key
        assert (found[key].stride(), found[key].dtype, found[key].requires_grad) == (value.stride(), value.dtype, value.requires_grad), key
        if isinstance(value, nn.Parameter):
            assert vars(found[key]) == {"mark": "kept"}
    names = dict(plain.named_parameters(remove_duplicate=False))
    ours = dict(deferred.module.named_parameters(remove_duplicate=False))
    for one in names:
        for other in names:
            assert (ours[one] is ours[other]) == (names[one] is names[other]), f"{one}, {other}: tied here and not there"


def test_plain_attributes_and_tables_are_computed_too() -> None:
    deferred = record(Everything)
    assert isinstance(deferred, Deferred)
    deferred.prepare()
    deferred.materialise_buffers()
    found, expected = deferred.module, Everything()
    assert torch.equal(found.tables[0], expected.tables[0])
    assert torch.equal(found.tables[1]["ones"], expected.tables[1]["ones"])
    assert torch.equal(found.table, expected.table)
    assert "table" not in found.state_dict()
    assert found.rates == expected.rates


def test_initial_values_that_are_replaced_are_not_computed() -> None:
    deferred = record(lambda: initialised(lambda weight: nn.init.normal_(weight)))
    assert isinstance(deferred, Deferred)
    view = deferred._targets[id(deferred.module.weight)]
    assert [deferred._log.operations[index].call.name() for index in deferred._sources[view.storage]] == ["aten::normal_"]


held: list[Tensor] = []


def hidden() -> nn.Module:
    held.append(torch.randn(3))
    return nn.Linear(4, 4)


def hidden_view() -> nn.Module:
    layer = nn.Linear(4, 4)
    held.append(layer.weight.detach()[0])
    return layer


def by_value() -> nn.Module:
    layer = nn.Linear(4, 4)
    return layer if layer.weight.sum() > 0 else nn.Linear(4, 4)


def by_chance_of_values() -> nn.Module:
    torch.multinomial(torch.ones(4), 2)
    return nn.Linear(4, 4)


def never_written() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.extra = nn.Parameter(torch.empty(3))
    return layer


def ran_batch_norm() -> nn.Module:
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    layers(torch.randn(5, 3))
    return layers


def unregistered() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.more = [nn.Parameter(torch.randn(3))]  # type: ignore[assignment]
    return layer


def failing() -> nn.Module:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (hidden, "something other than a module holds a tensor"),
        (hidden_view, "something other than a module holds a tensor, or a view of one"),
        (by_value, "DataDependentOutputException"),
        (by_chance_of_values, "multinomial draws random numbers that may depend on values"),
        (never_written, "never written"),
        (failing, "KeyError: 'mine'"),
        (lambda: nn.Linear(2, 2, device="meta"), "on meta"),
        (lambda: 3, "int is no module"),
        (ran_batch_norm, "batch_norm"),
        (lambda: nn.ParameterList([torch.randn(3, dtype=torch.complex64).conj()]), "conjugate"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 3))), ""),
        (unregistered, "has not registered it"),
        (lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), "set_ changes what storage"),
    ],
)
def test_what_cannot_be_recorded_is_given_up_with_the_reason_and_random_states_as_they_were(function: Callable[[], object], words: str) -> None:
    held.clear()
    own = torch.Generator().manual_seed(9)
    states = torch.get_rng_state(), random.getstate(), own.get_state()

    def and_others() -> object:
        random.random()
        torch.randn(3, generator=own)
        return function()

    found = record(and_others)
    assert isinstance(found, str)
    assert words in found
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(own.get_state(), states[2])
    assert torch.nn.init.trunc_normal_(torch.empty(3)).isfinite().all()  # torch is as it was


def initial_bits(world: Communicator, layout: str) -> tuple[dict[str, Tensor], Tensor, str]:
    engine = make_engine(world, layout, BUILDERS["gpt"], loss=nn.CrossEntropyLoss())
    with engine.whole_parameters():
        weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return weights, torch.get_rng_state(), engine.explain().built


def test_initial_values_and_random_numbers_do_not_depend_on_the_layout() -> None:
    expected = run_ranks(3, initial_bits, "")
    for layout in ("zero3", "bf16 zero3", "zero3:cpu", "recompute zero3"):
        for rank, (weights, state, how) in enumerate(run_ranks(3, initial_bits, layout)):
            assert how == "one parameter at a time"
            assert torch.equal(state, expected[rank][1]), "a rank's random numbers go on differently"
            for name, value in expected[0][0].items():
                wanted = value.bfloat16() if layout.startswith("bf16") and "norm" not in name else value
                assert torch.equal(weights[name], wanted), f"{layout}: {name}"


def build_by_value(world: Communicator) -> tuple[str, bool]:
    def function() -> nn.Module:
        return by_value() if world.rank == 1 else nn.Linear(4, 4)

    engine = make_engine(world, "zero3", function, loss=nn.MSELoss())
    return engine.explain().built, math.isfinite(engine.train_step((torch.ones(2, 4), torch.ones(2, 4))))


def test_where_one_rank_cannot_record_all_build_the_whole_model_and_say_why() -> None:
    for how, is_finite in run_ranks(2, build_by_value):
        assert how.startswith("whole on every rank, for rank 1 could not record ")
        assert ": DataDependentOutputException" in how
        assert is_finite


MEASURE = """
import resource, torch
from torch import nn
from ringfold.parallel.deferred.model import record
def model():
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(40)))  # 160 MiB
deferred = record(lambda: nn.Linear(8, 8)); deferred.prepare(); deferred.value_of(deferred.module.weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
deferred = record(model)
deferred.prepare()
total = sum(float(deferred.value_of(parameter).sum()) for parameter in deferred.module.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_more_than_a_few_parameters_are_in_memory_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30
