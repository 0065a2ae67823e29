"""Layer maps: measured before training, kept, used again, refused; and ``kava calibrate`` as it is run."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kava_core.build import layer_maps
from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.layer_maps import layers_to_compare, warp_layers, with_measured_maps
from kava_core.cli.app import main
from kava_core.errors import KavaError, SpecError
from kava_core.jobs.heatmap import draw_similarity
from kava_core.kv.capture.capture import Capture
from kava_core.kv.maths.cka import StreamedCKA
from kava_core.models.load import load_model
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.runs.folder import Folder
from kava_core.train.run import run
from tests.cli.test_runs import kava
from tests.support import tiny
from tests.support.tiny_models import WORKS

CASES = {case.name: case for case in WORKS}
PRETRAIN = {"steps": 2, "batch_size": 8}


def spec_of(output, mapper="cka", *, teachers=None, **changes):
    """The tiny spec whose teachers have this layer mapper."""
    made = [{**t, "align": {"layer_mapper": mapper}} for t in teachers or tiny.FIELDS["teachers"]]
    return tiny.spec(output, teachers=made, **changes)


def maps(spec):
    return [teacher.align.layer_mapper.map for teacher in spec.teachers]


@pytest.fixture
def counted(monkeypatch):
    """The teachers that were measured, in order."""
    names = []
    measure = layer_maps._measure_layers
    monkeypatch.setattr(
        layer_maps, "_measure_layers", lambda spec, t, *rest: names.append(t.name) or measure(spec, t, *rest)
    )
    return names


def side(model_case, lengths=(7, 4)):
    """Random tokens, padded right."""
    made = torch.Generator().manual_seed(0)
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    return {"input_ids": torch.randint(3, 64, mask.shape, generator=made), "attention_mask": mask}


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-NeoX", "Gemma 2", "Qwen3-Next"])
def test_hidden_layers_are_the_outputs_of_the_attention_layers(name):
    """Against a hook on the decoder layers; the last is what the base model returns."""
    case = CASES[name]
    model = case.model().eval()
    base = model.base_model
    blocks = base.h if name == "GPT-2" else base.layers
    seen = []
    for block in blocks:
        block.register_forward_hook(
            lambda m, given, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    batch = side(case)
    found = layers_to_compare(model, batch, "hidden")
    indices = [m.layer_idx for m in Capture(model).modules]
    assert found.shape[1] == len(indices) == case.layers
    for layer, index in enumerate(indices):
        last = index == len(blocks) - 1
        seen_last = base(**batch, use_cache=False).last_hidden_state if last else seen[index]
        torch.testing.assert_close(found[:, layer], seen_last, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on", ["keys", "values"])
def test_cached_parts_lie_head_beside_head(on):
    model = CASES["Llama"].model().eval()
    batch = side(CASES["Llama"])
    capture = Capture(model)
    with capture, torch.no_grad():
        model(**batch, use_cache=False)
    cache = getattr(capture.take(), on)
    found = layers_to_compare(model, batch, on)
    for head in range(2):
        assert torch.equal(found[..., 8 * head : 8 * head + 8], cache[:, :, head])


def test_the_teacher_is_read_at_the_students_positions():
    x = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 2, 5, 3).bfloat16()
    time_map = TimeMap.gather(torch.tensor([[4, 0, 2]]), torch.tensor([[True, True, False]]))
    found = warp_layers(time_map, x)
    assert found.dtype == torch.float32
    assert found[0, 1, :, 2].tolist() == [4, 0, 0]


@pytest.mark.parametrize("on", ["hidden", "keys", "values"])
def test_the_similarity_is_that_of_the_formula_on_these_layers(tmp_path, on):
    """With all rows in one minibatch, and tokens that need no warping, by another way."""
    same = [{"name": "same", "config": tiny.llama(num_hidden_layers=3), "tokenizer": tiny.CHARS}]
    spec = spec_of(tmp_path, {"name": "cka", "on": on, "rows": 4096, "skip": 0}, teachers=same)
    data = make_data(spec)
    [path] = maps(with_measured_maps(spec, tmp_path, data))
    stream = StreamedCKA(4096)
    batch = data.plain_collator(data.train_items.items[:32])
    student = load_model(spec.student, data.tokenizer, seed=0, where="").eval()
    teacher = load_model(spec.teachers[0], data.teacher_tokenizers["same"], seed=0, where="").eval()
    timeline = Timeline.from_batch(batch["student"])
    valid = timeline.mask & (timeline.positions > 0)  # a first token counts in no calibration
    rows = [
        layers_to_compare(m, s, on).transpose(0, 1)[:, valid]
        for m, s in ((teacher, batch["teachers"]["same"]), (student, batch["student"]))
    ]
    stream.add(*rows)
    found = load_file(path)["similarity"].double()
    torch.testing.assert_close(found, stream.similarity(), rtol=0, atol=1e-5)
    assert found.shape == (2, 3)


def test_a_student_measured_against_itself_finds_itself(tmp_path):
    """A student with the teacher's weights reads each layer from the same layer."""
    model = {"config": tiny.llama(num_hidden_layers=4), "tokenizer": tiny.CHARS}
    spec = spec_of(tmp_path, {"name": "cka", "top_k": 1}, teachers=[{"name": "twin", **model}], student=model)
    [path] = maps(with_measured_maps(spec, tmp_path, make_data(spec)))
    state = load_file(path)
    assert torch.equal(state["matrix"], torch.eye(4))
    torch.testing.assert_close(state["similarity"].diagonal(), torch.ones(4), rtol=0, atol=1e-4)


