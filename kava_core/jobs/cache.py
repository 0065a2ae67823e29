"""``kava cache``: run the teachers once over all examples and keep their aligned caches."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.layer_maps import with_measured_maps
from kava_core.build.pipeline import load_projectors, projector_state
from kava_core.build.stored import (
    example_key,
    open_store,
    store_folder,
    store_ingredients,
    store_layout,
    unfinished_folder,
)
from kava_core.build.time_plans import PlansTime
from kava_core.console import progress, quiet
from kava_core.data.collate import EncodedExample
from kava_core.data.store.codec import encode_vectors
from kava_core.data.store.index import (
    INDEX_FILE,
    MAPS_FOLDER,
    PROJECTORS_FILE,
    Ingredients,
    Layout,
    read_index,
)
from kava_core.data.store.reader import SCALE, VALID, flatten_example, tensor_name
from kava_core.data.store.writer import StoreWriter, drop_records, save_durably
from kava_core.distill.calibration import aligned_targets
from kava_core.distill.distiller import Distiller
from kava_core.errors import KavaError, NonFiniteError, SpecError
from kava_core.kv.compare.values import Aligned
from kava_core.processes import world_size
from kava_core.runs import checkpoint
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.before_training import calibrate
from kava_core.train.run import with_trained_models


@dataclass(frozen=True)
class Cached:
    """A complete store."""

    folder: Path
    examples: int
    tokens: int
    """Student tokens of all examples."""
    bytes: int
    """On disk, everything included."""
    made: bool
    """Whether it was written now; it may have been there."""

    def __str__(self) -> str:
        each = self.bytes / max(self.tokens, 1)
        what = "written" if self.made else "there already"
        return (
            f"{self.folder}: {what}; {self.examples:,} examples, {self.tokens:,} student tokens, "
            f"{self.bytes / 2**20:,.1f} MiB, {each:,.1f} bytes a token"
        )


def cache_all(variants: Mapping[str, PipelineSpec], *, verify: bool = False) -> Iterator[str]:
    """``cache`` for every variant and seed; a line for each store, and for variants without teachers."""
    told = set()
    for name, spec in variants.items():
        for seed in spec.seeds:
            found = cache(spec, seed=seed, verify=verify)
            if found is None:
                yield f"{name}: runs no teacher, nothing to store"
                break
            if found.folder not in told:
                yield str(found)
            told.add(found.folder)


def cache(spec: PipelineSpec, *, seed: int, verify: bool = False) -> Cached | None:
    """Write the store of one variant and seed, go on with a half-written one, or find it complete.

    With ``verify`` nothing is written: the content of every file is compared with its sha256.

    Returns:
        The store; None where this spec runs no teacher.

    Raises:
        SpecError: the spec asks for no store, or has none yet (``verify``), or cannot have one.
        CheckpointError: the store is there but damaged.
        KavaError: another process writes it, or the disk is full.
    """
    if spec.store is None:
        raise SpecError("store: the spec names none; add store: {folder: …}")
    if world_size() > 1:
        raise KavaError("kava cache: runs in one process, not under torchrun")
    if not used_teachers(spec):
        return None
    with quiet():
        spec = with_trained_models(spec)
        data = make_data(spec)
        wanted = store_ingredients(spec, data, seed=seed)
        return _verified(spec, wanted) if verify else _made(spec, data, wanted, seed)


def _verified(spec: PipelineSpec, wanted: Ingredients) -> Cached:
    assert spec.store is not None
    store = open_store(spec.store, wanted)
    checkpoint.verify(store.folder)
    return _described(store.folder, made=False)


def _made(spec: PipelineSpec, data: Data, wanted: Ingredients, seed: int) -> Cached:
    assert spec.store is not None
    final = store_folder(spec.store, wanted)
    with _alone(final):
        if final.is_dir():
            open_store(spec.store, wanted)
            return _described(final, made=False)
        partial = unfinished_folder(final)
        partial.mkdir(exist_ok=True)
        if not (partial / INDEX_FILE).is_file():
            _write(spec, data, wanted, partial, seed)
        _seal(partial, final)
    return _described(final, made=True)


@contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Hold the store's lock file; KavaError where another process does, or where nothing can be written."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        stream = final.with_name(f"{final.name}.lock").open("w")
    except OSError as error:
        raise KavaError(f"{final.parent}: cannot be written: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KavaError(f"{final}: another process is writing this store") from error
        yield


def _seal(partial: Path, final: Path) -> None:
    try:
        drop_records(partial)
        checkpoint.seal(partial, final)
    except OSError as error:
        raise KavaError(f"{final}: cannot be written: {error.strerror}") from error


def _described(folder: Path, *, made: bool) -> Cached:
    index = read_index(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Cached(folder, sum(len(shard.items) for shard in index.shards), index.tokens, size, made)


def _write(spec: PipelineSpec, data: Data, wanted: Ingredients, partial: Path, seed: int) -> None:
    assert spec.store is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = with_measured_maps(spec, partial / MAPS_FOLDER, data, seed=seed)
    distiller = make_distiller(spec, data, seed=seed).to(device).eval()
    assert spec.store is not None
    distiller.place_teachers(device)
    _calibrated(distiller, data, spec, device, partial / PROJECTORS_FILE)
    writer = StoreWriter(partial, store_layout(spec, distiller.pipeline), shard_mb=spec.store.shard_mb)
    missing = _missing(data, writer.done)
    with progress(f"{spec.name}: cached", len(missing)) as advance:
        loader: Any = DataLoader(
            missing,  # type: ignore[arg-type]
            spec.train.batch_size,
            collate_fn=_WithItems(PlansTime(data.plain_collator, distiller.pipeline)),
            num_workers=spec.train.workers,
        )
        for items, batch in loader:
            _add(writer, items, _aligned(distiller, batch, spec.train.precision, device))
            advance(len(items))
    writer.finish(wanted)


def _calibrated(
    distiller: Distiller, data: Data, spec: PipelineSpec, device: torch.device, file: Path
) -> None:
    """Calibrate, or go on with what was computed before: all shards must come from one projection."""
    if file.is_file():
        load_projectors(distiller.pipeline, file)
        return
    calibrate(distiller, data, spec, device)
    save_durably(projector_state(distiller.pipeline), file)


def _missing(data: Data, done: set[str]) -> list[EncodedExample]:
    """Items that are not stored yet, each text once; the longest first, so that memory runs out at once."""
    items = {
        example_key(item.example): item for item in (*data.train_items.items, *data.validation_items.items)
    }
    return sorted((item for key, item in items.items() if key not in done), key=lambda i: -len(i.student))


class _WithItems:
    """A collator that also hands out what it was given."""

    def __init__(self, collate: PlansTime) -> None:
        self.collate = collate

    def __call__(self, items: list[EncodedExample]) -> tuple[list[EncodedExample], dict[str, Any]]:
        return items, self.collate(items)


@torch.no_grad()
def _aligned(
    distiller: Distiller, batch: dict[str, Any], precision: str, device: torch.device
) -> dict[str, Aligned]:
    """Every teacher's target, by the training step's own code and in its precision."""
    batch = send_to_device(batch, device)
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, half, enabled=precision != "fp32"):
        found = aligned_targets(distiller, batch)  # type: ignore[arg-type]
    return dict(zip(distiller.pipeline.names, found, strict=True))


def _add(writer: StoreWriter, items: Sequence[EncodedExample], aligned: dict[str, Aligned]) -> None:
    """Encode a batch on its device and hand it, example by example, to the writer."""
    tensors = {
        name: tensor.cpu()
        for teacher, one in aligned.items()
        for name, tensor in _encoded(teacher, one, writer.layout).items()
    }
    for row, item in enumerate(items):
        time = len(item.student)
        blocks = {name: flatten_example(tensor, row, time) for name, tensor in tensors.items()}
        writer.add(example_key(item.example), time, blocks)


def _encoded(teacher: str, aligned: Aligned, layout: Layout) -> dict[str, Tensor]:
    """Stored tensors of a batch by name, each ``batch layer head time dim``; zero where nothing is valid."""
    valid = aligned.valid[:, None, None, :, None]
    found = {tensor_name(teacher, VALID): valid}
    for part, x in aligned.target.items():
        x = x.where(valid, 0)
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"teacher {teacher!r}: its aligned {part} hold NaN or infinity; nothing stored"
            )
        numbers, scale = encode_vectors(x, layout.dtype)
        found[tensor_name(teacher, part)] = numbers
        if scale is not None:
            found[tensor_name(teacher, part + SCALE)] = scale[..., None]
    return found
