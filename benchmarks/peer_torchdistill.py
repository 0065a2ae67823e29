"""One step of torchdistill's DistillationBox, and kava's: squared differences of k_proj and v_proj outputs.

torchdistill feeds one batch to both models and compares module outputs of equal shape, so this is one
tokenizer, and a teacher with the student's number and width of key heads. Both compute the same loss.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from bench import Bench, Size, make_spec
from torch import nn

PARTS = ("k_proj", "v_proj")


class Absent:
    """Modules that hold an empty class under every name: torchdistill's image models import torchvision.

    torchvision's wheels on PyPI for torch 2.13 are CUDA builds; nothing of it runs in a step.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """For torchvision only."""
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one."""
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give it its names."""
        module.__getattr__ = _empty


def _empty(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (nn.Module,), {})


def _box() -> type:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        sys.meta_path.append(Absent())
        importlib.import_module("torchvision.datasets")
    return importlib.import_module("torchdistill.core.distillation").DistillationBox


def make(size: Size, device: str) -> tuple[Bench, dict[str, Callable[[], object]]]:
    """The bench around both, and the steps by name."""
    box_class = _box()
    width, layers, heads, _ = size["teachers"][0]
    size = size | {"teachers": [(width, layers, heads, size["student"][3])]}
    align = {"time_warper": "identity", "dim_projector": "identity"}
    bench = Bench(make_spec(size, [{"name": "mse"}], align=align), size, device, longer=1.0)
    bench.theirs["t0"]["input_ids"] = bench.ours["input_ids"]
    box = box_class(
        *(bench.teachers[0].model, bench.student, {}, _config(bench)),
        **{"device": torch.device(device), "device_ids": [], "distributed": False, "lr_factor": 1.0},
    )
    batch = {name: bench.ours[name] for name in ("input_ids", "attention_mask", "labels")}

    def loss() -> torch.Tensor:
        box.pre_forward_process()
        return box.forward_process(batch)

    torch.testing.assert_close(bench.loss(), loss(), rtol=1e-5, atol=0)
    return bench, {"kava": bench.step, "torchdistill": lambda: box.post_forward_process(loss())}


def _config(bench: Bench) -> dict[str, Any]:
    """A train configuration, as torchdistill's YAML files spell it."""
    registry = importlib.import_module("torchdistill.losses.registry")
    registry.register_func2extract_model_output(_model_loss)
    layers = bench.student.config.num_hidden_layers
    step = bench.teachers[0].model.config.num_hidden_layers // layers
    pairs = [(i, (i + 1) * step - 1, part) for i in range(layers) for part in PARTS]
    sub_terms = {f"{part}{i}": _term(_path(i, part), _path(j, part), 1 / layers) for i, j, part in pairs}
    return {
        "num_epochs": 1,
        "teacher": _side([_path(j, part) for _, j, part in pairs]) | {"requires_grad": False},
        "student": _side([_path(i, part) for i, _, part in pairs]),
        "criterion": {
            "key": "WeightedSumLoss",
            "func2extract_model_loss": "_model_loss",
            "kwargs": {"model_term": {"weight": 1.0}, "sub_terms": sub_terms},
        },
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-4}, "max_grad_norm": 1.0},
    }


def _path(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}"


def _side(paths: list[str]) -> dict[str, Any]:
    return {"forward_proc": "forward_batch_only_as_kwargs", "forward_hook": {"output": paths}}


def _term(path: str, t_path: str, weight: float) -> dict[str, Any]:
    places = {
        "input": {"is_from_teacher": False, "module_path": path, "io": "output"},
        "target": {"is_from_teacher": True, "module_path": t_path, "io": "output"},
    }
    wrapper = {"key": "SimpleLossWrapper", "kwargs": places}
    return {
        "criterion": {"key": "MSELoss", "kwargs": {}},
        "criterion_wrapper": wrapper,
        "weight": weight,
    }


def _model_loss(outputs: Any, targets: object, **_: object) -> dict[str, torch.Tensor]:
    return {"loss": outputs.loss}
