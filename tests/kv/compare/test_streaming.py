"""Layer by layer is the same as all at once: terms and every gradient, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.distiller import Distiller
from kava_core.errors import KavaError, SpecError
from kava_core.kv.align import streaming as align_stream
from kava_core.protocols.axes import Cache
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import run
from tests.support import tiny

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def made(tmp_path: Path, **changes: Any) -> tuple[Distiller, dict[str, Any], Tensor]:
    """A calibrated distiller in float64, a batch, and its counts."""
    changes.setdefault("train", {})
    spec = tiny.spec(tmp_path, **changes)
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0).double()
    for teacher in distiller.teachers:
        teacher.model.double()
    batch = data.plain_collator([data.train_items[index] for index in range(5)])
    calibrate_components(distiller, data, spec, torch.device("cpu"))
    return distiller.double(), batch, torch.tensor([40.0, 60.0], dtype=torch.float64)


def gradients(distiller: Distiller, batch: dict[str, Any], items: Tensor) -> tuple[dict[str, Tensor], ...]:
    torch.manual_seed(0)
    distiller.zero_grad()
    terms = distiller(batch["student"], batch["teachers"], items)
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in terms.items()}, found


def assert_same(tmp_path: Path, **changes: Any) -> dict[str, Tensor]:
    """Streamed and at once; the gradients, for more looks at them."""
    distiller, batch, items = made(tmp_path, **changes)
    whole, expected = gradients(distiller, batch, items)
    distiller.choose_alignment(stream=True)
    streamed, found = gradients(distiller, batch, items)
    assert streamed.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(streamed[name], whole[name], **CLOSE)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    return found


def deep(name: str, **changes: Any) -> dict[str, Any]:
    config = tiny.llama(num_hidden_layers=5, hidden_size=64, num_key_value_heads=4)
    return {"name": name, "config": config, "tokenizer": tiny.BPE} | changes


TRAINED = deep("t", align={"dim_projector": "linear"})
STUDENT = {"config": tiny.llama(num_hidden_layers=3), "tokenizer": tiny.CHARS}
LOSSES = [
    {"name": "mercator", "weight": 0.5},
    {"name": "relation", "parts": ["values"], "layers": [0, 2]},
    {"name": "attention_kl", "layers": [1], "parts": ["keys", "queries"]},
]

ALIGNMENTS: dict[str, dict[str, Any]] = {
    "calibrated, frozen": {},
    "trained matrices": {"dim_projector": {"name": "linear"}},
    "a matrix for each head": {"dim_projector": {"name": "linear", "share_heads": False}},
    "a bottleneck": {"dim_projector": {"name": "elastic", "dropout": 0.0}},
    "a trained basis": {"dim_projector": {"name": "calibrated", "method": "ridge", "trainable": True}},
    "trained heads of every layer": {
        "head_adapter": {"name": "structured", "per_layer": True, "trainable": True, "init": "random"}
    },
    "several layers": {"layer_mapper": {"name": "ratio", "sources": 2}},
    "layers side by side": {"layer_mapper": {"name": "ratio", "sources": 2}, "layers": "concat"},
    "learned layers": {"layer_mapper": {"name": "learned"}},
    "the student lifted": {"direction": "to_teacher", "dim_projector": {"name": "linear"}},
    "the last layers": {"layer_mapper": {"name": "last_aligned"}},
}


@pytest.mark.parametrize("align", ALIGNMENTS.values(), ids=ALIGNMENTS.keys())
def test_every_alignment(tmp_path: Path, align: dict[str, Any]) -> None:
    losses = LOSSES if "direction" not in align else LOSSES[:2]
    assert_same(tmp_path, student=STUDENT, teachers=[deep("t", align=align)], losses=losses)


@pytest.mark.parametrize("projector", ["calibrated", "linear"])
@pytest.mark.parametrize("rotary", ["strip", "keep", "match"])
def test_every_rotation(tmp_path: Path, rotary: str, projector: str) -> None:
    gemma = {
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 128,
    }
    student = {"config": gemma, "tokenizer": tiny.CHARS}
    teacher = deep("t", align={"dim_projector": projector})
    assert_same(tmp_path, student=student, teachers=[teacher], losses=LOSSES[:1], rotary=rotary)


@pytest.mark.parametrize(
    "fuser",
    [
        "fixed",
        {"name": "fixed", "sample": 1},
        {"name": "learnable", "per_layer": True, "entropy": 0.1},
        {"name": "similarity"},
        {"name": "reinforce"},
    ],
    ids=str,
)
def test_several_teachers_and_routers(tmp_path: Path, fuser: Any) -> None:
    align = {"dim_projector": "linear"}
    teachers = [deep("a"), {"name": "b", "config": tiny.gpt2(), "tokenizer": tiny.CHARS, "align": align}]
    distiller, batch, items = made(
        tmp_path, student=STUDENT, teachers=teachers, losses=LOSSES[:2], fuser=fuser
    )
    state = {name: value.clone() for name, value in distiller.state_dict().items()}
    whole, expected = gradients(distiller, batch, items)
    distiller.load_state_dict(state)  # reinforce keeps what it has seen
    distiller.choose_alignment(stream=True)
    streamed, found = gradients(distiller, batch, items)
    close = (
        CLOSE if fuser == "fixed" or "sample" in fuser else {"rtol": 1e-5, "atol": 1e-7}
    )  # float32 routers
    for name in whole:
        torch.testing.assert_close(streamed[name], whole[name], **close)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **close)


def test_unweighted_terms_have_the_same_gradients(tmp_path: Path) -> None:
    distiller, batch, items = made(tmp_path, student=STUDENT, teachers=[TRAINED], losses=LOSSES)
    trained = list(distiller.student.parameters())

    def slope(term: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(trained, found, strict=True)]

    def slopes() -> dict[str, list[Tensor]]:
        _, terms = distiller.terms(batch["student"], batch["teachers"], items)
        return {name: slope(terms[name]) for name in ("mercator", "relation", "attention_kl")}

    expected = slopes()
    distiller.choose_alignment(stream=True)
    for name, found in slopes().items():
        torch.testing.assert_close(found, expected[name], **CLOSE)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_gradient_checkpointing(tmp_path: Path, checkpointed: bool) -> None:
    student = STUDENT | {"gradient_checkpointing": checkpointed}
    assert_same(tmp_path, student=student, teachers=[TRAINED], losses=LOSSES)


def test_no_gradient_is_made_in_evaluation(tmp_path: Path) -> None:
    distiller, batch, items = made(tmp_path, student=STUDENT, teachers=[TRAINED], losses=LOSSES)
    distiller.choose_alignment(stream=True)
    with torch.no_grad():
        terms = distiller(batch["student"], batch["teachers"], items)
    assert not terms["loss"].requires_grad
    assert terms["mercator"] > 0


@pytest.mark.parametrize("projector", ["calibrated", "linear"])
def test_one_teacher_layer_is_alive_at_a_time(
    tmp_path: Path, projector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that no later student layer reads are let go at once."""
    teacher = deep("t", align={"dim_projector": projector})
    distiller, batch, items = made(tmp_path, student=STUDENT, teachers=[teacher], losses=LOSSES[:1])
    distiller.choose_alignment(stream=True)
    alive: list[int] = []
    plain = align_stream.WaitingLayers.take

    def counting(self: Any, place: int, cache: Cache) -> Any:
        yield from plain(self, place, cache)
        alive.append(len(self.kept))

    monkeypatch.setattr(align_stream.WaitingLayers, "take", counting)
    distiller(batch["student"], batch["teachers"], items)["loss"].backward()
    assert alive == [0, 0, 0]


