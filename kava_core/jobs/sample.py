"""Let a teacher write several rationales for every example, as a file to train from: ``kava sample``."""

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
from kava_core.data.encoding.answer_judge import first_altered_text
from kava_core.data.encoding.first_texts import alteration
from kava_core.data.examples import Example, find_answer_marker, is_correct
from kava_core.errors import KavaError, SpecError, did_you_mean
from kava_core.models.config import check_answer_fits
from kava_core.models.load import load_model
from kava_core.models.writing import Sampling, TextWriter, decode_behind, ends_of, rows_before_end
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.losses import LogitsSpec
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.run import with_pretrained_models


@dataclass(frozen=True)
class SamplingOptions:
    """How rationales are sampled."""

    split: Literal["train", "validation"] = "train"
    """Examples of this split."""
    count: int = 4
    """Texts the teacher writes for each example."""
    temperature: float = 0.8
    """Temperature of the sampling."""
    max_new_tokens: int = 256
    """Longest text written."""
    batch_size: int = 32
    """Examples in a forward pass."""
    keep_wrong: bool = False
    """Keep rationales that end in a wrong answer as well."""
    seed: int = 0
    """Seed of the sampling."""


def sample_rationales(spec: PipelineSpec, teacher: str, output: Path, options: SamplingOptions) -> str:
    """Write every example of a split with the rationales a teacher wrote for it.

    A line holds prompt, reasoning, answer, task and ``rationales``: those texts that differ from one another
    and from the example's own. Interrupted, the same call goes on where it stopped.

    Returns:
        A sentence on what was written.

    Raises:
        SpecError: no such teacher.
        KavaError: the file is there already or cannot be written.
    """
    if _find_teacher(spec, teacher).encoder:
        raise SpecError(f"teacher {teacher!r} is an encoder: it writes nothing")
    if _find_teacher(spec, teacher).stand_in is not None:
        raise SpecError(f"teacher {teacher!r} is a control (stand_in): what it writes teaches nothing")
    if output.exists():
        raise KavaError(f"{output}: is there already; choose another file or delete it")
    # The one teacher, reading text, with nothing but its logits wanted.
    only_teacher = {
        "teachers": (_find_teacher(spec, teacher),),
        "losses": (),
        "logits": LogitsSpec(),
        "trajectory": "text",
    }
    with quiet():
        spec = with_pretrained_models(spec.model_copy(update=only_teacher))
        partial = output.with_name(f"{output.name}.{_settings_hash(spec, teacher, options)}.partial")
        try:
            _write_missing_lines(_RationaleWriter(spec, _find_teacher(spec, teacher), options), partial)
            counts = _describe_counts(partial)
            os.replace(partial, output)
        except OSError as error:
            raise KavaError(f"{output}: cannot be written: {error.strerror}") from error
    return f"{output}: {counts}"


def _find_teacher(spec: PipelineSpec, name: str) -> TeacherSpec:
    names = [teacher.name for teacher in spec.teachers]
    if name not in names:
        near = did_you_mean(name, names)
        raise SpecError(f"teachers: no teacher {name!r}; there are {', '.join(names) or 'none'}{near}")
    return spec.teachers[names.index(name)]


def _settings_hash(spec: PipelineSpec, teacher: str, options: SamplingOptions) -> str:
    """Name everything that the sampled texts depend on, so that only the same call goes on with a file."""
    settings = [_find_teacher(spec, teacher).model_dump_json(), spec.data.model_dump_json(), repr(options)]
    return hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]


