"""Self-distillation, CODI's term, step cross-entropy, Coconut's stages, and the controls of latent tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.data.dataset import split_nearly_equal
from kava_core.data.examples import drop_last_step
from kava_core.distill.alignment import StepBatch
from kava_core.distill.hidden_states import codi_term, step_cross_entropy
from kava_core.errors import SpecError
from kava_core.latent.collate import thin_evenly
from kava_core.latent.curriculum import latents_at, step_of_tokens
from kava_core.latent.student import RefinedLatents
from kava_core.train.run import run
from kava_core.train.trainer import KavaTrainer
from kava_core.train.validation.answer_writer import AnswerWriter
from kava_core.train.validation.evaluator import Evaluator
from tests.support import tiny

ALIGN = {"time_warper": {"name": "segment", "segments": ["reasoning"]}, "dim_projector": "identity"}
ITSELF = {"name": "own", "itself": {}, "align": ALIGN}
LATENT: dict[str, Any] = {
    "trajectory": "latent",
    "latent": {"count": 3, "passes": 2},
    "teachers": [ITSELF],
    "losses": [{"name": "mse", "parts": ["keys", "values"]}],
}
OWN_LORA = LATENT | {
    "student": tiny.FIELDS["student"] | {"lora": {"rank": 4, "dropout": 0.1}},
    "teachers": [ITSELF | {"last_step": False, "align": ALIGN | {"time_warper": "random"}}],
    "codi": {"weight": 2.0},
}
STAGES = {"count": 2, "passes": 2, "curriculum": {"steps": 2}}
COCONUT = LATENT | {"latent": STAGES, "teachers": [], "losses": []}


def made(**changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Data, distiller and a batch of four examples."""
    one = tiny.spec("runs", **(LATENT | changes))
    data = make_data(one)
    distiller = make_distiller(one, data, seed=0)
    return data, distiller, data.plain_collator([data.train_items[index] for index in range(4)])


