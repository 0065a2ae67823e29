"""Loading: overrides, origins, digest, strictness, and what errors point at."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from kava_core.errors import SpecError
from kava_core.registry import Registry
from kava_core.specfile.load import LoadedSpec, load_spec
from kava_core.specfile.reading.source_map import InvalidSpecError
from tests.support.repository import MINIMAL_SPEC

TEXT = MINIMAL_SPEC.read_text(encoding="utf-8")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a spec as s.yaml and load it with overrides."""
    monkeypatch.chdir(tmp_path)

    def read(text: str = TEXT, *overrides: str, registry: Registry | None = None) -> LoadedSpec:
        Path("s.yaml").write_text(text, encoding="utf-8")
        return load_spec("s.yaml", overrides, registry)

    return read


def lines(read: Any, *arguments: str) -> list[str]:
    """The error's lines."""
    with pytest.raises(SpecError) as caught:
        read(*arguments)
    return str(caught.value).splitlines()


def test_minimal_spec() -> None:
    loaded = load_spec(MINIMAL_SPEC)
    spec = loaded.spec
    assert loaded.source == TEXT
    assert (spec.name, spec.train.steps, spec.data.name) == ("tiny", 3, "chain")
    assert [loss.name for loss in spec.losses] == ["relation"]
    assert spec.losses[0].parts == ("values",)
    align = spec.teachers[0].align
    chosen = [align.layer_mapper, align.head_adapter, align.time_warper, align.dim_projector, spec.fuser]
    assert [one.name for one in chosen] == ["ratio", "structured", "segment", "calibrated", "fixed"]


def test_overrides(written: Any) -> None:
    spec = written(
        TEXT,
        "losses.0.weight=0",
        "seeds=[0,1]",
        "train.learning_rate=1e-4",
        "student.lora.rank=4",
        "teachers.0.align.time_warper=linear",
        "teachers.0.align.time_warper.mode=nearest",
        "output=",
        "output='a b'",
        "train.steps=5",
    ).spec
    assert (spec.losses[0].name, spec.losses[0].weight) == ("relation", 0)
    assert spec.seeds == (0, 1)
    assert spec.train.learning_rate == 0.0001
    assert spec.student.lora.rank == 4
    warper = spec.teachers[0].align.time_warper
    assert (warper.name, warper.mode) == ("linear", "nearest")
    assert (spec.output, spec.train.steps) == ("a b", 5)


def test_an_override_does_not_touch_the_rest(written: Any) -> None:
    before, after = written().spec, written(TEXT, "train.steps=4").spec
    assert after.train.steps == 4
    assert after.model_dump(exclude={"train"}) == before.model_dump(exclude={"train"})


