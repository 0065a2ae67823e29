"""Run the teachers once over all examples and keep their aligned caches: ``kava cache``."""

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
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import with_pretrained_models


@dataclass(frozen=True)
class CompleteStore:
    """A complete store on disk."""

    folder: Path
    examples: int
    tokens: int
    """Student tokens of all examples."""
    bytes: int
    """Bytes on disk, everything included."""
    written: bool
    """Whether it was written now; else it had been there."""

    def __str__(self) -> str:
        token_bytes = self.bytes / max(self.tokens, 1)
        what = "written" if self.written else "there already"
        return (
            f"{self.folder}: {what}; {self.examples:,} examples, {self.tokens:,} student tokens, "
            f"{self.bytes / 2**20:,.1f} MiB, {token_bytes:,.1f} bytes a token"
        )


def write_stores(variants: Mapping[str, PipelineSpec], *, verify: bool = False) -> Iterator[str]:
    """Write the store of every variant and seed, as ``write_store`` does.

    Yields:
        A line for each store, and for each variant without teachers.
    """
    reported = set()
    for name, spec in variants.items():
        for seed in spec.seeds:
            store = write_store(spec, seed=seed, verify=verify)
            if store is None:
                yield f"{name}: runs no teacher, nothing to store"
                break
            if store.folder not in reported:
                yield str(store)
            reported.add(store.folder)


def write_store(spec: PipelineSpec, *, seed: int, verify: bool = False) -> CompleteStore | None:
    """Write the store of one variant and seed, go on with a half-written one, or find it complete.

    Args:
        spec: the variant's.
        seed: the run's.
        verify: write nothing; compare the content of every file with its sha256.

    Returns:
        The store; None if this spec runs no teacher.

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
        spec = with_pretrained_models(spec)
        data = make_data(spec)
        ingredients = store_ingredients(spec, data, seed=seed)
        if verify:
            return _verify_store(spec, ingredients)
        return _find_or_write(spec, data, ingredients, seed)


def _verify_store(spec: PipelineSpec, ingredients: Ingredients) -> CompleteStore:
    assert spec.store is not None
    store = open_store(spec.store, ingredients)
    checkpoint.verify(store.folder)
    return _describe_store(store.folder, written=False)


def _find_or_write(spec: PipelineSpec, data: Data, ingredients: Ingredients, seed: int) -> CompleteStore:
    assert spec.store is not None
    final = store_folder(spec.store, ingredients)
    with _store_lock(final):
        if final.is_dir():
            open_store(spec.store, ingredients)
            return _describe_store(final, written=False)
        partial = unfinished_folder(final)
        partial.mkdir(exist_ok=True)
        if not (partial / INDEX_FILE).is_file():
            _write_examples(spec, data, ingredients, partial, seed)
        _seal_store(partial, final)
    return _describe_store(final, written=True)


@contextmanager
def _store_lock(final: Path) -> Iterator[None]:
    """Hold the store's lock file; KavaError if another process does, or if nothing can be written."""
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


def _seal_store(partial: Path, final: Path) -> None:
    try:
        drop_records(partial)
        checkpoint.seal(partial, final)
    except OSError as error:
        raise KavaError(f"{final}: cannot be written: {error.strerror}") from error


def _describe_store(folder: Path, *, written: bool) -> CompleteStore:
    index = read_index(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    examples = sum(len(shard.items) for shard in index.shards)
    return CompleteStore(folder, examples, index.tokens, size, written)


def _write_examples(
    spec: PipelineSpec, data: Data, ingredients: Ingredients, partial: Path, seed: int
) -> None:
    """Write the examples that are missing in the folder ``partial``, then the store's index."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = with_measured_maps(spec, partial / MAPS_FOLDER, data, seed=seed)
    distiller = make_distiller(spec, data, seed=seed).to(device).eval()
    assert spec.store is not None
    distiller.place_teachers(device)
    _calibrate_once(distiller, data, spec, device, partial / PROJECTORS_FILE)
    writer = StoreWriter(partial, store_layout(spec, distiller.pipeline), shard_mb=spec.store.shard_mb)
    missing = _missing_items(data, writer.done)
    with progress(f"{spec.name}: cached", len(missing)) as advance:
        loader: Any = DataLoader(
            missing,  # type: ignore[arg-type]
            spec.train.batch_size,
            collate_fn=_CollatorWithItems(PlansTime(data.plain_collator, distiller.pipeline)),
            num_workers=spec.train.workers,
        )
        for items, batch in loader:
            aligned = _align_batch(distiller, batch, spec.train.precision, device)
            _write_batch(writer, items, aligned)
            advance(len(items))
    writer.finish(ingredients)


def _calibrate_once(
    distiller: Distiller, data: Data, spec: PipelineSpec, device: torch.device, file: Path
) -> None:
    """Calibrate, or go on with what was computed before: all shards must come from one projection."""
    if file.is_file():
        load_projectors(distiller.pipeline, file)
        return
    calibrate_components(distiller, data, spec, device)
    save_durably(projector_state(distiller.pipeline), file)


def _missing_items(data: Data, done: set[str]) -> list[EncodedExample]:
    """Return the items that are not stored yet, each text once.

    The longest come first, so that memory runs out at once if it does.
    """
    missing: dict[str, EncodedExample] = {}
    for item in (*data.train_items.items, *data.validation_items.items):
        key = example_key(item.example)
        if key not in done:
            missing[key] = item
    return sorted(missing.values(), key=lambda item: -len(item.student))


class _CollatorWithItems:
    """A collator that also returns the items it was given."""

    def __init__(self, collate: PlansTime) -> None:
        self.collate = collate

    def __call__(self, items: list[EncodedExample]) -> tuple[list[EncodedExample], dict[str, Any]]:
        return items, self.collate(items)


@torch.no_grad()
def _align_batch(
    distiller: Distiller, batch: dict[str, Any], precision: str, device: torch.device
) -> dict[str, Aligned]:
    """Return every teacher's target, made by the training step's own code and in its precision."""
    batch = send_to_device(batch, device)
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, half, enabled=precision != "fp32"):
        aligned = aligned_targets(distiller, batch)  # type: ignore[arg-type]
    return dict(zip(distiller.pipeline.names, aligned, strict=True))


def _write_batch(writer: StoreWriter, items: Sequence[EncodedExample], aligned: dict[str, Aligned]) -> None:
    """Encode a batch on its device and give it, example by example, to the writer."""
    tensors: dict[str, Tensor] = {}
    for teacher, target in aligned.items():
        for name, tensor in encode_target(teacher, target, writer.layout).items():
            tensors[name] = tensor.cpu()
    for row, item in enumerate(items):
        time = len(item.student)
        blocks = {name: flatten_example(tensor, row, time) for name, tensor in tensors.items()}
        writer.add(example_key(item.example), time, blocks)


def encode_target(teacher: str, aligned: Aligned, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors to store of a batch, by name, each ``batch layer head time dim``.

    They are zero at positions that are not valid.

    Raises:
        NonFiniteError: a valid position holds NaN or infinity.
    """
    valid = aligned.valid[:, None, None, :, None]
    tensors = {tensor_name(teacher, VALID): valid}
    for part, tensor in aligned.target.items():
        tensor = tensor.where(valid, 0)
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"teacher {teacher!r}: its aligned {part} hold NaN or infinity; nothing stored"
            )
        numbers, scale = encode_vectors(tensor, layout.dtype)
        tensors[tensor_name(teacher, part)] = numbers
        if scale is not None:
            tensors[tensor_name(teacher, part + SCALE)] = scale[..., None]
    return tensors
