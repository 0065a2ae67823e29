"""``kava latents``: against loops over one example, one layer, one head and one slot at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kava_core.cli.app import main
from kava_core.data.collate import Collator
from kava_core.jobs.latents import latent_run
from kava_core.jobs.latents.cosine_map import (
    compute_cosine_maps,
    sum_slot_cosines,
    sum_step_cosines,
    time_unaligned_cache,
)
from kava_core.jobs.latents.latent_run import LatentRun, load_latent_run
from kava_core.jobs.latents.show_latents import decode_examples
from kava_core.latent.exported import LatentStudent
from kava_core.protocols.timeline import REASONING, Timeline
from kava_core.runs import checkpoint
from kava_core.train.run import run
from tests.support import tiny

ALIGN = {"time_warper": {"name": "segment", "segments": ["reasoning"]}, "dim_projector": "identity"}
ALIKE = {"name": "alike", "config": tiny.llama(num_hidden_layers=4), "tokenizer": tiny.BPE, "align": ALIGN}
LATENT: dict[str, Any] = {"trajectory": "latent", "latent": {"count": 3, "passes": 2}}
TRAIN = {"steps": 2, "save_every": 2}


def spec(folder: Path | str, **changes: Any) -> Any:
    plain = {
        "teachers": [ALIKE],
        "rotary": "keep",
        "losses": ["mse"],
        "train": TRAIN,
        "evaluate": {"every": 2},
    }
    return tiny.spec(folder, **(plain | LATENT | changes))


def trained(folder: Path, **changes: Any) -> Path:
    return run(spec(folder, **changes), variant="main", seed=0).folder


@pytest.fixture(scope="module", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher has the student's heads and width, and rotated keys are compared."""
    return trained(tmp_path_factory.mktemp("alike"))


@pytest.fixture(scope="module")
def made(alike: Path) -> LatentRun:
    return load_latent_run(alike)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two teachers of other shapes and trained projections."""
    learns = ALIGN | {"dim_projector": "linear"}
    teachers = [one | {"align": learns} for one in tiny.FIELDS["teachers"]]
    return trained(tmp_path_factory.mktemp("wide"), teachers=teachers, rotary="strip")


def kava(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, words)))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def final_pass(student: LatentStudent, prompt: str) -> tuple[Any, int]:
    """Of one example alone, nothing padded and no answer: outputs, and where its slots begin."""
    model, latents, embed = student.model, student.latents, student.model.get_input_embeddings()
    ids = student.tokenizer(f"{prompt}?<bot>", return_tensors="pt")["input_ids"]
    prefix, thought = embed(ids), latents.slots[None]
    for _ in range(latents.passes):
        hidden = model.model(inputs_embeds=torch.cat([prefix, thought], 1), use_cache=False).last_hidden_state
        thought = latents.slots[None] + latents.projection(hidden[:, prefix.shape[1] - 1 : -1])
    return model(inputs_embeds=torch.cat([prefix, thought], 1), use_cache=True), prefix.shape[1]


def pair_of(cache: Any, part: str) -> Tensor:
    """``layer head time dim`` of a batch of one, in float64."""
    return torch.stack([getattr(layer, part)[0].double() for layer in cache.layers])


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


@torch.no_grad()
def test_decoded_tokens_are_those_of_one_example_at_a_time(alike: Path, made: LatentRun) -> None:
    student = LatentStudent.from_pretrained(alike / "student")
    found = decode_examples(made, examples=8, top=3)
    assert len(found) == 8
    for one in found:
        outputs, begin = final_pass(student, one["prompt"])
        assert len(one["slots"]) == 3
        for slot, likely in enumerate(one["slots"]):
            chances = outputs.logits[0, begin - 1 + slot].double().exp()
            chances = chances / chances.sum()
            order = chances.argsort(descending=True)[:3]
            assert [token for token, _ in likely] == [student.tokenizer.decode([int(i)]) for i in order]
            assert [share for _, share in likely] == pytest.approx(chances[order].tolist(), rel=1e-4)


def test_beside_them_stand_the_teachers_written_tokens(made: LatentRun) -> None:
    for one in decode_examples(made, examples=5, top=1):
        assert "".join(one["written"]["alike"]).split() == one["reasoning"].split()
        assert all(one[field] for field in ("prompt", "answer", "reasoning"))


def test_more_tokens_than_there_are_is_all_of_them(made: LatentRun) -> None:
    (one,) = decode_examples(made, examples=1, top=10_000)
    assert {len(likely) for likely in one["slots"]} == {len(made.data.tokenizer)}
    assert sum(share for _, share in one["slots"][0]) == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def by_loop(run: Path, made: LatentRun, part: str, examples: int, shift: int) -> tuple[Tensor, Tensor]:
    """Both maps in float64 from plain transformers; every second teacher layer is read by a student's."""
    student, batch = LatentStudent.from_pretrained(run / "student"), next(made.batches(examples))
    side, pipeline = batch["teachers"]["alike"], made.distiller.pipeline
    model = made.distiller.teachers[0].model
    plan = pipeline.teachers[0].plan(Timeline.from_batch(side), Timeline.from_batch(batch["student"]))
    dense = plan.dense(side["input_ids"].shape[1]).double()
    slots, steps = [], []
    for row in range(examples):
        outputs, begin = final_pass(student, made.data.validation_items[row].example.prompt)
        own, other = pair_of(outputs.past_key_values, part), (row + shift) % examples
        ids = side["input_ids"][other][side["attention_mask"][other].bool()][None]
        theirs = pair_of(model(ids, use_cache=True).past_key_values, part)[[1, 3]]
        reasoning = side["segments"][other].eq(REASONING).nonzero().flatten().tolist()
        target = torch.einsum("st,lhtd->lhsd", dense[other][:, : ids.shape[1]], theirs)
        heads, layers = range(own.shape[1]), range(len(own))
        slots.append(
            [
                [
                    sum(cosine(own[layer, h, begin + s], target[layer, h, s]) for h in heads) / 2
                    for s in range(3)
                ]
                for layer in layers
            ]
        )
        steps.append(
            [
                [
                    sum(
                        cosine(own[layer, h, begin + s], theirs[layer, h, t])
                        for h in heads
                        for layer in layers
                    )
                    / 4
                    for t in reasoning
                ]
                for s in range(3)
            ]
        )
    return torch.tensor(slots).double().mean(0), torch.tensor(steps).double().mean(0)


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("shift", [0, 1])
def test_cosines_are_those_of_a_loop_in_float64(alike: Path, made: LatentRun, part: str, shift: int) -> None:
    found: Any = compute_cosine_maps(made.distiller, made.batches(5))["alike"][part]
    slots, steps = by_loop(alike, made, part, 5, shift)
    by_slot, by_step = (found.slots_next, found.steps_next) if shift else (found.slots, found.steps)
    torch.testing.assert_close(by_slot.mean, slots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_step.mean, steps, rtol=1e-4, atol=1e-5)
    assert by_slot.count.tolist() == [5] * 3
    assert by_step.count.tolist() == [5] * steps.shape[1]


