"""The allocator: steps cost no page faults once it is set, and whoever has set something is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ringfold.runtime.allocator import arrange

# Page faults of the median of seven train steps of 10 M parameters, after four to warm up: kept memory may still grow in one of them.
STEPS = """
import resource, statistics, sys
import torch
from ringfold.benchmarks._model import GPT, SIZES, next_byte_loss, random_batches
from ringfold.runtime.allocator import arrange
if sys.argv[1] == "arranged":
    said = arrange()
    assert said.startswith("keeps what is freed"), said
model = GPT(SIZES["10M"], 64)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
((ids, target),) = random_batches(1, 4, 64, seed=0)
def step():
    next_byte_loss(model(ids), target).backward()
    optimizer.step()
    optimizer.zero_grad()
for _ in range(4):
    step()
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median(faults_of_a_step() for _ in range(7)))
"""


def page_faults(how: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", STEPS, how], env=environment, check=True, capture_output=True, text=True, timeout=100)
    return int(done.stdout)


def test_train_steps_cost_a_fraction_of_the_page_faults() -> None:
    assert page_faults("arranged") * 3 < page_faults("as it is")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX is set"),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "GLIBC_TUNABLES is set"),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "jemalloc is preloaded"),
    ],
)
def test_what_the_user_has_set_is_left_alone(environment: dict[str, str], named: str) -> None:
    assert arrange(environment) == f"left as it is: {named}"
