"""The store's files: numbers within their bounds, any example from anywhere, nothing half-written taken."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kava_core.data.store.codec import StoredDtype, bytes_per_vector, decode_vectors, encode_vectors
from kava_core.data.store.index import (
    INDEX_FILE,
    Layout,
    ingredient_differences,
    nearest_store,
    read_index,
    store_digest,
)
from kava_core.data.store.reader import SCALE, VALID, Store, decode_target, tensor_name
from kava_core.data.store.writer import StoreWriter, drop_records
from kava_core.errors import CheckpointError, KavaError, NonFiniteError
from kava_core.jobs.cache import encode_target
from kava_core.kv.compare.values import Aligned
from kava_core.protocols.axes import Cache
from kava_core.runs import checkpoint

DTYPES: tuple[StoredDtype, ...] = ("float32", "bfloat16", "int8")
TEACHERS = {"a": {"keys": (2, 3, 8), "values": (2, 3, 8)}, "b.keys": {"keys": (1, 1, 5)}}
LENGTHS = [3, 1, 7, 4, 1, 6, 2]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_store(
    folder: Path, dtype: StoredDtype = "float32", *, limit: int = 2000
) -> dict[str, dict[str, Tensor]]:
    """A store of several shards in ``folder``; the float32 targets it was made of, by example and tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder, Layout(dtype, TEACHERS), shard_mb=1)  # type: ignore[arg-type]
    writer.limit = limit
    originals = {f"example {i}": example(time, seed=i) for i, time in enumerate(LENGTHS)}
    for key, tensors in originals.items():
        if key not in writer.done:
            writer.add(key, tensors["a/keys"].shape[2], stored(tensors, dtype))
    writer.finish({"what": "test"})
    return originals


def example(time: int, *, seed: int) -> dict[str, Tensor]:
    """Every target of one example, ``layer head time dim``, and validity."""
    found: dict[str, Tensor] = {}
    for number, (teacher, parts) in enumerate(TEACHERS.items()):
        for place, (part, (layer, head, dim)) in enumerate(parts.items()):
            found[tensor_name(teacher, part)] = normal(
                layer, head, time, dim, seed=100 * seed + 10 * number + place
            )
        found[tensor_name(teacher, VALID)] = torch.arange(time) % 3 != 1
    return found


def stored(tensors: dict[str, Tensor], dtype: StoredDtype) -> dict[str, Tensor]:
    blocks = {}
    for name, x in tensors.items():
        numbers, scale = (x, None) if name.endswith(VALID) else encode_vectors(x, dtype)
        blocks[name] = numbers.reshape(-1)
        if scale is not None:
            blocks[name + SCALE] = scale.reshape(-1)
    return blocks


# numbers


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 50.0])
def test_int8_is_off_by_at_most_half_a_step(size: float) -> None:
    """Against float64: a step is the largest magnitude of the vector over 127."""
    x = normal(3, 2, 5, 16) * size
    x[0, 0, 0, 3] *= 100
    back = decode_vectors(*encode_vectors(x, "int8")).double()
    step = x.double().abs().amax(-1, keepdim=True) / 127
    assert ((back - x.double()).abs() <= step * 0.5001).all()


def test_int8_keeps_zeros_signs_and_the_largest_number() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [-127.0, 64.0, 127.0], [1e-45, 0.0, 0.0]])
    numbers, scale = encode_vectors(x, "int8")
    assert numbers.tolist()[:2] == [[0, 0, 0], [-127, 64, 127]]
    assert torch.isfinite(decode_vectors(numbers, scale)).all()
    assert torch.equal(decode_vectors(encode_vectors(-x, "int8")[0], scale)[:2], -x[:2])


def test_bfloat16_is_off_by_at_most_half_of_its_last_bit() -> None:
    x = normal(4, 2, 3, 32) * torch.logspace(-6, 6, 32)
    back = decode_vectors(*encode_vectors(x, "bfloat16"))
    assert back.dtype == torch.float32
    assert ((back.double() - x.double()).abs() <= x.double().abs() * 2**-8).all()
    assert torch.equal(decode_vectors(*encode_vectors(x, "float32")), x)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 256), ("bfloat16", 128), ("int8", 68)])
def test_bytes_of_a_vector(dtype: StoredDtype, expected: int) -> None:
    assert bytes_per_vector(64, dtype) == expected


