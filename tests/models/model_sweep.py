"""Every causal language model of the installed transformers, captured once without weights.

``python -m tests.models.model_table --sweep`` runs it (some minutes). Each architecture runs with its default
configuration, eight layers deep at most, on fake tensors, in a process of its own with a time limit.
"""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kava_core.errors import KavaError
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import fake_model
from kava_core.kv.capture.stacking import check_rotated, check_seen

DEPTH, LENGTH, SECONDS = 8, 4, 60
ROW = "| `{}` | {} | {} |\n"


def sweep() -> Iterator[str]:
    """A line of the table for every ``model_type``."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield ROW.format(model_type, *_apart(model_type))


def _apart(model_type: str) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else ("not tried", f"more than {SECONDS} seconds")
    except EOFError:
        return "not tried", "its process ended without an answer"
    finally:
        process.kill()
        process.join()


def _send(model_type: str, answer: Connection) -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answer.send(outcome(model_type))


def outcome(model_type: str) -> tuple[str, str]:
    """What can be captured of an architecture, and why not the rest."""
    try:
        config = small(model_type)
    except Exception as error:
        return "not tried", f"no configuration by default: {_line(error)}"
    try:
        with FakeTensorMode():
            return _captured(fake_model(config), config)
    except KavaError as error:
        return "refused", _line(error).split(": ", 1)[-1]
    except Exception as error:
        return "not tried", _line(error)


def small(model_type: str) -> Any:
    """The default configuration, less deep; lists with an entry for every layer are cut."""
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    if getattr(text, "is_decoder", True) is False:
        text.is_decoder = True
    depth = getattr(text, "num_hidden_layers", None)
    if isinstance(depth, int) and depth > DEPTH:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == depth:
                setattr(text, name, value[:DEPTH])
        text.num_hidden_layers = DEPTH
    return config


def _captured(model: nn.Module, config: Any) -> tuple[str, str]:
    capture = Capture(model, parts=("keys", "values"))
    with capture:
        model(input_ids=torch.ones(1, LENGTH, dtype=torch.long), use_cache=False)
    slots = capture._slots
    check_seen(slots)
    kinds = Counter(tuple(slot.keys.shape) for slot in slots)
    (_, head, _, dim), most = kinds.most_common(1)[0]
    depth = max(getattr(config.get_text_config(), "num_hidden_layers", None) or 0, len(slots))
    assert all(slot.keys.requires_grad and slot.values.requires_grad for slot in slots)
    remarks = [f"{head} key/value heads × {dim}"] + ["layers of several shapes"] * (len(kinds) > 1)
    try:
        if capture._followed:
            check_rotated(slots)
    except KavaError:
        remarks.append("only with `rotary: keep`")
    return "yes" if most == depth else f"{most} of {depth} layers", "; ".join(remarks)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().replace("|", "/")[:240]