def step_of(distiller: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = distiller(
        batch["student"], batch["teachers"], distiller.loss_denominators(batch)
    )
    return found


# self-distillation


def test_the_student_reads_the_written_steps_as_its_own_teacher() -> None:
    """Cross-entropy and target are those of the student itself on the whole text."""
    _, distiller, batch = made()
    distiller.eval()
    side, student = batch["teachers"]["own"], distiller.student
    text = {name: side[name] for name in ("input_ids", "attention_mask")}
    plain = student(**text, labels=side["labels"], use_cache=True)
    torch.testing.assert_close(step_of(distiller, batch)["reading_ce"], plain.loss.detach())
    teacher = distiller.own_teacher
    assert teacher.model is student
    for layer, values in enumerate(plain.past_key_values.layers):
        torch.testing.assert_close(teacher.cache(side).values[:, layer], values.values)


def test_the_written_steps_train_the_student_but_the_target_has_no_gradient() -> None:
    _, distiller, batch = made(losses=[], teachers=[ITSELF | {"itself": {"cross_entropy": 1.0}}])
    found = step_of(distiller, batch)
    alone = made(losses=[], teachers=[])[1]
    torch.testing.assert_close(found["loss"] - found["reading_ce"], step_of(alone, batch)["ce"])
    cache = made()[1].own_teacher.cache(batch["teachers"]["own"])
    assert not any(x.requires_grad for _, x in cache.items())
    weights = list(distiller.student.parameters())
    both = torch.autograd.grad(found["loss"], weights, allow_unused=True)
    reading = [p.grad for p in weights]
    assert all(g is None for g in reading)
    without = torch.autograd.grad(
        step_of(alone, batch)["loss"], list(alone.student.parameters()), allow_unused=True
    )
    assert any(not torch.allclose(a, b) for a, b in zip(both, without, strict=True) if a is not None)


def test_a_run_with_one_lora_backbone_in_two_roles(tmp_path: Path) -> None:
    """Every term is there and finite; the teacher is never saved apart."""
    result = run(tiny.spec(tmp_path, **OWN_LORA), variant="main", seed=0)
    assert {"reading_ce", "codi", "mse"} <= set(result.results)
    assert all(torch.isfinite(torch.tensor(value)) for value in result.results.values())
    saved = load_file(next((result.folder / "checkpoints").glob("*/*.safetensors")))
    assert not any("teacher" in name or "own" in name.split(".") for name in saved)


def test_a_text_of_its_own_is_read_in_the_students_tokens() -> None:
    """Though the words of its template are not in the texts that the tokenizer was trained on."""
    template = {"prompt": "Zq {prompt}?", "reasoning": "{reasoning}", "answer": " #{answer}"}
    data, _, batch = made(teachers=[ITSELF | {"template": template}])
    side = batch["teachers"]["own"]
    for row in range(4):
        text = data.tokenizer.decode(side["input_ids"][row][side["attention_mask"][row].bool()])
        assert data.train_items[row].example.prompt in text.replace(" ", "")


def test_without_its_cross_entropy_nothing_of_its_reading_has_gradient() -> None:
    """In autocast as well, where the student's own pass must not meet copies made without gradient."""
    still = ITSELF | {"itself": {"cross_entropy": 0.0}}
    _, distiller, batch = made(teachers=[still], codi={})
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        distiller.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = step_of(distiller, batch)
        assert "reading_ce" not in found
        found["loss"].backward()
        slopes.append(
            torch.cat([p.grad.flatten() for p in distiller.student.parameters() if p.grad is not None])
        )
    assert len(slopes[0]) == len(slopes[1])
    assert F.cosine_similarity(*slopes, dim=0) > 0.99


@pytest.mark.parametrize(
    ("fuser", "words"),
    [
        ({"name": "fixed", "weights": {"own": 0.0, "t": 1.0}}, "itself: teacher 'own' has weight 0"),
        ({"name": "fixed", "weights": {"own": 1.0, "t": 0.0}}, "codi: teacher 't' has weight 0"),
        ({"name": "reinforce"}, "codi: the fuser draws teachers|itself: the fuser draws teachers"),
    ],
)
def test_a_teacher_that_is_needed_must_run(fuser: dict[str, Any], words: str) -> None:
    fields = {"name": "t", "align": ALIGN, "config": tiny.llama(), "tokenizer": tiny.CHARS}
    with pytest.raises(SpecError, match=words):
        made(teachers=[ITSELF, fields], codi={"teacher": "t"}, fuser=fuser)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectory": "text"}, "own.*itself.*needs 'trajectory: latent'"),
        ({"teachers": [ITSELF, ITSELF | {"name": "twin"}]}, "only one teacher"),
        ({"teachers": [ITSELF | {"dtype": "bfloat16"}]}, "leave out 'dtype'"),
        ({"latent": {"count": 0}}, "leaves no latent tokens for losses"),
        ({"losses": [], "latent": {"count": 0, "step_cross_entropy": 1.0}}, "step_cross_entropy"),
        ({"losses": [], "latent": {"count": 0}, "evaluate": {"controls": True}}, "evaluate.controls"),
        ({"evaluate": {"controls": True, "batch_size": 1}}, "exchanges examples"),
        ({"evaluate": {"controls": True, "generate": False}}, "generate: true"),
        ({"teachers": [ITSELF | {"quantize": "int8"}]}, "leave out 'quantize'"),
        ({"teachers": [ITSELF | {"placement": "cpu"}]}, "leave out 'placement'"),
        ({"teachers": [ITSELF | {"align": ALIGN | {"time_warper": "linear"}}]}, "matches whole texts"),
        ({"teachers": [ITSELF | {"align": ALIGN | {"token_warper": "char_iou"}}]}, "matches whole texts"),
        ({"train": tiny.FIELDS["train"] | {"stream": True}}, "stream"),
        ({"codi": {"teacher": "other"}}, "no teacher 'other'"),
        ({"latent": STAGES}, "does not go .*with losses"),
        (
            {"losses": [], "teachers": [], "latent": STAGES | {"curriculum": {"steps": 3}}},
            "'train.steps' is 6",
        ),
        (
            {"losses": [], "latent": {"count": 3, "curriculum": {"steps": 1, "tokens": 2}}},
            "cannot be divided",
        ),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        tiny.spec("runs", **(LATENT | changes))


def test_the_last_written_step_can_be_left_out() -> None:
    data, _, batch = made(teachers=[ITSELF | {"last_step": False}])
    for row in range(4):
        example, side = data.train_items[row].example, batch["teachers"]["own"]
        text = data.tokenizer.decode(side["input_ids"][row][side["attention_mask"][row].bool()][:-1])
        steps = drop_last_step(example, " ").reasoning
        assert text.replace(" ", "") == f"{example.prompt}?{steps}#{example.answer}".replace(" ", "")
        assert len(steps.split()) == len(example.reasoning.split()) - 1


# CODI


def test_codi_is_the_mean_distance_over_the_teachers_spread() -> None:
    """Against loops in float64."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=random) * 2 for _ in range(2))
    expected = 0.0
    for own, theirs in zip(student.double(), teacher.double(), strict=True):
        for a, b in zip(own.flatten(), theirs.flatten(), strict=True):
            gap = abs(float(a - b))
            spread = float(theirs.std(correction=0))
            expected += (gap * gap / 2 if gap < 1 else gap - 0.5) / spread / own.numel() / 3
    items = torch.tensor([1.0, 1.0, 4.0, 1.0])
    torch.testing.assert_close(codi_term(student, teacher, items).item(), expected, rtol=1e-5, atol=1e-6)


def test_codi_of_equal_states_is_0_and_of_still_states_finite() -> None:
    states = torch.randn(2, 3, 4, requires_grad=True)
    assert codi_term(states, states, torch.ones(4)) == 0
    still = torch.zeros(2, 3, 4)
    codi_term(states, still + 1, torch.ones(4)).backward()
    assert torch.isfinite(states.grad).all()


def test_codi_compares_the_token_before_the_answers_own() -> None:
    """``#`` on both sides; the student's states there are those of one example alone."""
    data, distiller, batch = made(codi={})
    student, teacher = batch["student"], batch["teachers"]["own"]
    tokens = data.tokenizer.convert_ids_to_tokens
    for row in range(4):
        assert tokens(int(student["after"][row, student["answer_boundary"][row]])) == "#"
        assert tokens(int(teacher["input_ids"][row, teacher["answer_boundary"][row]])) == "#"
    own = distiller.eval().student_pass(StepBatch(student, {}, torch.ones(4)))
    for row in range(4):
        alone = data.plain_collator([data.train_items[row]])["student"]
        torch.testing.assert_close(
            own.answer_boundary[:, row],
            distiller.student_pass(StepBatch(alone, {}, torch.ones(4))).answer_boundary[:, 0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_codi_draws_the_student_and_not_its_teacher() -> None:
    """With a frozen teacher of the same shape; one of another shape is refused."""
    fields = {"name": "t", "align": ALIGN, "config": tiny.llama(), "tokenizer": tiny.CHARS}
    _, distiller, batch = made(teachers=[fields], losses=[], codi={"weight": 3.0})
    found = step_of(distiller, batch)
    torch.testing.assert_close(found["loss"], found["ce"] + 3 * found["codi"])
    found["loss"].backward()
    assert distiller.latents.slots.grad.abs().max() > 0
    assert all(p.grad is None for p in distiller.teachers[0].model.parameters())
    with pytest.raises(SpecError, match="codi: teacher 't' has 3 layers of width 32"):
        made(teachers=[fields | {"config": tiny.llama(num_hidden_layers=3)}], losses=[], codi={})


# LOTUS


def test_step_cross_entropy_reads_the_trace_where_latents_are_written() -> None:
    """Against plain cross-entropy of each example; the trace's tokens are the steps', in order."""
    data, distiller, batch = made(
        teachers=[], losses=[], latent={"count": 4, "passes": 3, "step_cross_entropy": 1.0}
    )
    side = batch["student"]
    for row in range(4):
        steps = data.train_items[row].example.reasoning
        labels = side["trace"][row]
        assert data.tokenizer.decode(labels[labels != -100]).replace(" ", "") == steps.replace(" ", "")
    writers = distiller.eval().student_pass(StepBatch(side, {}, torch.ones(4))).latent_writer_logits
    each = [F.cross_entropy(writers[row], side["trace"][row]) for row in range(4)]
    found = step_of(distiller, batch)
    torch.testing.assert_close(found["step_ce"], torch.stack(each).mean().detach())
    torch.testing.assert_close(found["loss"], found["ce"] + found["step_ce"])


def test_step_cross_entropy_of_empty_traces_is_0() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    term = step_cross_entropy(logits, torch.full((2, 3), -100), torch.ones(4))
    term.backward()
    assert term == 0
    assert (logits.grad == 0).all()
    assert torch.isfinite(
        step_cross_entropy(logits[:, :0], torch.zeros(2, 0, dtype=torch.long), torch.ones(4))
    )


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (2, 4, [0, 1, -100, -100]),
        (4, 4, [0, 1, 2, 3]),
        (9, 3, [1, 4, 7]),
        (5, 1, [2]),
        (3, 0, []),
        (0, 2, [-100] * 2),
    ],
)
def test_a_long_trace_is_thinned_evenly(length: int, count: int, expected: list[int]) -> None:
    assert thin_evenly(torch.arange(length), count).tolist() == expected


# Coconut


def test_stages_take_away_written_steps_from_the_front() -> None:
    """What is read at each stage is what an example with these steps cut away would be."""
    data, distiller, batch = made(**COCONUT)
    for active in (0, 1, 2):
        distiller.latents.active = active
        side = distiller.at_curriculum_stage(batch["student"])
        for row in range(4):
            example = data.train_items[row].example
            kept = data.tokenizer.decode(side["after"][row][side["after_mask"][row].bool()][1:-1])
            steps = "".join(example.reasoning.split()[active:])
            assert kept.replace(" ", "") == f"{steps}#{example.answer}"
            labels = side["labels"][row]
            assert data.tokenizer.decode(labels[labels != -100][:-1]) == kept


def test_a_stage_is_what_a_student_of_so_many_latents_would_read() -> None:
    """The last stage against the same weights without a curriculum; the first against plain text."""
    _, distiller, batch = made(**COCONUT)
    _, plain, other = made(**COCONUT | {"latent": {"count": 2, "passes": 2}})
    last = step_of(distiller.eval(), batch)["ce"]
    torch.testing.assert_close(last, step_of(plain.eval(), other)["ce"])
    distiller.latents.active = 0
    side = batch["student"]
    ids = torch.cat([side["before"], side["after"]], 1)
    mask = torch.cat([side["before_mask"], side["after_mask"]], 1)
    labels = torch.cat([torch.full_like(side["before"], -100), side["labels"]], 1)
    text = distiller.student(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), labels=labels
    )
    torch.testing.assert_close(step_of(distiller, batch)["ce"], text.loss.detach())