def test_invalid_positions_are_stored_as_zeros_whatever_they_hold() -> None:
    x = normal(2, 1, 1, 3, 4)
    x[0, :, :, 1] = torch.nan
    valid = torch.tensor([[True, False, True], [True, True, False]])
    layout = Layout("int8", {"a": {"keys": (1, 1, 4)}})
    found = encode_target("a", Aligned(Cache(keys=x), valid), layout)
    back = decode_vectors(found["a/keys"], found["a/keys.scale"][..., 0])
    assert torch.equal(back.ne(0).any(-1)[:, 0, 0], valid)


def test_a_valid_position_that_is_not_finite_is_refused() -> None:
    x = normal(1, 1, 1, 2, 4)
    x[..., 1, 2] = torch.inf
    layout = Layout("bfloat16", {"a": {"keys": (1, 1, 4)}})
    with pytest.raises(NonFiniteError, match=r"^teacher 'a': its aligned keys hold NaN or infinity"):
        encode_target("a", Aligned(Cache(keys=x), torch.ones(1, 2, dtype=torch.bool)), layout)


# reading


def opened(folder: Path) -> Store:
    """The store as ``kava cache`` leaves it: with a manifest."""
    staged = folder.with_name(f"{folder.name}.partial")
    folder.rename(staged)
    checkpoint.seal(staged, folder)
    return Store(folder)


def assert_rows(side: dict, teacher: str, rows: list[dict[str, Tensor]], time: int) -> None:
    """Every row is the example's own target, and zero and invalid after it."""
    target, valid = decode_target(side)
    for row, tensors in enumerate(rows):
        own = tensors[tensor_name(teacher, VALID)]
        assert torch.equal(valid[row, : len(own)], own)
        assert not valid[row, len(own) :].any()
        for part, x in target.items():
            original = tensors[tensor_name(teacher, part)]
            assert x.shape == (len(rows), *original.shape[:2], time, original.shape[3])
            assert torch.equal(x[row, :, :, : len(own)], original)
            assert not x[row, :, :, len(own) :].any()


@pytest.mark.parametrize("order", [range(7), range(6, -1, -1), [3], [5, 0, 5, 2]])
def test_any_order_reads_the_same_targets(tmp_path: Path, order: list[int]) -> None:
    originals = made_store(tmp_path)
    store = opened(tmp_path)
    assert len(read_index(tmp_path).shards) > 2
    keys = [f"example {i}" for i in order]
    time = max(LENGTHS[i] for i in order) + 2
    for teacher, side in store.batch(keys, time).items():
        assert_rows(side, teacher, [originals[key] for key in keys], time)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_gives_back_what_was_encoded(tmp_path: Path, dtype: StoredDtype) -> None:
    originals = made_store(tmp_path, dtype)
    store = pickle.loads(pickle.dumps(opened(tmp_path)))
    side = store.batch(["example 2"], 7)["a"]
    assert side["target"]["keys"].dtype == getattr(torch, dtype)
    expected = decode_vectors(*encode_vectors(originals["example 2"]["a/keys"], dtype))
    assert torch.equal(decode_target(side)[0].any[0], expected)


def test_an_opened_store_can_be_pickled(tmp_path: Path) -> None:
    made_store(tmp_path)
    store = opened(tmp_path)
    first = store.batch(["example 0"], 3)["a"]["target"]["values"]
    again = pickle.loads(pickle.dumps(store)).batch(["example 0"], 3)["a"]["target"]["values"]
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_token_are_those_on_disk(tmp_path: Path, dtype: StoredDtype) -> None:
    made_store(tmp_path, dtype)
    index, total = read_index(tmp_path), 0
    for shard in index.shards:
        with safe_open(tmp_path / shard.file, framework="pt") as file:
            total += sum(x.nbytes for x in (file.get_tensor(name) for name in file.keys()))  # noqa: SIM118
    assert index.layout.bytes_per_token() * index.tokens == total
    assert index.tokens == sum(LENGTHS)


def test_an_example_that_is_not_there_is_named(tmp_path: Path) -> None:
    made_store(tmp_path)
    with pytest.raises(CheckpointError, match="example nobody is not in this store"):
        opened(tmp_path).batch(["nobody"], 3)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_index_is_one_line(tmp_path: Path, text: str) -> None:
    made_store(tmp_path)
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(
        CheckpointError, match=r"index\.json: (unreadable: .*|store format 99, this kava reads 1)$"
    ):
        opened(tmp_path)


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    made_store(tmp_path)
    store = opened(tmp_path)
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: cannot be read"):
        store.batch(["example 0"], 3)


