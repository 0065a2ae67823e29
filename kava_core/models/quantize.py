"""Load teachers with quantised weights: what each format needs, and how transformers is asked for it.

Only the linear layers of the decoder are quantised: embeddings, norms and the language-model head keep their
dtype, and so do activations, so a quantised teacher's cache has the shapes and dtype of any other.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from kava_core.errors import SpecError

Format = Literal["int8", "int4", "nf4"]

LIBRARY: dict[Format, str] = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
GROUP = 32
"""Weights of a row that share a scale, with int4."""

BYTES: dict[Format, float] = {"int8": 1.0, "int4": 1.0, "nf4": 0.5}
"""Bytes of one quantised weight in memory, scales not counted. torchao's portable int4 takes a whole byte."""


def loading_options(format: Format, dtype: torch.dtype, *, where: str) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantise.

    Args:
        format: of the quantised weights.
        dtype: of everything else.
        where: how errors name the model.

    Raises:
        SpecError: the library is missing or broken.
    """
    _require_package(LIBRARY[format], format, where)
    return _OPTIONS[format](dtype)


def check_quantised(model: nn.Module, *, where: str) -> None:
    """Check that weights were quantised, and that they come out right on this device.

    A library passes over layers that it does not know.

    Raises:
        SpecError: no weight was quantised, or one is of a size that is computed wrongly.
    """
    quantised = [name for name, parameter in model.named_parameters() if is_quantised(parameter)]
    if not quantised:
        raise SpecError(
            f"{where}.quantize: {type(model).__name__} has no linear layer that could be quantised "
            "(GPT-2's are convolutions: nf4 takes them)"
        )
    for name in quantised:
        _check_blocks(model.get_submodule(name.rpartition(".")[0]), name, where)


def _check_blocks(layer: nn.Module, name: str, where: str) -> None:
    """Refuse layers whose scales bitsandbytes' CPU kernels mix up (0.50): of no whole number of blocks."""
    if "bitsandbytes" not in type(layer).__module__ or layer.weight.device.type != "cpu":
        return
    if layer.in_features % 64 or layer.out_features % 32:
        raise SpecError(
            f"{where}.quantize: nf4 on CPU needs layers with a multiple of 64 inputs and of 32 outputs; "
            f"{name} has {layer.in_features} and {layer.out_features}"
        )


@contextmanager
def explain_loading_error(format: Format, *, where: str) -> Iterator[None]:
    """Replace transformers' report of a failed conversion, which lacks the cause, by one that names it.

    Raises:
        SpecError: int4, and a layer's inputs are no multiple of the group size.
    """
    try:
        yield
    except RuntimeError as error:
        if format == "int4" and "conversion" in str(error):
            raise SpecError(
                f"{where}.quantize: int4 needs linear layers with a multiple of {GROUP} inputs"
            ) from error
        raise


def is_quantised(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a tensor of one of the quantising libraries."""
    kinds = (type(parameter), type(parameter.data))
    return any(kind.__module__.partition(".")[0] in LIBRARY.values() for kind in kinds)


def _require_package(library: str, format: Format, where: str) -> None:
    try:
        importlib.import_module(library)
    except Exception as error:  # a binary that does not fit raises anything
        raise SpecError(
            f"{where}.quantize: {format} needs {library}: pip install 'kava[quantize]'"
        ) from error


def _int8(dtype: torch.dtype) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def _int4(dtype: torch.dtype) -> dict[str, Any]:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    kind = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    return {"quantization_config": TorchAoConfig(kind)}


def _nf4(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    kind = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": kind, "device_map": {"": _device()}}


def _device() -> torch.device:
    """bitsandbytes packs weights differently on CPU and CUDA: they are made where they will be used."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


_OPTIONS: dict[Format, Callable[[torch.dtype], dict[str, Any]]] = {
    "int8": _int8,
    "int4": _int4,
    "nf4": _nf4,
}
