"""What the losses on attention compare is what transformers' own eager attention does, model by model."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config

from kava_core.errors import SpecError
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import ENCODER, model_geometry, probe_geometry
from kava_core.protocols.axes import PARTS, Cache, Geometry
from kava_core.protocols.timeline import ANSWER, REASONING
from kava_plugins.kv_losses import AttentionKLConfig, AttentionOutputConfig, StructuralConfig
from kava_plugins.time_warpers import RkvConfig
from tests.support.pipeline_helpers import timeline
from tests.support.tiny_models import WORKS

torch.set_num_threads(1)
NAMED = {case.name: case for case in WORKS}
TIME = 9
WIDE = {"sliding_window": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Granite": ("Granite", {"attention_multiplier": 1.0}),
    "Gemma 2, capped": ("Gemma 2", WIDE | {"attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 3}),
    "Gemma 2, not capped": ("Gemma 2", WIDE | {"attn_logit_softcapping": None, "query_pre_attn_scalar": 3}),
    "Gemma 3": ("Gemma 3 (text)", WIDE | {"query_pre_attn_scalar": 3}),
    "GPT-2": ("GPT-2", {}),
    "GPT-2, by layer": ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-2, no scale": ("GPT-2", {"scale_attn_weights": False}),
    "OPT": ("OPT", {}),
    "GPT-NeoX": ("GPT-NeoX", {}),
    "Qwen3": ("Qwen3", {}),
}
UNCAPPED = [name for name in MODELS if name != "Gemma 2, capped"]


class Attended(NamedTuple):
    """One forward pass: what was captured, and the model's own maps."""

    cache: Cache
    maps: Tensor
    """``batch layer qhead time t_time``."""
    geometry: Geometry


@torch.no_grad()
def attend(name: str, seed: int = 0) -> Attended:
    case, changes = MODELS[name]
    model = NAMED[case].model(torch.float64, attn_implementation="eager", **changes).eval()
    return attend_with(model, seed)


@torch.no_grad()
def attend_with(model: Any, seed: int = 0) -> Attended:
    ids = torch.randint(3, 60, (2, TIME), generator=torch.Generator().manual_seed(seed))
    capture = Capture(model, parts=PARTS, rotary="keep")
    with capture:
        model(ids, use_cache=False)
    cache = capture.take()
    maps = model(ids, use_cache=False, output_attentions=True).attentions
    return Attended(cache, torch.stack(maps, 1).double(), model_geometry(model))


def weights() -> Tensor:
    return torch.rand(2, 2, TIME, generator=torch.Generator().manual_seed(5)).double() + 0.1


def divergence(target: Tensor, student: Tensor) -> Tensor:
    """Σ weight × mean over heads of KL(target ‖ student), from maps whose later positions are 0."""
    seen = torch.ones(TIME, TIME, dtype=torch.bool).tril()
    logs = [torch.where(seen, maps, 1).log() for maps in (target, student)]
    return ((target * (logs[0] - logs[1])).sum(-1).mean(2) * weights()).sum()


def compare(config: Any, student: Attended, target: Attended) -> Tensor:
    loss = config.build(teacher=target.geometry, student=student.geometry)
    found: Tensor = loss(student.cache.pick(config.parts), target.cache.pick(config.parts), weights())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_models_own_attention(name: str) -> None:
    one, llama = attend(name), attend("Llama", seed=1)
    for student, target in ((one, llama), (llama, one)):
        wanted = divergence(target.maps, student.maps)
        assert wanted > 0.1
        config = AttentionKLConfig()
        torch.testing.assert_close(compare(config, student, target), wanted, rtol=1e-5, atol=0)
        attention_alone = StructuralConfig(alpha_k=0, alpha_v=0, alpha_attn=1)
        torch.testing.assert_close(compare(attention_alone, student, target), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", UNCAPPED)
def test_outputs_are_those_of_the_models_own_attention(name: str) -> None:
    student, target = attend(name), attend("Llama", seed=1)
    outputs = []
    for side in (student, target):
        assert side.cache.values is not None
        group = side.maps.shape[2] // side.cache.values.shape[2]
        outputs.append(side.maps @ side.cache.values.repeat_interleave(group, 2))
    wanted = ((outputs[0] - outputs[1]).square().mean((2, 4)) * weights()).sum()
    found = compare(AttentionOutputConfig(form="mse"), student, target)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["Granite", "Gemma 2, capped", "GPT-2, by layer"])
