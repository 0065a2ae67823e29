"""Tiny configurations of many architectures, what capturing each one must do, and tiny tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kava_core.data.tokenizers import load_tokenizer
from kava_core.files import cache_folder
from kava_core.specfile.sections.models import TrainTokenizer

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_WIDTH = {name: value for name, value in SIZE.items() if name != "head_dim"}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8} | {
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

SCHEMES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}


def heads(x: Tensor, head: int) -> Tensor:
    """``batch time (head dim)`` to ``batch head time dim``."""
    return x.unflatten(-1, (head, -1)).transpose(1, 2)


def separate(attention: nn.Module, head: int) -> Callable[[], dict[str, Tensor]]:
    """Keys and values from k_proj and v_proj; the keys from their norm, where the layer has one."""
    seen: dict[str, Tensor] = {}

    def save(name: str) -> Callable[..., None]:
        return lambda module, given, output: seen.__setitem__(name, output)

    attention.k_proj.register_forward_hook(save("keys"))
    attention.v_proj.register_forward_hook(save("values"))
    norm = next((getattr(attention, n) for n in ("k_norm", "k_layernorm") if hasattr(attention, n)), None)
    if norm is not None:
        norm.register_forward_hook(save("normed"))

    def read() -> dict[str, Tensor]:
        return {"keys": _key_heads(seen, head), "values": heads(seen["values"], head)}

    return read


def _key_heads(seen: dict[str, Tensor], head: int) -> Tensor:
    keys = seen.get("normed", seen["keys"])
    if keys.dim() == 3:
        return heads(keys, head)
    return keys if keys.shape[1] == head else keys.transpose(1, 2)


def fused(projection: str, cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Keys and values cut out of one projection's output ``batch time channels``."""

    def oracle(attention: nn.Module, head: int) -> Callable[[], dict[str, Tensor]]:
        seen: list[Tensor] = []
        getattr(attention, projection).register_forward_hook(lambda m, given, output: seen.append(output))
        return lambda: dict(zip(("keys", "values"), cut(seen[-1]), strict=True))

    return oracle


def _thirds(x: Tensor) -> tuple[Tensor, Tensor]:
    return heads(x[..., 32:64], 4), heads(x[..., 64:], 4)


def _neox(x: Tensor) -> tuple[Tensor, Tensor]:
    split = x.unflatten(-1, (4, 3, 8)).transpose(1, 2)
    return split[..., 1, :], split[..., 2, :]


def _phi3(x: Tensor) -> tuple[Tensor, Tensor]:
    return heads(x[..., 32:48], 2), heads(x[..., 48:], 2)


def _bigcode(x: Tensor) -> tuple[Tensor, Tensor]:
    return heads(x[..., 32:40], 1), heads(x[..., 40:], 1)


@dataclass(frozen=True)
class Case:
    """One architecture: its model_type, what differs from SIZE, and what is expected."""

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: SIZE)
    oracle: Callable[..., Any] = separate
    head: int = 2
    layers: int = 2
    note: str = ""

    def config(self, **more: Any) -> PretrainedConfig:
        """A fresh configuration."""
        return AutoConfig.for_model(self.model_type, **{**self.base, **self.changes, **more})

    def model(self, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
        """A model with random weights, the same every time; parameters nudged off their round defaults."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(**more)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3 / math.sqrt(parameter.shape[-1]))
        return model


NOPE = "layers without rotation are left as they are"

WORKS = (
    Case("Llama", "llama"),
    Case("Mistral", "mistral", {"sliding_window": 4}, note="sliding window"),
    Case("Qwen2", "qwen2"),
    Case("Qwen3", "qwen3", note="norm on queries and keys"),
    Case("Gemma", "gemma"),
    Case("Gemma 2", "gemma2", {"sliding_window": 4}, note="alternating sliding window"),
    Case(
        "Gemma 3 (text)",
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        note="local and global angles; norm on queries and keys",
    ),
    Case(
        "GPT-2",
        "gpt2",
        base=GPT,
        oracle=fused("c_attn", _thirds),
        head=4,
        note="fused projection; no rotation",
    ),
    Case(
        "GPT-NeoX",
        "gpt_neox",
        {"rotary_pct": 0.5},
        oracle=fused("query_key_value", _neox),
        head=4,
        note="fused projection; partial rotation",
    ),
    Case("Phi", "phi", {"partial_rotary_factor": 0.5}, note="partial rotation"),
    Case("Phi-3", "phi3", oracle=fused("qkv_proj", _phi3), note="fused projection"),
    Case("OLMo 2", "olmo2", note="norm on queries and keys"),
    Case("GLM", "glm", {"partial_rotary_factor": 0.5}, note="interleaved pairs; partial rotation"),
    Case("Cohere", "cohere", note="interleaved pairs"),
    Case(
        "Cohere 2",
        "cohere2",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        note=f"interleaved pairs; {NOPE}",
    ),
    Case("StableLM", "stablelm", {"partial_rotary_factor": 0.5}, note="partial rotation"),
    Case("Granite", "granite"),
    Case("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}, note=NOPE),
    Case(
        "GPT-OSS",
        "gpt_oss",
        {"sliding_window": 4, **MOE},
        note="experts; attention sinks; eager attention; YaRN angles",
    ),
    Case("Mixtral", "mixtral", MOE, note="experts"),
    Case(
        "GPT-BigCode",
        "gpt_bigcode",
        {"multi_query": True},
        base=GPT,
        oracle=fused("c_attn", _bigcode),
        head=1,
        note="one key/value head; no rotation",
    ),
    Case("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, head=4, note="no rotation"),
    Case(
        "Qwen3-Next",
        "qwen3_next",
        {
            **MOE,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "partial_rotary_factor": 0.5,
        },
        layers=1,
        note="hybrid: its attention layers only; partial rotation",
    ),
)

REFUSED = (
    Case("Bloom", "bloom", base=GPT | {"hidden_size": 32}),
    Case("Falcon", "falcon", {"multi_query": True}, base=NO_WIDTH),
    Case("GPT-J", "gptj", {"rotary_dim": 4}, base=GPT),
    Case("Mamba", "mamba", {"state_size": 4}),
    Case("DeepSeek-V2", "deepseek_v2", MLA, base=NO_WIDTH),
    Case("DeepSeek-V3", "deepseek_v3", MLA, base=NO_WIDTH),
)


TEXTS = ("say: 10+20= 30 and 4 #34", "4-1+1= 3 and and 40 #44", "5+1= naïve 🙂 6 #6", "0123456789 and so on")

VOCABULARIES = {"chars": 96, "bpe": 290, "unigram": 60}


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer trained on ``TEXTS``: characters, byte-level pairs, or pieces as in SentencePiece."""
    trained = TrainTokenizer.model_validate({"kind": kind, "vocab_size": VOCABULARIES[kind]})
    return load_tokenizer(trained, texts=TEXTS, cache=cache_folder() / "tokenizers")
