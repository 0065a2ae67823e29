"""Write a GGUF file of a tiny Llama, as llama.cpp's converter would, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from kava_core.data.tokenizers import vocabulary_size
from tests.support import tiny

BLOCK = 32
"""Weights that share a scale in the format Q8_0."""

TEXTS = ["7+3*2? 10 0 #0", "12 + 30 = 42 #42", "the sum of two numbers"]


def tiny_llama(tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **changes: Any) -> Any:
    """Make a Llama with random weights, wide enough for quantised blocks."""
    size = {"vocab_size": vocabulary_size(tokenizer), "num_hidden_layers": 3, "hidden_size": 64}
    special = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    fields = tiny.llama(intermediate_size=96, **size, **special) | changes
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()


def write_gguf(model: Any, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write the model with its linear layers in Q8_0 and everything else in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem = name.removesuffix(".weight")
        values = _in_llama_cpp_order(stem, tensor.numpy(), config)
        gguf_name = f"{names.get_name(stem)}.weight"
        if "proj" in stem:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded_to_q8(weight: torch.Tensor) -> torch.Tensor:
    """Return what is left of weights in Q8_0: 32 neighbours share a float16 scale, each keeps 8 bits."""
    blocks = weight.double().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scale > 0, blocks / scale, torch.zeros(())).round()
    return (whole * scale.half().double()).flatten(-2).float()


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _in_llama_cpp_order(stem: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Return queries' and keys' rows with the two halves of each rotated pair side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(stem.rpartition(".")[2])
    if count is None:
        return values
    rows, columns = values.shape
    halves = values.reshape(count, 2, rows // count // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
