"""Test what the contract asks of components of every kind."""

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
from kava_core.kv.align.watched_call import tensors_in
from kava_core.testing.geometries import GEOMETRIES, Sides
from kava_core.testing.require import require, require_finite, require_same
from kava_core.testing.tensors import change_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class ComponentTests:
    """Base of the kit's classes. Override the fixture ``config``, and the class variables if needed."""

    kind: ClassVar[str]
    """The kind, as a spec names it."""

    geometries: ClassVar[Mapping[str, Sides]] = GEOMETRIES
    """Pairs of models the component is tried with; most tests use the first."""

    refuses: ClassVar[tuple[str, ...]] = ()
    """Names of geometries that the component must refuse with a KavaError that names it."""

    @pytest.fixture
    def config(self) -> ComponentConfig:
        """Return the declaration under test, with its parameters."""
        pytest.fail("override the fixture 'config' and return your declaration", pytrace=False)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests once for each geometry, dtype or device they ask for."""
        if "sides" in metafunc.fixturenames:
            accepted = [name for name in self.geometries if name not in self.refuses]
            metafunc.parametrize("sides", [self.geometries[name] for name in accepted], ids=accepted)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=str)
        if "device" in metafunc.fixturenames:
            devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
            metafunc.parametrize("device", devices)

    @property
    def who(self) -> str:
        """Return the kind as the subject of a sentence."""
        return f"a {self.kind.replace('_', ' ')}"

    @property
    def usual(self) -> Sides:
        """Return the first geometry that the component accepts."""
        return next(sides for name, sides in self.geometries.items() if name not in self.refuses)

    def fitted(self, config: Any, sides: Sides) -> Sides:
        """Return the geometries as this kind meets them in a pipeline."""
        return sides

    def build(self, config: Any, sides: Sides, *, seed: int = 0) -> Any:
        """Build the implementation, ready to be used, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            component = self.construct(config, self.fitted(config, sides))
            self.prepare(component, config, sides)
        return component.eval()

    def construct(self, config: Any, sides: Sides) -> Any:
        """Build the implementation as kava constructs it."""
        return config.build(teacher=sides.teacher, student=sides.student)

    def prepare(self, component: Any, config: Any, sides: Sides) -> None:
        """Do what kava does before the first use: nothing for most kinds."""

    def inputs(self, config: Any, sides: Sides) -> Any:
        """Return inputs of a few calls, as tensors in tuples, mappings and dataclasses."""
        raise NotImplementedError

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return everything that the component returns for these inputs."""
        raise NotImplementedError

    def test_declaration_is_sound(self, config: Any) -> None:
        """Check that the registry accepts the declaration."""
        fault = declaration_fault(self.kind, type(config))
        require(fault is None, "the registry must accept the declaration", str(fault))

    def test_declaration_needs_no_torch(self, config: Any) -> None:
        """Check that the declaration imports without torch, because specs are checked by it alone."""
        found = _torch_imported_by(type(config).__module__)
        require(not found, "the declaration's module must import, without importing torch", f"found: {found}")

    def test_config_survives_json(self, config: Any) -> None:
        """Check that a config survives JSON, in which a run stores its spec."""
        json_text = config.model_dump_json()
        again = type(config).model_validate_json(json_text)
        require(again == config, "a config must be the same after JSON", f"{config!r} became {again!r}")

    def test_implementation_is_a_module(self, config: Any) -> None:
        """Check that its parameters and buffers will move and be saved with the student."""
        component = self.build(config, self.usual)
        kind = type(component).__name__
        require(isinstance(component, nn.Module), f"{self.who} must be a torch.nn.Module", f"{kind} is none")
        rate = getattr(component, "learning_rate", None)
        is_rate = rate is None or (isinstance(rate, float) and rate > 0)
        require(is_rate, "learning_rate must be None or a float above 0", f"it is {rate!r}")

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
        for first, second in self._output_pairs(component, inputs, component, inputs):
            require_same(second, first, f"{self.who} must give the same output for the same input")

    def test_inputs_are_left_alone(self, config: Any) -> None:
        """Check that nothing is changed in place."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        tensors = list(tensors_in(inputs))
        copies = [(tensor.clone(), tensor._version) for tensor in tensors]
        self.outputs(component, inputs)
        for tensor, (copy, version) in zip(tensors, copies, strict=True):
            unchanged = tensor._version == version and torch.equal(tensor, copy)
            require(unchanged, f"{self.who} must leave its inputs unchanged", "one was written to in place")

    def test_calibrated_state_is_finite(self, config: Any) -> None:
        """Check that what is computed from data before training holds no NaN or infinity."""
        component = self.build(config, self.usual)
        if not hasattr(component, "finish"):
            return
        for name, tensor in saved_state(component).items():
            contract = f"after finish() {self.who} must hold finite parameters and buffers ({name})"
            require_finite(tensor, contract)

    def test_works_without_gradients(self, config: Any) -> None:
        """Check that ``torch.no_grad`` changes nothing in the values."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        expected = self.outputs(component, inputs)
        with torch.no_grad():
            without_gradients = self.outputs(component, inputs)
        for actual, wanted in zip(without_gradients, expected, strict=True):
            require_same(actual, wanted, f"{self.who} must give the same output under torch.no_grad()")

    def test_state_round_trip(self, config: Any) -> None:
        """Check that a fresh component that loads the saved state gives the same output."""
        component, inputs = self.build(config, self.usual), self.inputs(config, self.usual)
        state = saved_state(component)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            fresh = self.construct(config, self.fitted(config, self.usual)).eval()
        fresh.load_state_dict(load(save(state)))
        for first, second in self._output_pairs(component, inputs, fresh, inputs):
            contract = f"{self.who} that loads a saved state_dict() must give the same output"
            require_same(second, first, contract)

    def test_device_is_kept(self, config: Any, device: str) -> None:
        """Check that the output is on the device of the input."""
        component = self.build(config, self.usual).to(device)
        inputs = change_tensors(self.inputs(config, self.usual), lambda x: x.to(device))
        self._require_device(self.outputs(component, inputs), device)

    def _output_pairs(self, one: Any, mine: Any, other: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.outputs(one, mine), self.outputs(other, theirs), strict=True))

    def _require_device(self, outputs: list[Tensor], device: str) -> None:
        devices = sorted({tensor.device.type for tensor in outputs})
        contract = f"{self.who} must keep the device of its input ({device})"
        require(devices == [device], contract, f"got {devices}")


class MetaTests(ComponentTests):
    """Tests for the kinds that the dry run calls on the meta device, which has shapes and no values."""

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
        outputs = self.outputs(component, change_tensors(inputs, lambda x: x.to("meta")))
        self._require_device(outputs, "meta")
        same_shapes = [tensor.shape for tensor in outputs] == shapes
        require(same_shapes, "shapes on the meta device must be those on the CPU", f"{outputs} and {shapes}")


def saved_state(component: Any) -> dict[str, Tensor]:
    """Return a component's parameters and buffers as safetensors takes them."""
    return {name: tensor.contiguous() for name, tensor in component.state_dict().items()}


@cache
def _torch_imported_by(module: str) -> str:
    """Return ``torch`` if a fresh interpreter imports it with a module, the error's last line if it fails."""
    code = (
        f"import sys, importlib; importlib.import_module({module!r}); print(*{{'torch'}} & {{*sys.modules}})"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "KAVA_SHAPE_CHECK": "0",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        return " ".join(done.stderr.strip().splitlines()[-1:])
    return " ".join(done.stdout.split())
