"""What teachers that are trained on the spot have seen of their student's examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kava_core.data.examples import render_example
from kava_core.data.splits import load_splits
from kava_core.specfile.digest import spec_digest
from kava_core.specfile.sections.models import TrainTokenizer
from kava_core.train.pretrain import pretraining_report, pretraining_spec
from kava_core.train.run import run
from kava_core.train.summary import pretrained_scores
from tests.support import tiny

DATA = {"name": "chain", "steps": 2, "train": 32, "validation": 16}


def spec(output: Path | str = "runs", **data: Any) -> Any:
    plan = {"steps": 2, "batch_size": 8, "data": data}
    return tiny.spec(output, data=DATA, teachers=[tiny.FIELDS["teachers"][0] | {"pretrain": plan}])


@pytest.mark.parametrize(
    ("data", "train", "validation"),
    [({}, 32, 0), ({"train_skip": 32}, 0, 0), ({"train_skip": 24}, 8, 0), ({"train": 8}, 8, 0)],
)
def test_shared_examples_are_counted(data: dict[str, Any], train: int, validation: int) -> None:
    (found,) = pretraining_report(spec(**data)).values()
    assert (found["shared_with_train"], found["shared_with_validation"]) == (train, validation)


def test_a_teacher_of_another_seed_may_know_the_validation_examples() -> None:
    found = pretraining_report(spec(seed=1, train=5_000))["wide"]
    assert found["examples"] == 5_000
    assert found["shared_with_validation"] >= 12  # 5,000 of the 5,290 chains there are


def test_models_from_elsewhere_are_not_reported() -> None:
    assert pretraining_report(tiny.spec()) == {}


EVALUATIONS: list[dict[str, Any]] = [
    {"every": 5, "examples": 3, "batch_size": 2},
    {"max_new_tokens": 1},
    {"generate": False},
]


def changed_plan(**sections: dict[str, Any]) -> Any:
    """The pretraining run of the spec with changed sections."""
    fields = spec().model_dump(mode="json")
    changed = type(spec()).model_validate(fields | {name: fields[name] | sections[name] for name in sections})
    return pretraining_spec(changed, changed.teachers[0])


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_how_a_run_evaluates_is_not_in_the_key_of_its_teacher(evaluate: dict[str, Any]) -> None:
    assert spec_digest(changed_plan(evaluate=evaluate)) == spec_digest(changed_plan())


@pytest.mark.parametrize("train", [{"max_length": 20}, {"precision": "bf16"}, {"loss_on": "all"}])
def test_what_its_training_depends_on_is_in_the_key(train: dict[str, Any]) -> None:
    assert spec_digest(changed_plan(train=train)) != spec_digest(changed_plan())


def test_a_teacher_may_write_as_much_as_the_data_do() -> None:
    """Against the longest of the first 256 texts, counted in characters, which are its tokens."""
    made = spec(validation=300)
    teacher = made.teachers[0].model_copy(update={"tokenizer": TrainTokenizer(**tiny.CHARS)})
    plan = pretraining_spec(made, teacher)
    texts = [
        render_example(example, plan.data.template)
        for example in load_splits(plan.data, root=Path()).validation[:256]
    ]
    expected = max(len(text.text) - len(text.prompt_part.text) for text in texts) + 1
    assert (plan.evaluate.generate, plan.evaluate.max_new_tokens) == (True, expected)
    longest_prompt = max(len(text.prompt_part.text) for text in texts)
    for positions, room in ((longest_prompt + 3, 3), (longest_prompt, 0)):
        config = teacher.config | {"max_position_embeddings": positions}
        evaluate = pretraining_spec(made, teacher.model_copy(update={"config": config})).evaluate
        assert (evaluate.generate, evaluate.max_new_tokens) == (room > 0, max(room, 1))


def test_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    result = run(spec(tmp_path, train_skip=32), variant="main", seed=0)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["pretraining_data"]["wide"]["shared_with_train"] == 0
    assert record["pretraining_data"]["wide"]["examples"] == 32
    skill = record["models"]["wide"]["results"]
    assert skill["ce"] > 0
    (told,) = pretrained_scores([result])
    assert told.startswith(f"wide: trained on the spot; validation cross-entropy {skill['ce']:.3g}, exact")
