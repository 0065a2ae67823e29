"""What a step keeps in memory, counted on tensors without values: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kava_core.costs.dry_run import DryRun
from kava_core.kv.capture.geometry import fake_model
from kava_core.kv.compare.values import Aligned
from kava_core.models.fsdp import decoder_layers
from kava_core.protocols.axes import Cache
from kava_core.specfile.sections.pipeline import PipelineSpec

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOGIT_BYTES = 12
"""Of one logit at the peak, which is in the backward pass: the log-probability and two gradients."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass."""

    layers: tuple[int, ...]
    """By decoder layer."""
    around: int
    """Outside of the layers: the embedding, the last norm; under autocast the head's weights as well."""
    entering: int
    """What enters one layer: all that checkpointing keeps of it."""
    copies: int
    """Autocast's copies of the layers' weights, which live until the forward pass ends."""

    def without_copies(self) -> Kept:
        """With weights that need no copy."""
        each = self.copies // len(self.layers)
        return replace(self, layers=tuple(layer - each for layer in self.layers), copies=0)

    def of_passes(self, count: float) -> Kept:
        """Of so many passes that are all kept, the last perhaps over a part of the text."""
        layers = tuple(int(layer * count) for layer in self.layers)
        how = {
            "around": int(self.around * count),
            "entering": int(self.entering * count),
            "copies": self.copies * math.ceil(count),
        }
        return replace(self, layers=layers, **how)

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.around + sum(self.layers)

    @property
    def checkpointed(self) -> int:
        """Likewise, where every layer is made again when its turn comes in the backward pass."""
        return self.around + self.entering * len(self.layers)


class _Storages:
    """Counts storages once, whoever views them, but not those of ``known`` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known = {x.untyped_storage()._cdata for x in known}
        self.found: dict[int, Any] = {}
        self.bytes = 0

    def see(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.found:
            self.found[storage._cdata] = storage  # held, so that no other gets its address
            self.bytes += storage.nbytes()
        return x

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.see, lambda x: x)


def kept_by_student(spec: PipelineSpec, config: PreTrainedConfig, *, batch: int, time: int) -> Kept:
    """The student's forward pass.

    Of several examples some are taken to be padded: attention keeps their mask at every layer,
    ``batch × time²`` numbers.
    """
    attention = "eager" if spec.student.attention == "eager" else "sdpa"
    padded = batch > 1 and spec.student.attention != "flash_attention_2"
    with FakeTensorMode(), nullcontext() if padded else _no_mask(attention):
        model: Any = fake_model(
            config, attn_implementation=attention, dtype=getattr(torch, spec.student.dtype)
        )
        ids = torch.zeros(batch, time, dtype=torch.long)
        return _kept(
            model.train(), AUTOCAST[spec.train.precision], lambda: model(input_ids=ids, use_cache=False)
        )


def _kept(model: nn.Module, autocast: torch.dtype | None, run: Callable[[], Any]) -> Kept:
    seen = _Storages((*model.parameters(), *model.buffers()))
    marks: list[int] = []
    entering: list[int] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        entering.append(x.numel() * x.element_size())
        marks.append(seen.bytes)

    def after(*_: Any) -> None:
        marks.append(seen.bytes)

    for block in decoder_layers(model):
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
    with seen.watching(), _autocast(autocast):
        run()
    layers = tuple(end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True))
    return Kept(layers, seen.bytes - sum(layers), max(entering), _copies(model, autocast))


def _copies(model: nn.Module, autocast: torch.dtype | None) -> int:
    weights = {id(p): p for block in decoder_layers(model) for p in block.parameters()}.values()
    if autocast is None or any(p.dtype == autocast for p in weights):
        return 0
    return sum(p.numel() * autocast.itemsize for p in weights if p.dim() > 1)


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def _no_mask(attention: str) -> Iterator[None]:
    """As for a batch without padding, of which transformers makes sure by looking at values."""
    if attention == "eager":
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS[attention] = lambda *_, **__: None
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[attention]


def kept_by_losses(dry: DryRun) -> int:
    """Alignment, where it is trained, and KV losses; the caches that they compare are counted elsewhere."""
    pipeline = dry.pipeline
    if pipeline is None:
        return 0
    own = dry.own.map(lambda x, _: x.detach().requires_grad_())
    caches = [x for cache in (own, *dry.caches.values()) for _, x in cache.items()]
    seen = _Storages((*pipeline.parameters(), *pipeline.buffers(), *caches))
    with seen.watching():
        aligned = [_aligned(dry, aligner, seen) for aligner in pipeline.teachers]
        pipeline.compare(own, aligned, torch.ones((), device="meta"))
    return seen.bytes


def _aligned(dry: DryRun, aligner: Any, seen: _Storages) -> Aligned:
    time_map = dry.maps[aligner.name]
    target: Cache = aligner.align(dry.caches[aligner.name], time_map)
    seen.known |= {x.untyped_storage()._cdata for _, x in target.items()}
    return Aligned(target, time_map.valid)


def largest_block(model: nn.Module) -> int:
    """Bytes of the weights of the largest decoder layer."""
    return max(
        sum(p.numel() * p.element_size() for p in block.parameters()) for block in decoder_layers(model)
    )
