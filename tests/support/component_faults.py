"""Components with one random fault each, run through a real pipeline: who notices, and what is said.

    python -m tests.support.component_faults COUNT SEED

prints one JSON line for each: kind, fault, and what the command line would say (null: nobody noticed).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kava_core.build.pipeline import build_pipeline
from kava_core.cli.app import explain_error
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import NO_FUSER_INPUTS, Aligned
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.specfile.sections.pipeline import PipelineSpec
from tests.support.pipeline_helpers import (
    STUDENT,
    WIDE,
    FakeConfig,
    FakeLoss,
    fake_align,
    spec,
    timeline,
)
from tests.support.pipeline_helpers import cache as random_cache

RAISED: tuple[type[BaseException], ...] = (
    *(ValueError, RuntimeError, StopIteration, AssertionError, MemoryError, RecursionError, OSError),
    *(SystemExit, KeyboardInterrupt, GeneratorExit, BaseException, type("Odd", (BaseException,), {})),
)
UNSEEN_WHEN_FAST = {"mutation", "detachment", "restless"}
"""What only debug mode looks for."""


class Sound(torch.nn.Module):
    """A component that keeps its contract; ``spoil`` may change what it is given and returns."""

    def __init__(self, spoil: Callable[..., Any], fault: str) -> None:
        super().__init__()
        self.spoil, self.fault, self.calls = spoil, fault, 0

    def forward(self, *given: Any) -> Any:
        self.calls += 1
        if self.fault == "mutation":
            spoil_in_place(given)
        sound = self.sound(*given)
        spoils_others = self.fault == "mutation" or self.fault.startswith(("observe", "finish"))
        return sound if spoils_others else self.spoil(sound, self.calls)

    def sound(self, *given: Any) -> Any:
        raise NotImplementedError


class HeadAdapter(Sound):
    teacher_view, student_view = WIDE.with_(layer=2, head=2, qhead=0), STUDENT.with_(qhead=0)

    def sound(self, x: Tensor, part: str) -> Tensor:
        return 1.0 * x[:, :, :2]

    def fold(self, x: Tensor) -> Tensor:
        return x.detach().clone() if self.fault == "detachment" else 1.0 * x


class DimProjector(Sound):
    def __init__(self, spoil: Callable[..., Any], fault: str) -> None:
        super().__init__(spoil, fault)
        self.register_buffer("gain", torch.ones((), dtype=torch.float64))

    def sound(self, x: Tensor, part: str) -> Tensor:
        return self.gain * x

    def observe(self, x: Tensor, like: Tensor, valid: Tensor, part: str) -> None:
        if self.fault.startswith("observe"):
            spoil_in_place((x,)) if "mutation" in self.fault else self.spoil(x, 1)

    def finish(self) -> None:
        if self.fault.startswith("finish"):
            self.gain = self.spoil(self.gain, 1)


class TimeWarper(Sound):
    def sound(self, teacher: Any, student: Any) -> TimeMap:
        valid = student.mask & (student.positions < teacher.mask.sum(1, keepdim=True))
        return TimeMap.gather(student.positions.clone(), valid)


class LayerMapper(Sound):
    def sound(self) -> Tensor:
        return torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)


class Fuser(Sound):
    def sound(self, context: Any) -> Tensor:
        teacher, batch, time = context.valid.shape
        return torch.full((teacher, batch, 2, time), 0.5, dtype=torch.float64)

    def observe(self, context: Any) -> None:
        if self.fault.startswith("observe"):
            spoil_in_place((context,)) if "mutation" in self.fault else self.spoil(context, 1)

    def finish(self) -> None:
        if self.fault.startswith("finish"):
            self.register_buffer("broken", self.spoil(torch.ones(()), 1))


class KVLoss(Sound):
    def sound(self, student: Cache, target: Cache, weight: Tensor) -> Tensor:
        each = (student.keys - target.keys).square().mean(dim=(2, 4))  # type: ignore[operator]
        return torch.where(weight > 0, each * weight, 0).sum()


KINDS: dict[str, type[Sound]] = {
    "head_adapter": HeadAdapter,
    "dim_projector": DimProjector,
    "time_warper": TimeWarper,
    "layer_mapper": LayerMapper,
    "fuser": Fuser,
    "kv_loss": KVLoss,
}


def spoil_in_place(given: Any) -> None:
    """Change a number of the first tensor, past autograd's eyes."""
    x = first_tensor(given)
    x.data[(0,) * x.ndim] = ~x.data[(0,) * x.ndim] if x.dtype == torch.bool else x.data[(0,) * x.ndim] + 1