def test_keys_with_dots(written: Any) -> None:
    text = TEXT.replace("name: big", "name: qwen-2.5") + "fuser: {name: fixed, weights: {qwen-2.5: 1}}\n"
    assert written(text, "fuser.weights.qwen-2.5=3").spec.fuser.weights == {"qwen-2.5": 3.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses.0.wieght=0", "losses.0.wieght: unknown key; possible: name, weight, share, "
         "schedule, end, parts, layers, center, form, heads; did you mean 'weight'?"),
        ("losses.1.weight=0", "losses: no entry '1'; possible: 0 to 0"),
        ("losses.-1.weight=0", "losses: no entry '-1'; possible: 0 to 0"),
        ("name.first=x", "name: has nothing inside: it is 'tiny'"),
        ("train.steps", "must be key=value, such as train.steps=100"),
        ("=3", "'' is not a dotted path such as train.steps"),
        ("train..steps=3", "'train..steps' is not a dotted path such as train.steps"),
        ("seeds=[0", "not valid YAML: expected ',' or ']', but got the end"),
        ("name=*x", "aliases (*x) are not allowed; write the value out"),
        ("seeds=[]", "seeds: needs at least 1 entry"),
        ("seeds=[0,x]", "seeds.1: must be a whole number, not 'x'"),
        ("train.steps=1e3", "train.steps: must be a whole number, not 1000.0"),
        ("train.steps=true", "train.steps: must be a whole number, not true"),
        ("train.steps=", "train.steps: must be a whole number, not null"),
        ("train.clip=.nan", "train.clip: must be a finite number, not nan"),
        ("train.clip=abc", "train.clip: must be a number, not 'abc'"),
        ("train=fast", "train: must be a mapping, not 'fast'"),
        ("losses=relation", "losses: must be a list, not 'relation'"),
        ("losses=[3]", "losses.0: must be a name or a mapping with a name, not 3; possible: {kv_loss}"),
        ("losses=[{weight: 1}]", "losses.0: needs a 'name'; possible: {kv_loss}"),
        ("losses.0.layers=4", "losses.0.layers: must be a list or 'all', not 4"),
        ("losses.0.layers=[0, x]", "losses.0.layers.1: must be a whole number, not 'x'"),
        ("losses.0.parts=[]", "losses.0.parts: needs at least 1 entry"),
        ("data=chain", "data: must be a mapping, not 'chain'"),
        ("data={steps: 3}", "data: needs a 'name'; possible: chain, hub, jsonl"),
        ("data.name=chian", "data.name: no data 'chian'; possible: chain, hub, jsonl; did you mean 'chain'?"),
        ("data={name: hub, path: x, columns: {promt: y}}", "data.columns.promt: 'promt' is not possible; "
         "possible: prompt, reasoning, answer; did you mean 'prompt'?"),
        ("data.operations=*", "not valid YAML: expected alphabetic or numeric character, but found the end"),
        ("data.operations='x'", "data.operations: must be text matching ^[-+*]+$, not 'x'"),
        ("student.tokenizer=5", "student.tokenizer: must be text or a mapping, not 5"),
        ("student.tokenizer.kind=char", "student.tokenizer.kind: 'char' is not possible; "
         "possible: chars, bpe, unigram, wordpiece; did you mean 'chars'?"),
        ("variants={a/b: {}}", "variants.a/b: must be letters, digits, '_', '.' and '-', "
         "starting with a letter or digit, not 'a/b'"),
        ("fuser.weights={big: 1}", "fuser: needs a 'name'; possible: {fuser}"),
        ("fuser={name: fixed, weights: {big: 0}}", "fuser.weights: at least one weight must be above 0"),
        ("name=" + "x" * 81, "name: must be at most 80 characters long, not '" + "x" * 56 + "…"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(written: Any, override: str, message: str) -> None:
    for kind in ("kv_loss", "fuser"):
        message = message.replace(f"{{{kind}}}", ", ".join(Registry.build().names(kind)))
    (line,) = lines(written, TEXT, override)
    assert line == f"override {override}: {message}"


def test_all_errors_at_once_overrides_first_then_by_line(written: Any) -> None:
    text = TEXT.replace("steps: 3", "steps: 0").replace("name: tiny", "name: 3")
    assert lines(written, text, "seeds=[a]", "losses.0.weight=-1") == [
        "override losses.0.weight=-1: losses.0.weight: must be at least 0, not -1",
        "override seeds=[a]: seeds.0: must be a whole number, not 'a'",
        "s.yaml:1:7: name: must be text, not 3",
        "s.yaml:13:10: train.steps: must be more than 0, not 0",
    ]


def test_a_wrong_key_and_its_wrong_value_are_two_errors(written: Any) -> None:
    given = "data={name: hub, path: x, columns: {promt: 3}}"
    assert lines(written, TEXT, given) == [
        f"override {given}: data.columns.promt: 'promt' is not possible; "
        "possible: prompt, reasoning, answer; did you mean 'prompt'?",
        f"override {given}: data.columns.promt: must be text, not 3",
    ]


def test_a_replaced_value_loses_its_old_place(written: Any) -> None:
    (line,) = lines(written, TEXT, "data={name: chain, steps: 0}")
    assert line == "override data={name: chain, steps: 0}: data.steps: must be more than 0, not 0"


def test_errors_between_fields(written: Any) -> None:
    assert lines(written, TEXT, "teachers=[]") == ["s.yaml:1:1: 'losses' need at least one teacher"]


def test_origins(written: Any) -> None:
    origins = written(TEXT, "train.clip=2", "losses.0.weight=3").origins
    assert origins["name"] == "s.yaml:1"
    assert origins["teachers.0.config.num_hidden_layers"] == "s.yaml:7"
    assert origins["losses.0.name"] == "s.yaml:9"
    assert origins["losses.0.weight"] == origins["train.clip"] == "override"
    assert "train.batch_size" not in origins


def test_digest(written: Any) -> None:
    digest = written().digest()
    assert len(digest) == 10
    assert int(digest, 16) >= 0
    same = ["seeds=[4]", "output=elsewhere", "variants={a: {}}", "train.batch_size=32", "losses.0.weight=1.0"]
    assert {written(TEXT, one).digest() for one in same} == {digest}
    other = ["train.steps=4", "losses.0.weight=2", "teachers.0.align.time_warper=pad", "rotary=keep"]
    assert len({written(TEXT, one).digest() for one in other} | {digest}) == 5


def test_the_resolved_spec_reads_back(written: Any) -> None:
    loaded = written(TEXT, "teachers.0.align.time_warper={name: segment, ratio: {reasoning: 0.5}}")
    dumped = loaded.spec.model_dump(mode="json")
    assert dumped["teachers"][0]["align"]["time_warper"]["ratio"]["reasoning"] == 0.5
    assert loaded.model.model_validate(dumped) == loaded.spec


def test_core_alone_says_that_nothing_is_installed(written: Any) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        written(registry=Registry.build(disabled=["kava"]))
    assert caught.value.lines[0] == "s.yaml:1:1: fuser: no fuser 'fixed'; possible: none"
    assert "s.yaml:9:10: losses.0: no kv_loss 'relation'; possible: none" in caught.value.lines


def test_a_name_with_nul_is_one_line() -> None:
    with pytest.raises(SpecError) as told:
        load_spec("a\0b.yaml")
    assert str(told.value) == "'a\\x00b.yaml': cannot be read: embedded null byte"


def test_very_many_unknown_keys_are_told_at_once(tmp_path: Path) -> None:
    """Of 30,000 the first 200 and how many more; one suggestion each would take a minute."""
    file = tmp_path / "s.yaml"
    text = MINIMAL_SPEC.read_text(encoding="utf-8") + "".join(f"key{i}: 1\n" for i in range(30_000))
    file.write_text(text, encoding="utf-8")
    begin = monotonic()
    with pytest.raises(InvalidSpecError) as told:
        load_spec(file)
    assert len(told.value.lines) == 201
    assert told.value.lines[-1] == f"{file}:1:1: and 29,800 more things are wrong"
    assert monotonic() - begin < 30
