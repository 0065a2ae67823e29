"""Teachers whose tokens are evicted: what is gathered, with which rotation, and how a step sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.config import ComponentConfig
from kava_core.costs.plan import make_plan
from kava_core.distill.calibration import aligned_targets
from kava_core.errors import PluginError, SpecError
from kava_core.kv.align.eviction import Eviction, evicted_cache, filled_slots
from kava_core.kv.capture.capture import Capture
from kava_core.protocols.axes import Cache
from kava_core.protocols.timeline import Timeline
from kava_core.testing import TimeWarperTests
from kava_core.train.run import run
from kava_core.train.validation.score_spreads import eviction_score_spreads, score_spread
from kava_plugins.time_warpers._reasoning import highest_positions, is_reasoning
from tests.support import tiny
from tests.support.pipeline_helpers import FakeConfig, Module, timeline

torch.set_num_threads(1)


def spec(folder: Path | str = "runs", *, align: dict[str, Any] | None = None, **changes: Any) -> Any:
    how = {"time_warper": "rkv", "dim_projector": "linear"} | (align or {})
    teachers = [one | {"align": how} for one in tiny.FIELDS["teachers"]]
    latent = {"trajectory": "latent", "latent": {"count": 3, "passes": 2}, "teachers": teachers}
    return tiny.spec(folder, **(latent | changes))


def made(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """Distiller and a batch of five examples."""
    one = spec(**changes)
    data = make_data(one)
    distiller = make_distiller(one, data, seed=0).eval()
    return distiller, data.plain_collator([data.train_items[index] for index in range(5)])


def teacher_of(distiller: Any, name: str) -> Any:
    return next(t for t in distiller.teachers if t.name == name)


def raw(distiller: Any, batch: dict[str, Any], name: str, rotary: Any) -> Cache:
    """A teacher's cache of all positions, captured by hand."""
    teacher, side = teacher_of(distiller, name), batch["teachers"][name]
    layers = teacher.capture.layers
    capture = Capture(teacher.model, layers=layers, parts=("keys", "values", "queries"), rotary=rotary)
    with torch.no_grad(), capture:
        teacher.model(side["input_ids"], attention_mask=side["attention_mask"], use_cache=False)
    return capture.take()


class Fixed(torch.nn.Module):
    """Chooses what a function says of cache, timeline and count."""

    reads = ("keys",)

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.choose = function

    def forward(self, teacher: Timeline, student: Timeline) -> Any:
        """Not asked for here."""
        raise NotImplementedError


def eviction(function: Any, slots: int, **how: Any) -> Eviction:
    return Eviction(
        Fixed(function), slots, **({"parts": ("keys", "values"), "rotary": "keep"} | how), who="x"
    )


def side_of(line: Timeline) -> dict[str, torch.Tensor]:
    return {"attention_mask": line.mask.long(), "segments": line.segments, "spans": line.spans}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_gathered_alike(dtype: torch.dtype) -> None:
    keys, values = (torch.randn(2, 3, 2, 7, 4).to(dtype) for _ in range(2))
    place = torch.randint(7, (2, 3, 2, 5))
    filled = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    found = evicted_cache(Cache(keys, values), place, filled)
    for part, x in (("keys", keys), ("values", values)):
        for b, layer, head, slot in torch.cartesian_prod(*map(torch.arange, (2, 3, 2, 5))).tolist():
            wanted = x[b, layer, head, place[b, layer, head, slot]] * filled[b, slot]
            assert torch.equal(getattr(found, part)[b, layer, head, slot], wanted)


def test_empty_slots_are_zero_whatever_stands_there() -> None:
    x = torch.full((1, 1, 1, 3, 2), torch.nan)
    found = evicted_cache(Cache(keys=x), torch.zeros(1, 1, 1, 4, dtype=torch.long), torch.zeros(1, 4).bool())
    assert torch.equal(found.any, torch.zeros(1, 1, 1, 4, 2))
    nothing = evicted_cache(
        Cache(keys=x[:, :, :, :0]), torch.zeros(1, 1, 1, 4).long(), torch.zeros(1, 4).bool()
    )
    assert torch.equal(nothing.any, torch.zeros(1, 1, 1, 4, 2))


def test_as_many_slots_are_filled_as_there_are_reasoning_tokens() -> None:
    found = filled_slots(timeline((1, 2, 3), (1, 0, 2), (0, 5, 1), left=1), 3)
    assert found.tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_queries_are_not_compared() -> None:
    x = torch.zeros(1, 1, 1, 3, 2)
    with pytest.raises(SpecError, match="queries of an evicted teacher"):
        evicted_cache(Cache(x, x, x), torch.zeros(1, 1, 1, 2).long(), torch.ones(1, 2).bool())
    with pytest.raises(SpecError, match=r"'rkv' .* losses must compare keys and values alone"):
        made(losses=[{"name": "relation", "parts": ["keys", "queries"]}])


