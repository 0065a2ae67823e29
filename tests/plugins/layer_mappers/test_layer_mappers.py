"""Layer mappers against their formulas, the layers of known pairs, and what CKA finds in made-up layers."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from kava_core.errors import KavaError, SpecError
from kava_core.kv.align.layer_map import LayerMap
from kava_core.kv.maths.cka import StreamedCKA
from kava_core.protocols.axes import Geometry
from kava_core.protocols.layer_mapper import LayerMapper, Measured
from kava_plugins.layer_mappers import kava_layer_mappers

SHAPE = {"head": 1, "dim": 2, "qhead": 1, "hidden": 4}
PAIRS = [(1, 1), (1, 3), (2, 5), (4, 2), (7, 7), (28, 24)]


def build(t_layer, layer, name="ratio", **fields):
    [declaration] = [one for one in kava_layer_mappers() if one.component_name() == name]
    return declaration(**fields).build(
        teacher=Geometry(layer=t_layer, **SHAPE), student=Geometry(layer=layer, **SHAPE)
    )


@pytest.mark.parametrize("t_layer", [1, 2, 3, 4, 7, 24, 28])
@pytest.mark.parametrize("layer", [1, 2, 3, 5, 12, 28, 40])
def test_ratio_is_the_formula(t_layer, layer):
    wanted = torch.zeros(layer, t_layer)
    for i in range(layer):
        depth = math.floor(Fraction((i + 1) * t_layer, layer) + Fraction(1, 2)) - 1
        wanted[i, min(max(depth, 0), t_layer - 1)] = 1
    assert torch.equal(build(t_layer, layer)(), wanted)


@pytest.mark.parametrize(
    ("t_layer", "layer", "read"),
    [(4, 2, [1, 3]), (28, 4, [6, 13, 20, 27]), (2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0]), (5, 1, [4])],
)
def test_ratio_of_known_pairs(t_layer, layer, read):
    assert build(t_layer, layer)().argmax(1).tolist() == read


@pytest.mark.parametrize(
    ("name", "sources", "rows"),
    [
        ("ratio", 2, [[0, 1], [2, 3], [4, 5]]),
        ("ratio", 3, [[0, 1, 2], [2, 3, 4], [3, 4, 5]]),
        ("ratio", 9, [[0, 1, 2, 3, 4, 5]] * 3),
        ("last_aligned", 1, [[3], [4], [5]]),
        ("last_aligned", 2, [[2, 3], [3, 4], [4, 5]]),
        ("last_aligned", 9, [[0, 1, 2, 3, 4, 5]] * 3),
    ],
)
def test_sources_are_averaged(name, sources, rows):
    wanted = torch.zeros(3, 6)
    for i, row in enumerate(rows):
        wanted[i, row] = 1 / len(row)
    torch.testing.assert_close(build(6, 3, name, sources=sources)(), wanted)
    assert (build(6, 3, name, sources=sources)().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(("t_layer", "layer"), PAIRS)
def test_last_aligned_lets_the_last_layers_meet(t_layer, layer):
    wanted = [[float(j == max(t_layer - layer + i, 0)) for j in range(t_layer)] for i in range(layer)]
    assert build(t_layer, layer, "last_aligned")().tolist() == wanted


def test_chosen_layers_are_averaged_row_by_row():
    assert build(4, 3, "chosen", layers=[[0], [1, 3], [-1, 3, -2]])().tolist() == [
        [1, 0, 0, 0],
        [0, 0.5, 0, 0.5],
        [0, 0, 0.5, 0.5],
    ]
    assert build(4, 2, "chosen", layers=[[2, 3]])().tolist() == [[0, 0, 0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([[0], [1]], "2 rows for a student of 3 layers; give 3, or one for all"),
        ([[4]], "no layer 4 in a teacher of 4; possible: 0 to 3, or -1 to -4 from the end"),
        ([[-5]], "no layer -5 in a teacher of 4"),
    ],
)
def test_chosen_layers_that_are_not_there(layers, said):
    with pytest.raises(SpecError, match=f"^layers: {said}"):
        build(4, 3, "chosen", layers=layers)


@pytest.mark.parametrize("layers", [[], [[]], [[0], []], [[0.5]]])
def test_rows_of_chosen_layers_are_not_empty(layers):
    with pytest.raises(ValidationError):
        build(4, 3, "chosen", layers=layers)


@pytest.mark.parametrize(("t_layer", "layer"), PAIRS)
def test_learned_begins_around_ratio(t_layer, layer):
    mapper = build(t_layer, layer, "learned")
    assert mapper().argmax(1).tolist() == build(t_layer, layer)().argmax(1).tolist()
    torch.testing.assert_close(mapper().sum(1), torch.ones(layer))
    assert mapper().min() > 5e-4


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_learned_weights_are_a_softmax_with_its_temperature(temperature):
    mapper = build(4, 2, "learned", temperature=temperature)
    for row, centre in zip(mapper().tolist(), (1, 3), strict=True):
        raw = [(1 + abs(j - centre)) ** (-2 / temperature) for j in range(4)]
        assert row == pytest.approx([each / sum(raw) for each in raw], rel=1e-5)


def test_learned_weights_move_towards_the_layer_that_fits():
    mapper = build(6, 1, "learned")
    layers = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(mapper.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (mapper() @ layers - layers[1]).square().mean().backward()
        assert mapper.logits.grad.isfinite().all()
        assert (mapper.logits.grad != 0).all()
        optimizer.step()
    assert mapper().argmax() == 1
    assert mapper().max() > 0.9


def test_learned_rate_is_its_own_where_given():
    assert build(2, 2, "learned").learning_rate is None
    assert build(2, 2, "learned", learning_rate=0.05).learning_rate == 0.05


LINKS = {0: 4, 1: 1, 2: 5}
"""Student layer to the teacher layer that holds nearly the same."""


def sides(batch=6, time=20, *, seed=0):
    """Six teacher layers of noise, three student layers that are rotated copies of some, with noise."""
    made = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, 6, time, 8, generator=made)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]
    student = teacher[:, list(LINKS.values())] @ turn[:, :5]
    return teacher, student + 0.3 * torch.randn(student.shape, generator=made)


def measured(teacher, student, valid=None, **fields):
    mapper = build(teacher.shape[1], student.shape[1], "cka", **fields)
    valid = torch.ones(teacher.shape[0], teacher.shape[2], dtype=torch.bool) if valid is None else valid
    mapper.observe(teacher, student, valid)
    mapper.finish()
    return mapper


@pytest.mark.parametrize(("t_layer", "layer"), PAIRS)
@pytest.mark.parametrize("top_k", [1, 2, 50])
def test_cka_reads_what_ratio_does_until_measured(t_layer, layer, top_k):
    mapper = build(t_layer, layer, "cka", top_k=top_k)
    assert isinstance(mapper, Measured)
    assert isinstance(mapper, LayerMapper)
    assert torch.equal(mapper(), build(t_layer, layer, sources=top_k)())
    assert not mapper.measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cka_finds_the_layers_that_hold_the_same(dtype):
    mapper = measured(*(x.to(dtype) for x in sides()), top_k=1)
    wanted = torch.zeros(3, 6)
    wanted[list(LINKS), list(LINKS.values())] = 1
    assert torch.equal(mapper(), wanted)
    assert mapper.measured
    assert mapper.similarity.dtype == torch.float32


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 0.1), (2, 0.1), (3, 0.02), (6, 1.0), (9, 1.0)])
def test_cka_weights_are_a_softmax_over_the_most_similar(top_k, temperature):
    mapper = measured(*sides(), top_k=top_k, temperature=temperature)
    for row, weights in zip(mapper.similarity.tolist(), mapper().tolist(), strict=True):
        best = sorted(range(6), key=lambda j: -row[j])[:top_k]
        total = sum(math.exp(row[j] / temperature) for j in best)
        wanted = [math.exp(row[j] / temperature) / total if j in best else 0 for j in range(6)]
        assert weights == pytest.approx(wanted, abs=1e-6)


def test_cka_similarity_is_that_of_the_stream():
    """One minibatch holds all rows, so their order cannot matter."""
    teacher, student = sides()
    stream = StreamedCKA(256)
    stream.add(teacher.transpose(0, 1).flatten(1, 2), student.transpose(0, 1).flatten(1, 2))
    torch.testing.assert_close(
        measured(teacher, student, skip=0).similarity.double(), stream.similarity(), rtol=0, atol=1e-5
    )


def test_cka_is_blind_to_padding():
    teacher, student = sides()
    valid = torch.ones(6, 20, dtype=torch.bool)
    valid[2, 11:] = valid[5] = False
    dirty = [x.masked_fill(~valid[:, None, :, None], math.nan) for x in (teacher, student)]
    longer = [torch.nn.functional.pad(x, (0, 0, 3, 4), value=1e4) for x in dirty]
    plain = measured(teacher, student, valid)
    assert torch.equal(measured(*dirty, valid).similarity, plain.similarity)
    more = torch.nn.functional.pad(valid, (3, 4))
    assert torch.equal(measured(*longer, more).similarity, plain.similarity)


def test_cka_is_blind_to_batches_without_a_valid_position():
    teacher, student = sides()
    valid = torch.ones(6, 20, dtype=torch.bool)
    mapper = build(6, 3, "cka")
    for mask in (~valid, valid, ~valid):
        mapper.observe(teacher, student, mask)
    mapper.observe(teacher[:, :, :0], student[:, :, :0], valid[:, :0])
    mapper.finish()
    assert torch.equal(mapper.similarity, measured(teacher, student).similarity)


def test_cka_hardly_depends_on_the_batch_size():
    """Only on which rows share a minibatch; exactly not where one minibatch holds all."""
    teacher, student = sides(batch=48)
    valid = torch.ones(48, 20, dtype=torch.bool)
    for rows, tolerance in ((1024, 1e-5), (128, 0.03)):
        mapper = build(6, 3, "cka", rows=rows)
        for start in range(0, 48, 5):
            part = slice(start, start + 5)
            mapper.observe(teacher[part], student[part], valid[part])
        mapper.finish()
        whole = measured(teacher, student, rows=rows)
        torch.testing.assert_close(mapper.similarity, whole.similarity, rtol=0, atol=tolerance)


def test_cka_minibatches_mix_the_texts():
    """Rows side by side would see only what differs inside a text; here nothing does."""
    made = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 1, 1, 8, generator=made).expand(64, 1, 16, 8)
    student = teacher[..., :5] @ torch.randn(5, 5, generator=made)
    noisy = [x + 0.1 * torch.randn(x.shape, generator=made) for x in (teacher, student)]
    assert measured(*noisy, rows=16, skip=0).similarity.item() > 0.5
    ordered = StreamedCKA(16)
    ordered.add(*(x.transpose(0, 1).flatten(1, 2) for x in noisy))
    assert ordered.similarity().item() < 0.2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_cka_refuses_too_few_positions(count):
    teacher, student = sides()
    valid = torch.zeros(6, 20, dtype=torch.bool)
    valid[0, :count] = True
    with pytest.raises(KavaError, match=f"^CKA: {count} rows were added, at least 4 are needed$"):
        measured(teacher, student, valid, skip=0)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_huge_first_tokens_do_not_decide(skip):
    """Independent layers whose first token, after padding, is a hundred times larger."""
    made = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(30, 1, 20, width, generator=made) for width in (64, 32))
    valid = torch.ones(30, 20, dtype=torch.bool)
    valid[::2, :3] = False
    first = valid & (valid.cumsum(1) == 1)
    for side in (teacher, student):
        side[:, :, :, 0] += 100 * first[:, None]
    found = measured(teacher, student, valid, skip=skip).similarity.item()
    assert found > 0.9 if skip == 0 else abs(found) < 0.05


def test_a_layer_like_no_other_reads_what_ratio_does():
    teacher, student = sides()
    student[:, 1] = 5.0
    mapper = measured(teacher, student)
    assert torch.equal(mapper()[1], build(6, 3, sources=2)()[1])
    assert mapper()[0].argmax() == LINKS[0]


def test_equal_similarities_read_the_lower_layers():
    teacher, _ = sides()
    same = teacher[:, :1].expand(-1, 6, -1, -1)
    mapper = measured(same, (same @ torch.randn(8, 5))[:, :3])
    assert mapper().tolist() == [[0.5, 0.5, 0, 0, 0, 0]] * 3


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_every_layer_reads_equally_many_so_that_they_can_be_joined(temperature):
    mapper = measured(*sides(), top_k=3, temperature=temperature)
    assert mapper().gt(0).sum(1).tolist() == [3, 3, 3]
    extents = {"teacher": Geometry(layer=6, **SHAPE), "student": Geometry(layer=3, **SHAPE)}
    assert LayerMap(mapper, **extents, layers=(0, 2), combine="concat").joined == 3


def stored(folder, mapper, on="hidden"):
    """A map file and its record, as documented."""
    file = folder / "Llama-3.2.safetensors"
    save_file(mapper.state_dict(), file)
    record = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "on": on}
    (folder / "Llama-3.2.json").write_text(json.dumps(record))
    return str(file)


def test_a_map_gives_the_same_weights_without_measuring(tmp_path):
    mapper = measured(*sides())
    again = build(6, 3, "cka", map=stored(tmp_path, mapper))
    assert torch.equal(again(), mapper())
    assert again.measured
    assert torch.equal(again.similarity, mapper.similarity)


def test_a_map_serves_other_choices_of_layers(tmp_path):
    file = stored(tmp_path, measured(*sides()))
    wanted = measured(*sides(), top_k=4, temperature=0.5)
    assert torch.equal(build(6, 3, "cka", top_k=4, temperature=0.5, map=file)(), wanted())


def test_on_the_meta_device_only_shapes_matter():
    with torch.device("meta"):
        mapper = build(6, 3, "cka", map="absent.safetensors")
    assert mapper().shape == (3, 6)


def broken_map(folder, how):
    """A map file that must be refused."""
    file = stored(folder, measured(*sides()))
    record = folder / "Llama-3.2.json"
    if how == "absent":
        (folder / "Llama-3.2.safetensors").unlink()
    elif how == "no record":
        record.unlink()
    elif how == "damaged record":
        record.write_text("{")
    elif how == "altered":
        raw = bytearray((folder / "Llama-3.2.safetensors").read_bytes())
        raw[-1] ^= 1
        (folder / "Llama-3.2.safetensors").write_bytes(raw)
    elif how == "no map":
        stored(folder, torch.nn.Linear(2, 2))
    return file


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("absent", "cannot read Llama-3.2.safetensors: No such file or directory; {anew}"),
        ("no record", "cannot read Llama-3.2.json: No such file or directory; {anew}"),
        ("damaged record", "Llama-3.2.json is damaged: {json}; {anew}"),
        ("altered", "is not the file that Llama-3.2.json describes; {anew}"),
        ("no map", "holds no similarities: 'similarity'; {anew}"),
    ],
)
def test_a_map_that_cannot_be_trusted_is_refused(tmp_path, how, told):
    file = broken_map(tmp_path, how)
    with pytest.raises(SpecError) as caught:
        build(6, 3, "cka", map=file)
    wanted = told.format(
        anew="measure again with kava calibrate",
        json="Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    )
    assert str(caught.value) == f"map: {file}: {wanted}"


def test_a_map_of_other_layers_is_refused(tmp_path):
    file = stored(tmp_path, measured(*sides()))
    with pytest.raises(SpecError) as caught:
        build(5, 3, "cka", map=file)
    assert str(caught.value) == (
        f"map: {file}: holds 3 × 6 layers, but the student has 3 and the teacher 5; "
        "measure again with kava calibrate"
    )


def test_a_map_of_something_else_is_refused(tmp_path):
    file = stored(tmp_path, measured(*sides()), on="keys")
    with pytest.raises(SpecError) as caught:
        build(6, 3, "cka", map=file)
    assert str(caught.value) == (
        f"map: {file}: was measured on keys, not on hidden; measure again with kava calibrate, or set 'on'"
    )