def test_training_streams(tmp_path: Path) -> None:
    """The whole run: the same numbers as without, up to rounding."""
    both = [
        run(tiny.spec(tmp_path / str(on), train={"stream": on}), variant="main", seed=0).results
        for on in (False, True)
    ]
    for name in ("ce", "mercator", "relation"):
        assert both[1][name] == pytest.approx(both[0][name], rel=1e-4)


@pytest.mark.parametrize("changes", [{"target": "fused"}, {"fuser": "attention"}], ids=str)
def test_fixed_alignment_streams_for_all(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The targets are whole in the end, so they can be averaged or looked at."""
    changes = changes | {"teachers": [deep("a"), deep("b")], "losses": LOSSES[:1]}
    distiller, batch, items = made(tmp_path, student=STUDENT, **changes)
    whole, expected = gradients(distiller, batch, items)
    distiller.choose_alignment(stream=True)
    streamed, found = gradients(distiller, batch, items)
    for name in whole:
        torch.testing.assert_close(streamed[name], whole[name], **CLOSE)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "fused", "losses": [{"name": "relation"}]}, "train.stream: .* target: fused"),
        ({"fuser": "attention", "teachers": [TRAINED]}, "train.stream: .* fuser 'attention' cannot"),
        (
            {"teachers": [deep("t", align={"head_adapter": {"name": "flat", "layers": True}})]},
            "train.stream: the head adapter of teacher 't'",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if "target" in changes:
        align = {"head_adapter": "structured", "dim_projector": "linear"}
        changes = changes | {"teachers": [deep("a", align=align), deep("b", align=align)]}
    spec = tiny.spec(tmp_path, **changes, train={"stream": True})
    with pytest.raises(SpecError, match=words):
        make_distiller(spec, make_data(spec), seed=0)


def test_under_autocast_sums_are_exact(tmp_path: Path) -> None:
    """A matrix product of factors and terms would be rounded to bfloat16."""
    spec = tiny.spec(tmp_path, student=STUDENT, teachers=[TRAINED], losses=LOSSES, train={"stream": True})
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    batch = data.plain_collator([data.train_items[index] for index in range(5)])
    found = {}
    for stream in (False, True):
        distiller.choose_alignment(stream=stream)
        with torch.autocast("cpu", torch.bfloat16):
            found[stream] = distiller(batch["student"], batch["teachers"], torch.ones(4))
    torch.testing.assert_close(found[True]["loss"], found[False]["loss"], rtol=1e-6, atol=0)


def test_a_projector_that_makes_nan_is_named_while_streaming(tmp_path: Path) -> None:
    distiller, batch, items = made(tmp_path, student=STUDENT, teachers=[TRAINED], losses=LOSSES[:1])
    distiller.choose_alignment(stream=True)
    with torch.no_grad():
        distiller.pipeline.teachers[0].dim_projector.values.fill_(torch.nan)
    with pytest.raises(
        KavaError, match=r"returned NaN or infinity for finite values, layers \[0\]"
    ) as caught:
        distiller(batch["student"], batch["teachers"], items)
    assert caught.value.__notes__[0].startswith("in dim_projector 'linear', teacher 't' (kava ")
