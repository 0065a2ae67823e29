"""The teacher store: reading random items, and a training step from it against one with live teachers.

Reading: batches of random items (page cache warm), as GB/s of target bytes, alternated in one process with
``np.memmap`` rows of the same bytes copied into a batch, and ``torch.load`` of one file per item.
Step: CPU or CUDA time of the distiller's forward and backward pass, alternated; median of ratios.

    python benchmarks/store.py [--rounds 20] [--time 256] [--items 192] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import VOCAB, build, config

from kava_core.build.pipeline import build_pipeline
from kava_core.data.store.codec import encode_vectors
from kava_core.data.store.index import Layout
from kava_core.data.store.reader import VALID, Store
from kava_core.data.store.writer import StoreWriter
from kava_core.distill.distiller import Distiller
from kava_core.kv.capture.geometry import model_geometry
from kava_core.models.teacher import Teacher
from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.questions import compared_parts

LAYER, HEAD, DIM, BATCH = 12, 4, 64, 8


def seconds(action: Callable[[], object], device: str = "cpu") -> float:
    """How long an action takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def made_store(folder: Path, items: int, length: int) -> Store:
    """One teacher, keys and values in bfloat16."""
    parts: dict[Any, tuple[int, int, int]] = {"keys": (LAYER, HEAD, DIM), "values": (LAYER, HEAD, DIM)}
    writer = StoreWriter(folder, Layout("bfloat16", {"t": parts}), shard_mb=128)
    for item in range(items):
        target = torch.randn(2, LAYER * HEAD * length * DIM)
        blocks = {
            f"t/{part}": encode_vectors(x, "bfloat16")[0] for part, x in zip(parts, target, strict=True)
        }
        writer.add(str(item), length, blocks | {f"t/{VALID}": torch.ones(length, dtype=torch.bool)})
    writer.finish({})
    return Store(folder)


def read(options: argparse.Namespace, folder: Path) -> None:
    """Print bandwidths and ratios of reading."""
    store = made_store(folder, options.items, options.time)
    shape = (LAYER, HEAD, options.time, DIM)
    everything = np.memmap(folder / "raw", np.uint16, "w+", shape=(options.items, 2, *shape))
    for item in range(options.items):
        target = store.batch([str(item)], options.time)["t"]["target"]
        pair = torch.stack([target["keys"][0], target["values"][0]])
        everything[item] = pair.view(torch.uint16).numpy()
        torch.save(pair, folder / f"{item}.pt")

    def mapped(items: list[int]) -> Any:
        return torch.from_numpy(everything[items])

    def loaded(items: list[int]) -> Any:
        return torch.stack([torch.load(folder / f"{item}.pt") for item in items])

    ways: dict[str, Callable[[list[int]], Any]] = {
        "store": lambda items: store.batch([str(item) for item in items], options.time),
        "np.memmap": mapped,
        "torch.load": loaded,
    }
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(options.rounds + 2):
        items = random.Random(round_).sample(range(options.items), BATCH)
        for name, way in ways.items():
            taken = seconds(lambda way=way, items=items: way(items))
            if round_ >= 2:
                timed[name].append(taken)
    size = BATCH * 2 * everything[0, 0].size * 2
    print(f"random batches of {BATCH} items × {size / BATCH / 2**20:.1f} MiB, page cache warm")
    for name, taken in timed.items():
        ratio = statistics.median(s / t for s, t in zip(timed["store"], taken, strict=True))
        print(f"  {name:<11} {size / statistics.median(taken) / 1e9:6.2f} GB/s   store / {name}: {ratio:.2f}")


def llama(*shape: int) -> Any:
    """A model with random weights: width, layers, heads, KV heads."""
    return build(config(*shape), "cpu")


