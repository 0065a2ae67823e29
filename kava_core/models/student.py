"""Load the student, and prepare it for training: adapters, checkpointing, compiling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kava_core import shapecheck
from kava_core.data.tokenizers import vocabulary_size
from kava_core.errors import SpecError, did_you_mean
from kava_core.models.config import reason_of
from kava_core.models.denoiser import Denoiser
from kava_core.models.load import load_model
from kava_core.specfile.sections.models import Lora, StudentSpec


def load_student(
    spec: StudentSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int, grow: bool = False
) -> nn.Module:
    """Load the student, with its adapters and gradient checkpointing if the spec asks for them.

    Args:
        spec: the student's section of the spec.
        tokenizer: the student's.
        seed: fixes random weights, of adapters as well.
        grow: add embeddings for tokens that were added to the tokenizer.

    Raises:
        SpecError: it cannot be loaded, it is not causal, or its adapters cannot be made.
    """
    student = load_model(spec, tokenizer, seed=seed, where="student", grow=grow)
    if spec.encoder:
        return Denoiser(student, vocabulary_size(tokenizer), tokenizer.mask_token_id)
    _check_causal(student)
    if spec.gradient_checkpointing:
        checkpoint_activations(student)
    if spec.lora is not None:
        if spec.gradient_checkpointing:
            student.enable_input_require_grads()
        student = add_lora(student, spec.lora, seed=seed)
    return student.requires_grad_(False) if spec.frozen else student


PROBE_LENGTH = 4


def _first_logits(model: nn.Module, where: str) -> tuple[Tensor, Tensor]:
    """Logits at the first of a few tokens, and the embeddings they were computed from."""
    embedded: list[Tensor] = []

    def follow(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    # No token may look like padding.
    token = int(getattr(model.config.get_text_config(), "pad_token_id", None) == 0)
    handle, training = model.get_input_embeddings().register_forward_hook(follow), model.training
    try:
        ids = torch.full((1, PROBE_LENGTH), token, device=next(model.parameters()).device)
        with torch.enable_grad():
            return model.eval()(input_ids=ids, use_cache=False).logits[0, 0], embedded[0]
    except Exception as error:
        raise SpecError(f"{where}: {type(model).__name__} cannot run: {reason_of(error)}") from error
    finally:
        handle.remove()
        model.train(training)


def _check_causal(student: nn.Module) -> None:
    """Refuse a model whose tokens attend to later ones.

    The gradient of the first token's logits by later embeddings shows that, as rounding does not blur it.
    """
    logits, embedded = _first_logits(student, "student")
    (slope,) = torch.autograd.grad(logits.float().sum(), embedded)
    if (slope[:, 1:].abs() > 0).any():
        raise SpecError(
            f"student: {type(student).__name__} is not causal: its tokens attend to later ones; "
            "it may need is_decoder: true in its config"
        )


def checkpoint_activations(model: nn.Module) -> None:
    """Turn gradient checkpointing on, never in the reentrant form."""
    options = {"use_reentrant": False}
    # transformers renamed the method in 5.23.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def compile_forward(model: nn.Module, backend: str) -> None:
    """Compile a model's forward pass in place by ``torch.compile``.

    Raises:
        SpecError: shape checking is on, whose checks cannot be compiled.
    """
    if shapecheck.active():
        raise SpecError("train.compile: not together with shape checking (--check-shapes, KAVA_SHAPE_CHECK)")
    # Else a layer under gradient checkpointing runs uncompiled, as it leaves tensors in a capture's slot.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    model.compile(backend=backend)


def add_lora(student: nn.Module, lora: Lora, *, seed: int) -> nn.Module:
    """Return the student with low-rank adapters, whose weights the seed fixes.

    Raises:
        SpecError: peft is not installed, or no module has one of the names in ``lora.targets``.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SpecError("student.lora: needs peft: pip install 'kava[lora]'") from error
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    _check_targets(student, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise SpecError(f"student.lora: {reason_of(error)}") from error


def _check_targets(student: nn.Module, targets: str | list[str]) -> None:
    """Check that every name is a module's; peft is content if one of them is."""
    if isinstance(targets, str):
        return
    modules = [name for name, _ in student.named_modules() if name]
    possible = {name.rpartition(".")[2] for name in modules}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            raise SpecError(
                f"student.lora.targets: no module named {target!r}{did_you_mean(target, possible)}"
            )
