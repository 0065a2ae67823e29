"""Let a causal language model write: greedily or by sampling, and nothing but its own probabilities decides.

What "the model writes" means is defined here alone; evaluation, ``online``, ``kava sample``, ``kava eval``
and the saved student use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kava_core.console import tell_once
from kava_core.data.encoding.answer_judge import decode_tokens
from kava_core.kv.capture.attention_layers import without_adapters


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: Any = None) -> tuple[int, ...]:
    """Return the numbers of the tokens that end a text.

    The first is the tokenizer's EOS or, if it has none, what it adds behind a text by itself. A model's
    generation settings may name further ends beside it, such as the end of a turn; those that are special
    tokens of the tokenizer count. Settings that do not name the tokenizer's own end are of another tokenizer,
    and do not: with the same weights a text would end at an ordinary token.

    Args:
        tokenizer: of the model.
        config: the model's generation settings, or its config; None: the tokenizer alone decides.
    """
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else _added_behind(tokenizer)
    named = getattr(config, "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or ())
    if not set(own) & set(named):
        return tuple(own)
    added = tokenizer.added_tokens_decoder
    never = {tokenizer.unk_token_id, tokenizer.bos_token_id}
    more = [number for number in named if number in added and added[number].special and number not in never]
    return tuple(dict.fromkeys([*own, *more]))


def _added_behind(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the last token that a tokenizer adds behind a text, such as BERT's SEP; none if it adds none."""
    output = tokenizer("a", return_special_tokens_mask=True)
    return output["input_ids"][-1:] if output["special_tokens_mask"][-1:] == [1] else []


