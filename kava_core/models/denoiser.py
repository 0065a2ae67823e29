"""Train an encoder, before it is a student, to restore the tokens of a text of which some were exchanged.

A tokenizer without a mask token gets random tokens instead.

Source: masked language modelling, BERT (arXiv 1810.04805).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

RATE = 0.3
"""Share of tokens exchanged. BERT takes 0.15; more is no worse (arXiv 2202.08005), and shows more here, where
texts are short."""


class Denoiser(nn.Module):
    """An encoder and a head that predicts every token of a text from its corrupted form.

    Its logits are shifted by one position, as a causal model's are: those at a position are of the token
    after it. The first token is not asked for. Only the encoder is kept once it is trained (``encoder``).

    Args:
        encoder: a transformers encoder that returns ``last_hidden_state``.
        vocabulary: how many tokens there are.
        mask: the mask token's number; None exchanges tokens for random ones.
    """

    def __init__(self, encoder: Any, vocabulary: int, mask: int | None) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        pooler = getattr(encoder, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # nothing here reads it
        self.head = nn.Linear(encoder.config.hidden_size, vocabulary)
        self.vocabulary, self.mask = vocabulary, mask

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the weights of encoder and head for a checkpoint, as ``model.safetensors``.

        Args:
            folder: made if it does not exist.
            state_dict: the weights to save; None: the module's own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "model.safetensors"
        if state_dict is None:
            save_model(self, str(file))
        else:
            save_file({name: x.contiguous() for name, x in state_dict.items()}, file)

    def forward(
        self, input_ids: Int[Tensor, "batch time"], attention_mask: Int[Tensor, "batch time"], **_: Any
    ) -> CausalLMOutput:
        """Exchange some tokens and return the logits of all, shifted: position i has those of token i + 1."""
        hidden = self.encoder(
            input_ids=self._corrupted(input_ids), attention_mask=attention_mask
        ).last_hidden_state
        logits: Float[Tensor, "batch time vocab"] = self.head(hidden)
        return CausalLMOutput(logits=F.pad(logits[:, 1:], (0, 0, 0, 1)))

    def _corrupted(self, ids: Tensor) -> Tensor:
        new = torch.randint_like(ids, self.vocabulary) if self.mask is None else self.mask
        exchanged: Tensor = torch.where(torch.rand(ids.shape, device=ids.device) < RATE, new, ids)
        return exchanged