def test_maps_are_measured_once(tmp_path, counted):
    spec = spec_of(tmp_path)
    data = make_data(spec)
    first = maps(with_measured_maps(spec, tmp_path / "maps", data))
    assert first == [str(tmp_path / "maps" / f"{name}.safetensors") for name in ("wide", "gpt")]
    assert maps(with_measured_maps(spec, tmp_path / "maps", data)) == first
    assert counted == ["wide", "gpt"]


def changed(what, spec):
    """A spec that differs in something the measurement depends on, and its data's seed."""
    if what == "data":
        return spec_of("runs", data={"seed": 7})
    if what == "mapper":
        return spec_of("runs", {"name": "cka", "on": "values"})
    if what == "warper":
        teachers = [
            t.model_copy(update={"align": t.align.model_copy(update={"time_warper": _linear()})})
            for t in spec.teachers
        ]
        return spec.model_copy(update={"teachers": tuple(teachers)})
    return spec_of("runs", student={"config": tiny.llama(hidden_size=16)})


def _linear():
    return (
        tiny.spec("runs", teachers=[{**tiny.FIELDS["teachers"][0], "align": {"time_warper": "linear"}}])
        .teachers[0]
        .align.time_warper
    )


@pytest.mark.parametrize("what", ["data", "mapper", "warper", "student"])
def test_maps_of_something_else_are_measured_again(tmp_path, counted, what):
    spec = spec_of(tmp_path)
    with_measured_maps(spec, tmp_path, make_data(spec))
    other = changed(what, spec)
    with_measured_maps(other, tmp_path, make_data(other))
    assert counted == ["wide", "gpt"] * 2


@pytest.mark.parametrize("what", ["seed", "altered", "no record"])
def test_maps_that_cannot_be_trusted_are_measured_again(tmp_path, counted, what):
    spec = spec_of(tmp_path)
    data = make_data(spec)
    before = maps(with_measured_maps(spec, tmp_path, data))
    wide = tmp_path / "wide.safetensors"
    whole = wide.read_bytes()
    if what == "altered":
        wide.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif what == "no record":
        wide.with_suffix(".json").unlink()
    assert maps(with_measured_maps(spec, tmp_path, data, seed=int(what == "seed"))) == before
    assert counted == ["wide", "gpt", *(["wide", "gpt"] if what == "seed" else ["wide"])]
    assert (wide.read_bytes() == whole) == (what != "seed")


def test_measuring_leaves_the_random_state(tmp_path):
    spec = spec_of(tmp_path)
    data = make_data(spec)
    torch.manual_seed(5)
    with_measured_maps(spec, tmp_path, data)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_specs_without_such_mappers_are_left_alone(tmp_path):
    spec = spec_of(tmp_path, "ratio")
    assert with_measured_maps(spec, tmp_path / "maps", make_data(spec)) is spec
    plain = spec_of(tmp_path, losses=[])
    assert with_measured_maps(plain, tmp_path / "maps", make_data(plain)) is plain
    assert not (tmp_path / "maps").exists()


