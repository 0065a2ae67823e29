"""Where a teacher's weights are must not change what it teaches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.errors import SpecError
from kava_core.kv.capture.capture import Capture
from kava_core.models import placement
from kava_core.models.fsdp import decoder_layers
from kava_core.models.placement import CaptureElsewhere, check_even_evaluation, place_model
from kava_core.models.teacher import Teacher
from kava_core.protocols.axes import Cache
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run
from tests.support import tiny
from tests.support.tiny_models import WORKS

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    return next(case for case in WORKS if case.name == "Llama").model().eval().requires_grad_(False)


def maker(model: nn.Module) -> partial[Capture]:
    return partial(Capture, model, layers=(0, 1), parts=("keys", "values"), rotary="strip", stop=True)


def read(model: Any, make: partial[Capture], ids: Tensor = IDS) -> Cache:
    with torch.no_grad(), make() as capture:
        model.base_model(input_ids=ids, use_cache=False)
    return capture.take()


def losses(folder: Path, placements: list[str]) -> list[dict[str, Any]]:
    teachers = [
        one | {"placement": where} for one, where in zip(tiny.fields()["teachers"], placements, strict=True)
    ]
    spec = tiny.spec(folder, teachers=teachers, train={"steps": 2}, evaluate={"every": 2})
    lines = read_metrics(run(spec, variant="main", seed=0).folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_device_of_its_own_gives_the_same_run(tmp_path: Path) -> None:
    """With one process ``sharded`` is ``replicated``."""
    expected = losses(tmp_path / "default", ["replicated", "replicated"])
    assert losses(tmp_path / "placed", ["cpu", "sharded"]) == expected


def test_inputs_go_to_the_teachers_device() -> None:
    model = llama()
    make = maker(model)
    assert place_model(model, make, "cpu", CPU, who="t") is make  # nothing to send or bring home
    layer = nn.Module()
    layer.base_model = nn.Linear(1, 1)
    seen: list[torch.device] = []
    placement._place_elsewhere(layer, make, META, CPU)
    layer.base_model.register_forward_pre_hook(lambda _, args: seen.append(args[0].device))
    layer.base_model(torch.zeros(2, 1))
    assert seen == [META]
    assert layer.base_model.weight.device == META
    _, named = placement._send_inputs(META, layer, (), {"attention_mask": IDS, "use_cache": False})
    assert (named["attention_mask"].device, named["use_cache"]) == (META, False)


def test_the_cache_comes_home() -> None:
    model = llama()
    want = read(model, maker(model))
    make = placement._place_elsewhere(model, maker(model), CPU, META)
    assert make.func is CaptureElsewhere
    found = read(model, make)
    for part, x in want.items():
        assert (getattr(found, part).device, getattr(found, part).shape) == (META, x.shape)


def test_a_cache_from_elsewhere_has_the_same_numbers() -> None:
    model = llama()
    want = read(model, maker(model))
    found = read(model, partial(CaptureElsewhere, model, home=CPU, layers=(0, 1), rotary="strip"))
    assert all(torch.equal(getattr(found, part), x) for part, x in want.items())


def test_placing_twice_sends_once() -> None:
    model = llama()
    make = placement._place_elsewhere(model, maker(model), CPU, META)
    again = placement._place_elsewhere(model, make, CPU, META)
    assert again is make
    assert len(model.base_model._forward_pre_hooks) == 1


@pytest.mark.parametrize("wrong", ["gpu", "shard", "cuda:", "cuda:-1", "cpu:0x", "", "Sharded"])
def test_other_words_are_refused_with_those_possible(wrong: str) -> None:
    teacher = tiny.fields()["teachers"][0] | {"placement": wrong}
    with pytest.raises(ValidationError, match=r"replicated\|sharded\|cpu\|cuda"):
        tiny.spec(teachers=[teacher])


def test_an_absent_device_is_one_line() -> None:
    model = llama()
    count = torch.cuda.device_count()
    with pytest.raises(SpecError, match=rf"^teacher 't': placement: cuda:99: there are {count} CUDA devices"):
        place_model(model, maker(model), "cuda:99", CPU, who="teacher 't'")


def test_quantised_weights_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "processes_met", lambda: 2)
    model = llama()
    model.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SpecError, match="teacher 't': placement: quantised weights cannot be sharded"):
        place_model(model, maker(model), "sharded", CPU, who="teacher 't'")


@pytest.mark.parametrize("case", WORKS, ids=lambda case: case.name)
def test_blocks_are_the_decoder_layers(case: Any) -> None:
    model = case.model()
    found = decoder_layers(model)
    assert len(found) == case.layers
    assert len({type(block) for block in found}) == 1
    assert not any(
        block is other or block in other.modules() for block in found for other in found if block is not other
    )


@pytest.mark.parametrize(
    ("examples", "batch", "even"), [(8, 4, True), (9, 4, False), (7, 4, True), (1, 4, False)]
)
def test_uneven_validation_is_refused_where_processes_wait_for_each_other(
    examples: int, batch: int, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "is_sharded", lambda module: True)
    distiller = SimpleNamespace(teachers=[SimpleNamespace(name="t", model=SimpleNamespace(base_model=None))])
    evaluator = SimpleNamespace(examples=range(examples), spec=SimpleNamespace(batch_size=batch))
    if even:
        check_even_evaluation(distiller, evaluator, 2)
    else:
        with pytest.raises(SpecError, match=r"set evaluate\.examples to a multiple of 2"):
            check_even_evaluation(distiller, evaluator, 2)


def test_streamed_layers_come_home() -> None:
    model = llama()
    whole = read(model, maker(model))
    make = placement._place_elsewhere(model, maker(model), CPU, META)
    seen: list[tuple[int, Any]] = []
    capture = make(each=lambda place, cache: seen.append((place, cache)))
    with torch.no_grad(), capture:
        model.base_model(input_ids=IDS, use_cache=False)
    capture.done()
    assert [place for place, _ in seen] == [0, 1]
    assert all(cache.keys.device == META for _, cache in seen)
    assert all(cache.keys.shape == whole.keys[:, :1].shape for _, cache in seen)


@pytest.mark.parametrize(
    ("fuser", "refused"),
    [({"name": "fixed"}, False), ({"name": "fixed", "sample": 1}, True), ("reinforce", True)],
    ids=str,
)
def test_drawn_teachers_are_not_sharded(
    fuser: Any, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process draws by itself, and a sharded teacher runs in all or in none."""
    spec = tiny.spec(tmp_path, fuser=fuser)
    distiller = make_distiller(spec, make_data(spec), seed=0)
    monkeypatch.setattr("kava_core.distill.distiller.processes_met", lambda: 2)
    monkeypatch.setattr(Teacher, "to", lambda *_: None)
    placements = {"wide": "sharded"}
    if not refused:
        distiller.place_teachers(torch.device("cpu"), placements)
        return
    with pytest.raises(SpecError, match=r"teacher 'wide': placement: sharded: the fuser draws"):
        distiller.place_teachers(torch.device("cpu"), placements)
