"""How strongly each KV loss pulls at the student, beside cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kava_core.distill.distiller import Distiller
from kava_core.errors import SpecError
from kava_core.kv.capture.attention_layers import with_hooks

PREFIX = "share"


def gradient_norms(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Norm of the gradient of ``ce`` and of every unweighted KV term over the student's trained weights.

    Each is a mean over its own positions of this batch. Gradients that are being collected stay as they are.
    """
    items = distiller.loss_denominators(batch).clamp_min(1)
    with torch.enable_grad():
        ce, terms = distiller.terms(batch["student"], batch["teachers"], items)
        trained = [p for p in distiller.student.parameters() if p.requires_grad]
        named = {"ce": ce} | {name: terms[name] for name in distiller.pipeline.term_names}
        return {name: _norm(value, trained) for name, value in named.items()}


def _norm(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    if not value.requires_grad or not parameters:
        return value.new_zeros(())
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([gradient.float().norm() for gradient in found if gradient is not None]).norm()


def shares(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, float]:
    """``share/TERM``: norm of λ · gradient of the term over that of cross-entropy.

    Nothing for a student that is sharded or compiled, or without KV losses.
    """
    pipeline = distiller.pipeline
    if not pipeline.compared or with_hooks(distiller.student):
        return {}
    norms = gradient_norms(distiller, batch)
    if not norms["ce"] > 0:
        return {}
    weights = dict(zip(pipeline.term_names, pipeline.current_weights(), strict=True))
    return {
        f"{PREFIX}/{name}": float(weights[name] * norms[name] / norms["ce"]) for name in pipeline.term_names
    }


def set_weights(distiller: Distiller, batches: Sequence[Mapping[str, Any]]) -> None:
    """λ of every loss with a ``share``, from the mean norms over some batches before the first step.

    SpecError where a gradient is 0, so that no λ gives the share.
    """
    pipeline = distiller.pipeline
    norms = [gradient_norms(distiller, batch) for batch in batches]
    means = {name: torch.stack([each[name] for each in norms]).mean() for name in norms[0]}
    for place, (name, config) in enumerate(zip(pipeline.term_names, pipeline.configs, strict=True)):
        if config.share is None:
            continue
        if not (means[name] > 0 and means["ce"] > 0):
            raise SpecError(f"loss {name!r}: share: a gradient is 0 before the first step; give a weight")
        pipeline.weights[place] = config.share * means["ce"] / means[name]
