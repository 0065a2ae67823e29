"""``kava sample``: several rationales of one teacher for every example, as a file to train from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device

from kava_core.build.data import make_data, teacher_reading
from kava_core.console import progress, quiet
from kava_core.data.collate import Collator
from kava_core.data.examples import Example, find_answer_marker, is_correct
from kava_core.errors import KavaError, SpecError, did_you_mean
from kava_core.models.config import check_answer_fits
from kava_core.models.load import load_model
from kava_core.models.sampling import decode_new_tokens, sample_tokens
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.losses import LogitsSpec
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.run import with_trained_models


@dataclass(frozen=True)
class Drawing:
    """How rationales are drawn."""

    split: Literal["train", "validation"] = "train"
    """Examples of this split."""
    count: int = 4
    """Texts the teacher writes for each example."""
    temperature: float = 0.8
    """Of the sampling."""
    max_new_tokens: int = 256
    """Longest text written."""
    batch_size: int = 32
    """Examples in a forward pass."""
    keep_wrong: bool = False
    """Keep rationales that end in a wrong answer as well."""
    seed: int = 0
    """Of the sampling."""


def sample(spec: PipelineSpec, teacher: str, output: Path, drawing: Drawing) -> str:
    """Write every example of a split with the rationales a teacher wrote for it; a sentence about them.

    A line holds prompt, reasoning, answer, task and ``rationales``: those texts that differ from one another
    and from the example's own. Interrupted, the same call goes on where it stopped.

    Raises:
        SpecError: no such teacher.
        KavaError: the file is there already or cannot be written.
    """
    if _declared(spec, teacher).encoder:
        raise SpecError(f"teacher {teacher!r} is an encoder: it writes nothing")
    if output.exists():
        raise KavaError(f"{output}: is there already; choose another file or delete it")
    # The one teacher, reading text, with nothing but its logits wanted.
    only = (_declared(spec, teacher),)
    alone = {"teachers": only, "losses": (), "logits": LogitsSpec(), "trajectory": "text"}
    with quiet():
        spec = with_trained_models(spec.model_copy(update=alone))
        partial = output.with_name(f"{output.name}.{_settings(spec, teacher, drawing)}.partial")
        try:
            _write_missing(_Writer(spec, _declared(spec, teacher), drawing), partial, drawing)
            found = _counted(partial)
            os.replace(partial, output)
        except OSError as error:
            raise KavaError(f"{output}: cannot be written: {error.strerror}") from error
    return f"{output}: {found}"


def _declared(spec: PipelineSpec, name: str) -> TeacherSpec:
    names = [teacher.name for teacher in spec.teachers]
    if name not in names:
        near = did_you_mean(name, names)
        raise SpecError(f"teachers: no teacher {name!r}; there are {', '.join(names) or 'none'}{near}")
    return spec.teachers[names.index(name)]


def _settings(spec: PipelineSpec, teacher: str, drawing: Drawing) -> str:
    said = [_declared(spec, teacher).model_dump_json(), spec.data.model_dump_json(), repr(drawing)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]


def _write_missing(writer: _Writer, partial: Path, drawing: Drawing) -> None:
    """Append the lines that are not there; a line that was cut off is written anew."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in _lines(partial) if line.endswith(b"\n")]
    done = len(kept) - len(kept) % drawing.batch_size  # whole batches: each has its own random numbers
    with partial.open("wb") as stream:
        stream.writelines(kept[:done])
        stream.flush()
        with progress("sampled", len(writer.examples), done) as advance:
            for batch in writer.batches(done):
                stream.write("".join(batch).encode())
                stream.flush()
                os.fsync(stream.fileno())
                advance(len(batch))


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def _counted(file: Path) -> str:
    counts = [len(json.loads(line)["rationales"]) for line in _lines(file)]
    without = counts.count(0)
    return f"{len(counts):,} examples, {sum(counts):,} rationales, {without:,} examples without any"


class _Writer:
    """One teacher, writing."""

    def __init__(self, spec: PipelineSpec, teacher: TeacherSpec, drawing: Drawing) -> None:
        data = make_data(spec)
        splits = data.splits
        self.examples: Sequence[Example] = splits.train if drawing.split == "train" else splits.validation
        self.template: Template = teacher_reading(spec, teacher).template
        self.tokenizer = data.teacher_tokenizers[teacher.name]
        self.collator = Collator(self.tokenizer, {}, self.template)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        where = f"teacher {teacher.name!r}"
        model: Any = load_model(teacher, self.tokenizer, seed=0, where=where).to(self.device).eval()
        self.model, self.drawing = model, drawing

    def batches(self, start: int) -> Iterator[list[str]]:
        """JSON lines of the examples from ``start`` on."""
        size = self.drawing.batch_size
        for begin in range(start, len(self.examples), size):
            examples = list(self.examples[begin : begin + size])
            yield [
                _line(example, self._kept(example, texts))
                for example, texts in zip(examples, self._written(examples, begin), strict=True)
            ]

    def _written(self, examples: list[Example], begin: int) -> list[list[str]]:
        prompts = send_to_device(self.collator.prompts(examples)[0], self.device)
        length = prompts["input_ids"].shape[1]
        check_answer_fits(self.model.config, length, self.drawing.max_new_tokens)
        drawing = self.drawing
        count, seed = drawing.count, drawing.seed * 1_000_003 + begin
        how: dict[str, Any] = {"temperature": drawing.temperature, "max_new_tokens": drawing.max_new_tokens}
        tokens = sample_tokens(self.model, prompts, seed=seed, count=count, **how)
        texts = decode_new_tokens(self.tokenizer, tokens, length)
        return [texts[place * count : (place + 1) * count] for place in range(len(examples))]

    def _kept(self, example: Example, texts: list[str]) -> list[str]:
        """Different rationales, in the order they were written; texts without an answer have none."""
        right = (t for t in texts if self.drawing.keep_wrong or is_correct(t, example, self.template))
        found = dict.fromkeys(rationale for t in right if (rationale := rationale_of(t, self.template)))
        return [rationale for rationale in found if rationale != example.reasoning]


def rationale_of(written: str, template: Template) -> str | None:
    """What stands for ``{reasoning}`` in a written text; None where the answer's marker is missing."""
    found = find_answer_marker(written, template)
    before, _, after = template.reasoning.partition("{reasoning}")
    return written[: found[0]].removeprefix(before).removesuffix(after) if found else None


def _line(example: Example, rationales: list[str]) -> str:
    fields = {"prompt": example.prompt, "reasoning": example.reasoning, "answer": example.answer}
    task = {} if example.task is None else {"task": example.task}
    return json.dumps(fields | task | {"rationales": rationales}, ensure_ascii=False) + "\n"
