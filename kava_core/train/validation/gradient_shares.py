"""Measure how strongly each term pulls at the student, beside cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kava_core.distill.distiller import Distiller
from kava_core.errors import NonFiniteError, SpecError
from kava_core.kv.capture.attention_layers import with_hooks

PREFIX = "share"


def gradient_norms(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the norms of the gradients of ``ce`` and of every term that has a declaration, unweighted.

    Gradients are those of the student's trained weights; each term is a mean over its own positions of this
    batch. Gradients that are being collected stay as they are.
    """
    items = distiller.loss_denominators(batch).clamp_min(1)
    with torch.enable_grad():
        ce, terms = distiller.terms(batch["student"], batch["teachers"], items)
        trained = [weight for weight in distiller.student.parameters() if weight.requires_grad]
        norms = {"ce": _gradient_norm(ce, trained)}
        for name in distiller.weighted_terms():
            norms[name] = _gradient_norm(terms[name], trained)
        return norms


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    if not value.requires_grad or not parameters:
        return value.new_zeros(())
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm()


def gradient_shares(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, float]:
    """Return ``share/TERM``: the norm of λ · gradient of the term over that of cross-entropy.

    There are none for a student that is sharded or compiled, or without such terms.
    """
    if not distiller.weighted_terms() or with_hooks(distiller.student):
        return {}
    norms = gradient_norms(distiller, batch)
    if not norms["ce"] > 0:
        return {}
    shares = {}
    for name, weight in distiller.current_weights().items():
        shares[f"{PREFIX}/{name}"] = float(weight * norms[name] / norms["ce"])
    return shares


def set_weights_by_share(distiller: Distiller, batches: Sequence[Mapping[str, Any]]) -> None:
    """Set λ of every term with a ``share``, from the mean norms over some batches before the first step.

    Raises:
        SpecError: a gradient is 0, so that no λ gives the share.
        NonFiniteError: a gradient is NaN or infinite.
    """
    norms_of_batches = [gradient_norms(distiller, batch) for batch in batches]
    means = {}
    for name in norms_of_batches[0]:
        means[name] = torch.stack([norms[name] for norms in norms_of_batches]).mean()
    for name, term in distiller.weighted_terms().items():
        if term.share is None:
            continue
        if not (torch.isfinite(means[name]) and torch.isfinite(means["ce"])):
            raise NonFiniteError(f"loss {name!r}: share: a gradient is NaN or infinite before the first step")
        if not (means[name] > 0 and means["ce"] > 0):
            raise SpecError(f"loss {name!r}: share: a gradient is 0 before the first step; give a weight")
        distiller.set_first_weight(name, term.share * means["ce"] / means[name])