def test_a_wrong_choice_names_whose_it_is() -> None:
    line = timeline((1, 3, 1))
    wrong = eviction(lambda cache, line, count: torch.zeros(1, 2, 2, count + 1).long(), 2)
    cache = Cache(*(torch.zeros(1, 2, 2, 5, 4) for _ in range(2)))
    with pytest.raises(PluginError, match=r"returned shape \[1, 2, 2, 3\], must be \[1, 2, 2, 2\]") as caught:
        wrong(cache, None, side_of(line))
    assert caught.value.__notes__ == ["in x"]


@pytest.mark.parametrize("name", ["wide", "gpt"])
def test_an_evictor_sees_what_attention_saw(name: str) -> None:
    distiller, batch = made()
    teacher, seen = teacher_of(distiller, name), []
    choose = teacher.eviction.evictor.choose
    teacher.eviction.evictor.choose = lambda cache, *rest: seen.append(cache) or choose(cache, *rest)
    teacher.cache(batch["teachers"][name])
    wanted = raw(distiller, batch, name, "keep")
    assert torch.equal(seen[0].keys, wanted.keys)
    assert torch.equal(seen[0].queries, wanted.queries)


@pytest.mark.parametrize("rotary", ["strip", "keep"])
@pytest.mark.parametrize("name", ["wide", "gpt"])
def test_a_target_is_the_kept_tokens_of_the_whole_cache(rotary: str, name: str) -> None:
    """With ``strip`` their rotation is gone, by their own places in the text."""
    distiller, batch = made(rotary=rotary)
    teacher, side = teacher_of(distiller, name), batch["teachers"][name]
    line, whole = Timeline.from_batch(side), raw(distiller, batch, name, rotary)
    place = teacher.eviction.evictor.choose(raw(distiller, batch, name, "keep"), line, 3)
    found, filled = teacher.cache(side), filled_slots(line, 3)
    assert found.queries is None
    for part in ("keys", "values"):
        gathered = getattr(whole, part).take_along_dim(place[..., None], 3)
        wanted = torch.where(filled[:, None, None, :, None], gathered, 0)
        torch.testing.assert_close(getattr(found, part), wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_keys_lose_no_more_than_one_rounding() -> None:
    """Un-rotated in float32, and left there."""
    distiller, batch = made()
    teacher, side = teacher_of(distiller, "wide"), batch["teachers"]["wide"]
    exact = teacher.cache(side).keys
    teacher.model.bfloat16()
    found = teacher.cache(side).keys
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_autocast_does_not_reach_the_choice() -> None:
    distiller, batch = made()
    side, cut = batch["teachers"]["wide"], teacher_of(distiller, "wide").eviction
    cache = raw(distiller, batch, "wide", "keep")
    kept, scores = cut(cache, None, side), cut.scores(cache, side)
    with torch.autocast("cpu", torch.bfloat16):
        again, seen = cut(cache, None, side), cut.scores(cache, side)
    assert torch.equal(again.keys, kept.keys)
    for name, score in scores.items():
        assert torch.equal(seen[name], score)


@pytest.mark.parametrize("warper", ["rkv", "random", "uniform", "crop"])
def test_a_step_has_finite_gradients(warper: str) -> None:
    distiller, batch = made(align={"time_warper": warper})
    found = distiller(batch["student"], batch["teachers"], torch.ones(4))
    found["loss"].backward()
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert distiller.latents.slots.grad.abs().max() > 0


@pytest.mark.parametrize(("steps", "filled"), [(2, 2), (1, 0)])
def test_the_student_as_its_own_teacher(steps: int, filled: int) -> None:
    """As in KaVa, without the last step: of two a space and a digit are left, of one nothing."""
    align = {"time_warper": "rkv", "dim_projector": "identity"}
    distiller, batch = made(
        teachers=[{"name": "own", "itself": {}, "last_step": False, "align": align}],
        data=tiny.FIELDS["data"] | {"steps": steps},
    )
    (aligned,) = aligned_targets(distiller, batch)
    assert aligned.valid.sum(1).tolist() == [filled] * 5
    assert not any(x.requires_grad for _, x in aligned.target.items())
    found = distiller(batch["student"], batch["teachers"], torch.ones(4))
    found["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)
    assert (found["mercator"] > 0) == (filled > 0)


def test_targets_stand_at_the_latent_tokens_in_order() -> None:
    """Of a teacher with as many reasoning tokens as there are latents all are kept: the target is its own."""
    distiller, batch = made(
        teachers=[
            {"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS}
            | {"align": {"time_warper": "rkv", "dim_projector": "identity"}}
        ],
        latent={"count": 4, "passes": 1},
        losses=["mse"],
    )
    (aligned,) = aligned_targets(distiller, batch)
    whole, reasoning = raw(distiller, batch, "t", "strip"), batch["teachers"]["t"]["segments"] == 1
    assert aligned.valid.all()
    for part, target in aligned.target.items():
        for row in range(5):
            wanted = getattr(whole, part)[row][:, :, reasoning[row]]
            torch.testing.assert_close(target[row], wanted, rtol=1e-5, atol=1e-5)


def test_a_run_trains_calibrates_and_logs_the_spreads(tmp_path: Path) -> None:
    calibrated = {"dim_projector": "calibrated"}
    result = run(spec(tmp_path, align=calibrated), variant="main", seed=0)
    told = (result.folder / "metrics.jsonl").read_text()
    for score in ("importance", "redundancy"):
        assert f"spread/gpt/{score}" in told


def test_spread_is_the_standard_deviation_over_a_trace() -> None:
    none = -torch.inf
    score = torch.tensor([[none, 1.0, 3.0, 8.0], [2.0, none, none, none], [4.0, 6.0, none, none]])[
        :, None, None
    ]
    wanted = (
        torch.tensor([1.0, 3.0, 8.0]).std(correction=0) + torch.tensor([4.0, 6.0]).std(correction=0)
    ) / 2
    torch.testing.assert_close(score_spread(score), wanted)
    assert score_spread(score[1:2]).isnan()


def test_spreads_are_of_teachers_with_scores() -> None:
    distiller, batch = made()
    names = {f"spread/{t}/{score}" for t in ("wide", "gpt") for score in ("importance", "redundancy")}
    assert set(eviction_score_spreads(distiller, batch)) == names
    for warper in ("random", "crop"):
        assert eviction_score_spreads(*made(align={"time_warper": warper})) == {}


def test_a_dry_run_sees_slots() -> None:
    dry = make_plan(spec(), time=12, t_time=14).dry
    assert {shape.shape[3] for shape in dry.shapes} == {3}


@pytest.mark.parametrize("warper", ["rkv", "random"])
def test_written_steps_are_not_evicted(warper: str) -> None:
    with pytest.raises(ValidationError, match=rf"time_warper '{warper}' .* needs 'trajectory: latent'"):
        spec(trajectory="text", align={"time_warper": warper})
    tiny.spec(teachers=[tiny.FIELDS["teachers"][0] | {"align": {"time_warper": "uniform"}}])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"align": {"token_warper": "crop"}}, "cannot go together with a token_warper"),
        ({"align": {"time_warper": "crop", "token_warper": "rkv"}}, "cannot go together with a token_warper"),
        ({"align": {"layer_mapper": "learned"}}, "every student layer must read one teacher layer"),
        ({"train": {"stream": True}}, r"train.stream: the time warper of teacher 'wide' evicts"),
    ],
)
def test_what_does_not_go_together_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        made(**changes)


