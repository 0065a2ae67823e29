"""Record the loss of short runs at every step, and compare it later: a refactor leaves every bit as it was.

    python benchmarks/loss_curves.py --write     # before a change: writes benchmarks/loss_curves.json
    python benchmarks/loss_curves.py             # after it: exit code 1 and the names of what differs

Each case is a spec of this repository, shortened. A hash covers every number of every line of
``metrics.jsonl`` (in full precision, seconds left out) and the trained student's file. Hashes are those of
one machine with one version of torch, both named in the file; elsewhere write them anew before the change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_suffix(".json")

EVERY_STEP = ("train.log_every=1", "evaluate.every=10", "evaluate.examples=32", "evaluate.batch_size=16")
SHORT = (*EVERY_STEP, "train.steps=20", "train.batch_size=16", "train.warmup_steps=3", "seeds=[0]")
QUICKSTART = (
    *SHORT,
    "data.train=512",
    "data.validation=32",
    "teachers.0.pretrain.steps=10",
    "teachers.1.pretrain.steps=10",
)
ONE_VARIANT = (*QUICKSTART, "variants={}")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("specs/quickstart.yaml", QUICKSTART),
    "routers": (
        "specs/routers.yaml",
        (
            *SHORT,
            "teachers.0.pretrain.steps=10",
            "teachers.1.pretrain.steps=10",
            "data.train=512",
            "data.validation=32",
        ),
    ),
    "stream": ("specs/quickstart.yaml", (*ONE_VARIANT, "train.stream=true")),
    "stream_terms": (
        "specs/quickstart.yaml",
        (*ONE_VARIANT, "train.stream=true", "teachers.0.align.dim_projector=linear"),
    ),
    "stored": ("specs/quickstart.yaml", (*ONE_VARIANT, "store={folder: STORE, dtype: float32}")),
    "lora": (
        "specs/quickstart.yaml",
        (*ONE_VARIANT, "student.lora={rank: 4, dropout: 0.1}", "student.gradient_checkpointing=true"),
    ),
    "fused": (
        "specs/quickstart.yaml",
        (
            *ONE_VARIANT,
            "target=fused",
            "fuser=attention",
            "losses=[{name: structural, weight: 0.5}, {name: mercator, schedule: cosine},"
            " {name: mse, share: 0.2}]",
            "teachers.0.align={layer_mapper: learned, dim_projector: elastic}",
            "teachers.1.align={token_warper: char_iou, layer_mapper: cka}",
        ),
    ),
    "to_teacher": (
        "specs/quickstart.yaml",
        (
            *ONE_VARIANT,
            "rotary=keep",
            "teachers.0.align={direction: to_teacher, dim_projector: linear}",
            "losses=[{name: smooth_l1, parts: [keys, values, queries]}]",
        ),
    ),
    "logits": (
        "specs/quickstart.yaml",
        (*ONE_VARIANT, "logits={weight: 0.5, teachers: [llama]}", "train.accumulate=2"),
    ),
    "shuffled": ("specs/quickstart.yaml", (*ONE_VARIANT, "train.shuffle_teacher=true")),
    "online": (
        "specs/experiments/online.yaml",
        (
            *SHORT,
            "teachers.0.pretrain.steps=10",
            "data.train=512",
            "data.validation=32",
            "compare=null",
            "variants={}",
        ),
    ),
    "encoders": (
        "specs/experiments/encoders.yaml",
        (
            *SHORT,
            "teachers.0.pretrain={steps: 10}",
            "teachers.1.pretrain={steps: 10}",
            "data.train=512",
            "data.validation=32",
            "compare=null",
            "variants={}",
        ),
    ),
    "latent": (
        "specs/latent.yaml",
        (
            *SHORT,
            "train.accumulate=2",
            "student.pretrain.steps=10",
            "teachers.0.pretrain.steps=10",
            "data.train=512",
            "data.validation=32",
            "variants={kava: {codi: {weight: 1.0}}, lotus: {losses: [], latent.step_cross_entropy: 1.0},"
            " coconut: {losses: [], latent.curriculum: {steps: 2}, latent.projection: none},"
            " itself: {teachers.0: {name: itself, itself: {},"
            " align: {time_warper: rkv, dim_projector: identity}}}}",
        ),
    ),
}


def main() -> int:
    """Run the cases, two at a time; print what differs from what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record what the runs give now")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of: {', '.join(CASES)}")
    asked = parser.parse_args()
    names = asked.cases or list(CASES)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        hashes = dict(zip(names, pool.map(lambda name: run_case(name, Path(folder)), names), strict=True))
    if asked.write:
        write(hashes)
        return 0
    recorded = json.loads(RECORDED.read_text())["hashes"]
    differing = [name for name in names if hashes[name] != recorded[name]]
    print("differs:" if differing else "all bits as recorded:", ", ".join(differing or names))
    return 1 if differing else 0


def run_case(name: str, folder: Path) -> dict[str, str]:
    """Train every variant of a case in a process of its own; a hash for each."""
    spec, overrides = CASES[name]
    output = folder / name
    store = str(output / "store")
    arguments = [str(ROOT / spec), f"output={output}", *(one.replace("STORE", store) for one in overrides)]
    if name == "stored":
        _kava("cache", arguments, output)
    _kava("train", arguments, output)
    runs = sorted(run.parent for run in output.rglob("run.json") if "-s0" in run.parent.name)
    found = {run.name.partition("-")[0]: _hash(run) for run in runs if "pretrain" not in run.parts}
    print(f"{name}: {len(found)} runs", file=sys.stderr, flush=True)
    return found


def _kava(verb: str, arguments: list[str], output: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KAVA_CACHE": str(output / "cache"), "CI": "true"}
    command = [sys.executable, "-m", "kava_core", verb, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def _hash(run: Path) -> str:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    found = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for file in sorted((run / "student").glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def write(hashes: dict[str, dict[str, str]]) -> None:
    """Replace the recorded hashes of these cases."""
    before = json.loads(RECORDED.read_text())["hashes"] if RECORDED.exists() else {}
    where = {"torch": version("torch"), "transformers": version("transformers"), "machine": _processor()}
    RECORDED.write_text(json.dumps({"on": where, "hashes": before | hashes}, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
