"""Replace a teacher by a fixed random vector for every token: a control that knows tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kava_core.config import Part
from kava_core.kv.align.eviction import Eviction
from kava_core.models.ledger import Ledger
from kava_core.models.teacher import Teacher, TeacherPass
from kava_core.protocols.axes import PARTS, Cache, Geometry


class TokenVectors(nn.Module):
    """Normal vectors of variance 1 for every token, layer and head; a token's are drawn when it is first met.

    They depend on the seed, the token's number and the geometry alone, so they are the same in every process,
    in every run and after a resume, and no table of the whole vocabulary is ever held.

    Args:
        config: of the model that would teach; nothing of it is run.
        geometry: of that model's cache.
        vocabulary: how many tokens its tokenizer numbers.
        seed: decides all vectors.
    """

    def __init__(self, config: PreTrainedConfig, geometry: Geometry, vocabulary: int, *, seed: int) -> None:
        super().__init__()
        self.config, self.geometry, self.seed = config, geometry, seed
        self._ends: dict[str, tuple[int, int]] = {}
        end = 0
        for part in PARTS:
            start, end = end, end + geometry.heads(part) * geometry.dim
            self._ends[part] = start, end
        self._ends["hidden"] = end, end + geometry.hidden
        self._row_of_token = torch.full((vocabulary,), -1)
        self._rows = torch.empty(0, geometry.layer, end + geometry.hidden)

    @property
    def base_model(self) -> TokenVectors:
        """Return itself, as there is no head."""
        return self

    def cache(
        self, ids: Int[Tensor, "batch t_time"], layers: tuple[int, ...], parts: tuple[Part, ...]
    ) -> Cache:
        """Return the vectors of tokens as a cache, each part ``batch t_layer t_head t_time t_dim``.

        Args:
            ids: the tokens' numbers.
            layers: attention layers, in this order.
            parts: which parts.
        """
        geometry = self.geometry
        made = {}
        for part in parts:
            vectors = self._vectors(ids, part)[:, :, list(layers)]
            split = vectors.unflatten(-1, (geometry.heads(part), geometry.dim))
            made[part] = split.permute(0, 2, 3, 1, 4)
        return Cache(**made)

    def layers_to_compare(
        self, ids: Int[Tensor, "batch t_time"], on: str
    ) -> Float[Tensor, "batch t_layer t_time dim"]:
        """Return what a layer mapper compares of every layer: ``hidden``, ``keys`` or ``values``."""
        return self._vectors(ids, on).transpose(1, 2)

    def _vectors(
        self, ids: Int[Tensor, "batch t_time"], name: str
    ) -> Float[Tensor, "batch t_time t_layer dim"]:
        start, end = self._ends[name]
        rows = self._row_of_token.to(ids.device)[ids]
        if (rows < 0).any():
            self._meet(ids[rows < 0].unique())
            rows = self._row_of_token.to(ids.device)[ids]
        self._rows = self._rows.to(ids.device)
        return self._rows[rows][..., start:end]

    def _meet(self, tokens: Int[Tensor, " _"]) -> None:
        """Draw the vectors of tokens that were not met before, once each."""
        known, extents = len(self._rows), self._rows.shape[1:]
        drawn = []
        for token in tokens.tolist():
            random = np.random.default_rng([self.seed, token])
            drawn.append(torch.from_numpy(random.standard_normal(extents, dtype=np.float32)))
        self._row_of_token[tokens.cpu()] = torch.arange(known, known + len(drawn))
        self._rows = torch.cat([self._rows, torch.stack(drawn).to(self._rows.device)])


class TokenTeacher(Teacher):
    """Gives the vectors of the tokens it reads in place of a model's cache; there is no forward pass.

    Its keys are not rotated, whatever the spec's ``rotary``. Tokens are counted as read; of
    operations those of its alignment alone.

    Args:
        name: the teacher's name.
        model: the vectors.
        layers: attention layers to read.
        parts: what to read of them.
        rotary: ignored.
        eviction: as for ``Teacher``.
    """

    def __init__(
        self,
        name: str,
        model: TokenVectors,
        *,
        layers: tuple[int, ...],
        parts: tuple[Part, ...],
        rotary: Literal["strip", "keep", "match"] = "strip",
        eviction: Eviction | None = None,
    ) -> None:
        self.name, self.model, self.eviction = name, model, eviction
        self.layers, self.parts = layers, parts if eviction is None else eviction.seen
        self.logits = self.hidden = False
        self.ledger: Ledger | None = None

    def to(self, device: torch.device, placement: str = "replicated") -> None:
        """Do nothing: vectors are where the tokens are."""

    def read(self, side: Mapping[str, Any], *, keep_outputs: bool = False) -> TeacherPass:
        """Return the vectors of a batch's tokens; arguments as for ``Teacher.read``."""
        self._count(side)
        seen = self._seen(side)
        return TeacherPass(self.name, seen if self.eviction is None else self.eviction(seen, None, side))

    def read_by_layer(
        self, side: Mapping[str, Any], take_layer: Callable[[int, Cache], None], *, keep_outputs: bool = False
    ) -> TeacherPass:
        """Hand over the vectors layer by layer; arguments as for ``Teacher.read_by_layer``."""
        self._count(side)
        for place, layer in enumerate(self.layers):
            take_layer(place, self.model.cache(side["input_ids"], (layer,), self.parts))
        return TeacherPass(self.name, Cache())

    def eviction_scores(self, side: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the scores that tokens are chosen by; empty without an eviction."""
        return {} if self.eviction is None else self.eviction.scores(self._seen(side), side)

    def _seen(self, side: Mapping[str, Any]) -> Cache:
        return self.model.cache(side["input_ids"], self.layers, self.parts)

    def _count(self, side: Mapping[str, Any]) -> None:
        if self.ledger is not None:
            self.ledger.add_tokens(self.name, side["attention_mask"])
            # No operations follow from these positions but those of the alignment.
            self.ledger.add_text(self.name, side["attention_mask"])
