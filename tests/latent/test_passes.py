"""Latent reasoning as a user trains and uses it; one step against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoTokenizer

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.cli.app import main
from kava_core.costs.plan import make_plan
from kava_core.distill.alignment import StepBatch
from kava_core.distill.calibration import aligned_targets
from kava_core.errors import CheckpointError, SpecError
from kava_core.jobs.export import export_student
from kava_core.latent.collate import with_thought_tokens
from kava_core.latent.exported import LatentStudent, load_latents
from kava_core.latent.growing_text import GrowingText
from kava_core.latent.student import write_answers
from kava_core.runs import checkpoint
from kava_core.train.run import run
from kava_core.train.weights import load_weights, save_weights
from tests.support import tiny

ALIGN = {"time_warper": {"name": "segment", "segments": ["reasoning"]}, "dim_projector": "linear"}
TEACHERS = [one | {"align": ALIGN} for one in tiny.FIELDS["teachers"]]
OWN = {"name": "own", "itself": {}, "align": ALIGN}
LATENT: dict[str, Any] = {"trajectory": "latent", "latent": {"count": 3, "passes": 2}}


def spec(folder: Path | str = "runs", **changes: Any) -> Any:
    return tiny.spec(folder, **({"teachers": TEACHERS} | LATENT | changes))


def made(**changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Data, distiller and a batch of five examples."""
    one = spec(**changes)
    data = make_data(one)
    distiller = make_distiller(one, data, seed=0).eval()
    return data, distiller, data.plain_collator([data.train_items[index] for index in range(5)])


def test_the_batch_holds_prompt_thought_and_answer() -> None:
    data, _, batch = made()
    side, tokens = batch["student"], data.tokenizer.convert_ids_to_tokens
    for row in range(5):
        example = data.train_items[row].example
        before = tokens(side["before"][row][side["before_mask"][row].bool()])
        after = tokens(side["after"][row][side["after_mask"][row].bool()])
        assert "".join(before) == f"{example.prompt}?<bot>"
        assert "".join(after[:-1]) == f"<eot> #{example.answer}"
        assert side["labels"][row].tolist()[: len(after)] == [
            -100,
            *side["after"][row].tolist()[1 : len(after)],
        ]
    assert side["attention_mask"].shape == side["segments"].shape == (5, 3)
    assert (side["segments"] == 1).all()


