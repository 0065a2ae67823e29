"""The scale, cap and other terms of attention logits, read from the attention call."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import ENCODER, model_geometry, probe_geometry
from kava_core.kv.capture.logit_rule import LogitRule, common_logits, fold_scale, read_logit_rule
from kava_core.kv.capture.stacking import stack_layers
from kava_core.kv.capture.taps import SLOT, Slot, tap_function
from kava_core.protocols.attention_logits import PRODUCTS, AttentionLogits
from tests.support.tiny_models import SIZE, WORKS, Case

torch.set_num_threads(1)
NAMED = {case.name: case for case in WORKS}


def queries_of(case: Case, dtype: torch.dtype = torch.bfloat16, **changes: object) -> torch.Tensor:
    model = case.model(dtype, **changes).eval()
    with torch.no_grad(), Capture(model, parts=("queries",), rotary="strip") as capture:
        model(torch.arange(3, 12)[None], use_cache=False)
    queries = capture.take().queries
    assert queries is not None
    return queries


def test_queries_of_a_usual_scale_are_bit_for_bit_the_models() -> None:
    model = NAMED["Llama"].model(torch.bfloat16).eval()
    seen = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad(), Capture(model, parts=("queries",), rotary="strip") as capture:
        model(torch.arange(3, 12)[None], use_cache=False)
    queries = capture.take().queries
    assert torch.equal(queries, torch.stack([x.unflatten(-1, (4, 8)).transpose(1, 2) for x in seen], 1))


def test_another_scale_is_folded_in_float32() -> None:
    once, thrice = (queries_of(NAMED["Granite"], attention_multiplier=m) for m in (8**-0.5, 3 * 8**-0.5))
    assert (once.dtype, thrice.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(thrice[:, 0], 3 * once[:, 0].float())


def test_layers_keep_scales_of_their_own_and_gradients_pass() -> None:
    rules = [read_logit_rule(4, {"scaling": 0.5}), read_logit_rule(4, {"scaling": 0.25})]
    x = torch.randn(2, 2, 3, 5, 4, requires_grad=True)
    found = fold_scale(x, rules)
    assert torch.equal(found, torch.stack([x[:, 0], x[:, 1] / 2], 1))
    found.sum().backward()
    assert x.grad is not None
    assert x.grad[:, 1].eq(0.5).all()


def test_layers_capped_differently_cannot_be_followed() -> None:
    rules = [read_logit_rule(4, {"softcap": cap}) for cap in (30.0, None)]
    assert common_logits(rules) == AttentionLogits(None, "caps its logits differently from layer to layer")


@pytest.mark.parametrize("scale", [torch.tensor(0.3), None])
def test_a_scale_that_is_no_number_is_not_taken_for_the_usual_one(scale: torch.Tensor | None) -> None:
    logits = read_logit_rule(4, {"scaling": scale}).logits
    assert logits == (PRODUCTS if scale is None else AttentionLogits(None, "has a scale that is a tensor"))


def test_biases_are_seen_in_the_mask_and_beside_it() -> None:
    doge, t5 = (
        Case("Doge", "doge", base=SIZE),
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
    )
    setattr(t5, ENCODER, True)
    assert str(model_geometry(doge.model())).endswith("attention adds a bias to its logits")
    assert str(probe_geometry(doge.config())).endswith("attention adds a bias to its logits")
    assert str(probe_geometry(t5)).endswith("attention adds a position bias to its logits")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_causal_models_hold_no_bias(implementation: str) -> None:
    for name in ("Llama", "Mistral", "GPT-2", "OPT"):
        assert model_geometry(NAMED[name].model(attn_implementation=implementation)).logits == PRODUCTS


def test_arguments_without_names_are_taken_in_the_order_of_the_function() -> None:
    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None):
        return query

    module, x = torch.nn.Module(), torch.ones(1, 1, 3, 16)
    module.__dict__[SLOT] = slot = Slot("Odd", 0, ("queries",), None)
    tap_function(attend)(module, x, x, x, None, 0.0, 0.5, softcap=9.0)
    assert slot.logit_rule == LogitRule(0.5, AttentionLogits(9.0))
    assert stack_layers([slot], "queries", None).eq(2).all()
