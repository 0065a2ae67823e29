"""The trained weights on disk: the student as Hugging Face stores it, everything else beside it."""

from __future__ import annotations

from pathlib import Path

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


def aligner_state(distiller: Distiller) -> dict[str, Tensor]:
    """Parameters and buffers of aligners, fuser and losses."""
    return {name: tensor.contiguous() for name, tensor in distiller.pipeline.state_dict().items()}


def save_weights(distiller: Distiller, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """``folder/student`` (``save_pretrained``), ``folder/aligner.safetensors`` and latent tokens' weights.

    ``state_dict`` is the whole module's, where the student is sharded; None takes the student's own.
    """
    student = None if state_dict is None else under(state_dict, "student.")
    distiller.student.save_pretrained(folder / STUDENT, state_dict=student)
    save_file(aligner_state(distiller), folder / ALIGNER_FILE)
    if distiller.latents is not None:
        save_latents(distiller.latents, folder)


@torch.no_grad()
def assert_finite_weights(module: nn.Module, where: str) -> None:
    """NonFiniteError naming the first weight that holds NaN or infinity: such weights are never saved."""
    trained = {name: local_part(p) for name, p in module.named_parameters() if p.requires_grad}
    finite = torch.stack([torch.isfinite(p).all() for p in trained.values()]).float()
    if is_sharded(module):
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    if not finite.all():
        name = list(trained)[int(finite.argmin())]
        raise NonFiniteError(f"{where}: {name} holds NaN or infinity after the update; nothing saved")


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_weights(distiller: Distiller, folder: Path) -> None:
    """Load what ``save_weights`` wrote, every tensor exactly; CheckpointError where one does not fit."""
    try:
        _load_student(distiller.student, folder / STUDENT)
        if distiller.pipeline.compared:
            distiller.pipeline.load_state_dict(load_file(folder / ALIGNER_FILE))
        if distiller.latents is not None:
            distiller.latents.load_state_dict(load_latents(folder).state_dict())
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from error


def _load_student(student: nn.Module, folder: Path) -> None:
    if hasattr(student, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(student, load_file(folder / "adapter_model.safetensors"))
        return
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        load_model(student, shards[0])
        return
    state = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    missing, unexpected = student.load_state_dict(state, strict=False)
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise CheckpointError(
            f"{folder}: missing {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}"
        )
