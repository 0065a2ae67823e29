"""What ``kava profile`` computes, against loops in float64 and against the models' own attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from kava_core.build.aligner import build_aligner
from kava_core.jobs.profile import recomputed_attention
from kava_core.jobs.profile.layer_comparison import summed_cosines, to_student_view
from kava_core.jobs.profile.part_numbers import part_numbers
from kava_core.jobs.profile.quality_gate import gate_verdict, output_agreement
from kava_core.jobs.profile.recomputed_attention import (
    AttentionRule,
    attention_entropy,
    attention_output,
    attention_rules,
)
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import ENCODER
from kava_core.protocols.axes import Cache
from tests.support.pipeline_helpers import STUDENT, WIDE, cache, spec
from tests.support.tiny_models import WORKS

CASES = {case.name: case for case in WORKS}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(*lengths: int, time: int) -> Tensor:
    return torch.arange(time) < torch.tensor(lengths)[:, None]


def test_numbers_are_those_of_the_real_positions() -> None:
    x, valid = draw(2, 3, 2, 5, 4), mask(5, 2, time=5)
    x[1, :, :, 2:] = torch.nan
    x[0, 1, 0, 3, 2] = torch.inf
    found = part_numbers([(x, valid)])
    rows = [
        float(x[b, layer, h, t, d])
        for b in range(2)
        for layer in range(3)
        for h in range(2)
        for t in range(5)
        for d in range(4)
        if valid[b, t]
    ]
    kept = [v for v in rows if math.isfinite(v)]
    mean = sum(kept) / len(kept)
    assert found.shape == (2, 3, 2, 5, 4)
    assert found.bad == pytest.approx(1 / len(rows))
    assert found.bad_layers == (1,)
    assert (found.low, found.high) == (min(kept), max(kept))
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept)))


def test_batches_of_other_lengths_count_as_one() -> None:
    x, y = draw(2, 2, 2, 6, 3), draw(1, 2, 2, 3, 3, seed=1)
    together = torch.zeros(3, 2, 2, 6, 3, dtype=torch.float64)
    together[:2], together[2:, :, :, :3] = x, y
    apart = part_numbers([(x, mask(6, 4, time=6)), (y, mask(3, time=3))])
    one = part_numbers([(together, mask(6, 4, 3, time=6))])
    for name in ("bad", "low", "high", "mean", "std", "rank", "dead"):
        assert getattr(apart, name) == pytest.approx(getattr(one, name), rel=1e-9)


def test_rank_of_isotropic_and_of_collinear_positions() -> None:
    axes = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    line = torch.arange(8.0).double()[:, None] * torch.tensor([1.0, 2, 0, 0])
    x = torch.stack([axes, line])[None, :, None]
    assert part_numbers([(x[:, :1], mask(8, time=8))]).rank == pytest.approx(4)
    assert part_numbers([(x[:, 1:], mask(8, time=8))]).rank == pytest.approx(1)
    assert part_numbers([(x[:, 1:], mask(8, time=8))]).dead == pytest.approx(2 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_channel_is_dead_in_every_dtype(dtype: torch.dtype) -> None:
    x = draw(2, 1, 1, 6, 4)
    x[..., 1] = 0.7
    x[1, ..., 3:, 1] = 5.0
    found = part_numbers([(x.to(dtype), mask(6, 3, time=6))])
    assert found.dead == 1 / 4
    assert found.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("lengths", [(0, 0), (1, 0)])
def test_no_position_and_one_position_leave_numbers_open(lengths: tuple[int, int]) -> None:
    found = part_numbers([(draw(2, 1, 2, 3, 4), mask(*lengths, time=3))])
    assert (found.bad, found.bad_layers) == (0.0, ())
    assert math.isnan(found.dead)
    assert math.isnan(found.mean) == (sum(lengths) == 0)


def weights(q: Tensor, keys: Tensor, seen: list[int], scale: float) -> list[float]:
    scores = [float(q @ keys[j]) * scale for j in seen]
    exps = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(exps) for e in exps]


def looked_at(i: int, live: Tensor, window: int | None) -> list[int]:
    return [j for j in range(i + 1) if live[j] and (window is None or i - j < window)]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [2, 128])
def test_entropy_is_that_of_a_loop(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed_attention, "BLOCK", block)
    queries, keys, live = draw(2, 4, 7, 3), draw(2, 2, 7, 3, seed=1), mask(7, 4, time=7)
    live[0, 2] = False
    keys[1, :, 4:] = torch.nan
    nats, share = attention_entropy(queries, keys, live, AttentionRule(0.8, window))
    for b in range(2):
        for i in range(7):
            seen = looked_at(i, live[b], window)
            if not live[b, i]:
                assert nats[b, i].isnan()
                continue
            each = [
                -sum(p * math.log(p) for p in weights(queries[b, h, i], keys[b, h // 2], seen, 0.8))
                for h in range(4)
            ]
            assert float(nats[b, i]) == pytest.approx(sum(each) / 4, abs=1e-12)
            if len(seen) > 1:
                assert float(share[b, i]) == pytest.approx(sum(each) / 4 / math.log(len(seen)))
            else:
                assert share[b, i].isnan()


def test_alike_keys_have_all_of_log_n_and_a_loud_one_nothing() -> None:
    live = mask(5, time=5)
    nats, share = attention_entropy(
        draw(1, 1, 5, 2), torch.ones(1, 1, 5, 2).double(), live, AttentionRule(1.0)
    )
    assert nats[0].tolist() == pytest.approx([math.log(n) for n in range(1, 6)])
    assert share[0, 1:].tolist() == pytest.approx([1] * 4)
    loud = torch.zeros(1, 1, 5, 2).double()
    loud[..., 0, 0] = 1e4
    assert (
        float(attention_entropy(torch.ones(1, 1, 5, 2).double(), loud, live, AttentionRule(1.0))[0].sum())
        == 0
    )


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2", "Gemma 2", "Qwen3", "OPT"])
@torch.no_grad()
def test_entropy_is_that_of_the_models_own_attention(name: str) -> None:
    model = CASES[name].model(attn_implementation="eager", attn_logit_softcapping=None).eval()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    live = mask(9, 6, time=9)
    capture = Capture(model, parts=("keys", "queries"), rotary="keep")
    with capture:
        model(ids, attention_mask=live.long(), use_cache=False)
    held = capture.take()
    maps = model(ids, attention_mask=live.long(), use_cache=False, output_attentions=True).attentions
    assert held.queries is not None
    assert held.keys is not None
    for layer, rule in enumerate(attention_rules(model, (0, 1), held.keys.shape[-1])):
        nats, _ = attention_entropy(held.queries[:, layer], held.keys[:, layer], live, rule)
        wanted = torch.special.entr(maps[layer].double()).sum(-1).mean(1)
        torch.testing.assert_close(nats[live].double(), wanted[live], rtol=1e-4, atol=1e-4)


def output(q: Tensor, keys: Tensor, values: Tensor, seen: list[int], scale: float) -> Tensor:
    return sum(w * values[j] for w, j in zip(weights(q, keys, seen, scale), seen, strict=True))


def test_what_is_handed_on_and_its_agreement_are_those_of_a_loop() -> None:
    own = Cache(draw(2, 1, 2, 5, 3), draw(2, 1, 2, 5, 3, seed=1), draw(2, 1, 4, 5, 3, seed=2))
    target, live = Cache(draw(2, 1, 2, 5, 3, seed=3), draw(2, 1, 2, 5, 3, seed=4)), mask(5, 3, time=5)
    found = output_agreement(own, target, live, [AttentionRule(0.5)])
    for b in range(2):
        each = []
        for h in range(4):
            for i in range(int(live[b].sum())):
                seen = looked_at(i, live[b], None)
                mine, theirs = (
                    output(own.queries[b, 0, h, i], c.keys[b, 0, h // 2], c.values[b, 0, h // 2], seen, 0.5)
                    for c in (own, target)
                )
                each.append(float(mine @ theirs / (mine.norm() * theirs.norm())))
        assert float(found[b, 0]) == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_masked_positions_and_other_examples_change_no_agreement() -> None:
    own = Cache(draw(2, 2, 2, 6, 4), draw(2, 2, 2, 6, 4, seed=1), draw(2, 2, 2, 6, 4, seed=2))
    target, live, of = cache(STUDENT, 6, seed=5), mask(6, 3, time=6), [AttentionRule(0.5)] * 2
    plain = output_agreement(own, target, live, of)
    spoilt = target.map(lambda x, _: x.masked_fill(~live[:, None, None, :, None], torch.nan))
    torch.testing.assert_close(output_agreement(own, spoilt, live, of), plain)
    alone = output_agreement(*(c.map(lambda x, _: x[1:, :, :, :3]) for c in (own, target)), live[1:, :3], of)
    torch.testing.assert_close(alone, plain[1:])
    assert output_agreement(own, target, torch.zeros_like(live), of).isnan().all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_agreement_with_itself_is_one(dtype: torch.dtype, close: float) -> None:
    own = Cache(draw(1, 1, 1, 4, 8), draw(1, 1, 1, 4, 8, seed=1), draw(1, 1, 1, 4, 8, seed=2))
    own = own.map(lambda x, _: x.to(dtype))
    assert float(output_agreement(own, own, mask(4, time=4), [AttentionRule(0.3)])) == pytest.approx(
        1, abs=close
    )
    one = attention_output(
        own.queries[:, 0], own.keys[:, 0], own.values[:, 0], mask(1, time=4), AttentionRule(0.3)
    )
    torch.testing.assert_close(one[:, :, 0], own.values[:, 0, :, 0].float())


def test_cosines_are_summed_over_real_positions() -> None:
    own, target, valid = draw(2, 2, 2, 4, 3), draw(2, 2, 2, 4, 3, seed=1), mask(4, 1, time=4)
    found = summed_cosines(own, target.masked_fill(~valid[:, None, None, :, None], torch.nan), valid)
    for layer in range(2):
        each = [
            float(own[b, layer, h, t] @ target[b, layer, h, t])
            / float(own[b, layer, h, t].norm() * target[b, layer, h, t].norm())
            for b in range(2)
            for t in range(4)
            if valid[b, t]
            for h in range(2)
        ]
        assert float(found[layer]) == pytest.approx(sum(each) / 2)


def arms(true: list[float], shuffled: list[float]) -> dict[str, Tensor]:
    made = {"true": true, "shuffled": shuffled, "random": [0.0] * len(true)}
    return {arm: torch.tensor(values).double()[:, None] for arm, values in made.items()}


def test_the_gate_is_open_where_true_beats_shuffled_by_more_than_the_spread() -> None:
    found = gate_verdict(arms([0.9, 0.5, 0.7], [0.6, 0.1, 0.5]))
    assert found.difference == pytest.approx(0.3)
    assert found.spread == pytest.approx(0.1)
    assert found.open
    assert (found.examples, found.above) == (3, 1.0)
    assert not gate_verdict(arms([0.9, 0.1, 0.7], [0.6, 0.5, 0.5])).open
    assert not gate_verdict(arms([0.4, 0.4], [0.9, 0.8])).open


def test_examples_without_positions_are_left_out_and_one_has_no_spread() -> None:
    found = gate_verdict(arms([0.9, math.nan, 0.7], [0.6, 0.2, 0.5]))
    assert found.examples == 2
    assert found.mean["shuffled"] == pytest.approx(0.55)
    assert not gate_verdict(arms([0.9], [0.1])).open
    assert not gate_verdict(arms([math.nan], [0.1])).open


def aligner(align: dict[str, object], **changes: object) -> TeacherAligner:
    plain = {"head_adapter": "structured", "dim_projector": "identity", "time_warper": "pad"}
    made = spec(plain | align, losses=["relation"])
    both = {"teacher": WIDE, "student": STUDENT} | changes
    return build_aligner(
        made.teachers[0].align,
        name="a",
        layers=(0, 1),
        parts=("keys", "values"),
        **both,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "adapter", ["structured", "flat", {"name": "flat", "layers": True}], ids=["structured", "flat", "merged"]
)
def test_unfolding_undoes_the_view(adapter: object) -> None:
    own = cache(STUDENT, 5)
    one = aligner({"head_adapter": adapter, "dim_projector": "linear"})
    found = to_student_view(one, one.view_of(own), own)
    assert found is not None
    assert torch.equal(found.keys, own.keys)
    assert torch.equal(found.values, own.values)


def test_targets_of_other_extents_cannot_stand_in() -> None:
    own = cache(STUDENT, 5)
    lifted = aligner({"direction": "to_teacher", "dim_projector": "linear"})
    assert to_student_view(lifted, cache(WIDE, 5), own) is None
    wide = aligner({}, teacher=WIDE.with_(dim=6))
    assert to_student_view(wide, cache(STUDENT.with_(dim=6), 5), own) is None


def test_an_encoder_s_queries_see_later_keys() -> None:
    queries, keys, live = draw(1, 2, 4, 3), draw(1, 1, 4, 3, seed=1), mask(3, time=4)
    nats, _ = attention_entropy(queries, keys, live, AttentionRule(scale=0.5, causal=False))
    weights = (queries @ keys.mT * 0.5)[..., :3].softmax(-1)
    wanted = -(weights * weights.log()).sum(-1).mean(1)
    torch.testing.assert_close(nats[:, :3], wanted[:, :3])


def test_the_configuration_says_which_model_is_an_encoder() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    assert attention_rules(BertModel(config), (0,), 4) == [AttentionRule(0.5)]
    setattr(config, ENCODER, True)
    assert attention_rules(BertModel(config), (0,), 4) == [AttentionRule(0.5, causal=False)]