def step(options: argparse.Namespace, folder: Path) -> None:
    """Print what a step costs from the store and with live teachers."""
    tokens = {"kind": "chars"}
    align = {"dim_projector": {"name": "linear", "trainable": False}}
    fields = {
        "name": "bench",
        "student": {"config": {"model_type": "llama"}, "tokenizer": tokens},
        "teachers": [
            {"name": n, "config": {"model_type": "llama"}, "tokenizer": tokens, "align": align} for n in "ab"
        ],
        "losses": [{"name": "relation"}],
        "data": {"name": "chain"},
        "train": {"steps": 1},
    }
    spec = bind_spec_model(Registry.build()).model_validate(fields)
    student, models = llama(192, 4, 6, 2), {"a": llama(512, 8, 8, 4), "b": llama(384, 8, 6, 6)}
    pipeline = build_pipeline(
        spec, teachers={n: model_geometry(m) for n, m in models.items()}, student=model_geometry(student)
    )
    teachers = [
        Teacher(n, models[n], layers=a.sources, parts=compared_parts(spec), rotary="strip")
        for n, a in zip(models, pipeline.teachers, strict=True)
    ]
    distiller = Distiller(student, pipeline, teachers, parts=compared_parts(spec)).to(options.device)
    distiller.place_teachers(torch.device(options.device))
    arms = {"live": sides(options), "stored": {}}
    arms["stored"] = stored_sides(distiller, arms["live"], folder, options)

    def run(arm: str) -> None:
        loss = distiller(
            arms["live"]["student"], arms[arm]["teachers"](), torch.ones(2, device=options.device)
        )
        loss["loss"].backward()
        distiller.zero_grad()

    timed: dict[str, list[float]] = {arm: [] for arm in arms}
    for round_ in range(options.rounds + 2):
        for arm in arms:
            taken = seconds(lambda arm=arm: run(arm), options.device)
            if round_ >= 2:
                timed[arm].append(taken)
    ratio = statistics.median(s / t for s, t in zip(timed["stored"], timed["live"], strict=True))
    print(f"step of {BATCH} × {options.time} tokens on {options.device}, reading and decoding included")
    for arm, taken in timed.items():
        print(f"  {arm:<7} {statistics.median(taken) * 1e3:8.1f} ms")
    print(f"  stored / live: {ratio:.2f}")


def sides(options: argparse.Namespace) -> dict[str, Any]:
    """The tokens of a batch, the same for everyone."""
    ids = torch.randint(0, VOCAB, (BATCH, options.time))
    positions = torch.arange(options.time).expand_as(ids)
    side = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "segments": torch.zeros_like(ids),
        "spans": torch.stack([positions, positions + 1], -1),
    }
    moved = {name: tensor.to(options.device) for name, tensor in side.items()}
    return {"student": moved, "teachers": lambda: {"a": moved, "b": moved}}


def stored_sides(
    distiller: Distiller, live: dict[str, Any], folder: Path, options: argparse.Namespace
) -> Any:
    """What the collator reads for the same batch in every step."""
    from kava_core.protocols.timeline import Timeline

    with torch.no_grad():
        timeline = Timeline.from_batch(live["student"])
        aligned, _ = distiller.alignment.targets.read_targets(
            live["teachers"](), timeline, distiller.pipeline
        )
    found = dict(zip(distiller.pipeline.names, aligned, strict=True))
    extents: Any = {
        name: {part: (*x.shape[1:3], x.shape[4]) for part, x in one.target.items()}
        for name, one in found.items()
    }
    folder.mkdir()
    writer = StoreWriter(folder, Layout("bfloat16", extents), shard_mb=128)
    for row in range(BATCH):
        blocks = {f"{name}/{VALID}": one.valid[row].cpu() for name, one in found.items()}
        for name, one in found.items():
            blocks |= {f"{name}/{part}": x[row].bfloat16().flatten().cpu() for part, x in one.target.items()}
        writer.add(str(row), options.time, blocks)
    writer.finish({})
    store, keys = Store(folder), [str(row) for row in range(BATCH)]

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        return value.to(options.device)

    return {"teachers": lambda: moved(store.batch(keys, options.time))}


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--items", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        read(options, Path(folder))
        step(options, Path(folder) / "step")


if __name__ == "__main__":
    main()
