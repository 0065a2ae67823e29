"""Distillation of hidden states against plain passes in float64, and as a user trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.distiller import Distiller
from kava_core.errors import NonFiniteError, SpecError
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import run
from kava_core.train.weights import load_weights, save_weights
from tests.support import tiny

SAME_TEXT = {"time_warper": "identity", "dim_projector": "identity"}


def teacher(name: str = "t", *, align: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    model = {"config": tiny.llama(**{"num_hidden_layers": 4} | config), "tokenizer": tiny.CHARS}
    return {"name": name, "align": SAME_TEXT if align is None else align} | model


def made(
    hidden: dict[str, Any], teachers: list[dict[str, Any]], *, rows: int = 3, **fields: Any
) -> tuple[Distiller, dict[str, Any]]:
    spec = tiny.spec(**({"losses": [], "teachers": teachers, "hidden": hidden} | fields))
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0).eval()
    calibrate_components(distiller, data, spec, torch.device("cpu"))
    return distiller, data.plain_collator([data.train_items[index] for index in range(rows)])


def all_states(model: nn.Module, side: dict[str, Any]) -> list[Tensor]:
    outputs = model(
        input_ids=side["input_ids"], attention_mask=side["attention_mask"], output_hidden_states=True
    )
    return [states.detach().double() for states in outputs.hidden_states]


def by_loop(
    compare: str, own: list[Tensor], theirs: list[Tensor], reads: dict[int, list[int]], mask: Tensor
) -> float:
    """Layer by layer and token by token, the first one left out; a mean over layers and real tokens."""
    total = 0.0
    for layer, sources in reads.items():
        student = own[layer + 1]
        target = torch.stack([theirs[source + 1] for source in sources]).mean(0)
        for row in range(len(mask)):
            places = [place for place in range(1, mask.shape[1]) if mask[row, place]]
            scale = target[row, places].var(correction=0)
            for place in places:
                x, y = student[row, place], target[row, place]
                if compare == "mse":
                    total += float((x - y).square().mean() / scale)
                else:
                    total += float(1 - (x @ y) / (x.norm() * y.norm()))
    return total / len(reads)


@pytest.mark.parametrize("compare", ["mse", "cosine"])
@pytest.mark.parametrize(
    ("layers", "mapper", "reads"),
    [
        ("all", {"name": "ratio", "sources": 2}, {0: [0, 1], 1: [2, 3]}),
        ([-1], {"name": "chosen", "layers": [[3], [0]]}, {1: [0]}),
    ],
)
def test_value_is_that_of_plain_passes(compare: str, layers: Any, mapper: Any, reads: Any) -> None:
    align = SAME_TEXT | {"layer_mapper": mapper}
    distiller, batch = made({"compare": compare, "layers": layers}, [teacher(align=align)])
    side = batch["student"]
    items = torch.tensor([17.0, 40.0, 3.0, 1.0])
    found = distiller(side, batch["teachers"], items)
    own = all_states(distiller.student, side)
    theirs = all_states(distiller.teachers[0].model, batch["teachers"]["t"])
    expected = by_loop(compare, own, theirs, reads, side["attention_mask"]) / 40.0
    assert float(found["hidden"]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found["loss"], found["ce"] + found["hidden"])


@pytest.mark.parametrize("compare", ["mse", "cosine"])
def test_a_student_like_its_teacher_has_no_distance(compare: str) -> None:
    distiller, batch = made({"compare": compare}, [teacher(num_hidden_layers=2)])
    distiller.student.load_state_dict(distiller.teachers[0].model.state_dict())
    found = distiller(batch["student"], batch["teachers"], distiller.loss_denominators(batch))
    assert float(found["hidden"]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("compare", ["mse", "cosine"])
@pytest.mark.parametrize("stream", [False, True])
def test_gradient_is_finite_and_reaches_the_layers_below(compare: str, stream: bool) -> None:
    distiller, batch = made(
        {"compare": compare, "layers": [0]},
        [teacher()],
        losses=["relation"] if stream else [],
        train={"stream": stream},
    )
    distiller.train()
    ce, terms = distiller.terms(batch["student"], batch["teachers"], distiller.loss_denominators(batch))
    weights = dict(distiller.student.named_parameters())
    slopes = torch.autograd.grad(terms["hidden"], [*weights.values()], allow_unused=True)
    reached = {name for name, slope in zip(weights, slopes, strict=True) if slope is not None and slope.any()}
    assert all(torch.isfinite(slope).all() for slope in slopes if slope is not None)
    assert any("layers.0." in name for name in reached)
    assert not any("layers.1." in name for name in reached)
    assert ce.requires_grad


@pytest.mark.parametrize("compare", ["mse", "cosine"])
def test_other_examples_and_padding_change_nothing(compare: str) -> None:
    """The sum over a padded batch is the sum over its examples, each alone and without padding."""
    distiller, _ = made({"compare": compare}, [teacher()])
    data = make_data(tiny.spec(losses=[], teachers=[teacher()], hidden={"compare": compare}))
    ones = torch.ones(4)

    def total(rows: list[int]) -> float:
        data.plain_collator.pad_to_multiple = 32 if len(rows) > 1 else 1
        batch = data.plain_collator([data.train_items[row] for row in rows])
        assert bool((batch["student"]["attention_mask"] == 0).any()) == (len(rows) > 1)
        return float(distiller(batch["student"], batch["teachers"], ones)["hidden"])

    assert total([0, 1, 2, 3]) == pytest.approx(sum(total([row]) for row in range(4)), rel=1e-4)


def test_what_has_no_target_has_no_influence() -> None:
    """NaN in hidden states of padding is not seen; NaN of a real token is named."""
    distiller, _ = made({}, [teacher()])
    data = make_data(tiny.spec(losses=[], teachers=[teacher()], hidden={}))
    data.plain_collator.pad_to_multiple = 32
    batch = data.plain_collator([data.train_items[row] for row in range(4)])
    side = batch["student"]
    padding = (side["attention_mask"] == 0).nonzero()
    assert len(padding)
    clean = distiller(side, batch["teachers"], torch.ones(4))["hidden"]
    spoiled = {"where": padding[0].tolist()}

    def spoil(module: nn.Module, given: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        row, place = spoiled["where"]
        states[row, place] = torch.nan
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layer = distiller.teachers[0].model.model.layers[-1]
    layer.register_forward_hook(spoil)
    again = distiller(side, batch["teachers"], torch.ones(4))["hidden"]
    torch.testing.assert_close(again, clean)
    spoiled["where"] = [0, 2]
    with pytest.raises(NonFiniteError, match="aligned cache of teacher 't'"):
        distiller(side, batch["teachers"], torch.ones(4))


def test_two_teachers_count_by_their_weights() -> None:
    pair = [teacher("a"), teacher("b", rms_norm_eps=0.5)]
    found = {}
    for name, hidden in {
        "a": {"teachers": ["a"]},
        "b": {"teachers": ["b"]},
        "both": {"teacher_weights": {"b": 3.0}},
    }.items():
        distiller, batch = made(hidden, pair)
        assert [one.name for one in distiller.teachers] == (["a", "b"] if name == "both" else [name])
        found[name] = float(distiller(batch["student"], batch["teachers"], torch.ones(4))["hidden"])
    assert found["both"] == pytest.approx(0.25 * found["a"] + 0.75 * found["b"], rel=1e-5)
    assert found["a"] != pytest.approx(found["b"], rel=0.01)


ALIGNMENTS: dict[str, dict[str, Any]] = {
    "calibrated": {"dim_projector": "calibrated", "token_warper": "char_iou", "time_warper": "identity"},
    "procrustes": {
        "dim_projector": {"name": "calibrated", "method": "procrustes"},
        "time_warper": "char_iou",
    },
    "linear": {"dim_projector": "linear", "direction": "to_teacher", "time_warper": "char_iou"},
    "elastic": {"dim_projector": "elastic", "head_adapter": "flat", "layer_mapper": "learned"},
    "joined": {
        "layers": "concat",
        "layer_mapper": {"name": "ratio", "sources": 2},
        "dim_projector": "linear",
    },
}


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_any_two_models_meet(align: str, tmp_path: Path) -> None:
    """Other depth, width and tokenizer: a trained run whose checkpoint holds what aligns."""
    wide = tiny.FIELDS["teachers"][0] | {"align": ALIGNMENTS[align]}
    fields: dict[str, Any] = {"losses": [], "teachers": [wide], "hidden": {"share": 0.5}}
    train = {"steps": 4, "save_every": 4}
    evaluate = {"generate": False}
    result = run(tiny.spec(tmp_path, **fields, train=train, evaluate=evaluate), variant="main", seed=0)
    assert result.results["hidden"] > 0
    assert result.results["share/hidden"] > 0
    record = (result.folder / "run.json").read_text()
    assert "alignment of hidden states" in record

    spec = tiny.spec(**fields)
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    load_weights(distiller, next((result.folder / "checkpoints").glob("*4")))
    batch = data.plain_collator([data.validation_items[index] for index in range(8)])
    items = distiller.loss_denominators(batch)
    found = distiller.eval()(batch["student"], batch["teachers"], items)
    assert float(found["hidden"]) == pytest.approx(result.results["hidden"], rel=1e-4)


def test_weights_that_no_state_reaches_are_frozen_and_the_others_learn() -> None:
    align = {"dim_projector": "linear", "direction": "to_teacher"}
    distiller, batch = made({}, [tiny.FIELDS["teachers"][0] | {"align": align}])
    assert distiller.hidden is not None
    trained = {name for name, weight in distiller.hidden.named_parameters() if weight.requires_grad}
    assert trained
    assert not any("keys" in name for name in trained)
    distiller.train()(batch["student"], batch["teachers"], torch.ones(4))["loss"].backward()
    for name, weight in distiller.hidden.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == (name in trained)


def test_a_teacher_that_does_not_run_leaves_zeros(tmp_path: Path) -> None:
    """A fuser draws one of two; the other's trained projector still gets a gradient, of 0."""
    align = {"dim_projector": "linear"}
    pair = [teacher("a", align=align), teacher("b", align=align)]
    distiller, batch = made({}, pair, losses=["relation"], fuser={"name": "fixed", "sample": 1})
    assert distiller.hidden is not None
    found = distiller.train()(batch["student"], batch["teachers"], torch.ones(4))
    found["loss"].backward()
    slopes = [
        [weight.grad for weight in aligner.parameters() if weight.requires_grad]
        for aligner in distiller.hidden.teachers
    ]
    assert all(slope is not None for of_teacher in slopes for slope in of_teacher)
    assert sorted(bool(torch.stack([s.any() for s in of_teacher]).any()) for of_teacher in slopes) == [
        False,
        True,
    ]
    alone, _ = made({"teachers": ["a"]}, pair)
    assert alone.teachers[0].name == "a"


