"""Undoing and redoing a model's rotation, against pre-rotary projections and formulas in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split

from kava_core.errors import KavaError
from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.rotation import rerotate, unrotate
from tests.support.tiny_models import SCHEMES, WORKS, Case

torch.set_num_threads(1)
LLAMA = Case("Llama", "llama")
TIME, DIM, LENGTH = 20, 8, 8
"""More positions than the tiny models were made for (LENGTH), where dynamic NTK and longrope change."""
IDS = torch.randint(3, 64, (2, TIME), generator=torch.Generator().manual_seed(0))
PLACES = torch.stack([torch.arange(TIME), torch.arange(TIME) * 3 + 1])
FLOAT32 = 2e-6
"""transformers computes angles in float32, whatever the dtype of the model."""
LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}}  # fmt: skip


def scheme_model(scheme: str, base: float = 1e4, **more: Any) -> nn.Module:
    parameters = {"rope_type": scheme, "rope_theta": base, **SCHEMES[scheme]}
    model = LLAMA.model(torch.float64, rope_parameters=parameters, max_position_embeddings=LENGTH, **more)
    return model.eval()


def before_rotation(model: nn.Module) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {"keys": [], "queries": []}
    for layer in attention_layers(model):
        layer.k_proj.register_forward_hook(lambda m, i, o: seen["keys"].append(o))
        layer.q_proj.register_forward_hook(lambda m, i, o: seen["queries"].append(o))
    return seen


def as_heads(projected: list[Tensor]) -> Tensor:
    return rearrange(projected, "layer batch time (head dim) -> batch layer head time dim", dim=DIM)


def forward(model: nn.Module, rotary: str, places: Tensor = PLACES, **options: Any) -> Capture:
    """A capture of one forward pass, not yet taken."""
    with torch.no_grad(), Capture(model, rotary=rotary, **options) as capture:
        model(IDS, position_ids=places, use_cache=False)
    return capture


def exactly(one: Tensor, other: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_frequency_scheme_is_undone(scheme: str) -> None:
    model = scheme_model(scheme)
    seen = before_rotation(model)
    cache = forward(model, "strip", parts=("keys", "values", "queries")).take()
    for part, projected in seen.items():
        exactly(getattr(cache, part), as_heads(projected))
    assert (forward(model, "keep").take().keys - cache.keys).abs().max() > 0.1


def default(base: float, dim: int, of: dict[str, Any], time: int) -> tuple[Tensor, float]:
    """RoFormer (arXiv 2104.09864), section 3.2.2."""
    return base ** (-torch.arange(0, dim, 2).double() / dim), 1.0


def linear(base: float, dim: int, of: dict[str, Any], time: int) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595)."""
    return default(base, dim, of, time)[0] / of["factor"], 1.0


def dynamic(base: float, dim: int, of: dict[str, Any], time: int) -> tuple[Tensor, float]:
    """NTK-aware base, growing with the text beyond the length trained on (YaRN, section 3.3)."""
    stretch = max(1.0, of["factor"] * time / LENGTH - (of["factor"] - 1))
    return default(base * stretch ** (dim / (dim - 2)), dim, of, time)


