"""Save and load the trained weights: the student as Hugging Face stores it, everything else beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from kava_core.distill.distiller import Distiller
from kava_core.errors import CheckpointError, NonFiniteError
from kava_core.latent.exported import load_latents, save_latents
from kava_core.models.fsdp import is_sharded, local_part

STUDENT = "student"
ALIGNER_FILE = "aligner.safetensors"
TERM_WEIGHTS = "term_weights."
HIDDEN_STATES = "hidden."


def aligner_state(distiller: Distiller) -> dict[str, Tensor]:
    """Return parameters and buffers of what aligns, routes and compares, and weights that were measured."""
    state = distiller.pipeline.state_dict() | distiller.term_weights.state_dict(prefix=TERM_WEIGHTS)
    if distiller.hidden is not None:
        state |= distiller.hidden.state_dict(prefix=HIDDEN_STATES)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def save_weights(distiller: Distiller, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write ``folder/student`` (``save_pretrained``), ``folder/aligner.safetensors`` and latent tokens.

    Args:
        distiller: what is trained.
        folder: of a checkpoint.
        state_dict: the whole module's if the student is sharded; None takes the student's own.
    """
    student = None if state_dict is None else entries_under(state_dict, "student.")
    distiller.student.save_pretrained(folder / STUDENT, state_dict=student)
    save_file(aligner_state(distiller), folder / ALIGNER_FILE)
    if distiller.latents is not None:
        save_latents(distiller.latents, folder)


@torch.no_grad()
def assert_finite_weights(module: nn.Module, where: str) -> None:
    """Refuse weights that hold NaN or infinity: they are never saved.

    Raises:
        NonFiniteError: names the first such weight.
    """
    names: list[str] = []
    is_finite: list[Tensor] = []
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            names.append(name)
            is_finite.append(torch.isfinite(local_part(weight)).all())
    finite = torch.stack(is_finite).float()
    if is_sharded(module):
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    if not finite.all():
        name = names[int(finite.argmin())]
        raise NonFiniteError(f"{where}: {name} holds NaN or infinity after the update; nothing saved")


def entries_under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the part of a state dict whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_weights(distiller: Distiller, folder: Path) -> None:
    """Load what ``save_weights`` wrote, every tensor exactly.

    Raises:
        CheckpointError: a file cannot be read, or a tensor does not fit.
    """
    try:
        _load_student(distiller.student, folder / STUDENT)
        if distiller.weighted_terms():
            _load_aligner_state(distiller, load_file(folder / ALIGNER_FILE))
        if distiller.latents is not None:
            distiller.latents.load_state_dict(load_latents(folder).state_dict())
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from error


@contextmanager
def explain_unreadable_state(folder: str | None) -> Iterator[None]:
    """Explain why the state of optimizer, schedule, scaler or random numbers cannot be loaded.

    They are pickles, of which torch opens none that would run code.

    Raises:
        CheckpointError: in place of what torch raised.
    """
    try:
        yield
    except (UnpicklingError, EOFError, OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: a state of the optimizer, its schedule or the random numbers cannot be read "
            f"({type(error).__name__}): the file is damaged or was not saved by kava; none of it was run"
        ) from error


def _load_aligner_state(distiller: Distiller, state: dict[str, Tensor]) -> None:
    others = (TERM_WEIGHTS, HIDDEN_STATES)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(others)}
    distiller.pipeline.load_state_dict(rest)
    distiller.term_weights.load_state_dict(entries_under(state, TERM_WEIGHTS))
    if distiller.hidden is not None:
        distiller.hidden.load_state_dict(entries_under(state, HIDDEN_STATES))


def _load_student(student: nn.Module, folder: Path) -> None:
    if hasattr(student, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(student, load_file(folder / "adapter_model.safetensors"))
        return
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        load_model(student, shards[0])
        return
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= load_file(shard)
    missing, unexpected = student.load_state_dict(state, strict=False)
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    untied = sorted(set(missing) - tied)  # tied weights are stored once
    if unexpected or untied:
        raise CheckpointError(f"{folder}: missing {untied}, unexpected {sorted(unexpected)}")
