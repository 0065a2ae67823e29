"""What latent reasoning costs: a training step and an answer, over those of written steps (full CoT).

Random weights and tokens: a prompt of 64 tokens, 65 of written steps, an answer of 4. The student's sizes are
``bench.py``'s. Everything of a row is alternated in one process; CPU time, or wall time on a GPU; medians of
ratios over rounds. FLOPs of matrix products are counted by torch; time beyond their ratio is the price of
small passes.
*Read again* is the same latent student without what ``GrowingText`` keeps: every Jacobi pass reads all.

    python benchmarks/latent.py [--rounds 10] [--size small medium] [--latents 24x3 …] [--part step answer]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from alternated import alternate, quartiles
from bench import SIZES, VOCAB, Size, build, config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kava_core.build.distiller import make_latent
from kava_core.build.pipeline import make_pipeline
from kava_core.build.teachers import make_teachers
from kava_core.data.encoding.encode import NO_LABEL
from kava_core.distill.calibration import calibrate_projectors, finish_projectors
from kava_core.distill.distiller import Distiller
from kava_core.kv.capture.geometry import model_geometry
from kava_core.latent.curriculum import ALWAYS
from kava_core.latent.growing_text import decoder_of, position_ids
from kava_core.latent.student import write_answers
from kava_core.latent.tokens import LatentTokens, extend_mask
from kava_core.protocols.timeline import REASONING
from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.sections.pipeline import PipelineSpec

PROMPT, TRACE, ANSWER = 64, 65, 4
"""Tokens; KaVa counts about 65 passes for an answer with written steps (arXiv 2510.02312)."""

LATENTS = {"24x3": (24, 3), "6x6": (6, 6), "24x24": (24, 24)}
"""Latent tokens and Jacobi passes: KaVa, CODI, and KaVa's tokens one after another."""

COT, PLAIN, AGAIN = "full CoT", "no KV loss", "no KV loss, read again"
FROZEN, ITSELF = "frozen teacher, K/V", "itself, R-KV, CODI"
FORMS = (PLAIN, AGAIN, FROZEN, ITSELF)
BATCHES = (1, 16)
"""Examples that are answered at once."""

SMOOTH_L1 = [{"name": "smooth_l1", "scale": "batch"}]


def fields_of(form: str, size: Size) -> dict[str, Any]:
    """The part of the spec in which the forms differ."""
    if form == FROZEN:
        segment = {"time_warper": {"name": "segment", "segments": ["reasoning"]}}
        model = {"config": config(*size["teachers"][0]), "tokenizer": {"kind": "bpe"}}
        return {"teachers": [{"name": "teacher", **model, "align": segment}], "losses": SMOOTH_L1}
    if form == ITSELF:
        rkv = {"time_warper": "rkv", "dim_projector": "identity"}
        itself = {"name": "teacher", "itself": {"cross_entropy": 1.0}, "align": rkv}
        return {"teachers": [itself], "losses": SMOOTH_L1, "codi": {"weight": 10.0}, "rotary": "keep"}
    return {"teachers": [], "losses": []}


def make_spec(form: str, size: Size, count: int, passes: int) -> PipelineSpec:
    """A latent run."""
    return bind_spec_model(Registry.build()).model_validate(
        {
            "name": "bench",
            "student": {"config": config(*size["student"]), "tokenizer": {"kind": "bpe"}},
            "trajectory": "latent",
            "latent": {"count": count, "passes": passes},
            "data": {"name": "chain"},
            "train": {"steps": 1},
            **fields_of(form, size),
        }
    )


class ReadAgain(LatentTokens):
    """The same latent tokens; every Jacobi pass reads the prompt and all slots."""

    def forward(self, model: nn.Module, prefix: Tensor, mask: Tensor, read: Any = None) -> Tensor:
        """As ``LatentTokens.forward``, without a cache."""
        begin, whole = prefix.shape[1], extend_mask(mask, self.count - 1)
        inputs = self.slots.expand(len(prefix), -1, -1)
        for _ in range(self.rounds):
            text = torch.cat([prefix, inputs[:, :-1]], 1)
            how = {"attention_mask": whole.long(), "position_ids": position_ids(whole), "use_cache": False}
            hidden = decoder_of(model)(inputs_embeds=text, **how).last_hidden_state
            inputs = self.slots + self.projection(hidden[:, begin - 1 :])
        return inputs