def yarn(base: float, dim: int, of: dict[str, Any], time: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): ramp between 32 and 1 turns, scaling 0.1 ln s + 1."""
    plain = default(base, dim, of, time)[0]

    def channel(turns: float) -> float:
        return dim * math.log(LENGTH / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), dim - 1)
    ramp = ((torch.arange(dim // 2).double() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / of["factor"] * ramp + plain * (1 - ramp), 0.1 * math.log(of["factor"]) + 1


def llama3(base: float, dim: int, of: dict[str, Any], time: int) -> tuple[Tensor, float]:
    """Llama 3.1's: long waves are slowed down, short ones kept, between them both are mixed."""
    plain = default(base, dim, of, time)[0]
    turns = LENGTH * plain / (2 * math.pi)
    low, high = of["low_freq_factor"], of["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / of["factor"] * (1 - kept), 1.0


def longrope(base: float, dim: int, of: dict[str, Any], time: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753) with Phi-3's attention scaling."""
    stretch = torch.tensor(of["long_factor" if time > LENGTH else "short_factor"]).double()
    scale = math.sqrt(1 + math.log(of["factor"]) / math.log(LENGTH))
    return default(base, dim, of, time)[0] / stretch, scale


Frequencies = Callable[[float, int, dict[str, Any], int], tuple[Tensor, float]]
FORMULAS: dict[str, Frequencies] = {
    formula.__name__: formula for formula in (default, linear, dynamic, yarn, llama3, longrope)
}


def roformer(x: Tensor, places: Tensor, frequencies: Tensor, scale: float, *, interleaved: bool) -> Tensor:
    """Complex numbers made of pairs of channels, times scale · exp(i · position · frequency)."""
    width = 2 * len(frequencies)
    pairs = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    theta = (places[..., None].double() * frequencies)[:, None, None]
    spun = torch.complex(first, second) * torch.polar(torch.full_like(theta, scale), theta)
    together = torch.stack([spun.real, spun.imag], -1 if interleaved else -2).flatten(-2)
    return torch.cat([together, x[..., width:]], -1)


@pytest.mark.parametrize("places", [PLACES, PLACES[:1, :6]], ids=["long", "short"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_frequency_scheme_is_its_paper_s(scheme: str, places: Tensor) -> None:
    """The captured rotation of a foreign tensor, against the scheme's formula and RoFormer's."""
    capture = Capture(scheme_model(scheme), rotary="match")
    with capture, torch.no_grad():
        capture._model(IDS[: len(places), : places.shape[1]], position_ids=places, use_cache=False)
    capture.take()
    raw = torch.randn(len(places), 2, 3, places.shape[1], DIM, dtype=torch.float64)
    frequencies, scale = FORMULAS[scheme](1e4, DIM, SCHEMES[scheme], int(places.max()) + 1)
    want = roformer(raw, places, frequencies, scale, interleaved=False)
    exactly(capture.rotation().apply(raw), want, atol=50 * FLOAT32)


FAMILIES = {case.name: case for case in WORKS}
ROTARY = {
    "Llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e3}},
    "GPT-NeoX": {},
    "Phi": {},
    "StableLM": {},
    "GLM": {},
    "Cohere": {},
    "Cohere 2": {},
    "SmolLM3": {},
    "Qwen3": {},
    "Gemma 3 (text)": LOCAL,
}


def family(name: str) -> nn.Module:
    return FAMILIES[name].model(torch.float64, **ROTARY[name]).eval()


def keys_before(name: str, model: nn.Module) -> Callable[[], Tensor]:
    case = FAMILIES[name]
    reads = [case.oracle(layer, case.head) for layer in attention_layers(model)]
    return lambda: torch.stack([read()["keys"] for read in reads], 1)


IN_FLOAT32 = ("Cohere", "Cohere 2")
"""Families that rotate in float32 whatever they are given."""


@pytest.mark.parametrize("name", ROTARY)
def test_a_family_s_own_rotation_is_undone_and_redone(name: str) -> None:
    model, rounding = family(name), 5e-7 if name in IN_FLOAT32 else 1e-13
    before = keys_before(name, model)
    stripped = forward(model, "strip").take().keys
    exactly(stripped, before(), rounding)
    capture = forward(model, "match")
    kept = capture.take().keys
    assert torch.equal(kept, forward(model, "keep").take().keys)
    exactly(capture.rotation().apply(before()), kept, rounding)
    exactly(capture.rotation().undo(kept), before(), rounding)


INTERLEAVED = ("GLM", "Cohere", "Cohere 2")
BASES = {
    "Llama": [3e3, 3e3],
    "Gemma 3 (text)": [1e3, 1e6],
    "SmolLM3": [2e6, None],
    "Cohere 2": [1e4, None],
} | {"Cohere": [5e5, 5e5]}
WIDTHS = {"GPT-NeoX": 4, "Phi": 4, "StableLM": 4, "GLM": 4}


@pytest.mark.parametrize("name", [name for name in ROTARY if name != "Qwen3"])
def test_a_family_s_rotation_is_roformer_s(name: str) -> None:
    """Bases, widths and pairs as each family's documentation gives them; None: a layer without rotation."""
    capture = forward(family(name), "match")
    capture.take()
    raw = torch.randn(2, 2, 3, TIME, DIM, dtype=torch.float64)
    turned = capture.rotation().apply(raw)
    for layer, base in enumerate(BASES.get(name, [1e4, 1e4])):
        want = raw[:, layer : layer + 1]
        if base is not None:
            frequencies, _ = default(base, WIDTHS.get(name, DIM), {}, TIME)
            frequencies = frequencies / (8 if base == 1e6 else 1)
            want = roformer(want, PLACES, frequencies, 1.0, interleaved=name in INTERLEAVED)
        exactly(turned[:, layer : layer + 1], want, atol=50 * FLOAT32)


PAIRS = [(name, "default") for name in ROTARY] + [
    ("Phi", scheme) for scheme in SCHEMES if scheme != "default"
]


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_teacher_s_keys_meet_in_the_student_s_rotary(name: str, scheme: str) -> None:
    """Another base, other positions, another scheme: as if the raw keys were rotated by the student."""
    teacher, student = family(name), scheme_model(scheme, base=5e5)
    before = keys_before(name, teacher)
    theirs = forward(teacher, "strip").take().keys
    places = PLACES * 2 + 5
    ours = forward(student, "match", places)
    ours.take()
    frequencies, scale = FORMULAS[scheme](5e5, DIM, SCHEMES[scheme], int(places.max()) + 1)
    want = roformer(before(), places, frequencies, scale, interleaved=False)
    exactly(ours.rotation().apply(theirs), want, atol=150 * FLOAT32)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2), (1,)])
