"""Whether texts fit a model's positions: rotary models read on silently beyond them, others crash."""

from __future__ import annotations

from transformers import PreTrainedConfig

from kava_core.errors import SpecError
from kava_core.train.models import positions


def assert_room(config: PreTrainedConfig, longest: int, *, who: str) -> None:
    """SpecError where the longest example has more tokens than the model positions."""
    room = positions(config)
    if room is not None and longest > room:
        raise SpecError(
            f"{who}: the longest example has {longest} tokens but the model only {room} positions; "
            "lower train.max_length, or give the config more positions"
        )


def assert_room_to_write(
    config: PreTrainedConfig, prompt: int, new_tokens: int, *, field: str = "evaluate.max_new_tokens"
) -> None:
    """SpecError where prompt and written answer together may leave the student's positions."""
    room = positions(config)
    if room is not None and prompt + new_tokens > room:
        raise SpecError(
            f"{field}: the longest prompt and {new_tokens} new tokens are "
            f"{prompt + new_tokens} tokens but the student has {room} positions"
        )
