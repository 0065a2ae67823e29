"""Shard the student by FSDP2, which accelerate applies if its launcher's config file asks for it.

What trains beside the student (aligners, fuser) stays whole in every process, in float32: it is small, and
everything that reads it (calibration, the collapse monitor, learning rates of its own) then works as in one
process. Its gradients are averaged here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from kava_core.errors import SpecError
from kava_core.kv.capture.attention_layers import attention_layers

WANTED = "ACCELERATE_USE_FSDP"
EMPTY_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_fsdp_wanted() -> bool:
    """Return whether the launcher asked for FSDP."""
    return _is_set(WANTED)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_launch(plugin: Any) -> None:
    """Refuse an accelerate config that asks for what accelerate would silently not do, or do wrongly.

    Args:
        plugin: accelerate's FSDP plugin; None if it does not shard.

    Raises:
        SpecError: FSDP without a GPU, its first version, or weights that only one process loads.
    """
    if not is_fsdp_wanted():
        return
    if plugin is None:
        raise SpecError("accelerate ignores FSDP without a GPU; launch with specs/accelerate/ddp.yaml")
    if plugin.fsdp_version != 2:
        raise SpecError("fsdp_version: 2 is needed; see specs/accelerate/fsdp2.yaml")
    if plugin.cpu_ram_efficient_loading or _is_set(EMPTY_LOADING):
        raise SpecError(
            "fsdp_cpu_ram_efficient_loading: must be false; true leaves the teachers empty in all processes "
            "but the first"
        )


def check_precision(launched: str | None, precision: str) -> None:
    """Check that the launcher's precision is the spec's.

    Args:
        launched: accelerate's ``mixed_precision``.
        precision: the spec's ``train.precision``.

    Raises:
        SpecError: they differ.
    """
    wanted = "no" if precision == "fp32" else precision
    if launched not in (None, "", "no", wanted):
        raise SpecError(
            f"accelerate's mixed_precision is {launched}, the spec's train.precision {precision}: "
            f"set one of them, or mixed_precision: 'no'"
        )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """List the decoder layers in order: the entries of module lists that hold the attention layers."""
    attention_ids = {id(attention) for attention in attention_layers(model)}
    layers = []
    for entries in _outermost_lists(model):
        for block in entries:
            if any(id(module) in attention_ids for module in block.modules()):
                layers.append(block)
    return layers


def _outermost_lists(model: nn.Module) -> list[nn.ModuleList]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside: set[nn.Module] = set()
    for outer in lists:
        inside.update(module for module in outer.modules() if module is not outer)
    return [entries for entries in lists if entries not in inside]


def prepare_for_sharding(
    distiller: Any, plugin: Any, *, device: torch.device, autocast: torch.dtype | None
) -> None:
    """Set what accelerate must know before it shards.

    Precision is autocast's, as in one process: FSDP2's usual policy would also round the counts that go into
    the forward pass, and the loss that comes out of it. Weights are gathered in bfloat16, as autocast would
    make, and keep, a copy of each; the hidden states stay in float32.

    Args:
        distiller: the module that is trained; changed in place.
        plugin: accelerate's FSDP plugin; changed in place.
        device: on which the module runs.
        autocast: the dtype of products; None: float32.
    """
    if autocast is not None:
        distiller.forward = torch.autocast(device.type, autocast)(distiller.forward)
    plugin.mixed_precision_policy = None
    if autocast == torch.bfloat16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        embedding = distiller.student.get_input_embeddings()
        embedding.register_forward_hook(lambda module, given, hidden: hidden.float())
    plugin.ignored_modules = list(distiller.beside_student)
    distiller._no_split_modules = sorted(
        {type(block).__name__ for block in decoder_layers(distiller.student)}
    )


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 shards this module."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered_weights(module: nn.Module, *, reshard: bool) -> Iterator[None]:
    """Gather all weights in every process, so that what runs inside needs no other process.

    Args:
        module: sharded or not.
        reshard: whether its layers free their gathered weights after a forward pass otherwise.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshard and unit is not module, recurse=False)


def average_gradients(module: nn.Module) -> None:
    """Average over processes, in place, the gradients of weights that FSDP does not shard."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for p, mean in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        p.grad = mean.view_as(p)


def local_part(x: Tensor) -> Tensor:
    """Return this process's part of a tensor; all of it if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def gathered_tensor(x: Tensor) -> Tensor:
    """Return a tensor gathered from all processes; the tensor itself if it is not sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def copy_without_weights(model: nn.Module) -> nn.Module:
    """Copy a model without its weights (they are on the meta device); weights the model ties stay tied."""
    without = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, without)


def fill_with_weights(bones: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put weights into what ``copy_without_weights`` made, without copying them, and return it.

    Args:
        bones: changed in place.
        state: weights and buffers by name; of tied weights one name is enough.
    """
    shared = {name: bones.get_parameter(name) for name, _ in bones.named_parameters(remove_duplicate=False)}
    filled: dict[int, nn.Parameter] = {}
    for name, empty in shared.items():
        if id(empty) not in filled and name in state:
            filled[id(empty)] = nn.Parameter(state[name], empty.requires_grad)
    for name, empty in shared.items():
        owner, _, leaf = name.rpartition(".")
        setattr(bones.get_submodule(owner), leaf, filled[id(empty)])
    for name, buffer in bones.named_buffers():
        if name in state:
            buffer.copy_(state[name])
    return bones
