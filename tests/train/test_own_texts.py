"""Texts the student writes itself while it is trained."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.time_plans import PlansTime
from kava_core.data.encoding.encode import NO_LABEL
from kava_core.data.examples import Example, split_completion
from kava_core.distill.distiller import Distiller
from kava_core.errors import Preempted, SpecError
from kava_core.models.ledger import Ledger
from kava_core.models.writing import TextWriter, decode_behind, written_tokens
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.own_texts import CollatorWithExamples, OwnTexts
from kava_core.train.run import run
from tests.support import tiny
from tests.support.stops import stop

SHORT = Template(prompt="{prompt}=", reasoning="{reasoning}", answer=" #{answer}")
EXAMPLE = Example("1+2", " 3", "3")
ONLINE = {"share": 0.5, "max_new_tokens": 7}


def test_a_written_text_is_divided_at_the_marker() -> None:
    text = split_completion(Example("1+2", " 9", "9"), " 3 #3", SHORT)
    assert text.text == "1+2= 3 #3"
    assert text.bounds == (0, 4, 6, 9)
    assert text.text[text.answer_start :] == "3"


def test_a_written_text_without_a_marker_is_all_reasoning() -> None:
    text = split_completion(Example("1+2", " 9", "9"), " 3 3", SHORT)
    assert text.bounds == (0, 4, 8, 8)
    assert text.answer_start == 8


def test_a_marker_without_its_white_space_is_found() -> None:
    text = split_completion(Example("1+2", " 9", "9"), "3#4", SHORT)
    assert text.bounds == (0, 4, 5, 7)
    assert text.text[text.answer_start :] == "4"


def prepared(tmp_path: Path, **online: Any) -> tuple[PipelineSpec, Data, Distiller, dict[str, Any]]:
    spec = tiny.spec(tmp_path, online=ONLINE | online)
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    collate = CollatorWithExamples(PlansTime(data.collator, distiller.pipeline))
    return spec, data, distiller, collate([data.train_items[i] for i in range(8)])


def own_texts(spec: PipelineSpec, data: Data, distiller: Distiller) -> OwnTexts:
    assert spec.online is not None
    return OwnTexts(
        spec.online, data.collator, PlansTime(data.collator, distiller.pipeline), seed=0, position_limits={}
    )


def texts(side: dict[str, Any], tokenizer: Any) -> list[str]:
    rows = zip(side["input_ids"], side["attention_mask"].bool(), strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]


def test_the_first_rows_are_the_student_s_and_have_no_labels(tmp_path: Path) -> None:
    spec, data, distiller, batch = prepared(tmp_path)
    made = own_texts(spec, data, distiller)(batch, distiller, Ledger(3), (0, 0, 0))
    labelled = made["student"]["labels"].ne(NO_LABEL).any(1)
    assert labelled.tolist() == [False] * 4 + [True] * 4
    before, after = (texts(one["student"], data.tokenizer) for one in (batch, made))
    assert before[4:] == after[4:]
    assert all(a != b for a, b in zip(before[:4], after[:4], strict=True))
    prompts = [example.prompt for example in batch["examples"]]
    assert all(text.startswith(prompt) for text, prompt in zip(after, prompts, strict=True))


def test_every_teacher_reads_what_the_student_wrote(tmp_path: Path) -> None:
    spec, data, distiller, batch = prepared(tmp_path)
    made = own_texts(spec, data, distiller)(batch, distiller, Ledger(3), (0, 0, 0))
    own = [text.replace(" ", "") for text in texts(made["student"], data.tokenizer)]
    for name, tokenizer in data.teacher_tokenizers.items():
        assert [text.replace(" ", "") for text in texts(made["teachers"][name], tokenizer)] == own
        assert "time_map" in made["teachers"][name]


def test_the_same_place_writes_the_same_and_another_another(tmp_path: Path) -> None:
    spec, data, distiller, batch = prepared(tmp_path)
    state = torch.get_rng_state()
    writer = own_texts(spec, data, distiller)
    first, again, other = (
        writer(batch, distiller, Ledger(3), place)["student"]["input_ids"].tolist()
        for place in ((3, 0, 0), (3, 0, 0), (4, 0, 0))
    )
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)
    assert distiller.training


def test_what_is_written_depends_on_the_student_alone_not_on_other_rows(tmp_path: Path) -> None:
    spec, data, distiller, batch = prepared(tmp_path, temperature=1e-4)  # as good as greedy
    writer, prompts = own_texts(spec, data, distiller), data.collator.prompts(batch["examples"][:4])[0]
    made = writer(batch, distiller, Ledger(3), (0, 0, 0))
    student: Any = distiller.student.eval()
    greedy = student.generate(**prompts, do_sample=False, max_new_tokens=7)
    expected = data.tokenizer.batch_decode(greedy, skip_special_tokens=True)
    assert texts(made["student"], data.tokenizer)[:4] == expected


def test_writing_is_entered_in_the_ledger_up_to_eos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of 4 tokens, 5 written: one ends at the second, the other does not."""
    spec, data, distiller, _ = prepared(tmp_path)
    eos = data.tokenizer.eos_token_id
    items: list[Any] = data.collator.encode([EXAMPLE] * 4)
    batch = CollatorWithExamples(data.collator)(items)

    def fixed(*_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([[5, eos, 0, 0, 0], [5, 6, 5, 6, 5]])

    monkeypatch.setattr(TextWriter, "write", fixed)
    ledger = Ledger(3)
    own_texts(spec, data, distiller)(batch, distiller, ledger, (0, 0, 0))
    read, prompt = ledger.read["student"], data.collator.prompts([EXAMPLE])[0]["input_ids"].shape[1]
    assert ledger.passes == 0
    assert int(ledger.tokens["student"]) == 2 * prompt + 2 + 5
    assert read.positions == 2 * (prompt + 4)  # the last written token is not read
    assert ledger.read["student head"].positions == 2 * 5


def test_without_kv_losses_rows_only_lose_their_labels(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, online=ONLINE, losses=[])
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    collate = CollatorWithExamples(PlansTime(data.collator, distiller.pipeline))
    batch = collate([data.train_items[i] for i in range(8)])
    ledger = Ledger(3)
    made = own_texts(spec, data, distiller)(batch, distiller, ledger, (0, 0, 0))
    assert not ledger.read
    assert made["student"]["input_ids"].tolist() == batch["student"]["input_ids"].tolist()
    assert made["student"]["labels"].ne(NO_LABEL).any(1).tolist() == [False] * 4 + [True] * 4


def test_a_text_too_long_for_a_teacher_is_not_used(tmp_path: Path) -> None:
    spec, data, distiller, batch = prepared(tmp_path, max_new_tokens=60)
    data.collator.max_length = 20
    made = own_texts(spec, data, distiller)(batch, distiller, Ledger(3), (0, 0, 0))
    before, after = (texts(one["student"], data.tokenizer)[:4] for one in (batch, made))
    lengths = made["student"]["attention_mask"].sum(1)
    assert lengths.max() <= 20
    assert any(a == b for a, b in zip(before, after, strict=True))
    assert not made["student"]["labels"][:4].ne(NO_LABEL).any()


@pytest.mark.parametrize("side", ["student", "wide", "gpt"])
def test_a_text_too_long_for_a_model_s_positions_is_not_used(tmp_path: Path, side: str) -> None:
    spec, data, distiller, batch = prepared(tmp_path, max_new_tokens=40)
    writer = own_texts(spec, data, distiller)
    writer.position_limits = {None if side == "student" else side: 20}
    made = writer(batch, distiller, Ledger(3), (0, 0, 0))
    there = made["student"] if side == "student" else made["teachers"][side]
    assert there["attention_mask"].sum(1).max() <= 20
    assert not made["student"]["labels"][:4].ne(NO_LABEL).any()


def test_a_batch_brings_no_tensors_of_its_examples(tmp_path: Path) -> None:
    """A worker hands every tensor over as an open file."""
    *_, batch = prepared(tmp_path)
    assert {type(example) for example in batch["examples"]} == {Example}
    assert all(
        isinstance(getattr(one, f.name), str | tuple | None) for one in batch["examples"] for f in fields(one)
    )


def test_the_space_after_the_prompt_is_kept() -> None:
    """SentencePiece's tokenizers drop it from the first word of what they decode."""
    tokenizer = Tokenizer(
        models.BPE(vocab={"▁": 0, "▁a": 1, "▁b": 2, "a": 3, "b": 4}, merges=[("▁", "a"), ("▁", "b")])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([2]) == "b"
    assert decode_behind(fast, [torch.tensor([1])] * 2, [[2, 1], [4, 1]]) == [" b a", "b a"]


def test_what_stands_after_eos_is_padding() -> None:
    tokens = torch.tensor([[4, 9, 9, 4], [4, 4, 4, 4], [9, 4, 4, 4]])
    assert written_tokens(tokens, [9]).sum(1).tolist() == [2, 4, 1]
    assert written_tokens(tokens, []).all()


def test_a_router_that_learns_from_cross_entropy_needs_labels(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, online=ONLINE | {"share": 1.0}, fuser={"name": "reinforce"})
    with pytest.raises(SpecError, match=r"online\.share: 1 leaves no labels, and the fuser learns from"):
        make_distiller(spec, make_data(spec), seed=0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_stopped_run_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    changes: dict[str, Any] = {"online": ONLINE | {"share": share}, "train": {"accumulate": 2}}
    straight = run(tiny.spec(tmp_path / "straight", **changes), variant="main", seed=1)
    stopped = tiny.spec(tmp_path / "stopped", **changes)
    stop(monkeypatch, 3)
    with pytest.raises(Preempted):
        run(stopped, variant="main", seed=1)
    monkeypatch.undo()
    result = run(stopped, variant="main", seed=1)
    assert result.results == straight.results
    ce = [line["ce"] for line in read_metrics(straight.folder / "metrics.jsonl") if "ce" in line]
    assert all(x > 0 for x in ce) if share < 1 else not any(ce)


def test_writing_costs_tokens_and_operations(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train": {"steps": 2}, "evaluate": {"every": 2}}
    runs = [run(tiny.spec(tmp_path, online=o, **changes), variant="main", seed=1) for o in (ONLINE, None)]
    online, plain = (json.loads((r.folder / "run.json").read_text())["compute"] for r in runs)
    assert online["student_tokens"] > plain["student_tokens"]
    assert plain["flops_of"]["student"] < online["flops_of"]["student"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectory": "latent", "losses": []}, "does not go together with trajectory: latent"),
        ({"store": {"folder": "x"}}, "does not go together with store"),
        ({"data": {"template": {"answer": "{answer}"}}}, "needs a marker"),
        ({"data": {"template": {"answer": "  {answer}"}}}, "needs a marker"),
        ({"train": {"batch_size": 1}}, "0.5 of 'train.batch_size' 1 is none or all of it"),
        (
            {"teachers": [tiny.FIELDS["teachers"][0] | {"last_step": False}], "losses": []},
            "reads another text than the student \\(last_step\\)",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny.spec(online=ONLINE, **changes)


def test_no_room_to_write_is_said_before_training(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, online=ONLINE | {"max_new_tokens": 200})
    with pytest.raises(SpecError, match=r"online\.max_new_tokens: .* the student has 128 positions"):
        make_distiller(spec, make_data(spec), seed=0)
