"""Block Influence of layers against the paper's formula, computed plainly in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.errors import NonFiniteError
from kava_core.models.assembled.influence import block_influence
from tests.support.tiny_models import GPT, SIZE

FIELDS = {
    "llama": {"model_type": "llama", **SIZE, "num_hidden_layers": 4},
    "gpt2": {"model_type": "gpt2", **GPT, "n_layer": 4},
}


def model_of(family: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FIELDS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    """Two batches of other sizes, with padding on the right."""
    ids = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[1, 4:] = mask[3, 7:] = 0
    return [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in (slice(0, 3), slice(3, 5))]


@pytest.mark.parametrize("family", FIELDS)
def test_influence_is_one_minus_the_mean_cosine_over_real_tokens(family: str) -> None:
    """The reference runs every text alone, unpadded, in float64; the last output is before the final norm."""
    model = model_of(family)
    found = block_influence(model, batches(), where="student")
    exact = model_of(family).double().eval()
    cosines: list[list[float]] = [[] for _ in range(4)]
    last: list[torch.Tensor] = []
    norm = exact.model.norm if family == "llama" else exact.transformer.ln_f
    norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            with torch.no_grad():
                hidden = exact(ids[mask.bool()][None], output_hidden_states=True).hidden_states[:4]
            states = [*hidden, last[-1]]
            for layer in range(4):
                for before, after in zip(states[layer][0], states[layer + 1][0], strict=True):
                    cosines[layer].append(float(before @ after / (before.norm() * after.norm())))
    expected = [1 - sum(of_layer) / len(of_layer) for of_layer in cosines]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 4


def test_a_layer_that_changes_nothing_has_no_influence() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    found = block_influence(model, batches(), where="student")
    assert found[2].item() == pytest.approx(0, abs=1e-12)
    assert found.argmin() == 2


def test_nothing_is_left_in_the_model() -> None:
    """Training mode is as before, and no hook stays."""
    model = model_of("llama").train()
    block_influence(model, batches(), where="student")
    assert model.training
    assert all(not layer._forward_hooks for layer in model.model.layers)


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(
        NonFiniteError, match=r"^student: keep_layers: hidden states of layers \[1, 2, 3\] hold"
    ):
        block_influence(model, batches(), where="student")
