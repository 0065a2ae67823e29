"""Every architecture of the table: what is captured, and that capturing changes nothing."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.capture import Capture
from tests.models.model_sweep import outcome
from tests.models.model_table import PAGE, SWEPT_TITLE, page, swept_section
from tests.support.tiny_models import REFUSED, WORKS, Case

torch.set_num_threads(1)
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)
works = pytest.mark.parametrize("case", WORKS, ids=lambda case: case.name)


def run(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


@works
def test_captured_equals_the_projections(case: Case) -> None:
    model = case.model().eval()
    reads = [case.oracle(layer, case.head) for layer in attention_layers(model)]
    with Capture(model) as capture, torch.no_grad():
        run(model)
    cache = capture.take()
    before = {part: torch.stack([read()[part] for read in reads], 1) for part in ("keys", "values")}
    torch.testing.assert_close(cache.keys, before["keys"], rtol=1e-5, atol=2e-6)
    assert torch.equal(cache.values, before["values"])


@works
def test_logits_are_bit_identical(case: Case) -> None:
    model = case.model().eval()
    with torch.no_grad():
        plain = run(model)
        with Capture(model):
            captured = run(model)
        assert torch.equal(captured, plain)
        assert torch.equal(run(model), plain)


@works
def test_gradient_reaches_every_key_projection(case: Case) -> None:
    model = case.model()
    with Capture(model, parts=("keys",)) as capture:
        run(model)
    capture.take().keys.square().sum().backward()
    for layer in attention_layers(model):
        names = ("k_proj", "c_attn", "qkv_proj", "query_key_value")
        projection = next(getattr(layer, name) for name in names if hasattr(layer, name))
        assert projection.weight.grad.abs().sum() > 0


@works
def test_eager_attention_gives_the_same_keys(case: Case) -> None:
    caches = []
    for attention in (None, "eager"):
        model = case.model().eval()
        if attention is not None:
            model.set_attn_implementation(attention)
        with Capture(model, parts=("keys",)) as capture, torch.no_grad():
            run(model)
        caches.append(capture.take().keys)
    real = MASK.bool()[:, None, None, :, None]
    torch.testing.assert_close(caches[0] * real, caches[1] * real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    model = case.model().eval()
    with pytest.raises(UnsupportedModelError, match=type(model).__name__), torch.no_grad():
        capture_once(model)


def capture_once(model: nn.Module) -> None:
    with Capture(model) as capture:
        run(model)
    capture.take()


def test_page_is_current() -> None:
    text = PAGE.read_text()
    assert text == page(swept_section(text)), (
        "docs/guide/models.md is stale: run python -m tests.models.model_table"
    )


def swept() -> dict[str, tuple[str, str]]:
    """The last table of the page: what was captured and the remarks, by ``model_type``."""
    section = swept_section(PAGE.read_text())
    if not section.startswith(f"{SWEPT_TITLE}{transformers.__version__}\n"):
        pytest.skip(f"the page is not about transformers {transformers.__version__}")
    rows = section.partition("|---|---|---|\n")[2].splitlines()
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in rows]
    return {name.strip("`"): (captured, remarks) for name, captured, remarks in cells}


def test_the_sweep_lists_every_causal_model() -> None:
    assert swept().keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys(), "run model_table.py --sweep"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "jamba", "deepseek_v3", "mamba", "bloom"])
def test_the_sweep_is_current(model_type: str) -> None:
    assert swept()[model_type] == outcome(model_type)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text"])
def test_chosen_layers_of_sliding_window_models(model_type: str) -> None:
    """One layer alone is what it is among all; the window hides positions, not keys."""
    case = next(case for case in WORKS if case.model_type == model_type)
    model = case.model().eval()
    caches = []
    for layers in (None, (1,)):
        with Capture(model, layers=layers) as capture, torch.no_grad():
            run(model)
        caches.append(capture.take())
    assert caches[0].keys.shape[3] == IDS.shape[1] > case.config().sliding_window
    assert torch.equal(caches[0].keys[:, 1:], caches[1].keys)
    assert torch.equal(caches[0].values[:, 1:], caches[1].values)