def _write_missing_lines(writer: _RationaleWriter, partial: Path) -> None:
    """Append the lines that are not there; a line that was cut off is written anew."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    complete = [line for line in _read_lines(partial) if line.endswith(b"\n")]
    # Whole batches only: each has its own random numbers.
    done = len(complete) - len(complete) % writer.options.batch_size
    with partial.open("wb") as stream:
        stream.writelines(complete[:done])
        stream.flush()
        with progress("sampled", len(writer.examples), done) as advance:
            for lines in writer.line_batches(done):
                stream.write("".join(lines).encode())
                stream.flush()
                os.fsync(stream.fileno())
                advance(len(lines))


def _read_lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def _describe_counts(file: Path) -> str:
    counts = [len(json.loads(line)["rationales"]) for line in _read_lines(file)]
    without = counts.count(0)
    return f"{len(counts):,} examples, {sum(counts):,} rationales, {without:,} examples without any"


class _RationaleWriter:
    """One teacher that writes rationales."""

    def __init__(self, spec: PipelineSpec, teacher: TeacherSpec, options: SamplingOptions) -> None:
        data = make_data(spec)
        splits = data.splits
        self.examples: Sequence[Example] = splits.train if options.split == "train" else splits.validation
        self.template: Template = teacher_reading(spec, teacher).template
        self.tokenizer = data.teacher_tokenizers[teacher.name]
        altered = first_altered_text(self.tokenizer, self.examples, self.template)
        if altered is not None:
            raise SpecError(
                f"teacher {teacher.name!r}: {alteration(altered)}, so its rationales would be others"
            )
        self.collator = Collator(self.tokenizer, {}, self.template)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        where = f"teacher {teacher.name!r}"
        self.model: Any = load_model(teacher, self.tokenizer, seed=0, where=where).to(self.device).eval()
        self.writer = TextWriter(self.tokenizer, where)
        self.options = options

    def line_batches(self, start: int) -> Iterator[list[str]]:
        """Yield the JSON lines of the examples from ``start`` on, a batch at a time."""
        size = self.options.batch_size
        for begin in range(start, len(self.examples), size):
            examples = list(self.examples[begin : begin + size])
            lines = []
            for example, texts in zip(examples, self._sample_texts(examples, begin), strict=True):
                lines.append(_json_line(example, self._kept_rationales(example, texts)))
            yield lines

    def _sample_texts(self, examples: list[Example], begin: int) -> list[list[str]]:
        """Let the teacher write ``options.count`` texts for each example; ``begin`` is the first's number."""
        options = self.options
        on_cpu = self.collator.prompts(examples)[0]
        check_answer_fits(self.model.config, on_cpu["input_ids"].shape[1], options.max_new_tokens)
        tokens = self.writer.write(
            self.model,
            send_to_device(on_cpu, self.device),
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, options.seed * 1_000_003 + begin, options.count),
        )
        given = []
        for ids, mask in zip(*on_cpu.values(), strict=True):
            given += [ids[mask.bool()]] * options.count
        ends = ends_of(self.model)
        texts = decode_behind(self.tokenizer, given, rows_before_end(tokens, ends))
        return [texts[row * options.count : (row + 1) * options.count] for row in range(len(examples))]

    def _kept_rationales(self, example: Example, texts: list[str]) -> list[str]:
        """Return the different rationales, in the order they were written.

        Texts without an answer have none; a rationale that is the example's own is left out.
        """
        kept: list[str] = []
        for text in texts:
            if not self.options.keep_wrong and not is_correct(text, example, self.template):
                continue
            rationale = rationale_of(text, self.template)
            if rationale and rationale != example.reasoning and rationale not in kept:
                kept.append(rationale)
        return kept


def rationale_of(written: str, template: Template) -> str | None:
    """Return what a written text has in the place of ``{reasoning}``; None without the answer's marker."""
    marker = find_answer_marker(written, template)
    if not marker:
        return None
    before, _, after = template.reasoning.partition("{reasoning}")
    return written[: marker[0]].removeprefix(before).removesuffix(after)


def _json_line(example: Example, rationales: list[str]) -> str:
    fields: dict[str, Any] = {
        "prompt": example.prompt,
        "reasoning": example.reasoning,
        "answer": example.answer,
    }
    if example.task is not None:
        fields["task"] = example.task
    fields["rationales"] = rationales
    return json.dumps(fields, ensure_ascii=False) + "\n"