def test_importance_is_the_models_own_attention_to_the_reasoning(name: str) -> None:
    attended = attend(name)
    line = timeline((2, 4, 3), (1, 5, 3))
    warper = RkvConfig().build(teacher=attended.geometry, student=attended.geometry)
    found = warper.scores(attended.cache, line)["importance"]
    for b in range(2):
        answer, reasoning = ((line.segments[b] == s).nonzero().flatten() for s in (ANSWER, REASONING))
        rows = attended.maps[b][:, :, answer][..., reasoning]
        by_head = (rows / rows.sum(-1, keepdim=True)).mean(2)
        group = by_head.shape[1] // found.shape[2]
        wanted = by_head.unflatten(1, (-1, group)).amax(2)
        torch.testing.assert_close(found[b][..., reasoning], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equal_attention_of_a_granite_and_a_llama_loses_nothing(implementation: str) -> None:
    """Weights as in shared/cases/07: the Llama's queries are 4 times as long, its scale is a quarter."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "attn_implementation": implementation,
    }
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**sizes, attention_multiplier=1.0)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    llama.load_state_dict(granite.state_dict())
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(4)
    caches = []
    for model in (granite, llama):
        capture = Capture(model, parts=PARTS, rotary="keep")
        with torch.no_grad(), capture:
            model(torch.arange(3, 30)[None], use_cache=False)
        caches.append(capture.take())
    weight, sides = torch.ones(1, 2, 27), dict(teacher=model_geometry(granite), student=model_geometry(llama))
    for config in (AttentionKLConfig(), AttentionOutputConfig()):
        lost = config.build(**sides)(*(cache.pick(config.parts) for cache in caches), weight)
        assert float(lost) == pytest.approx(0, abs=1e-4)


def test_a_cap_changes_the_gradient_as_autograd_says() -> None:
    student, target = attend("Gemma 2, capped"), attend("Llama", seed=1)
    cap = student.geometry.logits.softcap
    assert cap == 0.7
    leaves = {part: x.clone().requires_grad_() for part, x in student.cache.pick(("keys", "queries")).items()}
    found = compare(
        AttentionKLConfig(kind="jeffreys", temperature=1.3), student._replace(cache=Cache(**leaves)), target
    )
    products = leaves["queries"] @ leaves["keys"].repeat_interleave(2, 2).mT / 8**0.5
    later = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    own = (cap * torch.tanh(products / cap) / 1.3).masked_fill(later, -torch.inf).softmax(-1)
    other = torch.where(later, 0, target.maps ** (1 / 1.3))
    other = other / other.sum(-1, keepdim=True)
    wanted = divergence(other, own) + divergence(own, other)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        *(torch.autograd.grad(x, [*leaves.values()]) for x in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def t5_encoder() -> Geometry:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
    setattr(config, ENCODER, True)
    return probe_geometry(config)


REFUSALS = {
    "Gemma 2": "caps its logits at 50 (softcap)",
    "GPT-OSS": "has sinks beside its keys",
    "T5": "adds a position bias to its logits",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_attention_of_more_than_queries_and_keys_is_refused(name: str) -> None:
    odd = t5_encoder() if name == "T5" else probe_geometry(NAMED[name].config())
    plain = odd.attending_like(probe_geometry(NAMED["Llama"].config()))
    for teacher, student, whose in ((odd, plain, "teacher"), (plain, odd, "student")):
        with pytest.raises(SpecError) as caught:
            AttentionOutputConfig().build(teacher=teacher, student=student)
        assert str(caught.value) == (
            f"loss 'attention_output', the {whose}'s queries: attention {REFUSALS[name]}, which cannot be "
            "computed from queries and keys here; use a loss that computes no such attention, for example "
            "mercator or relation"
        )


@pytest.mark.parametrize("name", ["GPT-OSS", "T5"])
def test_every_component_that_computes_attention_refuses_what_it_cannot_follow(name: str) -> None:
    odd = t5_encoder() if name == "T5" else probe_geometry(NAMED[name].config())
    for config in (AttentionKLConfig(), StructuralConfig(), RkvConfig()):
        with pytest.raises(SpecError, match=REFUSALS[name]):
            config.build(teacher=odd, student=odd)
    StructuralConfig(alpha_attn=0).build(teacher=odd, student=odd)
