"""Validation: cross-entropy, perplexity, KV terms, and exact matches of written answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from kava_core.build.time_plans import PlansTime
from kava_core.data.collate import Collator
from kava_core.data.dataset import EncodedDataset, split_nearly_equal
from kava_core.data.examples import is_correct
from kava_core.distill.denominators import EXAMPLES, LABELLED, READ, TOKENS
from kava_core.distill.distiller import LOGITS, Distiller
from kava_core.distill.hidden_states import CODI, READING, STEPS
from kava_core.json_files import write_json
from kava_core.latent.student import Control
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.training import EvaluateSpec
from kava_core.train.validation.answers import Answers
from kava_core.train.validation.collapse_monitor import EXAMPLES as WATCHED
from kava_core.train.validation.collapse_monitor import CollapseMonitor
from kava_core.train.validation.gradient_shares import shares
from kava_core.train.validation.score_spreads import spreads

COUNTS = ("labelled", "tokens", "examples", "read")
DIVISORS = {"ce": LABELLED, LOGITS: LABELLED, CODI: EXAMPLES, STEPS: EXAMPLES, READING: READ}
"""What a term's sum is divided by; all others by the student's positions."""

SAMPLES = 8
"""Written answers of the newest evaluation that are kept."""


class Evaluator:
    """Evaluates a distiller on the validation split, shared among processes.

    Args:
        items: the validation examples, encoded for every side.
        collator: makes batches and prompts.
        tokenizer: the student's.
        template: finds the answer in what the student wrote.
        spec: sizes.
        folder: keeps some written answers of the newest evaluation, and which were right.
        monitor: watches the aligners on the first validation examples.
    """

    def __init__(
        self,
        items: EncodedDataset,
        collator: Collator,
        tokenizer: Any,
        template: Template,
        spec: EvaluateSpec,
        folder: Folder,
        monitor: CollapseMonitor,
    ) -> None:
        self.items, self.examples, self.collator = items, items.examples, collator
        self.tokenizer, self.template, self.spec, self.folder = tokenizer, template, spec, folder
        self.monitor = monitor
        self.answers = Answers(collator, tokenizer, spec.max_new_tokens)

    def begin(self, distiller: Distiller, device: torch.device) -> None:
        """Let the monitor keep the state before the first step."""
        self.monitor.begin(distiller, self._watched(distiller, device))

    def _watched(self, distiller: Distiller, device: torch.device) -> dict[str, Any]:
        count = min(WATCHED, self.spec.batch_size, len(self.items))
        some = [self.items[index] for index in range(count)]
        batch: dict[str, Any] = send_to_device(PlansTime(self.collator, distiller.pipeline)(some), device)
        return batch

    def __call__(self, distiller: Distiller) -> dict[str, float]:
        """Metrics: ``ce`` (nats per labelled token), ``perplexity``, every KV term, ``exact_match``."""
        accelerator = Accelerator()
        mine = range(accelerator.process_index, len(self.examples), accelerator.num_processes)
        with _evaluating(distiller), _own_random_numbers(), torch.no_grad():
            metrics = self._losses(distiller, list(mine), accelerator)
            watched = self._watched(distiller, accelerator.device)
            metrics |= self.monitor(distiller, watched) | shares(distiller, watched)
            metrics |= spreads(distiller, watched)
            if self.spec.generate:
                metrics |= self._exact_matches(distiller, list(mine), accelerator)
        return metrics

    def _exact_matches(
        self, distiller: Distiller, mine: list[int], accelerator: Accelerator
    ) -> dict[str, float]:
        """Of the student as it is, and with latent tokens that know nothing of the example."""
        found = {
            f"exact_match/{control}": self._matches(distiller, mine, accelerator, control)["exact_match"]
            for control in (get_args(Control) if self.spec.controls else ())
        }
        return self._matches(distiller, mine, accelerator) | found

    def _losses(self, distiller: Distiller, mine: list[int], accelerator: Accelerator) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        one = torch.ones(4, device=accelerator.device)
        collate = PlansTime(self.collator, distiller.pipeline)
        for batch in DataLoader(Subset(self.items, mine), self.spec.batch_size, collate_fn=collate):
            batch = send_to_device(batch, accelerator.device)
            found = distiller(batch["student"], batch["teachers"], items=one)
            found |= dict(zip(COUNTS, distiller.loss_denominators(batch), strict=True))
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.double()
        return _means(_added({name: value.item() for name, value in sums.items()}))

    def _matches(
        self,
        distiller: Distiller,
        mine: list[int],
        accelerator: Accelerator,
        control: Control | None = None,
    ) -> dict[str, float]:
        """``exact_match``, and ``passes``: forward passes for an answer, the prompt's included."""
        marks, passes = list[bool](), 0
        written: list[dict[str, Any]] = []
        for indices in split_nearly_equal(mine, self.spec.batch_size):
            examples = [self.examples[index] for index in indices]
            texts, taken = self.answers(distiller, examples, accelerator.device, control)
            passes += taken
            for example, text in zip(examples, texts, strict=True):
                correct = is_correct(text, example, self.template)
                marks.append(correct)
                written.append(
                    {"prompt": example.prompt, "gold": example.answer, "wrote": text, "correct": correct}
                )
        if accelerator.is_main_process and control is None:
            with self.folder.samples.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in written[:SAMPLES])
        if control is None:
            self._keep_each(mine, marks, accelerator)
        counted = torch.tensor([sum(marks), passes, len(mine)], device=accelerator.device)
        whole = accelerator.reduce(counted, "sum").double()
        return {"exact_match": float(whole[0] / whole[2]), "passes": float(whole[1] / whole[2])}

    def _keep_each(self, mine: list[int], marks: list[bool], accelerator: Accelerator) -> None:
        """Which examples the newest evaluation found right, for resampling; 1 or 0 in their order."""
        everyones: list[tuple[int, bool]] = gather_object(list(zip(mine, marks, strict=True)))
        if accelerator.is_main_process:
            write_json(self.folder.correct, [int(mark) for _, mark in sorted(everyones)])


def _added(mine: dict[str, float]) -> dict[str, float]:
    """Sums over processes, of which one may have had no example and so no names."""
    everyones = gather_object([mine])
    names = dict.fromkeys(name for sums in everyones for name in sums)
    return {name: sum(sums.get(name, 0.0) for sums in everyones) for name in names}


def _means(sums: dict[str, float]) -> dict[str, float]:
    counted = [max(sums.pop(name), 1) for name in COUNTS]
    sums.pop("loss")
    found = {name: sums.pop(name) / counted[place] for name, place in DIVISORS.items() if name in sums}
    found["perplexity"] = math.exp(found["ce"]) if found["ce"] < 700 else math.inf
    return found | _of_tasks({name: value / counted[TOKENS] for name, value in sums.items()})


def _of_tasks(means: dict[str, float]) -> dict[str, float]:
    """``weight/TEACHER@TASK`` as shares of the task's own positions."""
    totals: dict[str, float] = {}
    for name, value in means.items():
        if "@" in name:
            task = name.partition("@")[2]
            totals[task] = totals.get(task, 0.0) + value
    return {
        name: value / max(totals[name.partition("@")[2]], 1e-30) if "@" in name else value
        for name, value in means.items()
    }


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The same random numbers at every evaluation; training's go on as if there had been none."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
