"""Read config and tokenizer of a GGUF file once, and keep them in the cache as a transformers folder.

Reading the vocabulary of a GGUF file can take minutes, so nothing is read from the file twice.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from uuid import uuid4

import transformers
from transformers import AutoConfig, AutoTokenizer

from kava_core.errors import KavaError, SpecError
from kava_core.files import cache_folder, file_hash, locked, make_folder, read_json_object, write_json

SUFFIX = ".gguf"
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
"""How llama.cpp names the parts of a file that it split."""

NOT_IN_FOLDERS = ("quantization_config", "_pre_quantization_dtype")
"""Fields of a GGUF file's config that would make transformers take dequantised weights for packed ones."""


def is_gguf(path: str) -> bool:
    """Return whether a path names a GGUF file, by its ending."""
    return path.lower().endswith(SUFFIX) and not Path(path).is_dir()


def gguf_description(file: Path, *, where: str) -> Path:
    """Return a folder with the config and the tokenizer of a GGUF file; it holds no weights.

    Args:
        file: the GGUF file.
        where: how errors name the section.

    Raises:
        SpecError: there is no such file, transformers cannot read it, or the package ``gguf`` is missing.
    """
    assert_readable(file, where)

    return kept_folder(file, "description", _write_description, where=where)


def _write_description(alone: Path, folder: Path) -> None:
    config = AutoConfig.from_pretrained(str(alone.parent), gguf_file=alone.name)
    for name in NOT_IN_FOLDERS:
        if hasattr(config, name):
            delattr(config, name)
    tokenizer = AutoTokenizer.from_pretrained(str(alone.parent), gguf_file=alone.name)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_tokens_from(config.get_text_config().vocab_size, folder / "tokenizer.json")


def _drop_tokens_from(size: int, file: Path) -> None:
    """Drop added tokens that the model has no row for: transformers adds GPT-2's end to many vocabularies."""
    fields = read_json_object(file)
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < size]
    write_json(file, fields)


def assert_readable(file: Path, where: str) -> None:
    """Check what can go wrong with a GGUF file before it is read.

    Raises:
        SpecError: it is not there, is one of several parts, or the package ``gguf`` is missing.
    """
    if not file.is_file():
        raise SpecError(f"{where}: {file}: no such file")
    if SPLIT.search(file.name):
        raise SpecError(
            f"{where}: {file}: is one part of a split file; put them together with llama-gguf-split --merge"
        )
    if importlib.util.find_spec("gguf") is None:
        raise SpecError(f"{where}: {file}: needs the package gguf: pip install 'kava[gguf]'")


def kept_folder(file: Path, name: str, write: Callable[[Path, Path], None], *, where: str) -> Path:
    """Return a folder in the cache that was made of a GGUF file; make it first if need be.

    It is found by the file's sha256, so a changed file is read anew. It appears complete or not at all; one
    process of several makes it.

    Args:
        file: the GGUF file.
        name: what the folder is called among those of this file.
        write: makes the files. It gets a path of the GGUF file with no other files beside it, as transformers
            would read those too, and an empty folder to fill.
        where: how errors name the section.

    Raises:
        SpecError: the file cannot be read.
        KavaError: the cache cannot be written.
    """
    folder = cache_folder() / "gguf" / f"{gguf_hash(file)[:32]}-{transformers.__version__}" / name
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    with locked(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            _publish(folder, write, file, where)
    return folder


def gguf_hash(file: Path) -> str:
    """Return the sha256 of a GGUF file; a process reads a file once, unless its size or time changes."""
    status = file.stat()
    return _hash_of_version(file.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _hash_of_version(file: Path, size: int, changed: int) -> str:
    return file_hash(file)


def _publish(folder: Path, write: Callable[[Path, Path], None], file: Path, where: str) -> None:
    draft = folder.with_name(f".{folder.name}.{uuid4().hex}")
    with tempfile.TemporaryDirectory(prefix="kava-") as empty:
        alone = Path(empty) / f"model{SUFFIX}"
        alone.symlink_to(file.resolve())
        try:
            draft.mkdir()
            write(alone, draft)
            os.rename(draft, folder)
        except KavaError:
            raise
        except Exception as error:  # transformers and gguf raise whatever they meet
            if isinstance(error, OSError) and error.strerror:
                raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            reason = reason.replace(str(alone), file.name)
            raise SpecError(f"{where}: {file}: cannot be read as GGUF: {reason}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