def by_hand(distiller: Any, side: dict[str, Tensor], row: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One example without padding: its answer's cross-entropy, logits, and keys of its latent tokens."""
    student, latents = distiller.student, distiller.latents
    before = side["before"][row][side["before_mask"][row].bool()][None]
    after = side["after"][row][side["after_mask"][row].bool()][None]
    embed = student.get_input_embeddings()
    prefix, thought = embed(before), latents.slots[None]
    for _ in range(latents.passes):
        whole = torch.cat([prefix, thought], 1)
        hidden = student.model(inputs_embeds=whole, use_cache=False).last_hidden_state
        thought = latents.slots[None] + latents.projection(hidden[:, prefix.shape[1] - 1 : -1])
    outputs = student(inputs_embeds=torch.cat([prefix, thought, embed(after)], 1), use_cache=True)
    columns = slice(prefix.shape[1], prefix.shape[1] + latents.count)
    values = [layer.values[0, :, columns] for layer in outputs.past_key_values.layers]
    logits = outputs.logits[0, columns.stop :]
    return F.cross_entropy(logits[:-1], after[0, 1:], reduction="sum"), logits, values


def test_a_step_is_what_plain_transformers_give_without_padding() -> None:
    """Cross-entropy, and the values that are compared, of a padded batch against its examples alone."""
    _, distiller, batch = made(losses=[{"name": "mse", "parts": ["values"]}])
    side = batch["student"]
    alone = [by_hand(distiller, side, row) for row in range(5)]
    own = distiller.student_pass(StepBatch(side, {}, torch.ones(4)))
    torch.testing.assert_close(
        own.cross_entropy, torch.stack([ce for ce, _, _ in alone]).sum(), rtol=1e-5, atol=1e-5
    )
    for row, (_, logits, values) in enumerate(alone):
        torch.testing.assert_close(own.logits[row, : len(logits)], logits, rtol=1e-4, atol=1e-5)
        for layer, expected in enumerate(values):
            torch.testing.assert_close(own.cache.values[row, layer], expected, rtol=1e-4, atol=1e-5)


def test_the_kv_loss_alone_reaches_slots_projection_and_weights() -> None:
    _, distiller, batch = made()
    _, terms = distiller.terms(batch["student"], batch["teachers"], torch.ones(4))
    latents = distiller.latents
    wanted = [
        latents.slots,
        *latents.projection.parameters(),
        distiller.student.model.layers[0].self_attn.k_proj.weight,
    ]
    for gradient in torch.autograd.grad(terms["mercator"], wanted):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_the_teacher_reasoning_is_spread_over_the_latent_tokens() -> None:
    """Targets of a teacher with as many reasoning tokens as there are latents are its own, in order."""
    _, distiller, batch = made(
        teachers=[{"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS}
                  | {"align": ALIGN | {"dim_projector": "identity"}}],
        latent={"count": 4, "passes": 1},
        losses=[{"name": "mse", "parts": ["values"]}],
    )  # fmt: skip

    teacher, side = distiller.teachers[0], batch["teachers"]["t"]
    (aligned,) = aligned_targets(distiller, batch)
    raw = teacher.cache(side).values
    for row in range(5):
        places = (side["segments"][row] == 1).nonzero().flatten()
        assert len(places) == 4  # two steps, each a space and a digit
        torch.testing.assert_close(aligned.target.values[row], raw[row][:, :, places])
    assert aligned.valid.all()


def test_answers_are_the_same_alone_and_in_a_batch() -> None:
    data, distiller, _ = made()
    examples = [data.train_items[row].example for row in range(6)]
    how = {"end": data.collator.end, "max_new_tokens": 5}

    def answers(some: list[Any]) -> list[list[int]]:
        prompts, _ = data.plain_collator.prompts(some)
        found: list[list[int]] = write_answers(
            distiller.student, distiller.latents, **prompts, **how
        ).tolist()
        return found

    alone = [answers([example])[0] for example in examples]
    pad = distiller.student.generation_config.pad_token_id
    for mine, theirs in zip(alone, answers(examples), strict=True):
        assert mine == theirs[: len(mine)]
        assert all(token == pad for token in theirs[len(mine) :])


@pytest.mark.parametrize("losses", [[], tiny.FIELDS["losses"]])
def test_a_run_ends_resumes_and_answers(tmp_path: Path, losses: list[Any]) -> None:
    result = run(spec(tmp_path, losses=losses), variant="main", seed=0)
    student = LatentStudent.from_pretrained(result.folder / "student")
    assert len(student.answer(["1+2*3?", "4-1+1?"], max_new_tokens=4)) == 2
    last = checkpoint.newest_intact(result.folder / "checkpoints")
    assert last is not None
    kept = load_latents(last).state_dict()
    for name, tensor in student.latents.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_latents_are_saved_and_loaded_exactly(tmp_path: Path) -> None:
    data, distiller, _ = made(losses=[], teachers=[])
    save_weights(distiller, tmp_path)
    other = make_distiller(spec(losses=[], teachers=[]), data, seed=1)
    assert not torch.equal(other.latents.slots, distiller.latents.slots)
    load_weights(other, tmp_path)
    assert torch.equal(other.latents.slots, distiller.latents.slots)
    (tmp_path / "latent.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no latent tokens can be loaded"):
        load_weights(other, tmp_path)


def test_a_model_with_fewer_embeddings_grows(tmp_path: Path) -> None:
    """A student from a folder knows no thought tokens; its own embeddings stay as they are."""
    path = run(tiny.spec(tmp_path, teachers=[], losses=[]), variant="main", seed=0).folder / "student"
    one = spec(
        tmp_path, student={"config": None, "tokenizer": None, "path": str(path)}, teachers=[], losses=[]
    )
    data = make_data(one)
    grown = make_distiller(one, data, seed=0).student.get_input_embeddings().weight
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    assert len(grown) == len(plain) + 2 == len(data.tokenizer)
    assert torch.equal(grown[: len(plain)], plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": {"teachers": ["gpt"]}}, "logits"),
        ({"store": {"folder": "x"}}, "store"),
        ({"rotary": "match"}, "rotary: match"),
        ({"train": {"compile": "aot_eager"}}, "train.compile"),
    ],
)
def test_what_does_not_go_together_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=rf"'trajectory: latent' does not go together with {words} yet"):
        spec(**changes)