def test_bfloat16_is_compared_in_float32() -> None:
    distiller, batch = made({}, [teacher()])
    exact = float(distiller(batch["student"], batch["teachers"], torch.ones(4))["hidden"])
    with torch.autocast("cpu", torch.bfloat16):
        found = distiller(batch["student"], batch["teachers"], torch.ones(4))["hidden"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(exact, rel=0.05)


def test_widths_that_do_not_meet_are_refused() -> None:
    wide = tiny.FIELDS["teachers"][0] | {"align": {"dim_projector": "identity"}}
    with pytest.raises(
        SpecError, match="hidden: teacher 'wide': states are compared at 2 layers of width 64"
    ):
        made({}, [wide])
    with pytest.raises(SpecError, match=r"hidden: layers \[7\]: the student has layers 0 to 1"):
        made({"layers": [7]}, [teacher()])


def test_a_shuffled_teacher_is_another_example(tmp_path: Path) -> None:
    """The control runs, and its term is not that of the treatment."""
    found = {}
    for shuffle in (False, True):
        spec = tiny.spec(
            tmp_path / str(shuffle),
            losses=[],
            teachers=[teacher(align={"dim_projector": "identity"})],
            hidden={},
            train={"steps": 2, "shuffle_teacher": shuffle},
            evaluate={"generate": False},
        )
        lines = run(spec, variant="main", seed=0)
        found[shuffle] = lines.results["hidden"]
    assert found[True] != found[False]


def test_saved_weights_come_back(tmp_path: Path) -> None:
    align = {"dim_projector": "linear"}
    fields = {"hidden": {"share": 0.5}, "teachers": [tiny.FIELDS["teachers"][0] | {"align": align}]}
    distiller, _ = made(**fields)
    assert distiller.hidden is not None
    with torch.no_grad():
        for weight in distiller.hidden.parameters():
            weight.add_(1.0)
    save_weights(distiller, tmp_path)
    other, _ = made(**fields)
    load_weights(other, tmp_path)
    assert other.hidden is not None
    for mine, theirs in zip(distiller.hidden.parameters(), other.hidden.parameters(), strict=True):
        assert torch.equal(mine, theirs)
