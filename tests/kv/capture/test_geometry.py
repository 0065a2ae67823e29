"""A model's geometry, from its configuration alone or from the model."""

import pytest
import torch
from torch import nn

from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.geometry import model_geometry, probe_geometry
from kava_core.protocols.attention_logits import PRODUCTS, AttentionLogits
from kava_core.protocols.axes import Geometry
from tests.support.tiny_models import REFUSED, SCHEMES, WORKS, Case

torch.set_num_threads(1)
BEYOND_PRODUCTS = {
    "Gemma 2": AttentionLogits(softcap=50.0),
    "GPT-OSS": AttentionLogits(unfollowed="has sinks beside its keys"),
}
NAMED = {case.name: case for case in WORKS + REFUSED}


@pytest.mark.parametrize("case", WORKS, ids=lambda case: case.name)
def test_geometry_of_every_architecture(case: Case) -> None:
    logits = BEYOND_PRODUCTS.get(case.name, PRODUCTS)
    want = Geometry(layer=case.layers, head=case.head, dim=8, qhead=4, hidden=32, logits=logits)
    assert probe_geometry(case.config()) == want


def test_a_large_model_is_probed_without_weights() -> None:
    width = {"hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128, "vocab_size": 128256}
    count = {"num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 8}
    config = Case("70B", "llama").config(**width, **count)
    assert probe_geometry(config) == Geometry(layer=8, head=8, dim=128, qhead=64, hidden=8192)


@pytest.mark.parametrize("scheme", ["dynamic", "longrope", "yarn"])
def test_schemes_that_look_at_positions(scheme: str) -> None:
    parameters = {"rope_type": scheme, "rope_theta": 1e4, **SCHEMES[scheme]}
    config = NAMED["Llama"].config(rope_parameters=parameters)
    assert probe_geometry(config).head == 2
    assert config.rope_parameters["rope_type"] == scheme


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_architectures(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match=type(case.model()).__name__):
        probe_geometry(case.config())


def test_a_live_model_is_left_as_it_was() -> None:
    model = NAMED["Llama"].model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert model_geometry(model) == Geometry(layer=2, head=2, dim=8, qhead=4, hidden=32)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_configuration_is_probed_without_random_numbers() -> None:
    state = torch.get_rng_state()
    probe_geometry(NAMED["Qwen3"].config())
    assert torch.equal(torch.get_rng_state(), state)


def test_unequal_layers_are_named() -> None:
    model = NAMED["Llama"].model()
    narrow(model.model.layers[1].self_attn)
    with pytest.raises(UnsupportedModelError) as caught:
        model_geometry(model)
    assert str(caught.value) == (
        "LlamaForCausalLM: keys of attention layers 1 differ from layer 0: "
        "1 heads × 8 at 4 positions, not 2 × 8 at 4"
    )


def narrow(attention: nn.Module) -> None:
    attention.k_proj, attention.v_proj = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    attention.num_key_value_groups = 4