def test_too_little_to_measure_names_the_teacher(tmp_path):
    spec = spec_of(tmp_path, {"name": "cka", "skip": 500})
    with pytest.raises(KavaError, match="CKA: 0 rows were added, at least 4 are needed") as caught:
        with_measured_maps(spec, tmp_path, make_data(spec))
    assert "layer_mapper 'cka', teacher 'wide'" in caught.value.__notes__[0]
    assert list(tmp_path.glob("*.safetensors")) == []


def test_training_measures_and_reads_the_measured_layers(tmp_path):
    spec = spec_of(tmp_path / "runs", {"name": "cka", "top_k": 1}, train={"steps": 2})
    result = run(spec, variant="main", seed=0)
    folder = result.folder / "layer_maps"
    assert sorted(file.name for file in folder.iterdir()) == [
        *("gpt.json", "gpt.safetensors", "wide.json", "wide.safetensors")
    ]
    measured = with_measured_maps(spec, folder, make_data(spec))
    distiller = make_distiller(measured, make_data(spec), seed=0)
    for aligner in distiller.pipeline.teachers:
        record = json.loads((folder / f"{aligner.name}.json").read_text())
        named = {int(layer) for row in record["layers"].values() for layer in row}
        assert set(aligner.sources) == named
        saved = load_file(folder / f"{aligner.name}.safetensors")
        assert torch.equal(aligner.layer_map.mapper(), saved["matrix"])


def kava_here(*words, cwd, **environment):
    """The command line in this process, which has imported everything already."""
    out, told, code = io.StringIO(), io.StringIO(), 0
    settings = {"COLUMNS": "160"} | environment
    with mock.patch.dict(os.environ, settings), chdir(cwd), redirect_stdout(out), redirect_stderr(told):
        try:
            main(words)
        except SystemExit as end:
            code = end.code or 0
    return CompletedProcess(words, code, out.getvalue(), told.getvalue())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """``kava calibrate`` on models that are trained first: folder, spec fields, what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    fields = tiny.fields(losses=[{"name": "mercator"}])
    fields["student"] |= {"pretrain": PRETRAIN}
    fields["teachers"][0] |= {
        "pretrain": PRETRAIN,
        "align": {"layer_mapper": {"name": "cka", "on": "keys", "top_k": 3}},
    }
    (folder / "spec.yaml").write_text(json.dumps(fields))
    cache = str(folder / "cache")
    done = kava("calibrate", "spec.yaml", "train.steps=2", "--output", "maps", cwd=folder, KAVA_CACHE=cache)
    assert done.returncode == 0, done.stderr
    return folder, fields, done


def lines(done):
    """The lines for the spec, by teacher."""
    text = done.stdout.splitlines()
    return {
        line.removesuffix(":").rpartition(" ")[2]: yaml.safe_load(text[i + 1])
        for i, line in enumerate(text)
        if line.startswith("for the spec")
    }


def test_calibrate_writes_maps_and_pictures(calibrated):
    folder, _, done = calibrated
    names = sorted(file.name for file in (folder / "maps").iterdir())
    assert names == [f"{name}.{end}" for name in ("gpt", "wide") for end in ("json", "png", "safetensors")]
    assert (folder / "maps/wide.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in done.stderr
    assert "tiny: layers of student and teacher 'gpt' on 32 examples" in done.stderr
    record = json.loads((folder / "maps/wide.json").read_text())
    assert record["on"] == "keys"
    assert {len(row) for row in record["layers"].values()} == {3}
    assert "model.safetensors" in record["measured"]["student"]["weights"]


def test_calibrate_prints_what_is_read_and_the_line_for_the_spec(calibrated):
    folder, _, done = calibrated
    path = str(folder.resolve() / "maps")
    assert lines(done) == {
        "wide": {
            "layer_mapper": {"name": "cka", "on": "keys", "top_k": 3, "map": f"{path}/wide.safetensors"}
        },
        "gpt": {"layer_mapper": {"name": "cka", "map": f"{path}/gpt.safetensors"}},
    }
    rows = [line.split("│")[1:3] for line in done.stdout.splitlines() if line.startswith("│")]
    state = load_file(folder / "maps/wide.safetensors")
    weight, layer = state["matrix"][1].max(0)
    assert rows[1][0].strip() == "1"
    assert rows[1][1].split("   ")[0].strip() == (
        f"{layer}: {weight:.2f} ({state['similarity'][1, layer]:.2f})"
    )
    assert "random weights" not in done.stdout


def with_lines(fields, done):
    """The spec's fields with the printed lines put in."""
    made = json.loads(json.dumps(fields))
    for teacher in made["teachers"]:
        teacher["align"] = lines(done)[teacher["name"]]
    return made


