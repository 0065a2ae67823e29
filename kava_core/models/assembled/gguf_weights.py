"""Turn the weights of a GGUF file into plain numbers once, and keep them in the cache as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.console import tell_once
from kava_core.data.pretrained.gguf import gguf_description, kept_folder
from kava_core.errors import SpecError
from kava_core.models.assembled.rebuilt import rebuilt_model


def dequantised_folder(file: Path, dtype: str, *, where: str) -> Path:
    """Return a transformers folder with the weights of a GGUF file in a plain number format.

    transformers computes the weights in float32 and rounds them to ``dtype``.

    Args:
        file: the GGUF file.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        where: how errors name the section.

    Raises:
        SpecError: the file cannot be read, or weights of the model are missing in it.
        KavaError: the cache cannot be written.
    """
    description = gguf_description(file, where=where)

    def write(alone: Path, folder: Path) -> None:
        tell_once(f"{where}: {file}: dequantised to {dtype}, once; kept in {folder.parent / dtype}")
        packed, loading_info = AutoModelForCausalLM.from_pretrained(
            str(alone.parent),
            gguf_file=alone.name,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
        )
        missing = sorted(loading_info["missing_keys"])
        if missing:
            raise SpecError(f"{where}: {file}: {len(missing)} weights are missing, such as {missing[0]}")
        # The packed model's own config would make transformers take the saved weights for GGUF's again.
        config = AutoConfig.from_pretrained(description, trust_remote_code=False)
        model = rebuilt_model(config, packed.state_dict(), like=packed, attention="sdpa")
        model.save_pretrained(folder)

    return kept_folder(file, dtype, write, where=where)
