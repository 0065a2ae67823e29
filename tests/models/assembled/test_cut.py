"""Models of some layers of another: exactly the whole model with the other layers passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.errors import SpecError
from kava_core.kv.capture.geometry import ENCODER
from kava_core.models.assembled.cut_config import cut_config, layer_list
from kava_core.models.assembled.cut_model import cut_model
from kava_core.models.assembled.kept_layers import even_layers, kept_layers, most_influential
from tests.support.tiny_models import GPT, MOE, SIZE

DEPTH = 6
IDS = torch.tensor([[5, 9, 33, 7, 21, 60, 11, 4, 17, 8, 52, 3], [4, 4, 50, 6, 9, 13, 62, 40, 30, 20, 10, 5]])
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZE},
    "qwen2": {"model_type": "qwen2", **SIZE, "use_sliding_window": True, "sliding_window": 4}
    | {"max_window_layers": 3},
    "qwen3": {"model_type": "qwen3", **SIZE},
    "gemma3": {"model_type": "gemma3_text", **SIZE, "sliding_window": 4, "layer_types": SLIDING},
    "gpt2": {"model_type": "gpt2", **GPT},
    "gpt-neo": {"model_type": "gpt_neo", "vocab_size": 64, "hidden_size": 32, "num_heads": 4}
    | {"attention_types": [[["global", "local"], 3]], "window_size": 4, "max_position_embeddings": 64},
    "smollm3": {"model_type": "smollm3", **SIZE, "no_rope_layers": [1, 1, 0, 1, 1, 0]},
    "qwen3-moe": {"model_type": "qwen3_moe", **SIZE, **MOE, "mlp_only_layers": [0, 4]},
    "mixtral": {"model_type": "mixtral", **SIZE, **MOE},
}
DEPTH_NAMES = {"gpt2": "n_layer", "gpt-neo": "num_layers"}


def whole_model(family: str, **changes: Any) -> Any:
    """Make a model of six layers whose weights are far from their beginnings."""
    fields = FAMILIES[family] | {DEPTH_NAMES.get(family, "num_hidden_layers"): DEPTH} | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@torch.no_grad()
def logits_without(model: Any, passed_over: set[int]) -> Tensor:
    """Run the whole model, but hand on what some layers were given in place of what they made."""

    def pass_over(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    found = layer_list(model, DEPTH)
    assert found is not None
    handles = [found[1][i].register_forward_hook(pass_over, with_kwargs=True) for i in passed_over]
    logits: Tensor = model(IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 3, 4, 5), (2, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_whole_one_without_the_other_layers(
    family: str, kept: tuple[int, ...], tmp_path: Path
) -> None:
    """The saved folder, loaded by transformers alone, computes it too; texts are longer than the windows."""
    whole = whole_model(family)
    expected = logits_without(whole, set(range(DEPTH)) - set(kept))
    assert not torch.allclose(expected, logits_without(whole, set()), atol=1e-3)
    attention = whole.config._attn_implementation  # GPT-Neo has no other than eager
    cut = cut_model(whole, kept, attention=attention, where="student")
    with torch.no_grad():
        torch.testing.assert_close(cut(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        cut.save_pretrained(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert plain.config.num_hidden_layers == len(kept)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen2"])
def test_caches_of_a_cut_model_have_a_place_for_each_layer(family: str) -> None:
    """Token by token with a cache it computes what it computes at once; attention layers count from 0."""
    cut = cut_model(whole_model(family), (1, 3, 5), attention="sdpa", where="student")
    numbers = [module.layer_idx for module in cut.modules() if "Attention" in type(module).__name__]
    assert numbers == [0, 1, 2]
    with torch.no_grad():
        at_once, cache, steps = cut(IDS, use_cache=False).logits, None, []
        for position in range(IDS.shape[1]):
            step = cut(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=1e-4, atol=1e-4)


def test_lists_of_a_config_are_cut_alike() -> None:
    config = cut_config(whole_model("gemma3").config, (1, 2, 5), where="student")
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    moe = cut_config(whole_model("qwen3-moe").config, (1, 3, 4), where="student")
    assert moe.mlp_only_layers == [2]
    qwen = cut_config(whole_model("qwen2").config, (0, 2, 3, 5), where="student")
    assert qwen.max_window_layers == 2


def test_the_given_config_stays_and_other_lists_too() -> None:
    """A list of two ends of text is no list of two layers."""
    config = AutoConfig.for_model(**FAMILIES["llama"] | {"num_hidden_layers": 2, "eos_token_id": [2, 3]})
    cut = cut_config(config, (1,), where="student")
    assert (config.num_hidden_layers, cut.num_hidden_layers, cut.eos_token_id) == (2, 1, [2, 3])


def test_all_layers_are_the_model_itself() -> None:
    whole = whole_model("llama")
    assert cut_model(whole, tuple(range(DEPTH)), attention="sdpa", where="student") is whole


def test_half_precision_and_tied_embeddings_stay() -> None:
    whole = whole_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    cut: Any = cut_model(whole, (0, 5), attention="eager", where="student")
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    assert cut.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in cut.parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "t5", "num_layers": 4, "d_model": 32}, "it is an encoder and a decoder"),
        (
            {"model_type": "albert", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4},
            "it has no single list of its layers, or shares weights between them",
        ),
        (
            {"model_type": "gpt2", **GPT, "n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
            "its attention is scaled by the layer's number",
        ),
        (
            {"model_type": "qwen3_moe", **SIZE, **MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2},
            "its layer 2 would be another as layer 1 (mlp.",
        ),
        (
            {"model_type": "diffllama", **SIZE, "num_hidden_layers": 4},
            "its layer 2 would be another as layer 1 (self_attn.lambda_init)",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(fields: dict[str, Any], said: str) -> None:
    config = AutoConfig.for_model(**fields)
    setattr(config, ENCODER, fields["model_type"] == "albert")
    with pytest.raises(SpecError) as error:
        cut_config(config, (0, 2, 3), where="student")
    start = f"student: keep_layers: layers cannot be taken out of a {fields['model_type']!r} model: "
    assert str(error.value).startswith(start + said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [2, 3, 7, 12, 30])
def test_even_layers_are_as_near_to_equal_distances_as_whole_numbers_can_be(depth: int) -> None:
    for count in range(2, depth + 1):
        kept = even_layers(count, depth)
        assert (kept[0], kept[-1], len(set(kept))) == (0, depth - 1, count)
        step = (depth - 1) / (count - 1)
        assert all(abs(layer - index * step) <= 0.5 for index, layer in enumerate(kept))


def test_even_layers_by_hand() -> None:
    assert even_layers(10, 30) == (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
    assert even_layers(3, 4) == (0, 2, 3)


def test_most_influential_layers_are_ascending_and_ties_go_to_the_earlier() -> None:
    assert most_influential([0.5, 0.1, 0.9, 0.1, 0.7], 3) == (0, 2, 4)
    assert most_influential([0.2, 0.2, 0.2, 0.9], 2) == (0, 3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("even:7", "even:7: the model has only 6 layers"),
        ("influence:9", "influence:9: the model has only 6 layers"),
        ((0, 6), "no layer 6: the model has layers 0 to 5"),
    ],
)
def test_layers_that_are_not_there(asked: Any, said: str) -> None:
    with pytest.raises(SpecError) as error:
        kept_layers(asked, DEPTH, where="teacher 'big'")
    assert str(error.value) == f"teacher 'big': keep_layers: {said}"
