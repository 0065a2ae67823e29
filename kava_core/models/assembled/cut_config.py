"""Cut a config down to some of the model's layers, and check that those layers stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from kava_core.errors import SpecError
from kava_core.kv.capture.geometry import config_key, fake_model

COUNTS_OF_FIRST_LAYERS = (
    "max_window_layers",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
)
"""Fields that say from which layer on something changes."""

LISTS_OF_LAYERS = ("mlp_only_layers", "moe_layers", "ple_layer_ids", "hybrid_layer_ids")
"""Fields that list numbers of layers, in place of one entry for each layer."""

LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes of modules that number the layer."""

PLAIN = (bool, int, float, str, type(None), torch.dtype)


def cut_config(config: PreTrainedConfig, kept: tuple[int, ...], *, where: str) -> PreTrainedConfig:
    """Return the config of the model with these layers alone; the given one is not changed.

    Lists with one entry for each layer are cut alike, and numbers of layers are renumbered.

    Args:
        config: the whole model's.
        kept: numbers of the kept layers, ascending.
        where: how errors name the section.

    Raises:
        SpecError: such a model's layers cannot be taken out of it.
    """
    key = config_key(config), kept
    if key not in _CUT:
        _CUT[key] = _checked_cut(config, kept, where)
    return copy.deepcopy(_CUT[key])


_CUT: dict[tuple[str, tuple[int, ...]], PreTrainedConfig] = {}


def model_depth(config: PreTrainedConfig, *, where: str) -> int:
    """Return the number of layers that a config names.

    Raises:
        SpecError: it names none.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise SpecError(
            f"{where}: keep_layers: the config of {config.model_type!r} names no number of layers"
        )
    return depth


def layer_list(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList] | None:
    """Return name and modules of the only list of ``depth`` layers in a model; None if there is no such."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            lists.append((name, module))
    return lists[0] if len(lists) == 1 else None


def _checked_cut(config: PreTrainedConfig, kept: tuple[int, ...], where: str) -> PreTrainedConfig:
    refused = f"{where}: keep_layers: layers cannot be taken out of a {config.model_type!r} model"
    if getattr(config, "is_encoder_decoder", False):
        raise SpecError(f"{refused}: it is an encoder and a decoder")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise SpecError(f"{refused}: its attention is scaled by the layer's number")
    depth = model_depth(config, where=where)
    cut = copy.deepcopy(config)
    _cut_fields(cut.get_text_config(), kept, depth)
    try:
        whole_model, cut_model = _model_without_weights(config), _model_without_weights(cut)
    except Exception as error:  # modelling code looks up what it needs by the layer's number
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SpecError(f"{refused}: {reason}") from error
    difference = _first_difference(whole_model, cut_model, kept, depth)
    if difference:
        raise SpecError(f"{refused}: {difference}")
    return cut


def _cut_fields(config: PreTrainedConfig, kept: tuple[int, ...], depth: int) -> None:
    """Change the fields of a text config in place."""
    numbers = {layer: index for index, layer in enumerate(kept)}
    for name, value in vars(config).copy().items():
        if name in COUNTS_OF_FIRST_LAYERS and isinstance(value, int):
            setattr(config, name, sum(layer < value for layer in kept))
        elif name in LISTS_OF_LAYERS and isinstance(value, list):
            setattr(config, name, [numbers[layer] for layer in value if layer in numbers])
        elif _is_per_layer(name, value, depth):
            setattr(config, name, [value[layer] for layer in kept])
        elif name == "attention_types":  # GPT-Neo's pattern, as pairs of types and repetitions
            types = [kind for kinds, count in value for _ in range(count) for kind in kinds]
            setattr(config, name, [[[types[layer]], 1] for layer in kept])
    config.num_hidden_layers = len(kept)


def _is_per_layer(name: str, value: Any, depth: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == depth and "layer" in name


def _model_without_weights(config: PreTrainedConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return fake_model(config)


def _first_difference(whole: nn.Module, cut: nn.Module, kept: tuple[int, ...], depth: int) -> str | None:
    """Return in words the first way in which the cut model is not the whole one without some layers."""
    found = layer_list(whole, depth)
    if found is None:
        return "it has no single list of its layers, or shares weights between them"
    name, whole_layers = found
    cut_layers: Any = cut.get_submodule(name)
    if len(cut_layers) != len(kept):
        return f"its config makes {len(cut_layers)} layers of {len(kept)}"
    for index, layer in enumerate(kept):
        for what in _differences(whole_layers[layer], cut_layers[index]):
            return f"its layer {layer} would be another as layer {index} ({what})"
    outside, outside_cut = _shapes_outside(whole, name), _shapes_outside(cut, name)
    if outside != outside_cut:
        return f"weights outside its layers depend on their number ({_first_unequal(outside, outside_cut)})"
    return None


def _differences(one: nn.Module, other: nn.Module) -> Iterator[str]:
    """Yield names of modules, tensors and plain attributes that are not the same in two layers."""
    modules, others = dict(one.named_modules()), dict(other.named_modules())
    if modules.keys() != others.keys():
        yield min(modules.keys() ^ others.keys())
        return
    for name, module in modules.items():
        facts, other_facts = _facts_of_module(module), _facts_of_module(others[name])
        if facts != other_facts:
            yield f"{name}.{_first_unequal(facts, other_facts)}".lstrip(".")


def _facts_of_module(module: nn.Module) -> dict[str, Any]:
    """Return type, shapes of own tensors and plain attributes of a module, its layer number left out."""
    facts: dict[str, Any] = {"class": type(module)}
    for name, value in vars(module).items():
        if isinstance(value, PLAIN) and name not in LAYER_NUMBERS:
            facts[name] = value
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        facts[name] = tensor.shape
    return facts


def _shapes_outside(model: nn.Module, layers: str) -> dict[str, Any]:
    """Return the shapes of what is saved and in no layer; rotary angles are computed from the config."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{layers}."):
            shapes[name] = tensor.shape
    return shapes


def _first_unequal(one: dict[str, Any], other: dict[str, Any]) -> str:
    return min(name for name in {*one, *other} if one.get(name) != other.get(name))
