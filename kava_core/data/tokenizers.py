"""Tokenizers: loaded from a folder or the hub, or trained and kept in a cache. Always fast ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kava_core.data import trainers
from kava_core.errors import SpecError
from kava_core.spec.model import ModelSpec, TrainTokenizer


def load_tokenizer(
    source: ModelSpec | TrainTokenizer | str,
    *,
    texts: Iterable[str] = (),
    cache: Path | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer; one to be trained on ``texts`` and kept under ``cache``; a folder or hub name.

    Raises:
        SpecError: nothing can be loaded from there, or it is a slow tokenizer, which knows no offsets.
    """
    if isinstance(source, ModelSpec):
        if source.tokenizer is None:
            return load_tokenizer(str(source.path), revision=source.revision)
        source = source.tokenizer
    if isinstance(source, TrainTokenizer):
        if cache is None:
            raise SpecError("tokenizer: one that is trained needs a cache folder")
        return train_tokenizer(source, texts, cache)
    return _from_path(source, revision)


def train_tokenizer(spec: TrainTokenizer, texts: Iterable[str], cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer trained on the texts, or the one trained on them before.

    Its folder under ``cache`` is named by a hash of the spec, the texts in their order and the version of
    ``tokenizers``; it appears complete or not at all, also when two processes train it at once.

    Raises:
        SpecError: no texts, or a vocabulary too small to spell them.
    """
    texts = list(texts)
    if not texts:
        raise SpecError(f"tokenizer: no texts to train {spec.kind!r} on")
    folder = cache / f"{spec.kind}-{_key(spec, texts)}"
    if not folder.exists():
        _publish(_wrapped(trainers.train(spec, texts)), folder)
    trained: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return trained


def _from_path(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub each raise their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SpecError(f"tokenizer {path!r}: cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise SpecError(
            f"tokenizer {path!r}: {type(tokenizer).__name__} is a slow tokenizer, which knows no character "
            "offsets; kava needs a fast one (a folder with tokenizer.json)"
        )
    return tokenizer


def _key(spec: TrainTokenizer, texts: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([tokenizers.__version__, spec.model_dump()]).encode())
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()[:32]


def _wrapped(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    unknown = trainers.UNK if tokenizer.token_to_id(trainers.UNK) is not None else None
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=trainers.PAD,
        eos_token=trainers.EOS,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def _publish(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        tokenizer.save_pretrained(draft)
        os.rename(draft, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
