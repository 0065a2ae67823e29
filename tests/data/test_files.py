"""Examples from JSON lines, GSM8K's format and ``datasets``."""

import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from kava_core.data.examples import Example, split_steps
from kava_core.data.hub import hub_examples
from kava_core.data.jsonl import read_examples
from kava_core.data.splits import load_splits
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import HubData, JsonlData
from tests.support.repository import SHARED_DATA

GOOD = '{"prompt": "p", "reasoning": "r", "answer": "a"}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refused(path: Path, format: str = "fields", **options: str) -> str:
    with pytest.raises(SpecError) as caught:
        read_examples(path, format, **options)
    return str(caught.value).removeprefix(str(path))


def test_fields(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        "\ufeff" + GOOD,
        "",
        '{"prompt": "p\u2028q", "reasoning": "", "answer": " 1", "task": "math", "other": 3}',
    )
    assert read_examples(path) == [Example("p", "r", "a"), Example("p\u2028q", "", " 1", "math")]
    assert read_examples(path, limit=1) == [Example("p", "r", "a")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "p", "reasonin": "r", "answer": "a"}',
         ":2: no field 'reasoning' among answer, prompt, reasonin; did you mean 'reasonin'?"),
        (GOOD.replace('"a"', "5"), ":2: field 'answer' must be a string, not int"),
        (GOOD.replace('"r"', "null"), ":2: field 'reasoning' must be a string, not NoneType"),
        (GOOD.replace('"a"', '" "'), ":2: field 'answer' is empty"),
        (GOOD.replace('"a"', '"a", "task": 1'), ":2: field 'task' must be a string, not int"),
        (GOOD.replace('"p"', '"\\ud800"'),
         ":2: field 'prompt' holds half of a surrogate pair, which is no character"),
        ('["p"]', ":2: each line must be an object, not list"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path, line, message):
    assert refused(write(tmp_path / "a.jsonl", GOOD, line, GOOD)) == message


def steps(*values: object) -> str:
    return json.dumps({"prompt": "p", "reasoning": values, "answer": "a"})


def test_a_list_of_steps_is_joined(tmp_path):
    path = write(tmp_path / "a.jsonl", steps("r", "s t"), steps(), steps("r"), GOOD)
    assert [example.reasoning for example in read_examples(path)] == ["r\ns t", "", "r", "r"]
    assert read_examples(path, separator=" ; ")[0].reasoning == "r ; s t"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (steps("r", 5), ":1: field 'reasoning[1]' must be a string, not int"),
        (steps("r", ["s"]), ":1: field 'reasoning[1]' must be a string, not list"),
        (steps("\ud800"),
         ":1: field 'reasoning[0]' holds half of a surrogate pair, which is no character"),
        (steps("r", "s" * 40 + "\nt"),
         ":1: the step '…" + "s" * 28 + "\\nt' holds the separator '\\n'; set another data.separator"),
    ],
)  # fmt: skip
def test_bad_steps(tmp_path, line, message):
    assert refused(write(tmp_path / "a.jsonl", line)) == message