def written(batch: int, device: str) -> dict[str, Tensor]:
    """Prompt, steps and answer: what the CoT student trains on and every teacher reads."""
    ids = torch.randint(3, VOCAB, (batch, PROMPT + TRACE + ANSWER), device=device)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([PROMPT, TRACE, ANSWER]))
    labels = ids.clone()
    labels[:, :PROMPT] = NO_LABEL
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "segments": segments.to(device).expand(batch, -1),
        "spans": torch.zeros(*ids.shape, 2, dtype=torch.long, device=device),
        "labels": labels,
        "answer_boundary": torch.full((batch,), PROMPT + TRACE - 1, device=device),
    }


def unwritten(text: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same example for the latent student, as ``LatentCollator`` makes it: BEGIN and END are id 1."""
    ids = text["input_ids"]
    mark, slots = torch.ones_like(ids[:, :1]), ids.new_ones(len(ids), count)
    before, after = torch.cat([ids[:, :PROMPT], mark], 1), torch.cat([mark, ids[:, -ANSWER:]], 1)
    return {
        "before": before,
        "before_mask": torch.ones_like(before),
        "after": after,
        "after_mask": torch.ones_like(after),
        "labels": torch.cat([torch.full_like(mark, NO_LABEL), ids[:, -ANSWER:]], 1),
        "steps": torch.full_like(after, ALWAYS),
        "answer_boundary": torch.zeros_like(ids[:, 0]),
        "trace": ids[:, PROMPT : PROMPT + count],
        "attention_mask": slots,
        "segments": torch.full_like(slots, REASONING),
        "spans": slots.new_zeros(*slots.shape, 2),
    }


class Step:
    """Forward, backward, clipping and AdamW on one batch."""

    def __init__(self, distiller: Distiller, batch: dict[str, Any]) -> None:
        self.distiller, self.batch = distiller, batch
        self.items = distiller.loss_denominators(batch)
        self.optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        """Of the batch."""
        return self.distiller(self.batch["student"], self.batch["teachers"], self.items)["loss"]

    def __call__(self) -> None:
        """One step."""
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.distiller.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def cot_step(size: Size, device: str) -> Step:
    """The student trained on the written steps."""
    torch.manual_seed(0)
    student = build(config(*size["student"]), device)
    return Step(Distiller(student), {"student": written(size["batch"], device), "teachers": {}})


def latent_step(form: str, size: Size, count: int, passes: int, device: str) -> Step:
    """The student trained on latent tokens; the weights, and so the losses, are the same read again."""
    torch.manual_seed(0)
    spec = make_spec(form, size, count, passes)
    student = build(spec.student.config, device)
    text = written(size["batch"], device)
    batch = {"student": unwritten(text, count), "teachers": {t.name: text for t in spec.teachers}}
    latent = make_latent(spec, student, seed=0)
    if form == AGAIN:
        again = ReadAgain(count, passes, student.config.hidden_size)
        again.load_state_dict(latent.tokens.state_dict())
        latent = replace(latent, tokens=again)
    if not spec.teachers:
        return Step(Distiller(student, latent=latent).to(device), batch)
    own = spec.teachers[0].itself is not None
    models = {t.name: student if own else build(t.config, device) for t in spec.teachers}
    known = {name: model_geometry(model) for name, model in models.items()}
    pipeline = make_pipeline(spec, known, model_geometry(student), seed=0)
    teachers = make_teachers(spec, models, pipeline)
    distiller = Distiller(student, pipeline, teachers, latent=latent, rotary=spec.rotary).to(device)
    calibrate_projectors(distiller, batch)
    finish_projectors(distiller.pipeline)
    return Step(distiller, batch)


def make_steps(size: Size, count: int, passes: int, device: str) -> dict[str, Step]:
    """All forms' steps; AssertionError where reading again gives another loss."""
    made = {form: latent_step(form, size, count, passes, device) for form in FORMS}
    torch.testing.assert_close(made[PLAIN].loss(), made[AGAIN].loss(), rtol=1e-5, atol=0)
    return {COT: cot_step(size, device), **made}


def make_answers(
    size: Size, batch: int, count: int, passes: int, device: str
) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """One model, and how it writes answers of a fixed length with written and with latent reasoning."""
    torch.manual_seed(0)
    model: Any = build(config(*size["student"]), device).eval()
    model.generation_config.eos_token_id = None  # nothing ends before its last token
    width = model.config.hidden_size
    latents = LatentTokens(count, passes, width).to(device)
    text = written(batch, device)
    prompt, side = text["input_ids"][:, :PROMPT], unwritten(text, count)
    seen = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    before = side["before"], side["before_mask"]
    return model, {
        COT: lambda: model.generate(prompt, max_new_tokens=TRACE + ANSWER, **seen)[:, PROMPT:],
        "latent": lambda: write_answers(model, latents, *before, end=1, max_new_tokens=ANSWER),
    }


def counted(model: nn.Module, work: Callable[[], object]) -> tuple[int, int]:
    """Forward passes of the decoder in ``work``, and FLOPs of its matrix products, backwards too.

    Attention itself is left out: what is counted of it depends on the kernel.
    """
    calls: list[None] = []
    hook = decoder_of(model).register_forward_hook(lambda *_: calls.append(None))
    with FlopCounterMode(display=False) as counter:
        work()
    hook.remove()
    by_operator = counter.get_flop_counts()["Global"].items()
    return len(calls), sum(n for operator, n in by_operator if "attention" not in str(operator))


def cell(over: list[float], under: list[float]) -> str:
    """Median and quartiles."""
    return "{1:.3f} ({0:.3f}–{2:.3f})".format(*quartiles(over, under))


def step_rows(name: str, shape: str, options: argparse.Namespace) -> list[str]:
    """A line of the table for every form."""
    steps = make_steps(SIZES[name], *LATENTS[shape], options.device)
    found = {form: counted(step.distiller.student, step) for form, step in steps.items()}
    seconds = alternate(steps, options.rounds, options.device, warm=0)
    base = f"{1e3 * median(seconds[COT]):.0f}"
    return [
        f"| {name} | {shape} | {form} | {found[form][0]} | {found[form][1] / found[COT][1]:.2f} "
        f"| {cell(seconds[form], seconds[COT])} "
        f"| {'1' if form == PLAIN else cell(seconds[form], seconds[PLAIN])} | {base} |"
        for form in FORMS
    ]


def answer_row(name: str, shape: str, batch: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    model, forms = make_answers(SIZES[name], batch, *LATENTS[shape], options.device)
    (most, all_work), (fewer, work) = (counted(model, form) for form in forms.values())
    seconds = alternate(forms, options.rounds, options.device, warm=0)
    base = f"{1e3 * median(seconds[COT]):.0f}"
    cells = [name, shape, batch, most, fewer, f"{fewer / most:.3f}", f"{work / all_work:.2f}"]
    return f"| {' | '.join(map(str, [*cells, cell(seconds['latent'], seconds[COT]), base]))} |"


HEADS = {
    "step": "size, latents, step, passes, FLOPs / CoT, time / CoT, time / no KV loss, CoT ms",
    "answer": "size, latents, batch, CoT's passes, passes, passes / CoT, FLOPs / CoT, time / CoT, CoT ms",
}
"""Columns of the two tables."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["small", "medium"])
    parser.add_argument("--latents", choices=LATENTS, nargs="+", default=list(LATENTS))
    parser.add_argument("--part", choices=HEADS, nargs="+", default=list(HEADS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.device}, 1 thread, {options.rounds} rounds")
    for part in options.part:
        columns = HEADS[part].split(", ")
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for name in options.size:
            for shape in options.latents:
                if part == "step":
                    print("\n".join(step_rows(name, shape, options)), flush=True)
                    continue
                for batch in BATCHES:
                    print(answer_row(name, shape, batch, options), flush=True)


if __name__ == "__main__":
    main()