def pad_or_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of the token that prompts are padded with."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def write_plainly(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a model's own generation settings by none: no penalties, bans, beams, least lengths, forced
    tokens.

    Only special tokens are kept, and its config names the same ends. A model that is saved afterwards ends
    its texts where training did, and is greedy unless told otherwise.

    Args:
        model: a causal language model without adapters.
        tokenizer: of the model.
    """
    ends = list(end_tokens(tokenizer, model.generation_config))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=(ends[0] if len(ends) == 1 else ends) or None,
        pad_token_id=pad_or_end(tokenizer),
    )
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "eos_token_id"):
            config.eos_token_id = model.generation_config.eos_token_id


@dataclass(frozen=True)
class Sampling:
    """How texts are sampled."""

    temperature: float
    seed: int
    count: int = 1
    """Texts for a prompt."""


AGREEMENT = {torch.float64: 1e-3, torch.float32: 1e-2}
"""Largest difference between two ways to compute the same logits, in their standard deviations, by dtype."""
AGREEMENT_OF_HALF = 0.5
"""Likewise for 16 bits, in which other summation orders show."""
CHECKED_TOKENS = 3
"""Tokens that are written to compare the two ways."""
CHECK: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": CHECKED_TOKENS,
    "min_new_tokens": CHECKED_TOKENS,
    "output_logits": True,
    "return_dict_in_generate": True,
}
"""Options of ``generate`` by which exactly so many tokens are written, and their logits returned."""


def agrees(difference: float, model: nn.Module) -> bool:
    """Return whether logits that differ by so many standard deviations are equal but for rounding."""
    return difference <= AGREEMENT.get(next(model.parameters()).dtype, AGREEMENT_OF_HALF)


def largest_difference(logits: Tensor, plain: Tensor) -> float:
    """Return the largest difference of logits, divided by the standard deviation of ``plain``."""
    plain = plain.float()
    return float((logits.float() - plain).abs().max() / plain.std().clamp_min(1e-12))


class TextWriter:
    """Lets one model write after prompts.

    transformers' ``generate`` reads prompts padded left and keeps caches. Models whose positions do not allow
    that (RoBERTa and its like count padding) are found on a few tokens when they first write: ``generate``
    must have the logits of a plain forward pass over the same text. Those that differ write with a whole pass
    over every text for each token, as training reads them: right, but slower.

    Args:
        tokenizer: of the model.
        who: names the model in a message, such as ``student``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, who: str) -> None:
        self.tokenizer, self.who = tokenizer, who
        self._generates: bool | None = None

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        prompts: Mapping[str, Tensor],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Write greedily, or sample; return the new tokens alone, ``batch time``, padded behind each text's
        end.

        The random state is left as it was.

        Args:
            model: a causal language model whose generation settings are plain, in the mode it is to write in.
            prompts: ``input_ids`` and ``attention_mask``, padded left.
            max_new_tokens: most tokens of a text.
            sampling: None: greedy, each token has the highest probability.
        """
        self.check(model, prompts)
        if sampling is not None:
            prompts = {name: rows.repeat_interleave(sampling.count, 0) for name, rows in prompts.items()}
        device = prompts["input_ids"].device
        # Compiled, every length would be compiled anew.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            if sampling is not None:
                torch.manual_seed(sampling.seed)
            if self._generates:
                return _generate(model, prompts, max_new_tokens, sampling)
            return self._write_by_whole_passes(model, prompts, max_new_tokens, sampling)

    def check(self, model: Any, prompts: Mapping[str, Tensor]) -> None:
        """Find out once whether ``generate`` has the logits of plain passes; say so on stderr if not.

        Args:
            model: as in ``write``.
            prompts: as in ``write``.
        """
        if self._generates is None:
            self._generates = self._check(model, prompts)

    def _check(self, model: Any, prompts: Mapping[str, Tensor]) -> bool:
        with torch.compiler.set_stance("force_eager"):
            difference = generate_difference(model, prompts, pad=pad_or_end(self.tokenizer) or 0)
        agreed = agrees(difference, model)
        if not agreed:
            tell_once(
                f"{self.who}: generate() of {type(without_adapters(model)).__name__} has other logits than a "
                f"plain pass over the same tokens (by {difference:.2g} of their standard deviation), so "
                "every written token takes a whole pass: slower, and right"
            )
        return agreed

    def _write_by_whole_passes(
        self, model: Any, prompts: Mapping[str, Tensor], max_new_tokens: int, sampling: Sampling | None
    ) -> Tensor:
        """Write as ``write`` does, with one pass over the whole text, padded right, for every token."""
        texts, mask = _padded_right(prompts["input_ids"], prompts["attention_mask"])
        pad = pad_or_end(self.tokenizer) or 0
        ends = texts.new_tensor(ends_of(model))
        written = []
        open_rows = torch.ones(len(texts), dtype=torch.bool, device=texts.device)
        for _ in range(max_new_tokens):
            logits = model(input_ids=texts, attention_mask=mask, use_cache=False).logits
            lengths = mask.sum(1)
            last = logits[torch.arange(len(texts), device=texts.device), lengths - 1]
            token = _chosen(last, sampling).where(open_rows, pad)
            written.append(token)
            open_rows &= ~torch.isin(token, ends)
            if not open_rows.any():
                break
            texts = torch.cat([texts, texts.new_full((len(texts), 1), pad)], 1)
            mask = torch.cat([mask, mask.new_zeros(len(mask), 1)], 1)
            texts.scatter_(1, lengths[:, None], token[:, None])
            mask.scatter_(1, lengths[:, None], 1)
        return torch.stack(written, 1)


def _generate(
    model: Any, prompts: Mapping[str, Tensor], max_new_tokens: int, sampling: Sampling | None
) -> Tensor:
    options: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    options |= options_of_writing(model)
    tokens: Tensor = model.generate(**prompts, max_new_tokens=max_new_tokens, **options)
    return tokens[:, prompts["input_ids"].shape[1] :]


def options_of_writing(model: Any) -> dict[str, Any]:
    """Return options for ``generate``: a mixture of experts is not asked for its router's loss, which needs
    all
    positions."""
    config = model.config.get_text_config()
    return {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}


def _chosen(logits: Tensor, sampling: Sampling | None) -> Tensor:
    """Return one token for each row of logits."""
    if sampling is None:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / sampling.temperature).softmax(-1), 1).squeeze(1)


def ends_of(model: Any) -> list[int]:
    """Return the numbers of the tokens that end a text of a model whose generation settings are plain."""
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _padded_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of rows, ``batch time``, from the left to the right."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


@torch.no_grad()
def generate_difference(model: Any, prompts: Mapping[str, Tensor], *, pad: int) -> float:
    """Measure by how much the logits of ``generate`` differ from those of a plain pass over the same tokens.

    Two prompts of different lengths are padded left for the one and right, as in training, for the other.

    Args:
        model: a causal language model, in the mode it is to write in.
        prompts: ``input_ids`` and ``attention_mask``; the first row is used.
        pad: number of the token for padding.

    Returns:
        The largest difference, divided by the logits' standard deviation.
    """
    whole = prompts["input_ids"][0][prompts["attention_mask"][0].bool()]
    rows = [whole, whole[len(whole) // 2 :]]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **options_of_writing(model),
        **CHECK,
    )
    texts, real = _padded_right(
        output.sequences, torch.cat([mask, mask.new_ones(len(mask), CHECKED_TOKENS)], 1)
    )
    logits = model(input_ids=texts, attention_mask=real, use_cache=False).logits
    columns = mask.sum(1)[:, None] - 1 + torch.arange(CHECKED_TOKENS, device=mask.device)
    plain = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
    return largest_difference(torch.stack(output.logits, 1), plain)


def written_tokens(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Return which tokens were written: those up to the first end, which is included; the rest is padding.

    Args:
        tokens: what was written, ``batch time``.
        ends: numbers of the tokens that end a text.
    """
    ended = torch.isin(tokens, tokens.new_tensor(list(ends))).long()
    return (ended.cumsum(1) - ended).eq(0)


def rows_before_end(tokens: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Return the tokens of each row up to its first end, which is left out.

    Args:
        tokens: what was written, ``batch time``.
        ends: numbers of the tokens that end a text.
    """
    kept = written_tokens(tokens, ends) & ~torch.isin(tokens, tokens.new_tensor(list(ends)))
    return [row[keep].tolist() for row, keep in zip(tokens.cpu(), kept.cpu(), strict=True)]


def decode_behind(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tensor], rows: Sequence[list[int]]
) -> list[str]:
    """Return the text of tokens that follow prompts, with special tokens such as a marker, for other models.

    Padding and unknown characters, which are no text, are left out. Decoded together with the prompt: many
    tokenizers drop the space before the first word they decode.

    Args:
        tokenizer: of the model.
        prompts: the tokens of each prompt, without padding.
        rows: the tokens that follow.
    """
    written = []
    no_text = {tokenizer.pad_token_id, tokenizer.unk_token_id}
    for prompt, tokens in zip(prompts, rows, strict=True):
        row = [token for token in tokens if token not in no_text]
        before = decode_tokens(tokenizer, prompt.tolist())
        text = decode_tokens(tokenizer, [*prompt.tolist(), *row])
        written.append(text[len(before) :] if text.startswith(before) else decode_tokens(tokenizer, row))
    return written