def test_every_weight_has_a_gradient_in_every_stage() -> None:
    """Several processes wait for all of them."""
    _, distiller, batch = made(**COCONUT)
    for active in (0, 1, 2):
        distiller.latents.active = active
        distiller.zero_grad()
        distiller(batch["student"], batch["teachers"], distiller.loss_denominators(batch))["loss"].backward()
        assert all(p.grad is not None for p in distiller.latents.parameters())


def test_stages_follow_the_steps() -> None:
    spec = tiny.spec("runs", **COCONUT)
    assert [latents_at(step, spec.latent) for step in range(7)] == [0, 0, 1, 1, 2, 2, 2]


def test_a_stage_is_evaluated_where_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps 3 and 6, of which the last had one latent token and two."""
    seen = []
    plain = Evaluator.__call__
    monkeypatch.setattr(
        Evaluator, "__call__", lambda self, d: seen.append(d.latents.active) or plain(self, d)
    )
    run(tiny.spec(tmp_path, **COCONUT), variant="main", seed=0)
    assert seen == [1, 2]


class Cut(Exception):
    """The run ends here."""


def whole_and_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Any]:
    """Results and saved weights of a run, and of one that was cut in its fourth step."""
    found = []
    plain = KavaTrainer._clip_grad_norm

    def cut(self: Any, model: Any) -> Any:
        if self.state.global_step == 3:
            raise Cut
        return plain(self, model)

    for name in ("whole", "resumed"):
        one = tiny.spec(folder / name, **changes)
        if name == "resumed":
            with monkeypatch.context() as patch:
                patch.setattr(KavaTrainer, "_clip_grad_norm", cut)
                with pytest.raises(Cut):
                    run(one, variant="main", seed=0)
        result = run(one, variant="main", seed=0)
        files = ("model.safetensors", "latent.safetensors")
        found.append((result.results, [load_file(result.folder / "student" / file) for file in files]))
    return found


@pytest.mark.parametrize("name", ["stages", "itself"])
def test_a_cut_run_goes_on_as_if_it_had_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the stage, and the LoRA backbone with dropout and tokens drawn at random."""
    changes = {"stages": COCONUT, "itself": OWN_LORA}[name]
    (results, weights), (again, others) = whole_and_resumed(tmp_path, monkeypatch, **changes)
    assert results == again
    for one, other in zip(weights, others, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_steps_are_told_from_characters() -> None:
    spans = torch.tensor([[0, 1], [0, 2], [2, 3], [3, 5], [5, 7], [7, 9]])
    assert step_of_tokens(spans, " 3 71", " ").tolist() == [0, 0, 1, 1, 1, 1]
    assert step_of_tokens(spans, "a\n\nb", "\n").tolist() == [0, 1, 1, 1, 1, 1]
    assert step_of_tokens(spans, "", " ").tolist() == [0] * 6


# no reasoning at all, and latents that know nothing


def test_no_latent_tokens_at_all_is_prompt_then_answer(tmp_path: Path) -> None:
    changes = LATENT | {"latent": {"count": 0, "passes": 0, "begin": False}, "teachers": [], "losses": []}
    result = run(tiny.spec(tmp_path, **changes), variant="main", seed=0)
    assert result.results["ce"] > 0


def test_controls_replace_the_latent_tokens_alone() -> None:
    inputs = torch.randn(3, 5, 2)
    thought = RefinedLatents(inputs, torch.ones(3, 5, dtype=torch.bool), 2)
    zeroed, shuffled = thought.controlled("zeroed").inputs, thought.controlled("shuffled").inputs
    assert torch.equal(zeroed[:, :3], inputs[:, :3])
    assert (zeroed[:, 3:] == 0).all()
    assert torch.equal(shuffled[:, :3], inputs[:, :3])
    assert torch.equal(shuffled[0, 3:], inputs[1, 3:])
    assert torch.equal(shuffled[2, 3:], inputs[0, 3:])


def test_evaluation_counts_matches_with_controls(tmp_path: Path) -> None:
    evaluate = tiny.FIELDS["evaluate"] | {"controls": True}
    result = run(tiny.spec(tmp_path, **LATENT | {"evaluate": evaluate}), variant="main", seed=0)
    written = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert result.results["exact_match"] == sum(line["correct"] for line in written) / len(written)
    for control in ("zeroed", "shuffled"):
        assert 0 <= result.results[f"exact_match/{control}"] <= 1


def test_no_batch_of_the_controls_is_left_with_one_example() -> None:
    assert [len(part) for part in split_nearly_equal(list(range(17)), 8)] == [5, 6, 6]
    assert [index for part in split_nearly_equal(list(range(9)), 2) for index in part] == list(range(9))
    assert split_nearly_equal([], 4) == []


@pytest.mark.parametrize("passes", [0, 2, 7])
def test_forward_passes_of_an_answer_are_counted(tmp_path: Path, passes: int, monkeypatch: Any) -> None:
    """Against the calls that the model itself sees, of one example in a batch."""
    changes = LATENT | {"latent": {"count": 3, "passes": passes}, "teachers": [], "losses": []}
    one = tiny.spec(tmp_path, **changes)
    data = make_data(one)
    distiller = make_distiller(one, data, seed=0).eval()
    examples = [item.example for item in data.validation_items.items[:1]]
    answers = AnswerWriter(data.plain_collator, data.tokenizer, data.judge, one.evaluate.max_new_tokens)
    calls: list[int] = []
    plain = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda *a, **k: calls.append(1) or plain(*a, **k))
    _, counted = answers(distiller, examples, torch.device("cpu"))
    assert counted == len(calls)
