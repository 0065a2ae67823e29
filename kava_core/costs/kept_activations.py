"""Count what a step keeps for the backward pass, on tensors without values: nothing is allocated."""

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
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.capture.geometry import fake_model
from kava_core.kv.compare.values import Aligned
from kava_core.models.fsdp import decoder_layers
from kava_core.specfile.sections.pipeline import PipelineSpec

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class KeptActivations:
    """Bytes that a forward pass keeps for the backward pass."""

    layers: tuple[int, ...]
    """Bytes of each decoder layer."""
    outside_layers: int
    """Bytes of the embedding, the last norm, and under autocast the head's weights."""
    layer_input: int
    """Bytes of what enters one layer: all that checkpointing keeps of it."""
    weight_copies: int
    """Bytes of autocast's copies of the layers' weights, which live until the forward pass ends."""

    def without_weight_copies(self) -> KeptActivations:
        """Return the same for weights that need no copy."""
        copies_of_layer = self.weight_copies // len(self.layers)
        layers = tuple(layer - copies_of_layer for layer in self.layers)
        return replace(self, layers=layers, weight_copies=0)

    def times(self, passes: float) -> KeptActivations:
        """Multiply by a number of passes that are all kept, the last perhaps over a part of the text."""
        return KeptActivations(
            layers=tuple(int(layer * passes) for layer in self.layers),
            outside_layers=int(self.outside_layers * passes),
            layer_input=int(self.layer_input * passes),
            weight_copies=self.weight_copies * math.ceil(passes),
        )

    @property
    def total(self) -> int:
        """Return the bytes of the whole model."""
        return self.outside_layers + sum(self.layers)

    @property
    def checkpointed(self) -> int:
        """Return the bytes of the whole model if the backward pass computes every layer again."""
        return self.outside_layers + self.layer_input * len(self.layers)


class _StorageCounter:
    """Counts the bytes of storages once, whoever views them, but not those of ``known`` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known: set[int] = set()
        self.counted: dict[int, Any] = {}
        self.bytes = 0
        self.ignore(known)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.counted:
            self.counted[storage._cdata] = storage  # held, so that no other gets its address
            self.bytes += storage.nbytes()
        return tensor

    def counting_saved_tensors(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self.count, lambda saved: saved)


def kept_by_student(
    spec: PipelineSpec, config: PreTrainedConfig, *, batch: int, time: int
) -> KeptActivations:
    """Count what the student's forward pass keeps.

    Of several examples some are taken to be padded: attention keeps their mask at every layer,
    ``batch × time²`` numbers.
    """
    attention = "eager" if spec.student.attention == "eager" else "sdpa"
    padded = batch > 1 and spec.student.attention != "flash_attention_2"
    with FakeTensorMode(), nullcontext() if padded else _without_mask(attention):
        dtype = getattr(torch, spec.student.dtype)
        model: Any = fake_model(config, attn_implementation=attention, dtype=dtype)
        ids = torch.zeros(batch, time, dtype=torch.long)
        return _kept_by_model(
            model.train(),
            AUTOCAST_DTYPES[spec.train.precision],
            lambda: model(input_ids=ids, use_cache=False),
        )


def _kept_by_model(model: nn.Module, autocast: torch.dtype | None, run: Callable[[], Any]) -> KeptActivations:
    counter = _StorageCounter((*model.parameters(), *model.buffers()))
    bytes_before: list[int] = []
    bytes_after: list[int] = []
    layer_inputs: list[int] = []

    def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = next(filter(_is_floating_point, (*args, *kwargs.values())))
        layer_inputs.append(hidden_states.numel() * hidden_states.element_size())
        bytes_before.append(counter.bytes)

    def after_layer(*_: Any) -> None:
        bytes_after.append(counter.bytes)

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(before_layer, with_kwargs=True)
        layer.register_forward_hook(after_layer)
    with counter.counting_saved_tensors(), _autocast(autocast):
        run()
    layers = tuple(after - before for before, after in zip(bytes_before, bytes_after, strict=True))
    outside_layers = counter.bytes - sum(layers)
    return KeptActivations(layers, outside_layers, max(layer_inputs), _weight_copies(model, autocast))


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _weight_copies(model: nn.Module, autocast: torch.dtype | None) -> int:
    """Return the bytes of autocast's copies of the decoder layers' matrices."""
    if autocast is None:
        return 0
    counted: set[int] = set()
    copies = 0
    for layer in decoder_layers(model):
        for weight in layer.parameters():
            if weight.dtype == autocast:
                return 0
            if weight.dim() > 1 and id(weight) not in counted:
                counted.add(id(weight))
                copies += weight.numel() * autocast.itemsize
    return copies


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def _without_mask(attention: str) -> Iterator[None]:
    """Run as for a batch without padding, which transformers would find out by looking at values."""
    if attention == "eager":
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS[attention] = lambda *_, **__: None
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[attention]


def kept_by_losses(dry: DryRun) -> int:
    """Return the bytes that alignment, if it is trained, and KV losses keep.

    The caches that the losses compare are not counted here.
    """
    pipeline = dry.pipeline
    if pipeline is None:
        return 0
    student_cache = dry.student_cache.map(lambda tensor, _: tensor.detach().requires_grad_())
    counter = _StorageCounter((*pipeline.parameters(), *pipeline.buffers()))
    for cache in (student_cache, *dry.teacher_caches.values()):
        counter.ignore(tensor for _, tensor in cache.items())
    with counter.counting_saved_tensors():
        aligned = [_align_teacher(dry, aligner, counter) for aligner in pipeline.teachers]
        pipeline.compare(student_cache, aligned, torch.ones((), device="meta"))
    return counter.bytes


def _align_teacher(dry: DryRun, aligner: TeacherAligner, counter: _StorageCounter) -> Aligned:
    """Return a teacher's target, whose own bytes the counter ignores from now on."""
    time_map = dry.time_maps[aligner.name]
    target = aligner.align(dry.teacher_caches[aligner.name], time_map)
    counter.ignore(tensor for _, tensor in target.items())
    return Aligned(target, time_map.valid)
