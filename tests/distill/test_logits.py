"""Distillation of next-token distributions against loops in float64, and as a user trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.data.collate import Collator, Reading
from kava_core.data.examples import Example
from kava_core.distill import logits as module
from kava_core.distill.alignment import StepBatch
from kava_core.distill.logits import assert_same_vocabulary, logit_divergence, same_tokens
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import Template
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import run
from tests.support import tiny

TEMPLATE = Template(prompt="{prompt}=", reasoning="{reasoning}", answer=" #{answer}")
LONG = Template(prompt="say: {prompt}=", reasoning="{reasoning}", answer=" #{answer}")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loop(
    student: Tensor, teacher: Tensor, places: Tensor, weight: Tensor, temperature: float, kind: str
) -> Tensor:
    """Position by position, in float64, for autograd."""
    width = min(student.shape[-1], teacher.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for row in range(student.shape[0]):
        for time in range(student.shape[1]):
            if weight[row, time] == 0:
                continue
            q = torch.softmax(student[row, time, :width].double() / temperature, -1)
            p = torch.softmax(teacher[row, places[row, time], :width].double() / temperature, -1)
            forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
            each = {"forward": forward, "reverse": reverse, "jeffreys": forward + reverse}[kind]
            total = total + weight[row, time] * temperature**2 * each
    return total


@pytest.mark.parametrize("kind", ["forward", "reverse", "jeffreys"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("elements", [2**22, 40])
def test_value_and_gradient(
    kind: Any, temperature: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ELEMENTS", elements)
    student, teacher = drawn(2, 5, 11).requires_grad_(), 3 * drawn(2, 7, 13, seed=1)
    places = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(2))
    weight = drawn(2, 5, seed=3).abs() * (drawn(2, 5, seed=4) > 0)
    expected = by_loop(student, teacher, places, weight, temperature, kind)
    (slope,) = torch.autograd.grad(expected, student)
    found = logit_divergence(student, teacher, places, weight, temperature=temperature, kind=kind)
    (mine,) = torch.autograd.grad(3 * found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine, 3 * slope)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jeffreys"])
def test_what_does_not_count_has_no_influence(kind: Any) -> None:
    """Not even infinite logits; nothing counts at all; a certain teacher is no NaN."""
    student, teacher = drawn(1, 3, 5), drawn(1, 3, 5, seed=1)
    places = torch.arange(3)[None]
    weight = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    clean = logit_divergence(student, teacher, places, weight, kind=kind)
    student[0, 1], teacher[0, 1] = torch.nan, torch.inf
    student.requires_grad_()
    spoilt = logit_divergence(student, teacher, places, weight, kind=kind)
    torch.testing.assert_close(spoilt, clean)
    (slope,) = torch.autograd.grad(spoilt, student)
    assert torch.isfinite(slope).all()
    assert not slope[0, 1].any()
    assert not logit_divergence(student, teacher, places, 0 * weight, kind=kind)


def test_a_certain_teacher_is_finite() -> None:
    teacher = torch.full((1, 1, 4), -torch.inf)
    teacher[..., 2] = 0
    student = drawn(1, 1, 4, dtype=torch.float32).requires_grad_()
    one = torch.ones(1, 1)
    found = logit_divergence(student, teacher, torch.zeros(1, 1, dtype=torch.long), one)
    torch.testing.assert_close(found, -student.log_softmax(-1)[0, 0, 2])
    found.backward()
    assert torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = drawn(1, 4, 50, dtype=torch.bfloat16), drawn(1, 4, 50, seed=1, dtype=torch.bfloat16)
    student = student.requires_grad_()
    places, weight = torch.arange(4)[None], torch.ones(1, 4)
    found = logit_divergence(student, teacher, places, weight)
    expected = by_loop(student, teacher, places, weight, 1.0, "forward")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    assert student.grad.dtype == torch.bfloat16


def tokenizer() -> Any:
    from kava_core.data.tokenizers import load_tokenizer
    from kava_core.files import cache_folder
    from kava_core.specfile.sections.models import TrainTokenizer

    spec = TrainTokenizer(kind="chars", vocab_size=64)
    return load_tokenizer(spec, texts=["say: 0123456789+-*=# ?"], cache=cache_folder() / "tokenizers")


def sides(examples: list[Example], reading: Reading | None, **how: Any) -> tuple[dict[str, Any], ...]:
    one = tokenizer()
    readings = {} if reading is None else {"t": reading}
    batch = Collator(one, {"t": one}, TEMPLATE, readings=readings, **how)(examples)
    return batch["student"], batch["teachers"]["t"]


EXAMPLES = [
    Example("1+2", " 3", "3"),
    Example("4-1+1", " 3 4", "4", rationales=(" 3 5 4",)),  # another length; they agree at first
    Example("5+1+1", " 6 7", "7", rationales=(" 9 6 7",)),  # they agree at the end alone
]


def matched_by_loop(student: dict[str, Any], teacher: dict[str, Any], row: int) -> dict[int, int]:
    """Student position to the teacher's, token by token: both completions from their first tokens on."""
    own = student["input_ids"][row][student["attention_mask"][row].bool()].tolist()
    other = teacher["input_ids"][row][teacher["attention_mask"][row].bool()].tolist()
    start, t_start = (int((side["segments"][row] == 0).sum()) for side in (student, teacher))
    found = {}
    for mine, theirs in zip(range(start, len(own)), range(t_start, len(other)), strict=False):
        if own[mine] != other[theirs]:
            break
        found[mine - 1] = theirs - 1
    return found