def test_bad_bytes_and_depth(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert refused(path) == ":1: not UTF-8 at byte 13"
    path.write_bytes(b"[" * 100_000 + b"\n")
    assert refused(path).startswith(":1: not JSON: ")


def test_missing_and_empty_files(tmp_path):
    assert refused(tmp_path / "none.jsonl") == ": cannot read the examples: No such file or directory"
    assert refused(write(tmp_path / "e.jsonl", "", " ")) == ": no examples: the file is empty"


def test_relative_paths(tmp_path, monkeypatch):
    write(tmp_path / "t.jsonl", GOOD, GOOD)
    monkeypatch.chdir("/")
    splits = load_splits(
        JsonlData(train="t.jsonl", validation=str(tmp_path / "t.jsonl"), validation_limit=1), root=tmp_path
    )
    assert (len(splits.train), len(splits.validation)) == (2, 1)


def gsm8k(answer: str, question: str = "How many?") -> str:
    return json.dumps({"question": question, "answer": answer})


def test_gsm8k_format(tmp_path):
    path = write(
        tmp_path / "g.jsonl",
        gsm8k("He has 5*2=<<5*2=10>>10.\nThen $<<10*100=1000>>1,000.\n#### 1,000"),
        gsm8k("#### -3"),
    )
    assert read_examples(path, "gsm8k") == [
        Example("How many?", "He has 5*2=10.\nThen $1,000.", "1000", "gsm8k"),
        Example("How many?", "", "-3", "gsm8k"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (gsm8k("It is 5."), ":1: 'answer' must end in a line '#### number', not 'It is 5.'"),
        (gsm8k("x" * 40 + "\n####"),
         ":1: 'answer' must end in a line '#### number', not '…" + "x" * 25 + "\\n####'"),
        (gsm8k("#### 5", question=""), ":1: field 'question' is empty"),
        ('{"question": "q"}', ":1: no field 'answer' among question"),
    ],
)  # fmt: skip
def test_bad_gsm8k(tmp_path, line, message):
    assert refused(write(tmp_path / "g.jsonl", line), "gsm8k") == message


RATIONALE = "He has 48/2=<<48/2=24>>24.\n\nThen <<.5*24=12>><<24+12=36>>36, as said.\n#### 36"


def test_the_steps_of_gsm8k_are_its_lines_or_its_equations(tmp_path):
    path = write(tmp_path / "g.jsonl", gsm8k(RATIONALE), gsm8k("No sum.\n#### 1"), gsm8k("#### 1"))
    lines = [example.reasoning for example in read_examples(path, "gsm8k", separator=" | ")]
    assert lines == ["He has 48/2=24. |  | Then 36, as said.", "No sum.", ""]
    equations = read_examples(path, "gsm8k_equations", separator=" ")
    assert equations[0] == Example("How many?", "<<48/2=24>> <<.5*24=12>> <<24+12=36>>", "36", "gsm8k")
    assert [example.reasoning for example in equations[1:]] == ["", ""]


@pytest.mark.parametrize("format", ["gsm8k", "gsm8k_equations"])
def test_a_step_of_gsm8k_must_not_hold_the_separator(tmp_path, format):
    path = write(tmp_path / "g.jsonl", gsm8k("Add <<1 + 1=2>>2.\n#### 2"))
    step = {"gsm8k": "Add 2.", "gsm8k_equations": "<<1 + 1=2>>"}[format]
    told = f":1: the step '{step}' holds the separator ' '; set another data.separator"
    assert refused(path, format, separator=" ") == told


@pytest.mark.parametrize("section", [JsonlData, HubData])
def test_no_empty_separator(section):
    with pytest.raises(ValidationError, match="separator\n  String should have at least 1 character"):
        section.model_validate({"path": "p", "train": "t", "validation": "v", "separator": ""})


with_gsm8k = pytest.mark.skipif(not (SHARED_DATA / "gsm8k").is_dir(), reason="shared GSM8K data is not here")


def solutions(file: str) -> list[str]:
    return [json.loads(line)["answer"] for line in (SHARED_DATA / "gsm8k" / file).open(encoding="utf-8")]


@with_gsm8k
@pytest.mark.parametrize(("file", "without"), [("train.jsonl", 95), ("test.jsonl", 18)])
def test_the_equations_of_the_real_gsm8k(file, without):
    examples = read_examples(SHARED_DATA / "gsm8k" / file, "gsm8k_equations", separator=" ")
    steps = [split_steps(example.reasoning, " ") for example in examples]
    assert [len(row) for row in steps] == [solution.count("<<") for solution in solutions(file)]
    assert sum(not row for row in steps) == without
    assert all(step.startswith("<<") and step.endswith(">>") for row in steps for step in row)


@with_gsm8k
def test_the_real_gsm8k():
    data = JsonlData(train="gsm8k/train.jsonl", validation="gsm8k/test.jsonl", format="gsm8k")
    splits = load_splits(data, root=SHARED_DATA)
    assert (len(splits.train), len(splits.validation)) == (7473, 1319)
    raw = [json.loads(line) for line in (SHARED_DATA / "gsm8k/test.jsonl").open(encoding="utf-8")]
    for example, record in zip(splits.validation, raw, strict=True):
        float(example.answer)
        assert record["answer"].replace(",", "").endswith(f"\n#### {example.answer}")
        assert example.reasoning.count("\n") == record["answer"].count("\n") - 1
        assert "<<" not in example.reasoning


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    folder.mkdir()
    write(
        folder / "train.jsonl",
        *(json.dumps({"q": f"q{i}", "steps": "s", "answer": str(i)}) for i in range(3)),
    )
    write(folder / "test.jsonl", json.dumps({"q": "t", "steps": "s", "answer": "9"}))
    yield folder
    datasets.enable_progress_bars()


COLUMNS = {"prompt": "q", "reasoning": "steps"}


def test_hub_columns_and_slices(hub):
    splits = load_splits(HubData(path=str(hub), train="train[1:]", columns=COLUMNS), root=Path())
    assert splits.train == [Example("q1", "s", "1"), Example("q2", "s", "2")]
    assert splits.validation == [Example("t", "s", "9")]


def test_hub_parquet_in_gsm8k_format(hub, tmp_path):
    import datasets

    rows = {"question": ["a", "b"], "answer": ["x <<1+1=2>>2\n#### 2", "#### 3"]}
    folder = tmp_path / "parquet"
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    train, test = hub_examples(HubData(path=str(folder), format="gsm8k"))
    assert train == test == [Example("a", "x 2", "2", "gsm8k"), Example("b", "", "3", "gsm8k")]


def test_hub_columns_of_lists(tmp_path):
    """As whynlp/gsm8k-aug has them: question, steps, answer."""
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["a", "b"], "steps": [["<<1+1=2>>", "<<2+1=3>>"], []], "answer": ["3", "4"]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    columns = {"prompt": "question", "reasoning": "steps"}
    data = HubData(path=str(tmp_path / "parquet"), columns=columns, separator=" ")
    assert hub_examples(data)[0] == [Example("a", "<<1+1=2>> <<2+1=3>>", "3"), Example("b", "", "4")]


def test_hub_errors(hub):
    with pytest.raises(SpecError, match=r"data:train\[0\]: no field 'prompt' among answer, q, steps"):
        hub_examples(HubData(path=str(hub)))
    with pytest.raises(
        SpecError, match=r"data:tset: cannot load the data: Unknown split \"tset\"\. Should be one of"
    ):
        hub_examples(HubData(path=str(hub), validation="tset", columns=COLUMNS))
    with pytest.raises(SpecError, match="nowhere:train: cannot load the data: "):
        hub_examples(HubData(path=str(hub / "nowhere")))
    with pytest.raises(SpecError, match=r"data:train\[:0\]: cannot load the data: Instruction .* no data"):
        hub_examples(HubData(path=str(hub), train="train[:0]", columns=COLUMNS))


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SpecError) as caught:
        hub_examples(HubData(path="x"))
    assert str(caught.value) == "data: 'hub' needs the package datasets: pip install 'kava[hub]'"


def test_a_teacher_may_read_later_lines_than_its_student(tmp_path):
    lines = [json.dumps({"prompt": f"p{n}", "reasoning": "r", "answer": str(n)}) for n in range(6)]
    file = write(tmp_path / "all.jsonl", *lines)
    data = JsonlData(train=str(file), validation=str(file), train_limit=2)
    later = data.model_copy(update={"train_skip": 2, "train_limit": 3})
    assert [e.prompt for e in load_splits(data, root=tmp_path).train] == ["p0", "p1"]
    assert [e.prompt for e in load_splits(later, root=tmp_path).train] == ["p2", "p3", "p4"]
    with pytest.raises(SpecError, match=r"all\.jsonl: no examples: the file is empty after 6"):
        read_examples(file, skip=6)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (GOOD.replace('"r"', '"r", "reasoning": "s"'), "reasoning"),
        (GOOD.replace('"a"', '"a", "more": {"x": 1, "y": 2, "x": 1}'), "x"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, line, key):
    """JSON readers keep the last without a word."""
    path = write(tmp_path / "a.jsonl", GOOD, line)
    assert refused(path) == f":2: key {key!r} is given twice in one object"


def test_a_file_name_with_nul_is_one_line(tmp_path):
    with pytest.raises(SpecError) as caught:
        read_examples(tmp_path / "a\0b")
    assert str(caught.value).endswith("a\\x00b': cannot read the examples: embedded null byte")


def test_a_column_of_null_in_one_file_and_text_in_another_is_told_with_its_cause(tmp_path, monkeypatch):
    """``datasets`` itself only says that an error occurred."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, task in (("a", None), ("b", "sum")):
        (tmp_path / "data" / "train").mkdir(parents=True, exist_ok=True)
        record = {"prompt": "p", "reasoning": "r", "answer": "a", "task": task}
        write(tmp_path / "data" / "train" / f"{name}.jsonl", json.dumps(record))
    with pytest.raises(SpecError) as caught:
        hub_examples(HubData(path=str(tmp_path / "data")))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data'}:train: cannot load the data: An error occurred while")
    assert message.endswith("; the cause: TypeError: Couldn't cast array of type string to null")
