"""Models of Hugging Face, as they are and without a plan: layouts have the numbers of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.layout import Layout
from ringfold.parallel.mesh import DeviceMesh
from ringfold.runtime.engine import Engine
from ringfold.runtime.float64 import Float64
from ringfold.runtime.rows import row_range, take_rows
from torch import Tensor, nn

from tests.harness import run_ranks

VOCABULARY = 67  # odd: ranks have unequal parts of it
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
CLIP_NORM = 0.5
EPSILON = 1e-6  # a gradient that is zero but for rounding, as a key's bias has, is not to be made a step
CLOSE = 1e-10


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    # their fused product of experts does not know float64
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, experts_implementation="eager"))


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "mixtral": mixtral}


def token_loss(output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, (labels != -100).sum()


def batches() -> list[dict[str, Tensor]]:
    """Return batches with padding, and with other numbers of valid labels in each row."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for rows in (5, 3):
        ids = torch.randint(0, VOCABULARY, (rows, 9), generator=generator)
        lengths = torch.randint(4, 10, (rows, 1), generator=generator)
        here = torch.arange(9) < lengths
        labels = ids.roll(-1, 1).masked_fill(torch.arange(9) >= lengths - 1, -100)
        found.append({"input_ids": ids, "attention_mask": here.long(), "labels": labels})
    return found


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=EPSILON)


def plain_training(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": []}
    with Float64():
        model = MODELS[name]().double().train()
        optimizer = make_optimizer(list(model.parameters()))
        for batch in batches():
            optimizer.zero_grad()
            total, count = token_loss(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), batch["labels"])
            (total / count).backward()
            found["losses"].append(float(total.detach() / count))
            found["norms"].append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
            found["grads"].append({key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()})
            optimizer.step()
    return found | {"weights": model.state_dict()}


def train(world: Communicator, name: str, layout: str) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": []}
    with Float64():
        mesh = DeviceMesh(Layout.parse(f"{layout} fp64"), world)
        engine = Engine(MODELS[name], mesh, loss=token_loss, optimizer=make_optimizer, clip_norm=CLIP_NORM)
        for batch in batches():
            mine = take_rows(batch, *row_range(len(batch["labels"]), mesh["dp"].rank, mesh["dp"].size))
            found["losses"].append(engine.train_step(mine))
            found["norms"].append(engine.grad_norm)
            found["grads"].append({key: engine.grad(key) for key, _ in engine.module.named_parameters()})
        with engine.whole_parameters():
            weights = {key: value.clone() for key, value in engine.module.state_dict().items()}
    divided = engine._division
    gathered = {} if divided.tensor is None or divided.context is not None else dict(divided.tensor.axis.gathered)
    return found | {"weights": weights, "gathered": gathered}


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "tp2"), (2, "cp2"), (2, "cp2:ulysses"))]


@pytest.mark.parametrize(("size", "layout"), [(4, "tp2 cp2"), (4, "dp2 tp2 zero3"), *SLOW])
@pytest.mark.parametrize("name", MODELS)
def test_layouts_have_the_numbers_of_one_process(name: str, size: int, layout: str) -> None:
    expected = plain_training(name)
    for found in run_ranks(size, train, name, layout, timeout_s=100):
        assert found["losses"] == pytest.approx(expected["losses"], rel=CLOSE)
        assert found["norms"] == pytest.approx(expected["norms"], rel=CLOSE)
        norm = max(expected["norms"])
        for mine, theirs in zip(found["grads"], expected["grads"], strict=True):
            for key, grad in theirs.items():
                if grad is not None:
                    torch.testing.assert_close(mine[key], grad, rtol=0, atol=norm * 1e-13, msg=lambda text, key=key: f"{key}: {text}")
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=CLOSE, atol=CLOSE, msg=lambda text, key=key: f"{key}: {text}")
        assert found["gathered"] == {}
        assert math.isfinite(found["losses"][-1])