def test_hidden_states_are_those_the_head_reads() -> None:
    _, distiller, batch = made(teachers=[], losses=[])
    student = distiller.student
    embeds = student.get_input_embeddings()(batch["student"]["before"])
    mask = batch["student"]["before_mask"].bool()
    hidden = GrowingText(student)(embeds, mask, final=0)
    logits = student(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    ).logits
    torch.testing.assert_close(student.lm_head(hidden), logits)


def test_layers_are_not_measured_on_latent_tokens(tmp_path: Path) -> None:
    measured = spec(tmp_path, teachers=[TEACHERS[0] | {"align": ALIGN | {"layer_mapper": "cka"}}])
    with pytest.raises(SpecError, match="layers cannot be measured on latent tokens"):
        run(measured, variant="main", seed=0)


def test_a_plan_counts_what_every_pass_reads() -> None:
    """12 tokens at last, 9 and a slot in the first Jacobi pass of two, 2 slots in the second.

    The pipeline sees three positions, whatever the text's length.
    """
    latent, text = (make_plan(spec(trajectory=t), time=12, t_time=14) for t in ("latent", "text"))
    own = make_plan(spec(teachers=[OWN], losses=[], trajectory="latent"), time=12, t_time=14)
    assert latent.flops["student"] == pytest.approx(text.flops["student"] * 24 / 12, rel=0.05)
    assert latent.flops["student"] < text.flops["student"] * 24 / 12  # no head in Jacobi passes
    more = own.flops["student"] - latent.flops["student"]
    assert more == pytest.approx(text.flops["student"] * 14 / 12)
    logits = "student: logits and their gradient"
    assert own.memory[logits] == text.memory[logits] / 12 * (12 + 14)
    assert list(own.flops) == ["student"]
    activations = text.memory["student: activations"] * 24 / 12
    assert latent.memory["student: activations"] == pytest.approx(activations, rel=0.01)
    assert {shape.shape[3] for shape in latent.dry.shapes if "time" in shape.stage} == {3}


def test_without_a_token_before_them(tmp_path: Path) -> None:
    """The first latent token then follows the prompt's last; the exported student knows."""
    latent = LATENT["latent"] | {"begin": False}
    data, _, batch = made(latent=latent)
    row = batch["student"]["before"][0][batch["student"]["before_mask"][0].bool()]
    prompt = data.train_items[0].example.prompt
    assert "".join(data.tokenizer.convert_ids_to_tokens(row)) == f"{prompt}?"
    result = run(spec(tmp_path, latent=latent, losses=[], teachers=[]), variant="main", seed=0)
    student = LatentStudent.from_pretrained(result.folder / "student")
    assert student.latents.begin is False
    prompts = [item.example.prompt + "?" for item in data.validation_items.items[:4]]
    written = [
        json.loads(line)["wrote"] for line in (result.folder / "samples.jsonl").read_text().splitlines()
    ]
    assert student.answer(prompts, max_new_tokens=6) == written[:4]


def test_other_special_tokens_stay_special(tmp_path: Path) -> None:
    tokenizer = make_data(spec(losses=[], teachers=[], trajectory="text")).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    with_thought_tokens(tokenizer)
    assert "<x>" in tokenizer.all_special_tokens
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one.convert_tokens_to_ids(["1", "<bot>", "<eot>", "<x>"])
        assert len(set(ids)) == 4
        assert one.decode(ids, skip_special_tokens=True) == "1"


def test_the_exported_card_names_the_class_that_thinks(tmp_path: Path) -> None:
    result = run(spec(tmp_path), variant="main", seed=0)
    export_student(result.folder, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "kava_core.latent.exported.LatentStudent" in card
    assert "kava is not needed" not in card
    assert LatentStudent.from_pretrained(tmp_path / "exported").answer(["1+2*3?"], max_new_tokens=2)


def test_calibrating_layers_of_latent_tokens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latent.yaml"
    file.write_text(json.dumps(tiny.FIELDS | {"teachers": TEACHERS} | LATENT))
    with pytest.raises(SystemExit) as left:
        main(["calibrate", str(file), "--output", str(tmp_path / "maps")])
    assert left.value.code == 2
    assert "layers cannot be measured on latent tokens" in capsys.readouterr().err
