"""Load what teaches: a teacher's model, or the control in its place."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from kava_core.data.tokenizers import vocabulary_size
from kava_core.kv.capture.geometry import model_geometry
from kava_core.models.config import config_geometry, model_config
from kava_core.models.load import load_model
from kava_core.models.stand_ins.token_identity import TokenVectors
from kava_core.models.stand_ins.untrained_weights import forget_training
from kava_core.protocols.axes import Geometry
from kava_core.specfile.sections.models import TeacherSpec


def load_teacher(spec: TeacherSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Load a teacher's model, or make its stand-in.

    Args:
        spec: the teacher's, ready to load.
        tokenizer: of the teacher.

    Raises:
        SpecError: it cannot be loaded, or its vocabulary is smaller than the tokenizer's.
    """
    where, stand_in = f"teacher {spec.name!r}", spec.stand_in
    if stand_in is not None and stand_in.kind == "token_identity":
        config = model_config(spec, tokenizer, where=where)
        geometry = config_geometry(config, where=where)
        return TokenVectors(config, geometry, vocabulary_size(tokenizer), seed=stand_in.seed)
    model = load_model(spec, tokenizer, seed=0, where=where)
    if stand_in is not None and stand_in.kind != "token_identity":
        forget_training(model, stand_in.kind, seed=stand_in.seed)
    return model


def teacher_geometry(model: nn.Module) -> Geometry:
    """Return the geometry of a teacher's model, measured, or of the vectors in its place."""
    return model.geometry if isinstance(model, TokenVectors) else model_geometry(model)
