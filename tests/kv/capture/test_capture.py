"""Capturing a model's cache: what it holds, what it leaves alone, what it refuses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kava_core.errors import KavaError, UnsupportedModelError
from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.capture import Capture
from tests.support.tiny_models import WORKS, Case

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
torch.set_num_threads(1)
NAMED = {case.name: case for case in WORKS}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
REENTRANT = {"use_reentrant": True}
NON_REENTRANT = {"use_reentrant": False}


def llama(**more: object) -> nn.Module:
    return NAMED["Llama"].model(**more)


def captured(model: nn.Module, ids: Tensor = IDS, **options: object) -> Tensor:
    with Capture(model, **options) as capture:
        model(input_ids=ids, use_cache=False)
    return capture.take()


def key_gradients(model: nn.Module, **options: object) -> list[Tensor]:
    captured(model, parts=("keys",), **options).keys.pow(3).sum().backward()
    return [layer.k_proj.weight.grad for layer in attention_layers(model)]


def test_extents_of_a_grouped_query_model() -> None:
    cache = captured(llama(num_hidden_layers=3), parts=("keys", "values", "queries"))
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 9, 8)
    assert cache.queries.shape == (2, 3, 4, 9, 8)


def test_only_the_parts_asked_for_are_held() -> None:
    cache = captured(llama(), parts=("queries",))
    assert [part for part, _ in cache.items()] == ["queries"]


SLIDING, FULL = "sliding_attention", "full_attention"
THREE = {
    "Llama": {},
    "Gemma 3 (text)": {"layer_types": [SLIDING, FULL, SLIDING]},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
}


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2)])
def test_layers_come_in_the_order_asked_for(name: str, order: tuple[int, ...]) -> None:
    model = NAMED[name].model(num_hidden_layers=3, **THREE[name])
    cache = captured(model, layers=order)
    alone = [captured(model, layers=(i,)) for i in order]
    assert torch.equal(cache.keys, torch.cat([one.keys for one in alone], 1))
    assert torch.equal(cache.values, torch.cat([one.values for one in alone], 1))


def test_layers_with_the_same_angles_are_turned_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(llama(num_hidden_layers=4), parts=("keys",))
    calls = []
    tap = capture._slots[0].rotary
    original = tap.apply
    monkeypatch.setattr(tap, "apply", lambda *given: calls.append(given[0].shape) or original(*given))
    with capture:
        capture._model(input_ids=IDS)
    capture.take()
    assert calls == [(2, 8, 9, 8)]


def test_base_model_and_peft_model_serve_as_well() -> None:
    peft = pytest.importorskip("peft")
    model = llama().eval()
    want = captured(model).keys
    assert torch.equal(captured(model.model).keys, want)
    lora = peft.LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    keys = captured(wrapped).keys
    assert (keys - want).abs().max() > 1e-4
    keys.pow(2).sum().backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    assert all("lora" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


@pytest.mark.parametrize("rotary", ["strip", "keep"])
def test_gradient_checkpointing_gives_the_same_gradient(rotary: str) -> None:
    plain, checkpointed = llama().train(), llama().train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=NON_REENTRANT)
    want, got = key_gradients(plain, rotary=rotary), key_gradients(checkpointed, rotary=rotary)
    assert all(gradient.abs().max() > 0 for gradient in want)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_checkpointed_cross_entropy_and_keys_together() -> None:
    gradients = []
    for checkpoint in (False, True):
        model = llama().train()
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=NON_REENTRANT)
        with Capture(model) as capture:
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        (loss + capture.take().keys.pow(2).mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_reentrant_checkpointing_is_refused() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    with pytest.raises(KavaError) as caught:
        captured(model)
    assert str(caught.value) == (
        "LlamaForCausalLM: reentrant gradient checkpointing detaches captured keys; enable it with "
        "{'use_reentrant': False}"
    )
    captured(model.eval())


def test_autocast_keeps_the_gradient() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        keys = captured(model).keys
    keys.float().pow(2).sum().backward()
    exact = captured(model).keys
    torch.testing.assert_close(keys.float(), exact, rtol=0.05, atol=0.05)
    assert all(layer.k_proj.weight.grad.abs().max() > 0 for layer in attention_layers(model))


def test_teacher_and_student_may_be_open_at_once() -> None:
    teacher, student = llama(num_key_value_heads=4).eval(), llama().train()
    alone = captured(teacher).keys, captured(student).keys
    with torch.no_grad(), Capture(teacher) as theirs, torch.enable_grad(), Capture(student) as ours:
        student(IDS, use_cache=False)
        with torch.no_grad():
            teacher(IDS, use_cache=False)
    t_keys, keys = theirs.take().keys, ours.take().keys
    assert torch.equal(t_keys, alone[0])
    assert torch.equal(keys, alone[1])
    assert keys.requires_grad
    assert not t_keys.requires_grad


@pytest.mark.parametrize("case", WORKS, ids=lambda case: case.name)
def test_stripping_is_undoing(case: Case) -> None:
    """What was rotated is either taken from before the rotation or turned back; both are the same."""
    model = case.model().eval()
    with torch.no_grad():
        before = captured(model, parts=("keys", "queries"), layers=(0,))
        with Capture(model, parts=("keys", "queries"), layers=(0,), rotary="match") as capture:
            model(input_ids=IDS, use_cache=False)
    cached = capture.take()
    rotation = capture.rotation()
    if rotation is None:
        return
    for part, x in cached.items():
        torch.testing.assert_close(rotation.undo(x), getattr(before, part), rtol=1e-4, atol=2e-6)


def test_two_captures_of_one_model_follow_each_other() -> None:
    model = llama()
    first, second = Capture(model), Capture(model, layers=(1,), rotary="keep")
    for ids in (IDS, IDS.flip(1)):
        with first:
            model(ids)
        with second:
            model(ids)
        values = first.take().values
        assert torch.equal(values[:, 1:], second.take().values)
        assert torch.equal(values, captured(model, ids).values)


def test_two_open_captures_of_one_model_are_refused() -> None:
    model = llama()
    with Capture(model), pytest.raises(KavaError) as caught, Capture(model):
        pass
    assert str(caught.value) == "LlamaForCausalLM: another capture of this model is still open"
    captured(model)


def test_nothing_is_left_in_the_model() -> None:
    model = llama()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    captured(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == config
    copy.deepcopy(model)


def test_functions_are_wrapped_once() -> None:
    model = llama()
    captured(model)
    functions = attention_function(model), model_rotation(model)
    captured(model)
    assert (attention_function(model), model_rotation(model)) == functions
    assert not hasattr(functions[0].__wrapped__, "__wrapped__")


def attention_function(model: nn.Module) -> Callable[..., object]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]


def model_rotation(model: nn.Module) -> Callable[..., object]:
    from transformers.models.llama import modeling_llama

    return modeling_llama.apply_rotary_pos_emb


def test_implementation_may_change_between_forwards() -> None:
    model = llama().eval()
    capture = Capture(model)
    keys = []
    for implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with capture:
            model(IDS)
        keys.append(capture.take().keys)
    torch.testing.assert_close(keys[1], keys[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(keys[2], keys[0])


def test_a_teacher_s_views_do_not_pin_the_fused_projection() -> None:
    model = NAMED["Phi-3"].model()
    capture = Capture(model)
    with torch.no_grad(), capture:
        model(IDS, use_cache=False)
    values = [slot.values for slot in capture._slots]
    assert [value.untyped_storage().nbytes() for value in values] == [value.nbytes for value in values]


def test_taking_forgets() -> None:
    capture = Capture(llama())
    with capture:
        capture._model(IDS)
    capture.take()
    assert all(slot.keys is slot.values is slot.angles is None for slot in capture._slots)


def test_a_failed_block_leaves_nothing_behind() -> None:
    capture = Capture(llama())
    with pytest.raises(IndexError), capture:
        capture._model(IDS)[7]
    assert all(slot.seen == 0 for slot in capture._slots)


def test_taking_without_a_forward_is_refused() -> None:
    with Capture(llama()) as capture:
        pass
    with pytest.raises(UnsupportedModelError) as caught:
        capture.take()
    assert str(caught.value) == (
        "LlamaForCausalLM: no attention layer could be captured: either no forward pass ran inside the "
        "with-block, or its attention bypasses transformers' AttentionInterface"
    )


def test_two_forwards_in_one_block_are_refused() -> None:
    with Capture(llama(), layers=(1,)) as capture:
        capture._model(IDS)
        capture._model(IDS)
    with pytest.raises(KavaError) as caught:
        capture.take()
    assert str(caught.value) == "LlamaForCausalLM: attention layers 1 were captured more than once"


def test_a_layer_that_did_not_run_is_named() -> None:
    model = llama(num_hidden_layers=3)
    with Capture(model) as capture:
        model.model.layers = model.model.layers[:2]
        model(IDS)
    with pytest.raises(UnsupportedModelError) as caught:
        capture.take()
    assert str(caught.value) == "LlamaForCausalLM: attention layers 2 were not captured"


@pytest.mark.parametrize(("layers", "listed"), [((2,), "2"), ((-1,), "-1"), ((0, 0), "0, 0"), ((), "(none)")])
def test_layers_that_do_not_exist(layers: tuple[int, ...], listed: str) -> None:
    with pytest.raises(KavaError) as caught:
        Capture(llama(), layers=layers)
    assert str(caught.value) == (
        f"LlamaForCausalLM: cannot capture attention layers {listed}; "
        "give different numbers from 0 to 1, at least one"
    )


def test_strip_with_past_keys_is_refused_and_keep_is_not() -> None:
    model = llama().eval()
    past = model.requires_grad_(False)(IDS, use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError) as caught, Capture(model):
        model(IDS[:, :2], past_key_values=copy.deepcopy(past))
    assert str(caught.value) == (
        "LlamaForCausalLM, attention layer 0: attends to 44 keys but rotated 8; strip and match need a "
        "forward pass without past keys that rotates every head; use rotary: keep"
    )
    with Capture(model, rotary="keep") as capture:
        model(IDS[:, :2], past_key_values=copy.deepcopy(past))
    assert capture.take().keys.shape == (2, 2, 2, 11, 8)


def test_a_rotation_kava_cannot_see_is_refused() -> None:
    model = llama()
    for layer in attention_layers(model):
        layer.__class__ = HiddenAttention
    with pytest.raises(UnsupportedModelError) as caught:
        captured(model)
    assert str(caught.value) == (
        "LlamaForCausalLM: its rotation of keys cannot be undone, as it does not call an "
        "apply_rotary_pos_emb(q, k, cos, sin); use rotary: keep"
    )
    assert captured(model, rotary="keep").keys.shape == (2, 2, 2, 9, 8)


class HiddenAttention(type(attention_layers(NAMED["Llama"].model())[0])):
    """An attention whose modeling file (this one) has no rotation of its own."""

    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(UnsupportedModelError) as caught:
        Capture(T5ForConditionalGeneration(config))
    assert str(caught.value) == (
        "T5ForConditionalGeneration: several attention modules share a layer, as in encoder–decoders; "
        "only decoders can be captured"
    )


def test_a_forward_pass_is_left_after_the_last_layer_asked_for() -> None:
    """The same cache, and nothing of that layer but its projections, nor anything behind it."""
    model = llama(num_hidden_layers=4)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    caches = []
    for stop in (False, True):
        ran.clear()
        capture = Capture(model, layers=(0, 2), parts=("keys", "values", "queries"), stop=stop)
        with torch.no_grad(), capture:
            model.base_model(input_ids=IDS, use_cache=False)
        caches.append(capture.take())
    for (_, whole), (_, stopped) in zip(caches[0].items(), caches[1].items(), strict=True):
        assert torch.equal(whole, stopped)
    assert "model.layers.2.self_attn.v_proj" in ran
    assert not {"model.layers.2.self_attn.o_proj", "model.layers.2.mlp", "model.norm"} & set(ran)
    assert not any(name.startswith("model.layers.3") for name in ran)


def test_an_error_in_a_forward_pass_that_may_be_left_is_not_hidden() -> None:
    capture = Capture(llama(), stop=True)
    with pytest.raises(ZeroDivisionError), capture:
        _ = 1 / 0


@pytest.mark.parametrize("mark", ["_hf_hook", "_get_fsdp_state"])
def test_hooks_of_others_run_to_the_end(mark: str) -> None:
    model = llama()
    setattr(model.base_model, mark, lambda: None)
    with torch.no_grad(), Capture(model, stop=True):
        done = model.base_model(input_ids=IDS, use_cache=False)
    assert done.last_hidden_state.shape[1] == IDS.shape[1]
