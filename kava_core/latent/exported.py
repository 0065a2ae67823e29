"""Save a trained latent student to disk, load it and let it answer.

Example::

    student = LatentStudent.from_pretrained("runs/…/student")
    student.answer(["7+3*2?"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_core.data.collate import pad_id, pad_left
from kava_core.data.encoding.answer_judge import decode_tokens
from kava_core.data.examples import Part
from kava_core.errors import CheckpointError
from kava_core.latent.collate import END, before_thought, token_id
from kava_core.latent.student import write_answers
from kava_core.latent.tokens import LatentTokens
from kava_core.models.writing import ends_of, rows_before_end, write_plainly

WEIGHTS, SHAPE = "latent.safetensors", "latent.json"


def save_latents(latents: LatentTokens, folder: Path) -> None:
    """Write two files beside the model's: the latent tokens' weights, and the settings that they are of."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in latents.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    hidden = latents.slots.shape[1]
    shape: dict[str, Any] = {"count": latents.count, "passes": latents.passes, "hidden": hidden}
    shape |= {"projection": latents.kind, "begin": latents.begin}
    (folder / SHAPE).write_text(json.dumps(shape) + "\n", encoding="utf-8")


def load_latents(folder: Path) -> LatentTokens:
    """Load the latent tokens that ``save_latents`` wrote.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        latents = LatentTokens(**json.loads((folder / SHAPE).read_text(encoding="utf-8")))
        latents.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: no latent tokens can be loaded: {str(error).splitlines()[0]}"
        ) from error
    return latents


class LatentStudent(nn.Module):
    """A model, its latent tokens and its tokenizer."""

    def __init__(self, model: nn.Module, latents: LatentTokens, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.latents, self.tokenizer = model, latents, tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> LatentStudent:
        """Load the student of a finished run.

        Args:
            folder: the run's ``student`` folder.
            options: further arguments of ``AutoModelForCausalLM.from_pretrained``.
        """
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        latents = load_latents(Path(folder)).to(model.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write_plainly(model, tokenizer)
        return cls(model, latents, tokenizer).eval()

    def answer(self, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """Return the greedy answer to every prompt.

        Args:
            prompts: the whole text up to where the written steps would begin.
            max_new_tokens: most tokens of an answer.
        """
        end = token_id(self.tokenizer, END)
        parts = [Part(prompt) for prompt in prompts]
        thought = before_thought(parts, self.tokenizer, begin=self.latents.begin)
        device = self.latents.slots.device
        before, mask = pad_left(thought, pad_id(self.tokenizer))
        tokens = write_answers(
            self.model,
            self.latents,
            before.to(device),
            mask.to(device),
            end=end,
            max_new_tokens=max_new_tokens,
        )
        rows = rows_before_end(tokens, ends_of(self.model))
        return [decode_tokens(self.tokenizer, row) for row in rows]
