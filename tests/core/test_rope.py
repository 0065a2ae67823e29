"""Undoing a model's rotation, against pre-rotary projections and against complex arithmetic."""

import pytest
import torch
from einops import rearrange
from tiny_models import SCHEMES, Case
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split

from kava_core.kv.attention_layers import attention_layers
from kava_core.kv.capture import Capture
from kava_core.kv.rope import rerotate, unrotate

torch.set_num_threads(1)
LLAMA = Case("Llama", "llama")


def scheme_model(scheme: str) -> nn.Module:
    parameters = {"rope_type": scheme, "rope_theta": 1e4, **SCHEMES[scheme]}
    return LLAMA.model(torch.float64, rope_parameters=parameters, max_position_embeddings=8).eval()


def before_rotation(model: nn.Module) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {"keys": [], "queries": []}
    for layer in attention_layers(model):
        layer.k_proj.register_forward_hook(lambda m, i, o: seen["keys"].append(o))
        layer.q_proj.register_forward_hook(lambda m, i, o: seen["queries"].append(o))
    return seen


def as_heads(projected: list[Tensor]) -> Tensor:
    return rearrange(projected, "layer batch time (head dim) -> batch layer head time dim", dim=8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_frequency_scheme_is_undone(scheme: str) -> None:
    model = scheme_model(scheme)
    seen = before_rotation(model)
    kept = Capture(model, rotary="keep")
    stripped = Capture(model, parts=("keys", "values", "queries"))
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    with stripped:
        model(ids, use_cache=False)
    cache = stripped.take()
    for part, projected in seen.items():
        torch.testing.assert_close(getattr(cache, part), as_heads(projected), rtol=0, atol=1e-13)
    with kept:
        model(ids, use_cache=False)
    assert (kept.take().keys - cache.keys).abs().max() > 0.1


def test_positions_of_each_example_are_their_own() -> None:
    model = LLAMA.model(torch.float64).eval()
    seen = before_rotation(model)
    positions = torch.stack([torch.arange(9), torch.arange(9) * 3 + 1])
    with Capture(model) as capture:
        model(torch.full((2, 9), 5), position_ids=positions, use_cache=False)
    torch.testing.assert_close(capture.take().keys, as_heads(seen["keys"]), rtol=0, atol=1e-13)


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
