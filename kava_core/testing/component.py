"""What the contract asks of components of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kava_core.config import ComponentConfig
from kava_core.declarations import declaration_fault
from kava_core.errors import KavaError
from kava_core.testing.geometries import GEOMETRIES, Sides
from kava_core.testing.require import require, require_same
from kava_core.testing.tensors import change_tensors, tensors_in

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class ComponentTests:
    """Base of the kit's classes. Override the fixture ``config``, and where needed what fits."""

    kind: ClassVar[str]
    """The kind, as a spec names it."""

    geometries: ClassVar[Mapping[str, Sides]] = GEOMETRIES
    """Pairs of models the component is tried with; most tests use the first."""

    refuses: ClassVar[tuple[str, ...]] = ()
    """Names of geometries that the component must refuse with a KavaError that names it."""

    @pytest.fixture
    def config(self) -> ComponentConfig:
        """The declaration under test, with its parameters."""
        pytest.fail("override the fixture 'config' and return your declaration", pytrace=False)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests once for each geometry, dtype or device they ask for."""
        if "sides" in metafunc.fixturenames:
            fitting = [name for name in self.geometries if name not in self.refuses]
            metafunc.parametrize("sides", [self.geometries[name] for name in fitting], ids=fitting)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=str)
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])

    @property
    def who(self) -> str:
        """The kind, as a sentence says it."""
        return f"a {self.kind.replace('_', ' ')}"

    @property
    def usual(self) -> Sides:
        """The first geometry that fits."""
        return next(sides for name, sides in self.geometries.items() if name not in self.refuses)

    def fitted(self, config: Any, sides: Sides) -> Sides:
        """The geometries as this kind meets them in a pipeline."""
        return sides

    def build(self, config: Any, sides: Sides, *, seed: int = 0) -> Any:
        """The implementation, ready to be used, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            component = self.construct(config, self.fitted(config, sides))
            self.prepare(component, config, sides)
        return component.eval()

    def construct(self, config: Any, sides: Sides) -> Any:
        """The implementation as kava constructs it."""
        return config.build(teacher=sides.teacher, student=sides.student)

    def prepare(self, component: Any, config: Any, sides: Sides) -> None:
        """What kava does before the first use: nothing for most kinds."""

    def inputs(self, config: Any, sides: Sides) -> Any:
        """Inputs of a few calls, as tensors in tuples, mappings and dataclasses."""
        raise NotImplementedError

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Everything the component returns for them."""
        raise NotImplementedError

    def test_declaration_is_sound(self, config: Any) -> None:
        """Check that the registry accepts the declaration."""
        fault = declaration_fault(self.kind, type(config))
        require(fault is None, "the registry must accept the declaration", str(fault))

    def test_declaration_needs_no_torch(self, config: Any) -> None:
        """Check that the declaration imports without torch, because specs are checked by it alone."""
        seen = _torch_imported_by(type(config).__module__)
        require(not seen, "the declaration's module must import, without importing torch", f"found: {seen}")

    def test_config_survives_json(self, config: Any) -> None:
        """Check that a config survives JSON, in which a run stores its spec."""
        told = config.model_dump_json()
        again = type(config).model_validate_json(told)
        require(again == config, "a config must be the same after JSON", f"{config!r} became {again!r}")

    def test_implementation_is_a_module(self, config: Any) -> None:
        """Check that its parameters and buffers will move and be saved with the student."""
        component = self.build(config, self.usual)
        kind = type(component).__name__
        require(isinstance(component, nn.Module), f"{self.who} must be a torch.nn.Module", f"{kind} is none")
        rate = getattr(component, "learning_rate", None)
        sound = rate is None or (isinstance(rate, float) and rate > 0)
        require(sound, "learning_rate must be None or a float above 0", f"it is {rate!r}")

    def test_what_does_not_fit_is_refused(self, config: Any) -> None:
        """Check that geometries in ``refuses`` raise a KavaError that names the component."""
        for name in self.refuses:
            contract = f"geometry {name!r} must be refused with a KavaError that names {config.name!r}"
            sides = self.geometries[name]
            try:
                self.outputs(self.build(config, sides), self.inputs(config, sides))
            except KavaError as error:
                require(config.name in str(error), contract, f"it said {str(error)!r}")
            else:
                require(False, contract, "nothing was raised")

    def test_same_input_same_output(self, config: Any) -> None:
        """Check that two calls in eval mode agree."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        for first, second in self._pairs(component, inputs, component, inputs):
            require_same(second, first, f"{self.who} must give the same output for the same input")

    def test_inputs_are_left_alone(self, config: Any) -> None:
        """Check that nothing is changed in place."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        given = list(tensors_in(inputs))
        before = [(one.clone(), one._version) for one in given]
        self.outputs(component, inputs)
        for one, (copy, version) in zip(given, before, strict=True):
            same = one._version == version and torch.equal(one, copy)
            require(same, f"{self.who} must leave its inputs unchanged", "one was written to in place")

    def test_works_without_gradients(self, config: Any) -> None:
        """Check that ``torch.no_grad`` changes nothing in the values."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        wanted = self.outputs(component, inputs)
        with torch.no_grad():
            seen = self.outputs(component, inputs)
        for one, other in zip(seen, wanted, strict=True):
            require_same(one, other, f"{self.who} must give the same output under torch.no_grad()")

    def test_state_round_trip(self, config: Any) -> None:
        """Check that a fresh component that loads the saved state gives the same output."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        state = saved_state(component)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            fresh = self.construct(config, self.fitted(config, self.usual)).eval()
        fresh.load_state_dict(load(save(state)))
        for first, second in self._pairs(component, inputs, fresh, inputs):
            contract = f"{self.who} that loads a saved state_dict() must give the same output"
            require_same(second, first, contract)

    def test_device_is_kept(self, config: Any, device: str) -> None:
        """Check that the output is on the device of the input."""
        component = self.build(config, self.usual).to(device)
        inputs = change_tensors(self.inputs(config, self.usual), lambda x: x.to(device))
        self._require_device(self.outputs(component, inputs), device)

    def _pairs(self, one: Any, mine: Any, other: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.outputs(one, mine), self.outputs(other, theirs), strict=True))

    def _require_device(self, outputs: list[Tensor], device: str) -> None:
        seen = sorted({tensor.device.type for tensor in outputs})
        require(seen == [device], f"{self.who} must keep the device of its input ({device})", f"got {seen}")


class MetaTests(ComponentTests):
    """For the kinds that the dry run calls on the meta device, which knows shapes and no values."""

    def test_runs_on_the_meta_device(self, config: Any) -> None:
        """Check a component that was moved there, as ``kava check`` does."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        shapes = [tensor.shape for tensor in self.outputs(component, inputs)]
        self._require_meta(component.to("meta"), inputs, shapes)

    def test_constructs_on_the_meta_device(self, config: Any) -> None:
        """Check a component that was constructed there, without data."""
        sides, inputs = self.fitted(config, self.usual), self.inputs(config, self.usual)
        shapes = [tensor.shape for tensor in self.outputs(self.build(config, self.usual), inputs)]
        with torch.device("meta"):
            component = self.construct(config, sides).eval()
        self._require_meta(component, inputs, shapes)

    def _require_meta(self, component: Any, inputs: Any, shapes: list[torch.Size]) -> None:
        seen = self.outputs(component, change_tensors(inputs, lambda x: x.to("meta")))
        self._require_device(seen, "meta")
        same = [tensor.shape for tensor in seen] == shapes
        require(same, "shapes on the meta device must be those on the CPU", f"{seen} and {shapes}")


def saved_state(component: Any) -> dict[str, Tensor]:
    """Its parameters and buffers as safetensors takes them."""
    return {name: tensor.contiguous() for name, tensor in component.state_dict().items()}


@cache
def _torch_imported_by(module: str) -> str:
    """What a fresh interpreter finds of torch once it has imported a module."""
    code = (
        f"import sys, importlib; importlib.import_module({module!r}); print(*{{'torch'}} & {{*sys.modules}})"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "KAVA_SHAPE_CHECK": "0",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stderr.strip().splitlines()[-1:] if done.returncode else done.stdout.split()
    return " ".join(said)
