"""Evaluate on the validation split: cross-entropy, perplexity, KV terms, exact matches of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from kava_core.build.time_plans import PlansTime
from kava_core.data.collate import Collator
from kava_core.data.dataset import EncodedDataset, split_nearly_equal
from kava_core.data.encoding.answer_judge import AnswerJudge
from kava_core.distill.denominators import EXAMPLES, LABELLED, READ, TOKENS
from kava_core.distill.distiller import CROSS_LOGITS, LOGITS, Distiller
from kava_core.distill.hidden_states import CODI, READING, STEPS
from kava_core.distill.student_pass import AUX_LOSS
from kava_core.files import replace_file, write_json
from kava_core.kv.align.finite import raise_unread_faults
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.latent.student import Control
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.training import EvaluateSpec
from kava_core.train.validation.answer_writer import AnswerWriter
from kava_core.train.validation.collapse_monitor import EXAMPLES as MONITORED
from kava_core.train.validation.collapse_monitor import CollapseMonitor
from kava_core.train.validation.gradient_shares import gradient_shares
from kava_core.train.validation.score_spreads import eviction_score_spreads

COUNTS = ("labelled", "tokens", "examples", "read")
"""Names of ``Distiller.loss_denominators``."""

DIVISORS = {
    "ce": LABELLED,
    AUX_LOSS: LABELLED,
    LOGITS: LABELLED,
    CROSS_LOGITS: LABELLED,
    CODI: EXAMPLES,
    STEPS: EXAMPLES,
    READING: READ,
}
"""Which count a term's sum is divided by; all others by the student's positions."""

SAMPLES = 8
"""Written answers of the newest evaluation that are kept."""


class Evaluator:
    """Evaluates a distiller on the validation split, shared among processes.

    Args:
        items: the validation examples, encoded for every side.
        collator: makes batches and prompts.
        tokenizer: the student's.
        judge: decides which written answers are right.
        spec: sizes.
        folder: keeps some written answers of the newest evaluation, and which were right.
        monitor: watches the aligners on the first validation examples.
    """

    def __init__(
        self,
        items: EncodedDataset,
        collator: Collator,
        tokenizer: Any,
        judge: AnswerJudge,
        spec: EvaluateSpec,
        folder: Folder,
        monitor: CollapseMonitor,
    ) -> None:
        self.items, self.examples, self.collator = items, items.examples, collator
        self.spec, self.folder = spec, folder
        self.monitor = monitor
        self.write_answers = AnswerWriter(collator, tokenizer, judge, spec.max_new_tokens)

    def begin(self, distiller: Distiller, device: torch.device) -> None:
        """Let the monitor keep the state before the first step, and check that the student can write."""
        self.monitor.begin(distiller, self._monitored_batch(distiller, device))
        if self.spec.generate:
            with evaluation_mode(distiller), _own_random_numbers(), torch.no_grad():
                self.write_answers.check(distiller, self.examples, device)

    def _monitored_batch(self, distiller: Distiller, device: torch.device) -> dict[str, Any]:
        count = min(MONITORED, self.spec.batch_size, len(self.items))
        collate = PlansTime(self.collator, distiller.pipeline, distiller.hidden)
        batch: dict[str, Any] = send_to_device(collate([self.items[index] for index in range(count)]), device)
        return batch

    def __call__(self, distiller: Distiller) -> dict[str, float]:
        """Measure ``ce`` (nats per labelled token), ``perplexity``, KV terms, ``exact_match`` and more."""
        accelerator = Accelerator()
        indices = list(range(accelerator.process_index, len(self.examples), accelerator.num_processes))
        with evaluation_mode(distiller), _own_random_numbers(), torch.no_grad():
            metrics = self._mean_losses(distiller, indices, accelerator)
            batch = self._monitored_batch(distiller, accelerator.device)
            metrics |= self.monitor(distiller, batch) | gradient_shares(distiller, batch)
            metrics |= eviction_score_spreads(distiller, batch)
            if self.spec.generate:
                metrics |= self._exact_matches(distiller, indices, accelerator)
        return metrics

    def _exact_matches(
        self, distiller: Distiller, indices: list[int], accelerator: Accelerator
    ) -> dict[str, float]:
        """Judge the student as it is, and with latent tokens that know nothing of the example."""
        controls = {}
        if self.spec.controls:
            for control in get_args(Control):
                matches = self._judge_answers(distiller, indices, accelerator, control)
                controls[f"exact_match/{control}"] = matches["exact_match"]
        return self._judge_answers(distiller, indices, accelerator) | controls

    def _mean_losses(
        self, distiller: Distiller, indices: list[int], accelerator: Accelerator
    ) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        undivided = torch.ones(4, device=accelerator.device)
        collate = PlansTime(self.collator, distiller.pipeline, distiller.hidden)
        for batch in DataLoader(Subset(self.items, indices), self.spec.batch_size, collate_fn=collate):
            batch = send_to_device(batch, accelerator.device)
            terms = distiller(batch["student"], batch["teachers"], items=undivided)
            terms |= dict(zip(COUNTS, distiller.loss_denominators(batch), strict=True))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.double()
        own_sums = {name: value.item() for name, value in sums.items()}
        raise_unread_faults()
        return _divide_sums(_sum_over_processes(own_sums))

    def _judge_answers(
        self,
        distiller: Distiller,
        indices: list[int],
        accelerator: Accelerator,
        control: Control | None = None,
    ) -> dict[str, float]:
        """Return ``exact_match``, and ``passes``: forward passes for an answer, the prompt's included.

        Answers without a control are kept in files.
        """
        marks: list[bool] = []
        passes = 0
        written: list[dict[str, Any]] = []
        for indices_of_batch in split_nearly_equal(indices, self.spec.batch_size):
            examples = [self.examples[index] for index in indices_of_batch]
            answers, passes_of_batch = self.write_answers(distiller, examples, accelerator.device, control)
            passes += passes_of_batch
            for example, (text, correct) in zip(examples, answers, strict=True):
                marks.append(correct)
                written.append(
                    {"prompt": example.prompt, "gold": example.answer, "wrote": text, "correct": correct}
                )
        if control is None:
            if accelerator.is_main_process:
                self._save_samples(written[:SAMPLES])
            self._save_marks(indices, marks, accelerator)
        own_counts = torch.tensor([sum(marks), passes, len(indices)], device=accelerator.device)
        right, all_passes, count = accelerator.reduce(own_counts, "sum").double()
        return {"exact_match": float(right / count), "passes": float(all_passes / count)}

    def _save_samples(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        replace_file(self.folder.samples, text.encode("utf-8"))

    def _save_marks(self, indices: list[int], marks: list[bool], accelerator: Accelerator) -> None:
        """Save which examples the newest evaluation found right, for resampling; 1 or 0 in their order."""
        of_all: list[tuple[int, bool]] = gather_object(list(zip(indices, marks, strict=True)))
        if accelerator.is_main_process:
            write_json(self.folder.correct, [int(mark) for _, mark in sorted(of_all)])


def _sum_over_processes(own_sums: dict[str, float]) -> dict[str, float]:
    """Add up the sums of all processes, of which one may have had no example and so no names."""
    total: dict[str, float] = {}
    for sums in gather_object([own_sums]):
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _divide_sums(sums: dict[str, float]) -> dict[str, float]:
    """Divide every term's sum by its count; add the perplexity."""
    counts = [max(sums.pop(name), 1) for name in COUNTS]
    sums.pop("loss")
    means = {}
    for name, count in DIVISORS.items():
        if name in sums:
            means[name] = sums.pop(name) / counts[count]
    means["perplexity"] = math.exp(means["ce"]) if means["ce"] < 700 else math.inf
    return means | _task_shares({name: value / counts[TOKENS] for name, value in sums.items()})


def _task_shares(means: dict[str, float]) -> dict[str, float]:
    """Return the means with ``weight/TEACHER@TASK`` as shares of the task's own positions."""
    totals: dict[str, float] = {}
    for name, value in means.items():
        _, at, task = name.partition("@")
        if at:
            totals[task] = totals.get(task, 0.0) + value
    shares = {}
    for name, value in means.items():
        _, at, task = name.partition("@")
        shares[name] = value / max(totals[task], 1e-30) if at else value
    return shares


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Draw the same random numbers at every evaluation; training's go on as if there had been none."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
