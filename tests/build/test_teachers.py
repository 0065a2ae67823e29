"""Two teachers out of one model: other texts, other rationales, other checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.teachers import load_teachers
from kava_core.data.collate import Collator, Reading
from kava_core.data.examples import Example, example_from_fields, render_example
from kava_core.data.splits import split_hash
from kava_core.data.tokenizers import load_tokenizer
from kava_core.errors import KavaError, SpecError
from kava_core.files import cache_folder
from kava_core.jobs.sample import SamplingOptions, rationale_of, sample_rationales
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.models import TrainTokenizer
from kava_core.train.pretrain import pretraining_spec
from kava_core.train.run import run
from tests.support import tiny

SHORT = Template(prompt="{prompt}=", reasoning="{reasoning}", answer=" #{answer}")
LONG = {"prompt": "work it out: {prompt}=", "reasoning": "{reasoning}", "answer": " #{answer}"}
EXAMPLE = Example("1+2", " 3", "3", rationales=(" 1 3", " 2 3"))


def chars() -> Any:
    spec = TrainTokenizer(kind="chars", vocab_size=64)
    return load_tokenizer(spec, texts=["work it out: 0123456789+-*=# ?"], cache=cache_folder() / "tokenizers")


def teacher(**changes: Any) -> dict[str, Any]:
    return {"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS} | changes


def saved_teacher(folder: Path) -> str:
    """A run's student, as a folder that two teachers can name."""
    made = run(tiny.spec(folder, teachers=[], losses=[]), variant="main", seed=3)
    return str(made.folder / "student")


def test_the_rationale_is_counted_round() -> None:
    assert [EXAMPLE.with_rationale(k).reasoning for k in range(5)] == [" 3", " 1 3", " 2 3", " 3", " 1 3"]
    assert Example("a", "b", "c").with_rationale(7).reasoning == "b"


def test_every_teacher_reads_its_own_text_of_the_same_example() -> None:
    tokenizer = chars()
    readings = {"plain": Reading(SHORT), "long": Reading(Template(**LONG), rationale=1)}
    collator = Collator(tokenizer, {name: tokenizer for name in readings}, SHORT, readings=readings)
    batch = collator([EXAMPLE, Example("4-1", " 3", "3")])

    def texts(side: dict[str, Any]) -> list[str]:
        rows = zip(side["input_ids"], side["attention_mask"].bool(), strict=True)
        return ["".join(tokenizer.convert_ids_to_tokens(ids[mask][:-1])) for ids, mask in rows]  # without EOS

    assert texts(batch["student"]) == ["1+2= 3 #3", "4-1= 3 #3"]
    assert texts(batch["teachers"]["plain"]) == texts(batch["student"])
    assert texts(batch["teachers"]["long"]) == ["work it out: 1+2= 1 3 #3", "work it out: 4-1= 3 #3"]


def test_segments_of_another_text_are_its_own() -> None:
    tokenizer = chars()
    readings = {"t": Reading(Template(**LONG), rationale=1)}
    side = Collator(tokenizer, {"t": tokenizer}, SHORT, readings=readings)([EXAMPLE])["teachers"]["t"]
    text = render_example(EXAMPLE.with_rationale(1), Template(**LONG))
    counts = [int((side["segments"] == segment).sum()) for segment in range(3)]
    prompt, reasoning, end = text.bounds[1:]
    assert counts == [prompt, reasoning - prompt, end - reasoning + 1]  # the last is EOS


def test_rationales_are_read_and_change_the_hash_only_where_there_are_any() -> None:
    record = {"prompt": "p", "reasoning": "r", "answer": "a", "rationales": ["x", "y"]}
    assert example_from_fields(record, "here").rationales == ("x", "y")
    without = example_from_fields({k: v for k, v in record.items() if k != "rationales"}, "here")
    assert split_hash([without]) == split_hash([Example("p", "r", "a")])
    assert split_hash([without]) != split_hash([example_from_fields(record, "here")])
    # The hash of examples without rationales, written down when they were new: finished runs hold it.
    assert split_hash([Example("p", "r", "a")])[:16] == OLD_HASH


