"""Validation numbers against brute force, and training that does not notice being evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.data.encoding.encode import NO_LABEL
from kava_core.data.examples import render_example
from kava_core.distill.distiller import Distiller
from kava_core.models.writing import TextWriter
from kava_core.runs import checkpoint
from kava_core.runs.folder import Folder
from kava_core.train.run import run
from kava_core.train.validation.collapse_monitor import CollapseMonitor
from kava_core.train.validation.evaluator import Evaluator
from kava_core.train.weights import ALIGNER_FILE
from tests.support import tiny


def setup(folder: Path, **changes: Any) -> tuple[Evaluator, Distiller, Data]:
    """An evaluator of 7 examples in batches of 3, and what it evaluates."""
    evaluate = {"examples": 7, "batch_size": 3, "generate": False} | changes.pop("evaluate", {})
    teachers = [teacher | {"align": {"dim_projector": "linear"}} for teacher in tiny.fields()["teachers"]]
    spec = tiny.spec(folder, evaluate=evaluate, teachers=teachers, **changes)
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    parts = (data.plain_collator, data.tokenizer, data.judge, spec.evaluate)
    files = (Folder(folder), monitor(folder))
    return Evaluator(data.validation_items, *parts, *files), distiller, data


def monitor(folder: Path) -> CollapseMonitor:
    return CollapseMonitor(folder / "before.safetensors")


@torch.no_grad()
def token_losses(distiller: Distiller, data: Data) -> list[float]:
    """−log p of every labelled token, one example at a time, without padding, in float64."""
    student, losses = distiller.student.double().eval(), []
    for item in data.validation_items:
        logits = student(input_ids=item.student.input_ids[None]).logits[0]
        for t in range(1, len(item.student.input_ids)):
            if item.student.labels[t] != NO_LABEL:
                exponents = [math.exp(x) for x in logits[t - 1].tolist()]
                losses.append(-math.log(exponents[int(item.student.labels[t])] / sum(exponents)))
    distiller.student.float()
    return losses


def test_cross_entropy_and_perplexity_against_a_loop_over_tokens(tmp_path: Path) -> None:
    evaluator, distiller, data = setup(tmp_path)
    found, losses = evaluator(distiller), token_losses(distiller, data)
    assert len(data.validation_items) == 7
    assert len(losses) > 50
    expected = sum(losses) / len(losses)
    assert found["ce"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_kv_terms_are_those_of_training_on_the_whole_split(tmp_path: Path) -> None:
    """Batches of 3, 3 and 1 give the forward pass of all 7 at once."""
    evaluator, distiller, data = setup(tmp_path)
    batch = data.plain_collator(list(data.validation_items))
    items = torch.tensor([1.0, float(batch["student"]["attention_mask"].sum())])
    expected = distiller.eval()(batch["student"], batch["teachers"], items=items)
    found = evaluator(distiller)
    for name in ("mercator", "relation"):
        assert found[name] == pytest.approx(expected[name].item(), rel=1e-4)
        assert found[name] > 0
    plain = {name for name in found if "/" not in name}
    assert plain == {"ce", "perplexity", "mercator", "relation"}


def test_shuffled_teachers_are_a_control_of_training_only(tmp_path: Path) -> None:
    plain, distiller, data = setup(tmp_path)
    shuffled, _, other = setup(tmp_path, train={"shuffle_teacher": True})
    assert shuffled(distiller) == plain(distiller)
    wrong = Evaluator(
        data.validation_items,
        other.collator,
        data.tokenizer,
        data.judge,
        _without_rest(plain),
        Folder(tmp_path / "s"),
        monitor(tmp_path),
    )
    assert wrong(distiller)["relation"] != pytest.approx(plain(distiller)["relation"], rel=1e-6)


def _without_rest(evaluator: Evaluator) -> Any:
    """The spec with one batch for all, as a batch of one cannot be rotated."""
    return evaluator.spec.model_copy(update={"batch_size": 7})


class Script:
    """Writes what it was told to, whatever the prompt."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.tokenizer, self.texts, self.options = tokenizer, iter(texts), []

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        self.options.append(options)
        written = [self.tokenizer(next(self.texts), add_special_tokens=False)["input_ids"] for _ in input_ids]
        longest = max(map(len, written))
        rows = [row + [self.tokenizer.eos_token_id] * (longest - len(row)) for row in written]
        assert attention_mask.shape == input_ids.shape
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_exact_match_counts_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third answer is wrong, and one has no marker: 3 of 7 are right."""
    evaluator, distiller, data = setup(tmp_path, evaluate={"generate": True, "max_new_tokens": 9})
    examples = data.validation_items.examples
    rendered = [render_example(example, data.judge.template) for example in examples]
    right = [text.text[text.bounds[1] :] for text in rendered]
    texts = [f" #{(int(e.answer) + 1) % 10}" if i % 3 == 0 else right[i] for i, e in enumerate(examples)]
    texts[1] = examples[1].answer
    script = Script(data.tokenizer, texts)
    monkeypatch.setattr(distiller.student, "generate", script.generate)
    monkeypatch.setattr(TextWriter, "_check", lambda *_: True)
    assert evaluator(distiller)["exact_match"] == pytest.approx(3 / 7)
    assert script.options == [{"max_new_tokens": 9, "do_sample": False}] * 3
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [index for index, sample in enumerate(samples) if not sample["correct"]] == [0, 1, 3, 6]
    assert [sample["wrote"] for sample in samples] == texts


def test_no_labelled_token_gives_no_nan(tmp_path: Path) -> None:
    evaluator, distiller, _ = setup(tmp_path)
    collate = evaluator.collator

    def unlabelled(items: list[Any]) -> dict[str, Any]:
        batch = collate(items)
        batch["student"]["labels"] = torch.full_like(batch["student"]["labels"], NO_LABEL)
        return batch

    evaluator.collator = unlabelled  # type: ignore[assignment]
    found = evaluator(distiller)
    assert found["ce"] == 0
    assert found["perplexity"] == 1
    assert all(math.isfinite(value) for value in found.values())


def test_evaluation_leaves_mode_and_random_state_alone(tmp_path: Path) -> None:
    evaluator, distiller, _ = setup(tmp_path, evaluate={"generate": True})
    distiller.train()
    before = torch.get_rng_state()
    first = evaluator(distiller)
    assert distiller.training
    assert distiller.student.training
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert evaluator(distiller) == first


def test_training_does_not_notice_evaluations(tmp_path: Path) -> None:
    """Dropout draws the same numbers, evaluated at every step or only at the last."""
    results = []
    for every in (1, 100):
        spec = tiny.spec(
            tmp_path / str(every),
            student={"config": tiny.llama(attention_dropout=0.3)},
            train={"steps": 5},
            evaluate={"every": every},
        )
        last = checkpoint.newest_intact(run(spec, variant="main", seed=1).folder / "checkpoints")
        assert last is not None
        results.append(load_file(last / "student" / "model.safetensors") | load_file(last / ALIGNER_FILE))
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []
