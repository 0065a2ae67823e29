"""Training from a store: the same curve as with live teachers, and never from a store of something else."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kava_core.build import distiller as assemble
from kava_core.build import teachers
from kava_core.build.data import make_data
from kava_core.build.stored import store_ingredients, unfinished_folder
from kava_core.cli.app import app, explain_error
from kava_core.data.store.index import ingredient_differences
from kava_core.errors import CheckpointError, KavaError, Preempted, SpecError
from kava_core.jobs.cache import write_store, write_stores
from kava_core.runs import checkpoint
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.run import run
from tests.support import tiny
from tests.support.stops import stop

WIDE, GPT = tiny.FIELDS["teachers"]


def texts(folder: Path, *, count: int = 40, seed: int = 0) -> dict[str, Any]:
    """Examples of very different lengths, so that batches are padded."""
    drawn = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        lines = [
            {"prompt": f"{i}{split[0]}?", "reasoning": "12 " * drawn.randint(0, 12), "answer": str(i)}
            for i in range(count if split == "train" else 12)
        ]
        (folder / split).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "jsonl", "train": str(folder / "train"), "validation": str(folder / "validation")}


def spec(folder: Path, dtype: str | None = None, **changes: Any) -> PipelineSpec:
    """The tiny spec on padded texts, from a store of this dtype or with live teachers."""
    store = None if dtype is None else {"folder": str(folder / "stores"), "dtype": dtype}
    fields = tiny.fields(**changes) | {"store": store, "output": str(folder / "runs")}
    fields["data"] = changes.get("data") or texts(folder / "data")
    fields["train"] |= {"steps": 4, "save_every": 4}
    fields["evaluate"] |= {"every": 2, "generate": False}
    return type(tiny.spec()).model_validate(fields)


def curve(made: PipelineSpec, *, seed: int = 0) -> list[dict[str, float]]:
    """Every logged line of a run but its seconds."""
    lines = read_metrics(run(made, variant="main", seed=seed).folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_curve(found: list[dict], expected: list[dict], *, tolerance: float) -> None:
    """Every number of every line."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(found) > 5
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def live(folder: Path) -> list[dict[str, float]]:
    """Two teachers, another architecture and tokenizer each, calibrated projectors, padded batches."""
    return curve(spec(folder))


@pytest.fixture(scope="module")
def kept(folder: Path) -> PipelineSpec:
    """A spec whose bfloat16 store has been written."""
    made = spec(folder, "bfloat16")
    write_store(made, seed=0)
    return made


# the same training


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-3), ("int8", 1e-2)])
def test_stored_and_live_teachers_give_the_same_curve(
    folder: Path, live: list[dict[str, float]], dtype: str, tolerance: float
) -> None:
    made = spec(folder, dtype)
    write_store(made, seed=0)
    assert_same_curve(curve(made), live, tolerance=tolerance)


TO_TEACHER = {"direction": "to_teacher", "dim_projector": "linear", "head_adapter": "structured"}
OTHERS = {
    "trained projector on the student's side": {"teachers": [WIDE | {"align": TO_TEACHER}]},
    "calibrated on the student's side": {"teachers": [WIDE | {"align": {"direction": "to_teacher"}}]},
    "rotated later": {"rotary": "match"},
    "measured layer map": {"teachers": [WIDE | {"align": {"layer_mapper": "cka"}}]},
    "fused": {"target": "fused"},
    "one layer, values alone": {"losses": [{"name": "mse", "parts": ["values"], "layers": [-1]}]},
    "mixed precision": {"train": {"precision": "bf16"}},
}


@pytest.mark.parametrize("case", OTHERS)
def test_every_way_of_aligning_can_be_stored(tmp_path: Path, case: str) -> None:
    make = partial(spec, tmp_path, **OTHERS[case])
    write_store(make("float32"), seed=3)
    tolerance = 2e-2 if case == "mixed precision" else 1e-5
    assert_same_curve(curve(make("float32"), seed=3), curve(make(), seed=3), tolerance=tolerance)


def test_no_teacher_is_loaded(kept: PipelineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(teacher: Any, _: Any) -> None:
        raise AssertionError(f"{teacher.name} was loaded")

    monkeypatch.setattr(teachers, "load_teacher", load)
    assert curve(kept.model_copy(update={"name": "alone"}))


def test_loader_processes_change_nothing(kept: PipelineSpec) -> None:
    two = kept.model_copy(update={"train": kept.train.model_copy(update={"workers": 2})})
    assert curve(two) == curve(kept)


def test_a_resumed_run_ends_in_the_same_numbers(kept: PipelineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = kept.model_copy(update={"name": "broken"})
    stop(monkeypatch, 1)
    with pytest.raises(Preempted):
        curve(broken)
    monkeypatch.undo()
    assert curve(broken)[-1] == curve(kept)[-1]


def test_run_json_names_the_store(kept: PipelineSpec) -> None:
    record = json.loads((run(kept, variant="main", seed=0).folder / "run.json").read_text())
    assert record["store"] == str(write_store(kept, seed=0).folder)  # type: ignore[union-attr]


def test_the_order_of_the_data_does_not_matter(folder: Path, kept: PipelineSpec, tmp_path: Path) -> None:
    """Where nothing is calibrated on the first examples."""
    lines = (folder / "data" / "train").read_text().splitlines(keepends=True)
    (tmp_path / "train").write_text("".join(reversed(lines)))
    frozen = [GPT | {"align": {"dim_projector": {"name": "linear", "trainable": False}}}]
    make = partial(spec, folder, "float32", teachers=frozen)
    write_store(make(), seed=0)
    data = {
        "name": "jsonl",
        "train": str(tmp_path / "train"),
        "validation": str(folder / "data" / "validation"),
    }
    reordered = make(data=data)
    assert not write_store(reordered, seed=0).written  # type: ignore[union-attr]
    live = reordered.model_copy(update={"store": None})
    assert_same_curve(curve(reordered), curve(live), tolerance=2e-6)


# the right store


def told(made: PipelineSpec, *, seed: int = 0) -> Any:
    return store_ingredients(made, make_data(made), seed=seed)


def changed(made: PipelineSpec, **fields: Any) -> PipelineSpec:
    return type(made).model_validate(made.model_dump(mode="json") | fields)


def nested(made: PipelineSpec, section: str, **fields: Any) -> PipelineSpec:
    return changed(made, **{section: made.model_dump(mode="json")[section] | fields})


def teacher(made: PipelineSpec, **fields: Any) -> PipelineSpec:
    first, *rest = made.model_dump(mode="json")["teachers"]
    return changed(made, teachers=[first | fields, *rest])


STALE: dict[str, Any] = {
    "weights of teacher 'wide' changed": lambda s: teacher(s, config=WIDE["config"] | {"rope_theta": 500.0}),
    "tokenizer of teacher 'wide' changed": lambda s: teacher(s, tokenizer=tiny.BPE | {"vocab_size": 290}),
    "student's tokenizer changed": lambda s: nested(s, "student", tokenizer=tiny.BPE),
    "alignment of teacher 'wide' changed": lambda s: teacher(s, align={"time_warper": "pad"}),
    "student's geometry changed "
    "(2 layers, 2 KV heads × 8, 4 query heads → 2 layers, 4 KV heads × 8, 4 query heads)": lambda s: nested(
        s, "student", config=tiny.llama(num_key_value_heads=4)
    ),
    "compared layers changed": lambda s: changed(s, losses=[{"name": "mercator", "layers": [1]}]),
    "compared parts changed": lambda s: changed(s, losses=[{"name": "mercator", "parts": ["keys"]}]),
    "rotary changed (strip → keep)": lambda s: changed(s, rotary="keep"),
    "store.dtype changed (bfloat16 → int8)": lambda s: nested(s, "store", dtype="int8"),
    "train.precision changed (fp32 → bf16)": lambda s: nested(s, "train", precision="bf16"),
    "train.max_length changed (1024 → 30)": lambda s: nested(s, "train", max_length=30),
    "data.template changed": lambda s: nested(s, "data", template={"prompt": "{prompt}!"}),
    "training examples changed": lambda s: nested(s, "data", train_limit=30),
    "validation examples changed": lambda s: nested(s, "evaluate", examples=5),
    "train.calibration_examples changed (32 → 8)": lambda s: nested(s, "train", calibration_examples=8),
}


@pytest.mark.parametrize("what", STALE)
def test_every_ingredient_makes_a_store_stale(kept: PipelineSpec, what: str) -> None:
    assert what in ingredient_differences(told(STALE[what](kept)), told(kept))


def test_what_cannot_matter_makes_no_store_stale(kept: PipelineSpec) -> None:
    others = [
        nested(kept, "train", learning_rate=0.5, steps=9, workers=1),
        changed(kept, target="fused", output="elsewhere", name="other"),
        changed(kept, losses=[{"name": "mercator", "weight": 3.0}]),
        changed(kept, rotary="match"),
    ]
    assert [ingredient_differences(told(other), told(kept)) for other in others] == [[]] * len(others)


def test_a_store_belongs_to_the_student_s_query_heads(tmp_path: Path) -> None:
    """One head of queries in a store would be broadcast to four without a word."""
    losses = [{"name": "mercator", "parts": ["keys", "queries"]}]
    four, one = (
        spec(tmp_path, "float32", losses=losses, student={"config": tiny.llama(num_attention_heads=heads)})
        for heads in (4, 2)
    )
    assert "4 query heads → " in " ".join(ingredient_differences(told(one), told(four)))


def test_new_weights_in_the_same_folder_make_a_store_stale(tmp_path: Path) -> None:
    made = spec(tmp_path, "float32", teachers=[], losses=[])
    saved = tmp_path / "teacher"
    assemble.load_student(made.student, make_data(made).tokenizer, seed=0).save_pretrained(saved)
    make_data(made).tokenizer.save_pretrained(saved)
    stored = spec(tmp_path, "float32", teachers=[{"name": "t", "path": str(saved)}])
    before = told(stored)
    assemble.load_student(made.student, make_data(made).tokenizer, seed=1).save_pretrained(saved)
    assert ingredient_differences(told(stored), before) == ["weights of teacher 't' changed"]


def test_seeds_share_a_store_unless_it_looks_at_the_student(kept: PipelineSpec) -> None:
    """The student's first weights come from the seed."""
    fixed = {"align": {"dim_projector": {"name": "linear", "trainable": False}}}
    blind = changed(kept, teachers=[WIDE | fixed, GPT | fixed])
    assert told(blind, seed=0) == told(blind, seed=1)
    looking = teacher(kept, align={"dim_projector": {"name": "calibrated", "method": "procrustes"}})
    assert "seed changed (0 → 1)" in ingredient_differences(told(looking, seed=1), told(looking, seed=0))


def test_training_without_a_store_says_what_to_do(tmp_path: Path) -> None:
    made = spec(tmp_path, "int8")
    with pytest.raises(SpecError) as error:
        run(made, variant="main", seed=0)
    stores = tmp_path / "stores"
    command = "run `kava cache` with this spec and these overrides first"
    assert str(error.value) == f"store: {stores}: nothing is stored for this spec; {command}"


def test_training_from_a_stale_store_says_what_changed(kept: PipelineSpec) -> None:
    folder = write_store(kept, seed=0).folder  # type: ignore[union-attr]
    with pytest.raises(SpecError) as error:
        run(nested(kept, "data", template={"prompt": "{prompt}!"}), variant="main", seed=0)
    assert str(error.value).startswith(f"store: {folder} is out of date: student's tokenizer changed; data.")
    assert str(error.value).endswith(
        "; to make a new one run `kava cache` with this spec and these overrides"
    )
    assert error.value.exit_code == 2


def test_a_trained_target_is_refused_by_name(kept: PipelineSpec) -> None:
    trained = {
        "dim_projector 'linear'": {"dim_projector": "linear"},
        "layer_mapper 'learned'": {"layer_mapper": "learned"},
        "head_adapter 'structured'": {"head_adapter": {"name": "structured", "trainable": True}},
    }
    for what, align in trained.items():
        with pytest.raises(SpecError, match=f"^store: {what} of teacher 'wide' is trained with the student"):
            write_store(teacher(kept, align=align), seed=0)


def test_a_shuffled_teacher_is_refused(kept: PipelineSpec) -> None:
    with pytest.raises(ValueError, match=r"'train\.shuffle_teacher' aligns .* set 'store: null'"):
        nested(kept, "train", shuffle_teacher=True)


# damage


def test_a_truncated_shard_is_refused_at_once(tmp_path: Path) -> None:
    made = spec(tmp_path, "int8")
    shard = next(write_store(made, seed=0).folder.glob("shard-*"))  # type: ignore[union-attr]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: altered since it was saved") as error:
        run(made, variant="main", seed=0)
    assert error.value.exit_code == 5
    with pytest.raises(CheckpointError):
        write_store(made, seed=0)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    made = spec(tmp_path, "int8")
    assert write_store(made, seed=0).written  # type: ignore[union-attr]
    shard = next((tmp_path / "stores").glob("*/shard-*"))
    assert not write_store(made, seed=0, verify=True).written  # type: ignore[union-attr]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: altered since it was saved"):
        write_store(made, seed=0, verify=True)


def test_an_unfinished_store_is_not_taken(tmp_path: Path, kept: PipelineSpec) -> None:
    made = nested(kept, "store", folder=str(tmp_path))
    unfinished_folder(tmp_path / write_store(kept, seed=0).folder.name).mkdir()  # type: ignore[union-attr]
    with pytest.raises(SpecError, match=r"not finished; run `kava cache` .*: it goes on where it stopped$"):
        run(made, variant="main", seed=0)


# the command


def test_cache_describes_each_store_once(folder: Path, kept: PipelineSpec) -> None:
    without = changed(kept, losses=[{"name": "mercator", "weight": 0.0}])
    found = list(write_stores({"main": kept, "same": kept, "ce": without}))
    done = write_store(kept, seed=0)
    assert done is not None
    size = sum(file.stat().st_size for file in done.folder.rglob("*") if file.is_file())
    assert done.bytes == size
    assert done.examples == 48
    items = [*make_data(kept).train_items.items, *make_data(kept).validation_items.items]
    assert done.tokens == sum(len(item.student) for item in items)
    assert found == [str(done), "ce: runs no teacher, nothing to store"]
    assert f"{size / done.tokens:,.1f} bytes a token" in found[0]


def test_cache_needs_a_store_in_the_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="store: the spec names none; add store"):
        write_store(spec(tmp_path), seed=0)


def test_cache_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = tiny.fields(teachers=[WIDE]) | {"store": {"folder": "stores"}, "output": "runs"}
    Path("spec.yaml").write_text(json.dumps(fields))
    result = CliRunner().invoke(app, ["cache", "spec.yaml", "data.train=16", "store.dtype=int8"])
    assert result.exit_code == 0, result.output
    assert "24 examples, 336 student tokens" in result.stdout
    again = CliRunner().invoke(app, ["cache", "spec.yaml", "data.train=16", "store.dtype=int8", "--verify"])
    assert "there already" in again.stdout
    missing = CliRunner().invoke(app, ["cache", "spec.yaml", "--verify"])
    known = explain_error(missing.exception)  # type: ignore[arg-type]
    assert isinstance(known, SpecError)
    assert "is out of date: store.dtype changed (int8 → bfloat16); training examples changed" in str(known)


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    import fcntl

    made = spec(tmp_path, "int8")
    folder = write_store(made, seed=0).folder  # type: ignore[union-attr]
    with folder.with_name(f"{folder.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(KavaError, match="another process is writing this store"):
            write_store(made, seed=0)


# killed


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("after", [1, 4])
def test_going_on_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    from kava_core.jobs import cache as module

    made, add, calls = spec(tmp_path, "bfloat16"), module._write_batch, list[int]()

    def dying(writer: Any, items: Any, aligned: Any) -> None:
        writer.limit = 1
        if len(calls) == after:
            raise Killed
        calls.append(len(items))
        add(writer, items, aligned)

    monkeypatch.setattr(module, "_write_batch", dying)
    with pytest.raises(Killed):
        write_store(made, seed=0)
    after = 10**6
    first = sum(calls)
    done = write_store(made, seed=0)
    assert done is not None
    assert first > 0
    assert sum(calls) == done.examples == 48
    checkpoint.verify(done.folder)
    assert [path.name for path in (tmp_path / "stores").iterdir() if path.is_dir()] == [done.folder.name]