def flip(file: Path) -> None:
    """Flip a bit of a file's last byte, which is a number's."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_found_when_its_shard_is_first_read(tmp_path: Path) -> None:
    """And only then: other shards are read as before. A file that is read again is not hashed again."""
    made_store(tmp_path)
    store = opened(tmp_path)
    last = read_index(tmp_path).shards[-1]
    flip(tmp_path / last.file)
    store.batch(["example 0"], 3)
    with pytest.raises(CheckpointError) as told:
        store.batch([last.items[-1][0]], 7)
    assert told.value.exit_code == 5
    assert (
        str(told.value) == f"{tmp_path / last.file}: altered since it was saved: not what the manifest says"
    )


def test_a_shard_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_store(tmp_path)
    opened(tmp_path).batch(["example 0"], 3)
    hashed: list[str] = []
    monkeypatch.setattr(checkpoint, "verify_file", lambda folder, name: hashed.append(name))
    again = Store(tmp_path)
    again.batch(["example 0"], 3)
    assert hashed == []
    again.batch(list(again.blocks), 7)
    assert sorted(hashed) == sorted({block.shard for block in again.blocks.values()})[1:]


def test_small_files_are_compared_when_a_store_is_opened(tmp_path: Path) -> None:
    made_store(tmp_path)
    opened(tmp_path)
    index = tmp_path / INDEX_FILE
    index.write_text(index.read_text().replace("example 0", "example 1", 1))
    with pytest.raises(CheckpointError, match=r"index\.json: altered since it was saved"):
        Store(tmp_path)


# writing


@pytest.mark.parametrize("lost", ["shard-00001.json", "shard-00001.safetensors"])
def test_going_on_writes_again_what_has_no_record(tmp_path: Path, lost: str) -> None:
    """Everything from the first incomplete shard on; the shards before it are left alone."""
    originals = made_store(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / lost).unlink()
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    made_store(tmp_path)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    keys = list(originals)
    for teacher, side in opened(tmp_path).batch(keys, 7).items():
        assert_rows(side, teacher, list(originals.values()), 7)


def test_records_and_drafts_go_before_a_store_is_sealed(tmp_path: Path) -> None:
    made_store(tmp_path)
    (tmp_path / "shard-00009.draft").write_bytes(b"half")
    drop_records(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert [file.name for file in tmp_path.glob("*.json")] == [INDEX_FILE]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=r"shard-00000\.safetensors: cannot be written: .*is the disk full"):
        made_store_in_nowhere(tmp_path / "gone")


def made_store_in_nowhere(folder: Path) -> None:
    writer = StoreWriter(folder, Layout("float32", TEACHERS), shard_mb=1)  # type: ignore[arg-type]
    writer.add("x", 3, stored(example(3, seed=0), "float32"))
    writer.flush()


# ingredients


def test_differences_are_told_in_words() -> None:
    then = {"kava": "0.1", "tokenizer of teacher 'a'": "f" * 64, "same": 1, "gone": [1]}
    now = {"kava": "0.2", "tokenizer of teacher 'a'": "e" * 64, "same": 1, "new": 3}
    assert ingredient_differences(now, then) == [
        "kava changed (0.1 → 0.2)",
        "tokenizer of teacher 'a' changed",
        "new changed",
        "gone changed",
    ]
    assert ingredient_differences(now, now) == []


def test_the_digest_is_that_of_the_content() -> None:
    assert (
        store_digest({"a": 1, "b": [2]})
        == store_digest({"b": [2], "a": 1})
        != store_digest({"a": 1, "b": [3]})
    )


def test_the_nearest_store_is_the_one_with_fewest_differences(tmp_path: Path) -> None:
    for name, kava in (("one", "0.1"), ("two", "0.2")):
        made_store(tmp_path / name)
        file = tmp_path / name / INDEX_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"ingredients": {"kava": kava, "x": 1}}))
    (tmp_path / "two" / "noise").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / INDEX_FILE).write_text("{")
    found = nearest_store(tmp_path, {"kava": "0.2", "x": 2})
    assert found == (tmp_path / "two", ["x changed (1 → 2)"])
    assert nearest_store(tmp_path / "broken", {}) is None