def test_the_control_is_the_collators_shuffled_teacher(wide: Path) -> None:
    """Where every side of a batch is shuffled, its own teacher is the next example's."""
    made = load_latent_run(wide)
    items = made.data.validation_items.items[:6]
    found: Any = compute_cosine_maps(made.distiller, made.batches(6))
    collator: Collator = made.data.plain_collator
    collator.shuffle_teacher = True
    shuffled: Any = compute_cosine_maps(made.distiller, [collator(items)])
    assert set(found) == {"wide", "gpt"}
    for teacher, parts in found.items():
        for part, maps in parts.items():
            torch.testing.assert_close(maps.slots_next.mean, shuffled[teacher][part].slots.mean)
            torch.testing.assert_close(maps.steps_next.mean, shuffled[teacher][part].steps.mean)
            assert not torch.allclose(maps.slots_next.mean, maps.slots.mean, atol=1e-3)


def test_the_trained_aligners_are_used(wide: Path) -> None:
    last = checkpoint.newest_intact(wide / "checkpoints")
    saved = load_file(last / "aligner.safetensors")
    state = load_latent_run(wide).distiller.pipeline.state_dict()
    assert any("dim_projector" in name for name in saved)
    assert all(torch.equal(state[name].cpu(), saved[name]) for name in saved)