OLD_HASH = "a002adf50159407b"


@pytest.mark.parametrize("given", ["text", 7, {"a": 1}])
def test_rationales_that_are_no_list_are_refused(given: Any) -> None:
    record = {"prompt": "p", "reasoning": "r", "answer": "a", "rationales": given}
    with pytest.raises(SpecError, match="here: field 'rationales' must be a list of strings"):
        example_from_fields(record, "here")


def test_a_rationale_that_is_no_text_is_refused_by_its_place() -> None:
    record = {"prompt": "p", "reasoning": "r", "answer": "a", "rationales": ["x", 3]}
    with pytest.raises(SpecError, match=r"rationales\[1\]"):
        example_from_fields(record, "here")


def test_characters_of_two_texts_are_not_compared() -> None:
    with pytest.raises(ValidationError, match=r"reads another text.*template.*time_warper 'char_iou'"):
        tiny.spec(teachers=[teacher(template=LONG, align={"time_warper": "char_iou"})])
    with pytest.raises(ValidationError, match=r"rationale.*token_warper 'char_iou'"):
        tiny.spec(teachers=[teacher(rationale=1, align={"token_warper": "char_iou"})])


def test_teachers_that_differ_only_in_what_they_read_share_their_weights() -> None:
    many = [
        teacher(name="a"),
        teacher(name="b", rationale=1),
        teacher(name="c", rationale=2),
        teacher(name="d", dtype="bfloat16"),
    ]
    spec = tiny.spec(teachers=many)
    models = load_teachers(spec, make_data(spec))
    assert models["a"] is models["b"] is models["c"]
    assert models["d"] is not models["a"]


def test_a_teacher_with_another_text_trains_a_tokenizer_that_can_spell_it() -> None:
    data = make_data(tiny.spec(teachers=[teacher(template=LONG)]))
    tokenizer = data.teacher_tokenizers["t"]
    ids = data.collator([data.train_items[0]])["teachers"]["t"]["input_ids"]
    assert tokenizer.unk_token_id not in ids.tolist()[0]


def test_two_prompts_and_two_checkpoints_train(tmp_path: Path) -> None:
    path = saved_teacher(tmp_path / "made")
    early = {"steps": 2, "batch_size": 8}
    late = {"steps": 4, "batch_size": 8}
    teachers = [
        {"name": "plain", "path": path},
        {"name": "long", "path": path, "template": LONG | {"prompt": "1 1 {prompt}?"}},
        teacher(name="early", pretrain=early),
        teacher(name="late", pretrain=late),
    ]
    found = run(tiny.spec(tmp_path, teachers=teachers), variant="main", seed=0).results
    assert {"weight/plain", "weight/long", "weight/early", "weight/late"} <= set(found)
    assert torch.isfinite(torch.tensor(found["mercator"]))


def test_another_text_gives_another_target(tmp_path: Path) -> None:
    """The KV term is that of the teacher's own text, not of the student's."""
    path = saved_teacher(tmp_path / "made")

    def term(**changes: Any) -> float:
        one = {"name": "t", "path": path, "align": {"dim_projector": "identity"}} | changes
        spec = tiny.spec(tmp_path, teachers=[one], losses=[{"name": "relation"}])
        data = make_data(spec)
        distiller = make_distiller(spec, data, seed=0).eval()
        batch = data.plain_collator([data.validation_items[i] for i in range(4)])
        items = torch.ones(4)
        return float(distiller(batch["student"], batch["teachers"], items)["relation"])

    same = {"prompt": "{prompt}?", "reasoning": "{reasoning}", "answer": " #{answer}"}
    assert term() == term(template=same)
    assert term() != term(template=same | {"prompt": "1 1 {prompt}?"})


