"""Load tokenizers from a folder or the hub, or train them and keep them in a cache. Always fast ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kava_core.data import tokenizer_training
from kava_core.data.pretrained.origin import find_origin
from kava_core.errors import KavaError, SpecError
from kava_core.specfile.sections.models import ModelSpec, TrainTokenizer


def load_tokenizer(
    source: ModelSpec | TrainTokenizer | str,
    *,
    texts: Iterable[str] = (),
    cache: Path | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or train it first.

    Args:
        source: a model, for its tokenizer; a tokenizer to be trained; or a folder or hub name.
        texts: what one is trained on.
        cache: folder that trained ones are kept in.
        revision: commit or tag on the hub, for a folder or hub name.

    Raises:
        SpecError: nothing can be loaded from there, or it is a slow tokenizer, which gives no offsets.
    """
    if isinstance(source, ModelSpec):
        if source.tokenizer is None:
            return load_tokenizer(str(source.path), revision=source.revision)
        source = source.tokenizer
    if isinstance(source, TrainTokenizer):
        if cache is None:
            raise SpecError("tokenizer: one that is trained needs a cache folder")
        return train_tokenizer(source, texts, cache)
    return _load_from_path(source, revision)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding of a tokenizer's tokens needs: its highest number and one.

    More than it has tokens where numbers are left out, as after tokens were removed from a vocabulary.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def train_tokenizer(spec: TrainTokenizer, texts: Iterable[str], cache: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer on texts, or load the one that was trained on them before.

    Its folder under ``cache`` is named by a hash of the spec, the texts in their order and the version of
    ``tokenizers``; it appears complete or not at all, even if two processes train it at once. A kept one that
    cannot be loaded is trained again.

    Raises:
        SpecError: no texts, or a vocabulary too small to spell them.
        KavaError: the cache cannot be written.
    """
    texts = list(texts)
    if not texts:
        raise SpecError(f"tokenizer: no texts to train {spec.kind!r} on")
    folder = cache / f"{spec.kind}-{_cache_key(spec, texts)}"
    kept = _load_kept(folder)
    if kept is not None:
        return kept
    if folder.exists():
        _drop_broken(folder)
    _publish_tokenizer(_wrap_tokenizer(tokenizer_training.train_on_texts(spec, texts)), folder)
    trained = _load_kept(folder)
    if trained is None:
        raise KavaError(f"{folder}: the tokenizer just saved cannot be read; delete the folder")
    return trained


def _load_kept(folder: Path) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer in a folder; None if there is none that can be loaded."""
    if not folder.is_dir():
        return None
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception:  # tokenizers raises bare Exception
        return None
    return tokenizer


def _drop_broken(folder: Path) -> None:
    """Delete a broken tokenizer, unless another process has replaced it by a sound one.

    Its folder is renamed first, so that nobody sees it half deleted.
    """
    doomed = folder.with_name(f".{folder.name}.{uuid4().hex}")
    with suppress(OSError), _lock_folder(folder):
        if _load_kept(folder) is None:
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _load_from_path(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    origin = find_origin(path, revision, where="tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            origin.tokenizer, revision=origin.tokenizer_revision, trust_remote_code=False
        )
    except Exception as error:  # transformers, tokenizers and the hub each raise their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        no_folder = "" if Path(path).is_dir() else "no such folder here, and "
        raise SpecError(f"tokenizer {path!r}: {no_folder}cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise SpecError(
            f"tokenizer {path!r}: {type(tokenizer).__name__} is a slow tokenizer, which knows no character "
            "offsets; kava needs a fast one (a folder with tokenizer.json)"
        )
    return tokenizer


def _cache_key(spec: TrainTokenizer, texts: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([tokenizers.__version__, spec.model_dump()]).encode())
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()[:32]


def _wrap_tokenizer(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    unknown = tokenizer_training.UNK if tokenizer.token_to_id(tokenizer_training.UNK) is not None else None
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=tokenizer_training.PAD,
        eos_token=tokenizer_training.EOS,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def _publish_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    draft = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        tokenizer.save_pretrained(draft)
        os.rename(draft, folder)
    except Exception as error:  # tokenizers raises bare Exception
        if not folder.is_dir():
            reason = getattr(error, "strerror", None) or error
            raise KavaError(
                f"{folder.parent}: the tokenizer cannot be kept here: {reason} (KAVA_CACHE names the cache)"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