@pytest.mark.parametrize("reading", [None, Reading(LONG), Reading(TEMPLATE, 1), Reading(LONG, 1)])
def test_positions_that_predict_the_same_token_meet(reading: Reading | None) -> None:
    student, teacher = sides(EXAMPLES, reading)
    places, counts = same_tokens(student, teacher)
    for row in range(len(EXAMPLES)):
        expected = matched_by_loop(student, teacher, row)
        found = {time: int(places[row, time]) for time in range(counts.shape[1]) if counts[row, time]}
        assert found == expected
    assert counts.any()


def test_completions_that_differ_at_once_do_not_meet() -> None:
    student, teacher = sides(EXAMPLES, Reading(TEMPLATE, 1))
    _, counts = same_tokens(student, teacher)
    assert counts.sum(1).tolist()[1:] == [3, 1]  # " 3 " of four; the space before the first step


def test_prompts_count_only_where_the_texts_agree() -> None:
    student, teacher = sides(EXAMPLES, None, loss_on="all")
    _, counts = same_tokens(student, teacher)
    lengths = student["attention_mask"].sum(1)
    assert counts.sum(1).tolist() == (lengths - 1).tolist()
    student, teacher = sides(EXAMPLES, Reading(LONG), loss_on="all")
    _, counts = same_tokens(student, teacher)
    completions = (student["segments"] > 0).sum(1)
    assert counts.sum(1).tolist() == completions.tolist()


def test_other_vocabularies_are_refused_with_a_token() -> None:
    data = make_data(tiny.spec())
    with pytest.raises(SpecError, match=r"logits: teacher 'wide' has another vocabulary.*token"):
        assert_same_vocabulary(data.tokenizer, data.teacher_tokenizers["wide"], who="teacher 'wide'")
    assert_same_vocabulary(data.tokenizer, data.teacher_tokenizers["gpt"], who="teacher 'gpt'")


def test_the_spec_says_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match=r"'logits.teachers': no teacher 'gtp'; there are wide, gpt"):
        tiny.spec(logits={"teachers": ["gtp"]})
    with pytest.raises(ValidationError, match="'logits' needs at least one teacher"):
        tiny.spec(logits={}, teachers=[], losses=[])
    with pytest.raises(ValidationError, match="store: null"):
        tiny.spec(logits={"teachers": ["gpt"]}, store={"folder": "x"})


@pytest.mark.parametrize("stream", [False, True])
def test_the_term_beside_kv_losses(tmp_path: Path, stream: bool) -> None:
    """Against plain forward passes and a loop; the loss has it with its weight."""
    logits = {"teachers": ["gpt"], "weight": 0.7, "temperature": 2.0}
    align = {"dim_projector": "linear"}
    teachers = [one | {"align": align} for one in tiny.FIELDS["teachers"]]
    spec = tiny.spec(tmp_path, logits=logits, teachers=teachers, train={"stream": stream})
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0).eval()
    batch = data.plain_collator([data.train_items[index] for index in range(3)])
    student, gpt = batch["student"], batch["teachers"]["gpt"]
    items = torch.tensor([17.0, 40.0, 3.0, 1.0])
    found = distiller(student, batch["teachers"], items)

    model = {t.name: t.model for t in distiller.teachers}["gpt"]
    pair = [
        one(input_ids=side["input_ids"], attention_mask=side["attention_mask"]).logits.detach()
        for one, side in ((distiller.student, student), (model, gpt))
    ]
    places, counts = same_tokens(student, gpt)
    assert int(counts.sum()) == int((student["labels"] != -100).sum())
    expected = by_loop(*pair, places, counts / 17.0, 2.0, "forward")
    torch.testing.assert_close(found["logits"].double(), expected, rtol=1e-4, atol=1e-6)
    kv = 0.5 * found["mercator"] + found["relation"]
    torch.testing.assert_close(found["loss"], found["ce"] + kv + 0.7 * found["logits"])