def kit_with(choose: Any) -> tuple[TimeWarperTests, ComponentConfig]:
    """The conformance kit and a declaration of an evictor."""
    return TimeWarperTests(), FakeConfig(make=lambda **_: Fixed(choose))


def repeated(cache: Cache, line: Timeline, count: int) -> torch.Tensor:
    first = (line.segments == 1).long().argmax(1)
    return first[:, None, None, None].expand(*cache.any.shape[:3], count).clone()


def any_token(cache: Cache, line: Timeline, count: int) -> torch.Tensor:
    return torch.arange(count).clamp(max=line.mask.shape[1] - 1).expand(*cache.any.shape[:3], count)


@pytest.mark.parametrize(
    ("choose", "said"),
    [(repeated, "must be in time order, each token once"), (any_token, "must name reasoning tokens")],
)
def test_the_kit_finds_a_wrong_evictor(choose: Any, said: str) -> None:
    kit, config = kit_with(choose)
    with pytest.raises(pytest.fail.Exception, match=said):
        kit.test_evictions_are_reasoning_tokens(config, (9, 5))


def by_place(cache: Cache, line: Timeline, count: int) -> torch.Tensor:
    """Prefers some places of the padded sequence."""
    third = torch.arange(line.mask.shape[1]) % 3
    scores = torch.where(is_reasoning(line), third.float(), -torch.inf)
    return highest_positions(scores[:, None, None].expand(cache.any.shape[:4]), count)


def test_the_kit_finds_an_evictor_that_looks_at_padding() -> None:
    kit, config = kit_with(by_place)
    kit.test_evictions_are_reasoning_tokens(config, (9, 1))
    with pytest.raises(pytest.fail.Exception, match="padding must not change what is kept"):
        kit.test_evictions_ignore_padding(config, (12, 1))


def test_the_kit_asks_nothing_of_an_ordinary_warper() -> None:
    config = FakeConfig(make=lambda **_: Module(lambda *_: None))
    TimeWarperTests().test_evictions_are_reasoning_tokens(config, (9, 5))