def test_training_uses_the_calibrated_maps(calibrated):
    folder, fields, done = calibrated
    (folder / "mapped.yaml").write_text(json.dumps(with_lines(fields, done)))
    trained = kava_here("train", "mapped.yaml", "train.steps=2", cwd=folder, KAVA_CACHE=str(folder / "cache"))
    assert trained.returncode == 0, trained.stderr
    [run_folder] = (folder / "runs/tiny").glob("main-*")
    assert not (run_folder / "layer_maps").exists()
    [checkpoint] = (run_folder / "checkpoints").glob("checkpoint-2")
    saved = load_file(checkpoint / "aligner.safetensors")
    measured = load_file(folder / "maps/wide.safetensors")["similarity"]
    assert torch.equal(saved["aligners.0.layer_map.mapper.similarity"], measured)


def test_maps_of_other_models_are_refused_in_training(calibrated, tmp_path):
    """The teacher was trained for longer since."""
    folder, fields, done = calibrated
    other = with_lines(fields, done)
    other["teachers"][0]["pretrain"] = {**PRETRAIN, "steps": 3}
    (tmp_path / "spec.yaml").write_text(json.dumps(other))
    trained = kava_here("train", "spec.yaml", cwd=tmp_path, KAVA_CACHE=str(folder / "cache"))
    assert trained.returncode == SpecError.exit_code
    assert trained.stderr.splitlines()[-1] == (
        f"teacher 'wide': layer_mapper.map: {folder.resolve()}/maps/wide.safetensors: was measured with "
        "another teacher (weights differ); measure again with kava calibrate, or leave 'map' out"
    )


def test_calibrating_again_changes_nothing(calibrated, tmp_path):
    folder, _, done = calibrated
    shutil.copytree(folder / "maps", tmp_path / "maps")
    again = kava_here(
        *("calibrate", "spec.yaml", "train.steps=2", "--output", "maps"),
        cwd=folder,
        KAVA_CACHE=str(folder / "cache"),
    )
    assert again.stdout == done.stdout
    assert "layers of student" not in again.stderr
    assert (folder / "maps/gpt.json").read_text() == (tmp_path / "maps/gpt.json").read_text()


def test_calibrate_says_that_a_student_is_random_and_refuses_without_teachers(tmp_path):
    teachers = tiny.FIELDS["teachers"][1:]
    (tmp_path / "spec.yaml").write_text(json.dumps(tiny.fields(teachers=teachers)))
    done = kava_here("calibrate", "spec.yaml", "--output", "maps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: the student was measured with its random weights of seed 0\n" in done.stdout
    none = kava_here("calibrate", "spec.yaml", "losses=[]", "--output", "none", cwd=tmp_path)
    assert none.returncode == SpecError.exit_code
    assert none.stderr == "kava calibrate: no teacher is used; it needs 'teachers' and a loss of weight > 0\n"


@pytest.mark.parametrize(("layer", "t_layer"), [(1, 1), (2, 40), (24, 28), (3, 2)])
def test_heat_map_is_drawn_for_every_size(tmp_path, layer, t_layer):
    pytest.importorskip("matplotlib")
    similarity = torch.rand(layer, t_layer)
    weights = torch.nn.functional.one_hot(similarity.argmax(1), t_layer).float()
    path = tmp_path / "new" / "map.png"
    assert draw_similarity(similarity, weights, path, teacher="t", title="a title")
    assert path.stat().st_size > 3000


def test_a_run_is_not_resumed_with_another_map(tmp_path: Path) -> None:
    """Sources would come from the new map and weights from the old one: a target of zeros."""
    record = {"layer_maps": {"a": "1" * 64}}
    folder = Folder.planned(tiny.spec(tmp_path), "main", 0)
    folder.path.mkdir(parents=True)
    folder.begin({"data": {}, "layer_maps": {"a": "0" * 64}})
    with pytest.raises(SpecError, match="a layer map changed since this run began"):
        folder.begin({"data": {}} | record)
    folder.begin({"data": {}, "layer_maps": {"a": "0" * 64}})
