"""Measure how much each layer changes what passes through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.errors import NonFiniteError, SpecError
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.models.assembled.cut_config import layer_list, model_depth


@torch.no_grad()
def block_influence(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, where: str
) -> Float[Tensor, " layer"]:
    """Return the Block Influence of every layer: 1 - mean cosine of its input and output hidden states.

    The mean is over all real tokens of all batches. 0: the layer changes no direction; at most 2.

    Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), equation 1.

    Args:
        model: a causal language model or an encoder.
        batches: each with ``input_ids`` and ``attention_mask``, ``batch time``, on the model's device.
        where: how errors name the section.

    Raises:
        SpecError: the model has no list of its layers.
        NonFiniteError: a hidden state is not finite.
    """
    found = layer_list(model, model_depth(model.config, where=where))
    if found is None:
        raise SpecError(f"{where}: keep_layers: {type(model).__name__} has no single list of its layers")
    sums = torch.zeros(len(found[1]), dtype=torch.float64)
    tokens = 0
    with evaluation_mode(model), _CosineHooks(found[1]) as hooks:
        for batch in batches:
            hooks.real = batch["attention_mask"].bool()
            model.base_model(**batch, use_cache=False)
            sums += torch.stack(hooks.sums).cpu()
            tokens += int(hooks.real.sum())
    influence = 1 - sums / tokens
    if not influence.isfinite().all():
        layers = (~influence.isfinite()).nonzero().flatten().tolist()
        raise NonFiniteError(f"{where}: keep_layers: hidden states of layers {layers} hold NaN or infinity")
    return influence


class _CosineHooks:
    """Sums, in every pass, the cosines of each layer's input and output over the real tokens."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.real: Bool[Tensor, "batch time"] = torch.empty(0, 0, dtype=torch.bool)
        self.sums = [torch.zeros((), dtype=torch.float64) for _ in layers]

    def __enter__(self) -> _CosineHooks:
        self.handles = []
        for index, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_hook(self._hook(index), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def add_cosines(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            cosines = torch.cosine_similarity(given.double(), made.double(), dim=-1)
            self.sums[index] = cosines[self.real].sum()

        return add_cosines