def test_logits_alone_run_no_capture_and_train(tmp_path: Path) -> None:
    """A student that copies its teacher's distributions comes closer to them than one that does not."""
    teacher = {"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS}
    teacher |= {"pretrain": {"steps": 40, "batch_size": 16, "learning_rate": 5e-3}}
    found = {}
    for weight in (0.0, 4.0):
        spec = tiny.spec(
            tmp_path / str(weight),
            teachers=[teacher],
            losses=[],
            logits={"weight": weight},
            train={"steps": 20, "learning_rate": 3e-3},
        )
        made = run(spec, variant="main", seed=0)
        found[weight] = made.results
    assert "logits" not in found[0.0]
    assert found[4.0]["logits"] < 1.0
    assert found[4.0]["ce"] < found[0.0]["ce"]


def test_float16_keeps_what_is_small_until_it_is_scaled() -> None:
    """As a loss scaler uses it: a weight below float16's steps, and a large factor in the backward pass."""
    student = drawn(1, 4, 50, dtype=torch.float16)
    teacher = (student.float() + 0.01 * drawn(1, 4, 50, seed=1, dtype=torch.float32)).half()
    places, weight = torch.arange(4)[None], torch.full((1, 4), 2.0**-15)
    wide = student.double().requires_grad_()
    (expected,) = torch.autograd.grad(2.0**15 * by_loop(wide, teacher, places, weight, 1.0, "forward"), wide)
    student.requires_grad_()
    (found,) = torch.autograd.grad(2.0**15 * logit_divergence(student, teacher, places, weight), student)
    assert found.dtype == torch.float16
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_logits_of_another_batch_are_not_kept(tmp_path: Path) -> None:
    """What runs a teacher for other reasons leaves nothing that a later batch would be compared with."""
    same = {"config": tiny.llama(), "tokenizer": tiny.CHARS}
    spec = tiny.spec(tmp_path, teachers=[{"name": "a"} | same, {"name": "b"} | same], logits={})
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    calibrate_components(distiller, data, spec, torch.device("cpu"))
    batch = data.plain_collator([data.train_items[index] for index in range(3)])
    one = StepBatch(batch["student"], batch["teachers"], torch.ones(4))
    assert all(
        read.logits is None
        for read in distiller.alignment.compare_apart(one, distiller.student_pass).teachers
    )
    assert all(
        read.logits is not None for read in distiller.alignment.compare(one, distiller.student_pass).teachers
    )
    assert not any(
        isinstance(value, Tensor) for teacher in distiller.teachers for value in vars(teacher).values()
    )


def test_drawn_teachers_are_heard_when_they_run(tmp_path: Path) -> None:
    same = {"config": tiny.llama(), "tokenizer": tiny.CHARS}
    fuser = {"name": "fixed", "sample": 1}
    teachers = [{"name": "a"} | same, {"name": "b"} | same]
    found = run(tiny.spec(tmp_path, teachers=teachers, logits={}, fuser=fuser), variant="main", seed=0)
    assert found.results["logits"] > 0


def test_a_teacher_that_never_runs_is_not_asked(tmp_path: Path) -> None:
    same = {"config": tiny.llama(), "tokenizer": tiny.CHARS}
    fuser = {"name": "fixed", "weights": {"a": 1, "b": 0}}
    teachers = [{"name": "a"} | same, {"name": "b"} | same]
    spec = tiny.spec(tmp_path, teachers=teachers, logits={"teachers": ["b"]}, fuser=fuser)
    with pytest.raises(SpecError, match="logits: teacher 'b' has weight 0"):
        make_distiller(spec, make_data(spec), seed=0)


def test_shuffled_teachers_have_other_tokens() -> None:
    with pytest.raises(ValidationError, match="another example beside the student"):
        tiny.spec(logits={"teachers": ["gpt"]}, train={"shuffle_teacher": True})