def first_tensor(given: Any) -> Tensor:
    value = given[0]
    while not isinstance(value, Tensor):
        value = value.keys if isinstance(value, Cache) else next(iter(vars(value).values()))
    return value


def tensor_faults(chance: random.Random) -> dict[str, Callable[[Tensor, int], Any]]:
    """What can be wrong with any tensor."""
    number = chance.choice([torch.nan, torch.inf, -torch.inf])
    adds_axis = chance.random() < 0.5
    dtype = chance.choice([torch.int64, torch.complex128, torch.float16, torch.bool])
    wrong_type = chance.choice([lambda x: (x, x), str, float, Tensor.tolist, lambda x: x.detach().numpy()])

    def hold(x: Tensor, _: int) -> Tensor:
        x = x.clone()
        # At the first position, which is real in every example.
        x[(0,) * x.ndim] = number
        return x

    return {
        "shape": lambda x, _: x[None] if adds_axis or not x.ndim else x[..., :1],
        "dtype": lambda x, _: x.to(dtype),
        "device": lambda x, _: x.to("meta"),
        "nothing": lambda x, _: None,
        "type": lambda x, _: wrong_type(x.sum()),
        "number": hold,
        "restless": lambda x, calls: x * (1 + 0.01 * calls),
    }


def map_faults(chance: random.Random) -> dict[str, Callable[[TimeMap, int], Any]]:
    """What can be wrong with a time map."""
    place = chance.choice([0, 1])
    field = chance.choice(["index", "weight", "start", "valid"])
    wrong_type = chance.choice([lambda found: found.valid, lambda found: (found, found), repr])

    def changed(field: str, change: Callable[[Tensor], Tensor]) -> Callable[[TimeMap, int], TimeMap]:
        return lambda found, _: replace(found, **{field: change(getattr(found, field))})

    def at_place(value: float) -> Callable[[Tensor], Tensor]:
        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[place] = value
            return x

        return put

    return {
        "index above": changed("index", at_place(chance.choice([9, 10, 17]))),
        "index below": changed("index", at_place(-chance.choice([1, 9]))),
        "padding": changed("valid", torch.ones_like),
        "start length": changed("start", lambda x: x[:-1]),
        "start falls": changed("start", at_place(3)),
        "sum": changed("weight", at_place(chance.choice([0.0, 0.5, 2.0]))),
        "negative": changed("weight", lambda x: -x),
        "number": changed("weight", at_place(chance.choice([torch.nan, torch.inf]))),
        "dtype": changed(
            *chance.choice([("index", Tensor.float), ("weight", Tensor.long), ("valid", Tensor.long)])
        ),
        "shape": changed("valid", lambda x: x[:, 1:]),
        "device": changed(field, lambda x: x.to("meta")),
        "nothing": lambda found, _: None,
        "type": lambda found, _: wrong_type(found),
        "identity": lambda found, _: replace(found, identity=True),
        "restless": lambda found, calls: replace(found, index=torch.full_like(found.index, calls % 2)),
    }


def faults_of(kind: str, chance: random.Random) -> dict[str, Callable[..., Any]]:
    """Every fault that a component of this kind can have, by name."""

    raised = chance.choice(RAISED)

    def throw(*_: Any) -> Any:
        raise raised("thrown on purpose")

    faults = map_faults(chance) if kind == "time_warper" else tensor_faults(chance)
    faults["raises"] = throw
    if kind != "layer_mapper":
        faults["mutation"] = throw
    if kind == "layer_mapper":
        faults |= {"sum": lambda x, _: 1.1 * x, "negative": lambda x, _: 2 * x - x.flip(1)}
    if kind == "fuser":
        faults["negative"] = lambda x, _: -x
    if kind == "kv_loss":
        faults["detachment"] = lambda x, _: x.detach()
    if kind == "head_adapter":
        faults["detachment"] = lambda x, _: x
    if kind in ("dim_projector", "fuser"):
        faults |= {"observe raises": throw, "finish raises": throw, "observe mutation": throw}
        faults["finish number"] = lambda x, _: x * torch.nan
    return faults


