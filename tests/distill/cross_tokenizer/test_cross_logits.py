"""The term of logits across tokenizers, as a user trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.cross_tokenizer.grouped_distance import Comparison, grouped_distance
from kava_core.distill.cross_tokenizer.shared_tokens import SharedTokens
from kava_core.distill.cross_tokenizer.token_groups import pair_by_characters, pair_by_order
from kava_core.distill.distiller import Distiller
from kava_core.distill.logits import logit_divergence, same_tokens
from kava_core.errors import SpecError
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import run
from tests.support import tiny

WIDE, GPT = tiny.FIELDS["teachers"]
PAIRING = {"sorted": pair_by_order, "spans": pair_by_characters}


def made(cross_logits: dict[str, Any], rows: int = 3, **fields: Any) -> tuple[Distiller, dict[str, Any], Any]:
    spec = tiny.spec(**({"losses": [], "cross_logits": cross_logits} | fields))
    data = make_data(spec)
    batch = data.plain_collator([data.train_items[index] for index in range(rows)])
    distiller = make_distiller(spec, data, seed=0).eval()
    calibrate_components(distiller, data, spec, torch.device("cpu"))
    return distiller, batch, data


def logits_of(model: Any, side: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model(
        input_ids=side["input_ids"], attention_mask=side["attention_mask"]
    ).logits.detach()
    return found


@pytest.mark.parametrize("form", ["sorted", "spans"])
@pytest.mark.parametrize(
    "fields", [{}, {"losses": ["relation"]}, {"losses": ["relation"], "train": {"stream": True}}]
)
def test_the_term_is_the_weighted_mean_of_its_teachers(form: str, fields: dict[str, Any]) -> None:
    """Against plain passes; the loss has it with its weight, the other terms as they are."""
    term = {"form": form, "weight": 0.7, "temperature": 2.0, "teacher_weights": {"wide": 3.0}}
    distiller, batch, data = made(term, **fields)
    student = batch["student"]
    items = torch.tensor([17.0, 40.0, 3.0, 1.0])
    found = distiller(student, batch["teachers"], items)
    models = {teacher.name: teacher.model for teacher in distiller.teachers}
    expected = 0.0
    for name, share in (("wide", 0.75), ("gpt", 0.25)):
        side = batch["teachers"][name]
        vocabularies = SharedTokens(data.tokenizer, data.teacher_tokenizers[name])
        distance = grouped_distance(
            logits_of(distiller.student, student).double(),
            logits_of(models[name], side).double(),
            PAIRING[form](student, side),
            Comparison(vocabularies, form == "spans", 2.0),
        )
        expected += share * float(distance) / 17.0
    assert float(found["cross_logits"]) == pytest.approx(expected, rel=1e-4)
    others = found["relation"] if "losses" in fields else 0.0
    torch.testing.assert_close(found["loss"], found["ce"] + others + 0.7 * found["cross_logits"])


def test_one_tokenizer_gives_the_term_of_logits_without_the_end() -> None:
    """The same tokens, all of them shared: the divergence of ``logits`` at every token that has text."""
    distiller, batch, _ = made({"form": "spans"}, teachers=[GPT])
    student, side = batch["student"], batch["teachers"]["gpt"]
    items = distiller.loss_denominators(batch)
    found = distiller(student, batch["teachers"], items)["cross_logits"]
    places, counts = same_tokens(student, side)
    has_text = student["spans"][..., 1] > student["spans"][..., 0]
    counts[:, :-1] &= has_text[:, 1:]
    expected = logit_divergence(
        logits_of(distiller.student, student),
        logits_of(distiller.teachers[0].model, side),
        places,
        counts / items[0],
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["sorted", "spans"])
def test_other_examples_and_padding_change_nothing(form: str) -> None:
    distiller, _, data = made({"form": form}, teachers=[WIDE])
    ones = torch.ones(4)

    def total(rows: list[int]) -> float:
        data.plain_collator.pad_to_multiple = 32 if len(rows) > 1 else 1
        batch = data.plain_collator([data.train_items[row] for row in rows])
        return float(distiller(batch["student"], batch["teachers"], ones)["cross_logits"])

    assert total([0, 1, 2, 3]) == pytest.approx(sum(total([row]) for row in range(4)), rel=1e-4)


@pytest.mark.parametrize("form", ["sorted", "spans"])
def test_its_gradient_leads_to_the_teacher(form: str) -> None:
    """A few steps along it alone bring the student's distributions closer to a sure teacher's."""
    distiller, batch, _ = made({"form": form}, teachers=[WIDE])
    with torch.no_grad():
        distiller.teachers[0].model.lm_head.weight.mul_(30.0)
    optimizer = torch.optim.Adam(distiller.student.parameters(), lr=3e-3)
    items = distiller.loss_denominators(batch)
    values = []
    for _ in range(15):
        _, terms = distiller.terms(batch["student"], batch["teachers"], items)
        values.append(float(terms["cross_logits"].detach()))
        optimizer.zero_grad()
        terms["cross_logits"].backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]


def test_it_stands_beside_logits_with_teachers_of_its_own() -> None:
    """Each term hears its own teachers; the one of one vocabulary is as if the other were not there."""
    fields: dict[str, Any] = {"teachers": [WIDE, GPT], "logits": {"teachers": ["gpt"]}}
    both, batch, _ = made({"teachers": ["wide"]}, **fields)
    items = both.loss_denominators(batch)
    found = both(batch["student"], batch["teachers"], items)
    for name, alone in (("logits", fields), ("cross_logits", {"cross_logits": {}, "teachers": [WIDE]})):
        spec = tiny.spec(**({"losses": []} | alone))
        distiller = make_distiller(spec, make_data(spec), seed=0).eval()
        single = distiller(batch["student"], batch["teachers"], items)
        torch.testing.assert_close(found[name], single[name])
    assert list(both.weighted_terms()) == ["logits", "cross_logits"]


def test_a_teacher_that_never_runs_is_not_asked() -> None:
    fuser = {"name": "fixed", "weights": {"wide": 1, "gpt": 0}}
    for section in ("cross_logits", "hidden"):
        spec = tiny.spec(fuser=fuser, **{section: {"teachers": ["gpt"]}})
        with pytest.raises(SpecError, match=f"{section}: teacher 'gpt' has weight 0 in the fuser"):
            make_distiller(spec, make_data(spec), seed=0)


@pytest.mark.parametrize("form", ["sorted", "spans"])
def test_a_shuffled_teacher_is_another_example(form: str) -> None:
    """The control compares with the distributions of another text, here of models that are sure of theirs."""
    distiller, batch, data = made({"form": form}, teachers=[WIDE], train={"shuffle_teacher": True})
    with torch.no_grad():
        distiller.teachers[0].model.lm_head.weight.mul_(30.0)
        distiller.student.lm_head.weight.mul_(30.0)
    shuffled = data.collator([data.train_items[index] for index in range(3)])
    items = distiller.loss_denominators(batch)
    values = []
    for given in (batch, shuffled):
        assert torch.equal(given["student"]["input_ids"], batch["student"]["input_ids"])
        values.append(float(distiller(given["student"], given["teachers"], items)["cross_logits"]))
    assert values[1] > 0
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_online_texts_have_no_part_in_it(tmp_path: Path) -> None:
    """What the student wrote has no labels, so the term is the other rows' alone."""
    spec = tiny.spec(
        tmp_path,
        teachers=[WIDE],
        losses=["relation"],
        cross_logits={},
        online={"share": 0.5, "max_new_tokens": 4},
        train={"steps": 2},
        evaluate={"generate": False},
    )
    assert run(spec, variant="main", seed=0).results["cross_logits"] > 0