def test_rotation_has_the_layers_asked_for(order: Sequence[int]) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = FAMILIES["Gemma 3 (text)"].model(
        torch.float64, num_hidden_layers=3, **(LOCAL | {"layer_types": kinds})
    )
    before = keys_before("Gemma 3 (text)", model.eval())
    capture = forward(model, "match", layers=order)
    kept = capture.take().keys
    exactly(capture.rotation().apply(before()[:, list(order)]), kept)


def test_queries_turn_like_keys() -> None:
    model = scheme_model("yarn")
    seen = before_rotation(model)
    capture = forward(model, "match", parts=("queries",))
    exactly(capture.take().queries, capture.rotation().apply(as_heads(seen["queries"])))


@pytest.mark.parametrize(("name", "rotary"), [("GPT-2", "match"), ("GPT-2", "strip"), ("Llama", "keep")])
def test_without_angles_there_is_no_rotation(name: str, rotary: str) -> None:
    capture = Capture(FAMILIES[name].model(), rotary=rotary)
    with capture:
        capture._model(IDS, use_cache=False)
    capture.take()
    assert capture.rotation() is None


def test_a_rotation_is_of_the_last_forward() -> None:
    model = scheme_model("default")
    capture = forward(model, "match")
    capture.take()
    first = capture.rotation()
    with capture:
        model(IDS[:, :5], use_cache=False)
        assert capture.rotation() is None
    raw, kept = torch.randn(1, 2, 1, 5, DIM, dtype=torch.float64), capture.take()
    assert kept.keys.shape[3] == 5
    exactly(capture.rotation().apply(raw), roformer(raw, torch.arange(5)[None], *default(1e4, DIM, {}, 5),
            interleaved=False), atol=FLOAT32 * 10)  # fmt: skip
    assert first is not capture.rotation()


@pytest.mark.parametrize("shape", [(2, 1, 2, TIME, DIM), (2, 2, 2, TIME, DIM + 2)])
def test_another_number_of_layers_or_width_is_refused(shape: tuple[int, ...]) -> None:
    capture = forward(scheme_model("default"), "match")
    capture.take()
    with pytest.raises(KavaError) as caught:
        capture.rotation().apply(torch.zeros(shape))
    assert str(caught.value) == (
        f"this rotation is of 2 layers and heads 8 wide, not of {shape[1]} layers and heads {shape[4]} wide"
    )


def test_redoing_has_a_gradient_and_keeps_low_precision() -> None:
    capture = forward(scheme_model("default"), "match")
    capture.take()
    x = torch.randn(2, 2, 2, TIME, DIM).bfloat16().requires_grad_()
    turned = capture.rotation().apply(x)
    assert turned.dtype == torch.bfloat16
    turned.float().square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=0.03, atol=0.03)


def angles(base: float, time: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    frequency = base ** (-torch.arange(0, dim, 2).double() / dim)
    theta = torch.arange(time).double()[:, None] * frequency
    whole = torch.cat([theta, theta], -1)[None]
    return theta, whole.cos(), whole.sin()


def turned(x: Tensor, theta: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    spun = torch.complex(low, high) * torch.polar(torch.ones_like(theta), theta)
    return torch.cat([spun.real, spun.imag], -1)


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("width", [None, 4])
def test_functions_against_complex_numbers(width: int | None, scale: float) -> None:
    x = torch.randn(2, 3, 2, 7, 8, dtype=torch.float64)
    theta, cos, sin = angles(1e4, 7, width or 8)
    want = torch.cat([scale * turned(x[..., :width], theta), x[..., width or 8 :]], -1)
    there = rerotate(x, scale * cos, scale * sin, half_split, width)
    torch.testing.assert_close(there, want, rtol=0, atol=1e-13)
    back = unrotate(want, scale * cos, scale * sin, half_split, width)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


def test_keys_of_two_bases_meet_in_the_student_s_base() -> None:
    x = torch.randn(1, 1, 1, 40, 8, dtype=torch.float64)
    (near, *one), (far, *two) = angles(1e4, 40, 8), angles(5e5, 40, 8)
    moved = rerotate(unrotate(turned(x, far), *two, half_split), *one, half_split)
    torch.testing.assert_close(moved, turned(x, near), rtol=0, atol=1e-12)


def test_low_precision_keeps_its_dtype_and_computes_in_float32() -> None:
    rotated = torch.randn(1, 2, 2, 30, 8).bfloat16()
    _, cos, sin = angles(1e4, 30, 8)
    got = unrotate(rotated, cos.bfloat16(), sin.bfloat16(), half_split)
    exact = unrotate(rotated.double(), cos.bfloat16().double(), sin.bfloat16().double(), half_split)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=2**-7, atol=1e-5)


def test_gradient_is_that_of_the_inverse_rotation() -> None:
    x = torch.randn(1, 2, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    theta, cos, sin = angles(1e4, 5, 8)
    weight = torch.randn(1, 2, 1, 5, 8, dtype=torch.float64)
    (unrotate(x, cos, sin, half_split) * weight).sum().backward()
    torch.testing.assert_close(x.grad, turned(weight, theta), rtol=0, atol=1e-13)