@cache
def sound_spec(teachers: int) -> PipelineSpec:
    """A spec of built-ins with so many teachers."""
    return spec(*[{}] * teachers, losses=["mse"], target="separate")


def made_pipeline(kind: str, component: Sound) -> KVPipeline:
    """A pipeline of built-ins but for this one component."""
    fake: Any = (FakeLoss if kind == "kv_loss" else FakeConfig)(make=lambda **_: component)
    teachers = {"a": WIDE} | ({"b": WIDE} if kind == "fuser" else {})
    made = sound_spec(len(teachers))
    if kind == "kv_loss":
        made = made.model_copy(update={"losses": (fake,)})
    elif kind == "fuser":
        made = made.model_copy(update={"fuser": fake})
    else:
        teacher = made.teachers[0].model_copy(update={"align": fake_align(**{kind: fake})})
        made = made.model_copy(update={"teachers": (teacher,)})
    return build_pipeline(made, teachers=teachers, student=STUDENT).double()


def run(kind: str, fault: str, spoil: Callable[..., Any]) -> None:
    """Calibrate and train one step, as ``kava train`` does."""
    terms = run_step(made_pipeline(kind, KINDS[kind](spoil, fault)))
    if not all(bool(torch.isfinite(term)) for term in terms.values()):
        raise ArithmeticError("the loss is not finite, and nobody was named")


def run_step(pipeline: KVPipeline) -> dict[str, Tensor]:
    """Calibrate, and return the terms of the loss."""
    ours, theirs = timeline((2, 3, 1), (1, 2, 2)), timeline((3, 4, 2), (1, 1, 1))
    own = random_cache(STUDENT, ours.mask.shape[1]).map(lambda x, _: x.requires_grad_())
    aligned = []
    for number, aligner in enumerate(pipeline.teachers):
        whole = random_cache(WIDE, theirs.mask.shape[1], seed=number + 1)
        read = whole.map(lambda x, _: x[:, list(aligner.sources)])  # noqa: B023
        time_map = aligner.plan(theirs, ours)
        if aligner.wants_calibration:
            aligner.observe(read, own.map(lambda x, _: x.detach()), time_map)
            aligner.finish_calibration()
        aligned.append(pipeline.align_with_map(aligner, read, time_map))
    if hasattr(pipeline.fuser, "observe"):
        show_fuser(pipeline, own, aligned)
    return pipeline.compare_aligned(own, aligned, ours, torch.tensor(7.0))


def show_fuser(pipeline: KVPipeline, own: Cache, aligned: list[Aligned]) -> None:
    view = pipeline.teachers[0].view_of(own.map(lambda x, _: x.detach()))
    pipeline.show_fuser(pipeline.fusion_context(view, aligned, NO_FUSER_INPUTS))
    pipeline.finish_fuser()


def told(kind: str, fault: str, spoil: Callable[..., Any]) -> str | None:
    """What the command line says, with its exit code; None if nobody noticed."""
    try:
        run(kind, fault, spoil)
    except Exception as error:
        explained = explain_error(error)
        return f"traceback: {error!r}" if explained is None else f"exit {explained.exit_code}: {explained}"
    except BaseException as error:
        return f"the process ends: {error!r}"
    return None


def random_faults(count: int, seed: int) -> Iterator[tuple[str, str, str | None]]:
    """Kind, fault and what is said of so many random faults; every kind has every fault of its own."""
    chance = random.Random(seed)
    every = [(kind, fault) for kind in KINDS for fault in faults_of(kind, chance)]
    drawn = every + [chance.choice(every) for _ in range(count - len(every))]
    for kind, fault in drawn:
        yield kind, fault, told(kind, fault, faults_of(kind, chance)[fault])


if __name__ == "__main__":
    for found in random_faults(int(sys.argv[1]), int(sys.argv[2])):
        print(json.dumps(found))