def test_batches_change_no_mean(made: LatentRun, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute_cosine_maps(made.distiller, made.batches(7))["alike"]
    tokens = decode_examples(made, examples=7, top=2)
    monkeypatch.setattr(latent_run, "MOST", 3)
    assert [len(batch["labels"]) for batch in made.batches(7)] == [2, 2, 3]
    parts = compute_cosine_maps(made.distiller, made.batches(7))["alike"]
    for part, maps in whole.items():
        torch.testing.assert_close(maps.slots.mean, parts[part].slots.mean)
        torch.testing.assert_close(maps.steps.mean, parts[part].steps.mean)
    again = decode_examples(made, examples=7, top=2)
    for one, other in zip(tokens, again, strict=True):
        for likely, more in zip(one["slots"], other["slots"], strict=True):
            assert dict(likely) == pytest.approx(dict(more), abs=1e-5)


def random_caches(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's, and segments: a prompt of as many tokens as the example's number."""
    drawn = torch.Generator().manual_seed(0)
    own, teacher = (torch.randn(len(lengths), 2, 3, time, 4, generator=drawn) for time in (2, 8))
    segments = torch.full((len(lengths), 8), -1)
    for row, length in enumerate(lengths):
        segments[row, :row] = 0
        segments[row, row : row + length] = REASONING
        segments[row, row + length : row + length + 1] = 2
    return own, teacher, segments


def test_steps_of_unequal_length_count_where_they_are() -> None:
    lengths = [4, 0, 2]
    own, teacher, segments = random_caches(lengths)
    found = sum_step_cosines(own, teacher, segments)
    assert found.count.tolist() == [2, 2, 1, 1]
    for slot in range(2):
        for step in range(4):
            rows = [row for row, length in enumerate(lengths) if step < length]
            cosines = [
                cosine(own[row, layer, h, slot], teacher[row, layer, h, row + step])
                for row in rows
                for layer in range(2)
                for h in range(3)
            ]
            assert float(found.mean[slot, step]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_slots_without_target_are_left_out() -> None:
    own, teacher, _ = random_caches([1, 1, 1])
    valid = torch.tensor([[True, False], [False, False], [True, False]])
    found = sum_slot_cosines(own, teacher[:, :, :, :2], valid)
    one = [cosine(own[row, 1, h, 0], teacher[row, 1, h, 0]) for row in (0, 2) for h in range(3)]
    assert float(found.mean[1, 0]) == pytest.approx(sum(one) / 6, abs=1e-5)
    assert found.mean[:, 1].isnan().all()


def test_no_reasoning_at_all_and_zero_vectors() -> None:
    own, teacher, segments = random_caches([0, 0])
    assert sum_step_cosines(own, teacher, segments).mean.shape == (2, 0)
    valid = torch.ones(2, 2, dtype=torch.bool)
    assert sum_slot_cosines(torch.zeros_like(own), teacher[:, :, :, :2], valid).mean.eq(0).all()


def test_the_command_prints_and_writes(
    alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kava("latents", alike, "--examples", "6", "--top", "2", "--out", tmp_path / "new" / "out") == 0
    printed, folder = capsys.readouterr().out, tmp_path / "new" / "out"
    listed = json.loads((folder / "latents.json").read_text())
    assert len(listed) == 6
    assert all(len(likely) == 2 for one in listed for likely in one["slots"])
    for word in (
        "4 of 6 validation examples",
        listed[0]["prompt"],
        "latents.json",
        "cosine.json",
        "cosine.png",
    ):
        assert word in printed
    assert (folder / "cosine.png").stat().st_size > 10_000
    cosines = json.loads((folder / "cosine.json").read_text())
    assert (cosines["examples"], cosines["layers"]) == (6, [0, 1])
    for part in ("keys", "values"):
        maps = cosines["teachers"]["alike"][part]
        assert set(maps) == {"slots", "steps", "slots_next", "steps_next"}
        assert [len(row) for row in maps["slots"]["cosine"]] == [3, 3]
        assert all(-1 <= value <= 1 for each in maps.values() for row in each["cosine"] for value in row)


def test_one_example_has_no_control(alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kava("latents", alike, "--examples", "1", "--out", tmp_path) == 0
    maps = json.loads((tmp_path / "cosine.json").read_text())["teachers"]["alike"]["keys"]
    assert set(maps) == {"slots", "steps"}
    assert (tmp_path / "cosine.png").exists()


def test_two_teachers_of_other_shapes(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kava("latents", wide) == 0
    assert (wide / "latents" / "cosine.png").stat().st_size > 10_000
    assert set(json.loads((wide / "latents" / "cosine.json").read_text())["teachers"]) == {"wide", "gpt"}
    shutil.rmtree(wide / "latents")


def test_without_a_kv_loss_the_map_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path, losses=[])
    assert kava("latents", folder) == 0
    assert "no cosine map: the run compared no teacher's cache (no KV loss)\n" in capsys.readouterr().out
    assert [file.name for file in (folder / "latents").iterdir()] == ["latents.json"]
    assert json.loads((folder / "latents" / "latents.json").read_text())[0]["written"] == {}


def test_without_the_last_checkpoint_the_map_is_left_out(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where else would the trained projections come from?"""
    shutil.copytree(wide, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert kava("latents", tmp_path / "run") == 0
    assert "checkpoint-2 is gone, and the trained aligners with it\n" in capsys.readouterr().out


def test_widths_that_differ_have_no_cosine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny.FIELDS["teachers"][0] | {"align": ALIGN}
    folder = trained(tmp_path, teachers=[teacher], losses=["relation"])
    assert kava("latents", folder) == 0
    assert (
        "no cosine map: no teacher is brought to the student's heads and width\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("warper", ["segment", "rkv"])
def test_the_student_as_its_own_teacher(
    warper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a warper keeps only some written steps, the cross map has all of them."""
    reads = {"segments": ["reasoning"]} if warper == "segment" else {}
    teacher = {
        "name": "itself",
        "itself": {"cross_entropy": 1.0},
        "align": ALIGN | {"time_warper": {"name": warper, **reads}},
    }
    folder = trained(tmp_path, teachers=[teacher], rotary="strip")
    assert kava("latents", folder, "--examples", "5") == 0
    assert "no cosine map" not in capsys.readouterr().out
    maps = json.loads((folder / "latents" / "cosine.json").read_text())["teachers"]["itself"]
    assert maps["keys"]["steps"]["examples"] == [5] * 4  # two steps, each a space and a digit
    distiller, side = (made := load_latent_run(folder)).distiller, next(made.batches(5))["teachers"]["itself"]
    found: Any = time_unaligned_cache(distiller, distiller.pipeline.teachers[0], side)
    model: Any = LatentStudent.from_pretrained(folder / "student").model
    for row in range(5):
        ids = side["input_ids"][row][side["attention_mask"][row].bool()][None]
        values = pair_of(model(ids, use_cache=True).past_key_values, "values").float()
        torch.testing.assert_close(found.values[row, :, :, : ids.shape[1]], values, rtol=1e-4, atol=1e-5)


def test_pretrained_models_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the run's record; where the teacher is gone, the map is left out and nothing is trained."""
    pretrain = {"pretrain": {"steps": 2, "batch_size": 8}}
    student = {"config": tiny.llama(), "tokenizer": tiny.BPE} | pretrain
    folder = trained(tmp_path, teachers=[ALIKE | pretrain], student=student)
    assert kava("latents", folder) == 0
    assert "cosine.json" in capsys.readouterr().out
    origin = json.loads((folder / "run.json").read_text())["models"]["alike"]["origin"]
    (tmp_path / "gone").mkdir()
    Path(origin).rename(tmp_path / "gone" / "student")
    shutil.rmtree(folder / "latents")
    assert kava("latents", folder) == 0
    printed = capsys.readouterr()
    assert f"no cosine map: teacher 'alike': its pretrained model is no longer at {origin}\n" in printed.out
    assert printed.err == ""
    assert not Path(origin).exists()


def test_adapters_are_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = trained(tmp_path, student={"lora": {"rank": 2}}, losses=["mse"])
    student, made = LatentStudent.from_pretrained(folder / "student"), load_latent_run(folder)
    prompts = [item.example.prompt + "?" for item in made.data.validation_items.items[:3]]
    again = LatentStudent(made.distiller.student, made.distiller.latents, made.data.tokenizer)
    assert student.answer(prompts, max_new_tokens=5) == again.answer(prompts, max_new_tokens=5)


def damaged(folder: Path, file: str, text: str | None) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "code", "words"),
    [
        ("run.json", None, 2, "not a run directory (no run.json)"),
        ("run.json", "{}", 5, "says nothing of"),
        ("spec.json", None, 5, "spec.json: unreadable"),
        ("spec.json", "{", 5, "spec.json: "),
        ("spec.json", "{}", 5, "spec.json: name: Field required"),
        ("student/latent.json", "{}", 5, "altered since it was saved"),
        ("student/latent.safetensors", None, 5, "missing, though the manifest lists it"),
        ("checkpoints/checkpoint-2/aligner.safetensors", "", 5, "altered since it was saved"),
    ],
)
def test_damage_is_said_in_one_line(
    alike: Path, tmp_path: Path, file: str, text: str | None, code: int, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(alike, folder)
    damaged(folder, file, text)
    assert kava("latents", folder) == code
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def edited(folder: Path, file: str, **changes: Any) -> None:
    read = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(read | changes))


def test_an_unfinished_run(alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(alike, tmp_path / "run")
    edited(tmp_path / "run", "run.json", status="running")
    assert kava("latents", tmp_path / "run") == 2
    assert "the run is not finished; train it to its end first" in capsys.readouterr().err


def test_changed_data(alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(alike, tmp_path / "run")
    edited(tmp_path / "run", "spec.json", data=tiny.FIELDS["data"] | {"validation": 15})
    assert kava("latents", tmp_path / "run") == 2
    assert "the data changed since this run ended" in capsys.readouterr().err


def test_a_run_with_written_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path, trajectory="text", losses=[], teachers=[])
    assert kava("latents", folder) == 2
    assert "only a latent one has latent tokens" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(
    alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert kava("latents", alike, "--out", tmp_path / "file") == 1
    assert capsys.readouterr().err == f"{tmp_path / 'file'}: cannot be written: File exists\n"
