"""Merge a PEFT adapter into the weights of its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from kava_core.errors import SpecError

WEIGHTS = "adapter_model.safetensors"


def merged_model(model: nn.Module, folder: Path, *, where: str) -> nn.Module:
    """Return the base model with an adapter's updates added to its weights; the model is changed.

    Args:
        model: the adapter's base model.
        folder: the adapter's.
        where: how errors name the section.

    Raises:
        SpecError: peft is missing, the weights are no safetensors or not those of this base model, or the
            adapter is of a kind that cannot be merged.
    """
    try:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise SpecError(f"{where}: {folder}: an adapter needs peft: pip install 'kava[lora]'") from error
    if not (folder / WEIGHTS).is_file():
        raise SpecError(f"{where}: {folder}: no {WEIGHTS}; save the adapter as safetensors")
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise SpecError(f"{where}: {folder}: {config.peft_type.value} has no update of weights to merge")
    # It may be a relative folder, which peft would tell from the model's.
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    adapted: Any = get_peft_model(model, config)
    result = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
    _check_names(adapted, result, f"{where}: {folder}")
    if not hasattr(adapted, "merge_and_unload"):
        raise SpecError(f"{where}: {folder}: peft cannot merge an adapter of type {config.peft_type.value}")
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)  # peft froze it for the adapter's sake


def _check_names(adapted: Any, result: Any, who: str) -> None:
    """Check that the file held exactly the adapter's weights; peft itself only warns."""
    own = {name for name, _ in adapted.named_parameters() if f".{adapted.active_adapter}." in f".{name}."}
    missing = sorted(own & set(result.missing_keys))
    if missing:
        raise SpecError(f"{who}: {len(missing)} weights of the adapter are missing, such as {missing[0]}")
    unused = sorted(result.unexpected_keys)
    if unused:
        raise SpecError(
            f"{who}: {len(unused)} weights of the adapter have no place in its base, such as {unused[0]}"
        )