def test_rationales_are_sampled_kept_apart_and_resumed(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, teachers=[teacher(pretrain={"steps": 10, "batch_size": 16})])
    options = SamplingOptions(
        split="validation", count=3, temperature=1.0, max_new_tokens=8, batch_size=4, keep_wrong=True
    )
    whole = tmp_path / "whole.jsonl"
    told = sample_rationales(spec, "t", whole, options)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert len(lines) == 16
    assert "16 examples" in told
    assert all(len(set(line["rationales"])) == len(line["rationales"]) <= 3 for line in lines)
    assert all(line["reasoning"] not in line["rationales"] for line in lines)

    again = tmp_path / "again.jsonl"
    sample_rationales(spec, "t", again, options)
    assert list(tmp_path.glob("again.jsonl*")) == [again]
    assert again.read_bytes() == whole.read_bytes()


def test_a_cut_file_of_rationales_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kava_core.jobs.sample as module

    spec = tiny.spec(tmp_path, teachers=[teacher(pretrain={"steps": 10, "batch_size": 16})])
    options = SamplingOptions(split="validation", count=2, max_new_tokens=8, batch_size=4, keep_wrong=True)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sample_rationales(spec, "t", whole, options)
    monkeypatch.setattr(module.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        sample_rationales(spec, "t", cut, options)
    monkeypatch.undo()
    (partial,) = tmp_path.glob("cut.jsonl.*.partial")
    partial.write_bytes(partial.read_bytes()[:-20])
    sample_rationales(spec, "t", cut, options)
    assert cut.read_bytes() == whole.read_bytes()
    with pytest.raises(KavaError, match="is there already"):
        sample_rationales(spec, "t", cut, options)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_unknown_teacher_is_named_with_the_likely_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no teacher 'wid'; there are wide, gpt.*'wide'"):
        sample_rationales(tiny.spec(tmp_path), "wid", tmp_path / "x.jsonl", SamplingOptions())


def test_the_rationale_is_cut_out_of_what_was_written() -> None:
    assert rationale_of(" 1 3 #3", SHORT) == " 1 3"
    lines = Template(prompt="{prompt}\n", reasoning="steps: {reasoning}\n", answer="#### {answer}")
    assert rationale_of("steps: a\nb\n#### 12", lines) == "a\nb"
    assert rationale_of("steps: a\n####12", lines) == "a"
    assert rationale_of("no mark", SHORT) is None


def test_variants_share_a_pretrained_teacher(tmp_path: Path) -> None:
    """What a variant changes beside the data leaves the pretraining run the same."""
    model = teacher(pretrain={"steps": 2})
    changes: list[dict[str, Any]] = [
        {},
        {"fuser": {"name": "fixed", "weights": {"t": 2.0}}},
        {"losses": []},
        {"logits": {"weight": 0.5}},
        {"rotary": "keep"},
        {"train": {"stream": True}},
    ]
    specs = [tiny.spec(tmp_path, teachers=[model], **change) for change in changes]
    plans = [pretraining_spec(spec, spec.teachers[0]) for spec in specs]
    assert all(plan == plans[0] for plan in plans)


def test_a_model_is_shared_only_with_the_same_vocabulary() -> None:
    """Tokenizers trained on two texts number their tokens differently."""
    spec = tiny.spec(
        teachers=[teacher(name="a"), teacher(name="b", template=LONG | {"prompt": "zyx {prompt}="})]
    )
    data = make_data(spec)
    models = load_teachers(spec, data)
    assert models["a"] is not models["b"]
    for name, model in models.items():
        ids = data.collator([data.train_items[0]])["teachers"][name]["input_ids"]
        assert int(ids.max()) < model.get_input_embeddings().weight.shape[0]


def test_another_rationale_needs_some(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, teachers=[teacher(rationale=1)])
    with pytest.raises(SpecError, match=r"teacher 't': rationale: 1, but no training example has"):
        make_distiller(spec, make_data(spec), seed=0)
