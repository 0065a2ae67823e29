"""The same step as ``Bench.step`` the way research code writes it: hooks, and loops over everything.

Teachers run to the end, LM head included. Each layer, example, segment and head is a call of its own:
``F.interpolate`` for a segment of an example, ``nn.Linear`` for a head, ``F.cosine_similarity`` for a head,
softmax maps and ``F.kl_div`` for an attention head. Weights are kava's own, and so is the loss to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from bench import Bench
from torch import Tensor, nn

PROJECTIONS = {"keys": "k_proj", "values": "v_proj", "queries": "q_proj"}
Seen = dict[tuple[str, int], Tensor]


@contextmanager
def hooked(model: nn.Module, parts: tuple[str, ...]) -> Iterator[Seen]:
    """Outputs of every layer's projections, ``batch time (head dim)``, not rotated yet."""
    seen: Seen = {}

    def keep(part: str, layer: int):
        return lambda module, given, output: seen.__setitem__((part, layer), output)

    handles = [
        getattr(block.self_attn, PROJECTIONS[part]).register_forward_hook(keep(part, layer))
        for layer, block in enumerate(model.layers)
        for part in parts
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Naive:
    """The naive form of a bench's step; losses ``mercator`` and ``attention_kl`` with weight 1."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.pipeline = bench, bench.pipeline
        self.parts = self.pipeline.parts
        self.projections = [self._linears(aligner) for aligner in self.pipeline.teachers]

    def _linears(self, aligner: nn.Module) -> dict[tuple[str, int, int], nn.Linear]:
        made = {}
        projector = aligner.dim_projector
        for part in self.parts:
            owner = "keys" if part == "queries" else part
            basis, mean = getattr(projector, f"{owner}_basis"), getattr(projector, f"{owner}_mean")
            for layer in range(basis.shape[0]):
                for head in range(aligner.target.heads(part)):
                    row = head * basis.shape[1] // aligner.target.heads(part)
                    weight, shift = basis[layer, row], mean[layer, row] * (part == owner)
                    made[part, layer, head] = _linear(weight, -weight @ shift)
        return made

    def step(self) -> None:
        """Loss and update."""
        self.bench.update(self.loss())

    def loss(self) -> Tensor:
        """Cross-entropy and the KV losses."""
        bench, here = self.bench, self.bench.ours
        targets = [self._targets(index) for index in range(len(bench.teachers))]
        with hooked(bench.student.model, self.parts) as seen:
            output = bench.student(
                input_ids=here["input_ids"], attention_mask=here["attention_mask"], labels=here["labels"]
            )
        terms = [self._terms(seen, target) for target in targets]
        return output.loss + torch.stack(terms).mean()

    @torch.no_grad()
    def _targets(self, index: int) -> dict[tuple[str, int, int], Tensor]:
        """``batch time dim`` of every part, student layer and head."""
        teacher, aligner = self.bench.teachers[index], self.pipeline.teachers[index]
        there = self.bench.theirs[teacher.name]
        with hooked(teacher.model.model, self.parts) as seen:
            teacher.model(input_ids=there["input_ids"], attention_mask=there["attention_mask"])
        targets = {}
        for layer in range(aligner.target.layer):
            source = int((layer + 1) * len(teacher.model.model.layers) / aligner.target.layer + 0.5) - 1
            for part in self.parts:
                warped = resample(seen[part, source], there["segments"], self.bench.ours["segments"])
                heads = warped.unflatten(-1, (aligner.teacher.heads(part), -1)).unbind(2)
                for head, row in enumerate(self._mix(aligner, part)):
                    mixed = sum(share * x for share, x in zip(row, heads, strict=True) if share)
                    targets[part, layer, head] = self.projections[index][part, layer, head](mixed)
        return targets

    def _mix(self, aligner: nn.Module, part: str) -> list[list[float]]:
        mix = getattr(aligner.head_adapter, "queries_mix" if part == "queries" else "keys_mix")
        return torch.eye(aligner.target.heads(part)).tolist() if mix is None else mix[0].tolist()

    def _terms(self, seen: Seen, targets: dict[tuple[str, int, int], Tensor]) -> Tensor:
        students = {key: x.unflatten(-1, (self._heads(key[0]), -1)) for key, x in seen.items()}
        total = torch.zeros((), device=self.bench.device)
        for row, config in enumerate(self.pipeline.configs):
            layers = getattr(self.pipeline, f"rows_{row}").tolist()
            term = self._cosines if config.name == "mercator" else self._divergences
            for layer in layers:
                total = total + term(students, targets, layer) / len(layers)
        return total / self.bench.items[1]

    def _heads(self, part: str) -> int:
        return self.pipeline.teachers[0].view.heads(part)

    def _cosines(self, students: Seen, targets: dict[tuple[str, int, int], Tensor], layer: int) -> Tensor:
        total = torch.zeros((), device=self.bench.device)
        for part in ("keys", "values"):
            heads = self._heads(part)
            for head in range(heads):
                cosine = F.cosine_similarity(
                    students[part, layer][:, :, head], targets[part, layer, head], dim=-1
                )
                total = total + (1 - cosine).sum() / heads
        return total

    def _divergences(self, students: Seen, targets: dict[tuple[str, int, int], Tensor], layer: int) -> Tensor:
        total = torch.zeros((), device=self.bench.device)
        heads, key_heads = self._heads("queries"), self._heads("keys")
        for head in range(heads):
            key_head = head * key_heads // heads
            queries, keys = students["queries", layer][:, :, head], students["keys", layer][:, :, key_head]
            mine = attention(queries, keys)
            theirs = attention(targets["queries", layer, head], targets["keys", layer, key_head])
            total = total + F.kl_div((mine + 1e-9).log(), theirs, reduction="sum") / heads
        return total


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Causal map of one head, ``batch time time``."""
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -1e9).softmax(-1)


def resample(x: Tensor, t_segments: Tensor, segments: Tensor) -> Tensor:
    """``batch t_time channels`` to the student's time: each segment of each example by itself."""
    rows = []
    for example in range(len(x)):
        pieces = []
        for (t_first, t_last), (first, last) in zip(
            borders(t_segments[example]), borders(segments[example]), strict=True
        ):
            piece = x[example, t_first:t_last].T[None]
            pieces.append(F.interpolate(piece, size=last - first, mode="linear", align_corners=False)[0].T)
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


def borders(segments: Tensor) -> list[tuple[int, int]]:
    """First position and the one after the last, of segments in their order."""
    counts = torch.bincount(segments, minlength=3).cumsum(0).tolist()
    return list(pairwise([0, *counts]))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(*weight.T.shape, device=weight.device)
    made.requires_grad_(False)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made
