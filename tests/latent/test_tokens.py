"""Jacobi passes against writing latent tokens one after another, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.latent.growing_text import decoder_of, position_ids
from kava_core.latent.student import refine_latents, write_answers
from kava_core.latent.tokens import LatentTokens
from tests.support.tiny_models import WORKS

torch.set_num_threads(1)
NAMED = {case.name: case for case in WORKS}
MODELS = ["Llama", "GPT-2", "Qwen3", "Gemma", "Gemma 3 (text)", "Phi"]
COUNT = 4


def model_of(name: str) -> nn.Module:
    return NAMED[name].model().double().eval()


def latents(passes: int, hidden: int, **how: Any) -> LatentTokens:
    torch.manual_seed(1)
    made = LatentTokens(COUNT, passes, hidden, **how).double()
    made.slots.data = torch.randn(COUNT, hidden, dtype=torch.float64)
    return made


def prefix_of(model: Any, lengths: tuple[int, ...] = (5, 3)) -> tuple[Tensor, Tensor]:
    """Embeddings padded on the left, and the mask."""
    ids = torch.randint(3, 64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return model.get_input_embeddings()(ids).detach(), mask


def one_by_one(made: LatentTokens, model: nn.Module, prefix: Tensor) -> Tensor:
    """Each slot from the hidden state before it, in a forward pass of its own; one example, no padding."""
    inputs = prefix
    for slot in range(made.count):
        hidden = decoder_of(model)(inputs_embeds=inputs, use_cache=False).last_hidden_state
        new = made.slots[slot] + made.projection(hidden[:, -1])
        inputs = torch.cat([inputs, new[:, None]], 1)
    return inputs[:, prefix.shape[1] :]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projection", ["none", "linear", "mlp"])
def test_as_many_passes_as_slots_are_sequential(name: str, projection: Any) -> None:
    """Whatever the padding: every example is compared alone."""
    model = model_of(name)
    prefix, mask = prefix_of(model)
    made = latents(COUNT, prefix.shape[-1], projection=projection)
    found = made(model, prefix, mask)
    for row, length in enumerate((5, 3)):
        alone = one_by_one(made, model, prefix[row : row + 1, -length:])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-9, atol=1e-10)


def test_more_passes_change_nothing_and_fewer_do() -> None:
    model = model_of("Llama")
    prefix, mask = prefix_of(model)
    found = {t: latents(t, prefix.shape[-1])(model, prefix, mask) for t in (0, 1, 3, 4, 7)}
    torch.testing.assert_close(found[7], found[4], rtol=1e-10, atol=1e-12)
    assert (found[3] - found[4]).abs().max() > 1e-6
    torch.testing.assert_close(found[1][:, :1], found[4][:, :1])  # the first slot needs one pass
    assert torch.equal(found[0], latents(0, prefix.shape[-1]).slots.expand_as(found[0]))


def test_gradients_pass_through_every_pass() -> None:
    """Finite differences of a loss of the last slot by the first slot's embedding."""
    model = model_of("Llama")
    prefix, mask = prefix_of(model, (4,))
    made = latents(3, prefix.shape[-1])

    def loss() -> Tensor:
        return made(model, prefix, mask)[:, -1].square().sum()

    (slope,) = torch.autograd.grad(loss(), made.slots)
    step = 2e-3  # transformers' norms round to float32
    for column in (0, 5):
        with torch.no_grad():
            made.slots[0, column] += step
            up = loss()
            made.slots[0, column] -= 2 * step
            down = loss()
            made.slots[0, column] += step
        torch.testing.assert_close(slope[0, column], (up - down) / (2 * step), rtol=1e-2, atol=1e-5)
    assert slope[0].abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passes", [2, COUNT])
def test_what_is_kept_between_passes_changes_neither_latents_nor_gradients(
    name: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against reading the whole text in every pass."""
    model = model_of(name)
    found = []
    for forbidden in (False, True):
        if forbidden:
            monkeypatch.setattr("kava_core.latent.growing_text._can_keep", lambda _: False)
        prefix, mask = prefix_of(model)
        made = latents(passes, prefix.shape[-1])
        model.zero_grad()
        inputs = made(model, prefix.requires_grad_(), mask)
        inputs.square().sum().backward()
        weights = [p.grad for p in (*model.parameters(), *made.parameters()) if p.grad is not None]
        found.append([inputs, prefix.grad, *weights])
    for kept, whole in zip(*found, strict=True):
        torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-5)  # transformers' norms round to float32


def test_a_model_that_recomputes_reads_everything_again() -> None:
    model = model_of("Llama").train()
    prefix, mask = prefix_of(model)
    made = latents(3, prefix.shape[-1])
    plain = made(model, prefix, mask)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = made(model, prefix, mask)
    torch.testing.assert_close(again, plain, rtol=1e-7, atol=1e-9)
    again.square().sum().backward()
    assert made.slots.grad.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("control", [None, "zeroed", "shuffled"])
@pytest.mark.parametrize("passes", [0, 2, COUNT])
def test_answers_are_those_of_reading_everything_again(name: str, control: Any, passes: int) -> None:
    """Token by token, of a batch padded on the left, whose first tokens are not read again."""
    model: Any = model_of(name)
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    made = latents(passes, model.get_input_embeddings().weight.shape[1])
    found = write_answers(model, made, ids, mask, end=3, max_new_tokens=4, control=control)
    thought = refine_latents(model, made, ids, mask)
    thought = thought if control is None else thought.controlled(control)
    text = torch.cat([thought.inputs, model.get_input_embeddings()(torch.full((2, 1), 3))], 1)
    real = torch.cat([thought.mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    for place in range(found.shape[1]):
        how = {"attention_mask": real.long(), "position_ids": position_ids(real), "use_cache": False}
        logits = model(inputs_embeds=text, **how).logits[:, -1]
        ended = (found[:, :place] == model.generation_config.eos_token_id).any(1)
        assert torch.equal(logits.argmax(1)[~ended], found[:, place][~ended])
        text = torch.cat([text, model.get_input_embeddings()(found[:, place : place + 1])], 1)
        real = torch.cat([real, torch.ones(2, 1, dtype=torch.bool)], 1)


def test_bfloat16_stays_finite() -> None:
    model = NAMED["Llama"].model().to(torch.bfloat16)
    prefix, mask = prefix_of(model)
    made = LatentTokens(COUNT, 3, prefix.shape[-1])
    found = made(model, prefix, mask)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
