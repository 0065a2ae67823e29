"""Describe the student, its teachers, and where their weights come from."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.align import AlignSpec
from kava_core.specfile.sections.compare import Name
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.types import Positive


class TrainTokenizer(Strict):
    """A tokenizer trained on the spec's own training texts, once, and kept in the cache.

    Example: ``{kind: bpe, vocab_size: 512}``.
    """

    kind: Literal["chars", "bpe", "unigram", "wordpiece"] = "bpe"
    """``chars``: one token for each character; ``bpe``: byte-level pairs; ``unigram``: as in SentencePiece;
    ``wordpiece``: as in BERT, whose decoding does not give back the exact text."""
    vocab_size: Positive = 512
    """Largest number of tokens in the vocabulary, special tokens included."""


class Pretrain(Strict):
    """Training of a model with random weights on the spec's training data, before anything else; kept in the
    cache. Example: ``{steps: 1500}``."""

    steps: Positive
    """Number of optimizer steps."""
    batch_size: Positive = 64
    """Number of examples in a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of the cosine schedule, after a warm-up of 5 % of the steps."""
    seed: int = 0
    """Seed of the weights and of the data order."""
    data: dict[str, Any] = Field(default={})
    """Changes of the spec's ``data`` for this training alone, such as ``{groups: ["+-"]}``. A teacher's own
    ``template`` is not used here unless it is among them. A tokenizer that is to be trained sees the examples
    of the spec, not of the changes."""


LAYER_RULE = re.compile(r"even:([2-9]|[1-9][0-9]+)|influence:[1-9][0-9]*")


def _check_kept_layers(given: str | tuple[int, ...]) -> str | tuple[int, ...]:
    if isinstance(given, str):
        if LAYER_RULE.fullmatch(given):
            return given
        raise ValueError(
            f"{given!r} is none of even:n (n from 2), influence:n (n from 1) and a list such as [0, 3]"
        )
    if not given or given[0] < 0 or list(given) != sorted(set(given)):
        raise ValueError("layers are counted from 0, in ascending order, each once, at least one")
    return given


KeepLayers = Annotated[str | tuple[int, ...], AfterValidator(_check_kept_layers)]
"""``even:n``, ``influence:n``, or numbers of layers."""


class ModelSpec(Strict):
    """A causal language model (or an encoder), loaded from a folder or the hub, or with random weights.

    Examples: ``{path: Qwen/Qwen3-0.6B}``; ``{config: {model_type: llama, num_hidden_layers: 2}, tokenizer:
    {kind: chars}}``.
    """

    path: str | None = None
    """Folder or hub name, as for ``AutoModelForCausalLM.from_pretrained``, whose weights must be safetensors;
    or a ``.gguf`` file, dequantised to ``dtype`` (needs the extra ``gguf``); or the folder of a PEFT adapter,
    merged into its base model (needs the extra ``lora``)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    config: dict[str, Any] | None = None
    """A transformers config with ``model_type``, for random weights of that architecture. ``vocab_size`` and
    the special token ids are filled in from the tokenizer."""
    tokenizer: str | TrainTokenizer | None = None
    """Folder or hub name of the tokenizer, or one to train; default: that of ``path``."""
    pretrain: Pretrain | None = None
    """Train the random weights first. Only with ``config``."""
    keep_layers: KeepLayers | None = None
    """Take these layers alone, with the vocabulary, the head and the final norm of the whole model.
    ``even:10``: at equal distances, the first and the last among them; ``[0, 3, 6]``: these, from 0;
    ``influence:10``: those that change the hidden states of the first ``train.calibration_examples`` training
    examples most (ShortGPT). Only for trained weights: with ``path`` or ``pretrain``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights. For mixed precision keep a student in float32 and set
    ``train.precision``."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Which attention implementation of transformers is used."""
    encoder: bool = False
    """Whether the model is an encoder (BERT, RoBERTa, ELECTRA, or that of T5), as
    ``AutoModelForTextEncoding`` loads it. Its positions see the whole text, later ones too. As a teacher it
    may be pretrained to restore corrupted texts; as a student it can only do that, without teachers."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if getattr(self, "itself", None) is not None:
            return self
        if (self.path is None) == (self.config is None):
            raise ValueError(
                "give exactly one of 'path' (a folder or hub name) and 'config' (random weights)"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("'config' needs a 'model_type', such as llama")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model made from 'config' needs a 'tokenizer'")
        if self.pretrain is not None and self.config is None:
            raise ValueError("'pretrain' is only for models made from 'config'")
        if self.keep_layers is not None and self.path is None and self.pretrain is None:
            raise ValueError(
                "'keep_layers' is for trained weights ('path' or 'pretrain'); give the 'config' fewer layers"
            )
        return self


class Lora(Strict):
    """Low-rank adapters that are trained in place of all weights (needs the extra ``lora``).

    Example: ``{rank: 8, alpha: 16}``.
    """

    rank: Positive = 16
    """Rank of the update of a weight matrix."""
    alpha: Positive = 32
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropout on the adapter's input."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter, such as ``[q_proj, v_proj]``."""


class StudentSpec(ModelSpec):
    """The model that is trained."""

    lora: Lora | None = None
    """Train adapters instead of all weights."""
    frozen: bool = False
    """Keep its weights as they are and train aligners and routers alone. This is a control: it shows how far
    the KV loss falls without the student."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs time. It is always the
    non-reentrant form: the other would detach keys."""


class SelfSpec(Strict):
    """The student as its own teacher: one model reads the written steps and writes the latent tokens."""

    cross_entropy: float = Field(1.0, ge=0)
    """Weight of its own cross-entropy on the written steps and the answer, a mean over their tokens, which
    trains the model too."""


class StandIn(Strict):
    """A control: what teaches in a teacher's place and knows nothing of it. Architecture, tokenizer, text and
    alignment stay the teacher's. Example: ``{kind: random_weights}``.
    """

    kind: Literal["random_weights", "shuffled_weights", "token_identity"]
    """``random_weights``: every weight tensor of the teacher is drawn anew, normal with its own mean and
    standard deviation, norms and biases included; ``shuffled_weights``: the numbers of every tensor are
    permuted, so that outliers stay; ``token_identity``: no model runs, and every token has a fixed random
    vector (normal, of variance 1) for each layer, head and part, the same at every position, never
    rotated."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the random numbers. All seeds of an experiment share it, as they share a trained teacher."""


class TeacherSpec(ModelSpec):
    """A model whose cache is distilled. It is never trained, saved or wrapped, unless it is ``itself``.

    Teachers with the same model (but, say, other texts) share its weights. Example:
    ``{name: big, path: Qwen/Qwen3-1.7B}``.
    """

    name: Name
    """Name of this teacher in tables, records and the fuser's weights."""
    itself: SelfSpec | None = None
    """If given, even as ``{}``: this teacher is the student at its present weights, which reads the written
    steps (self-distillation). Its cache is a target without gradient. It needs ``trajectory: latent``; the
    model's fields are the student's and are left out."""
    last_step: bool = True
    """Whether it reads the last written step, which contains the answer. KaVa leaves it out; an example of
    one step is then read without any."""
    template: Template | None = None
    """The text this teacher reads, if it is not the student's: say, with worked examples before the prompt,
    or in the format of a chat. Default: ``data.template``."""
    rationale: Annotated[int, Field(ge=0)] = 0
    """Which of an example's rationales this teacher reads: 0 is the student's, 1 the first of its field
    ``rationales``, and so on. If an example has fewer, counting starts again. ``kava sample`` writes them."""
    align: AlignSpec = Field(default={})  # type: ignore[assignment]
    """How its cache is brought to the student's axes."""
    quantize: Literal["int8", "int4", "nf4"] | None = None
    """Round the weights of its linear layers to 8 or 4 bits (needs the extra ``quantize``); embeddings, head
    and cache keep their dtype. ``int8`` and ``int4`` use torchao (int4 takes no less memory than int8);
    ``nf4`` uses bitsandbytes and takes half a byte a weight."""
    stand_in: StandIn | None = Field(None, exclude_if=lambda value: value is None)
    """If given, this teacher is replaced by a control that knows nothing. The controls ``untrained_teacher``,
    ``shuffled_weights`` and ``token_identity`` of ``compare`` set it."""
    placement: str = Field("replicated", pattern=r"^(replicated|sharded|cpu|cuda(:[0-9]+)?)$")
    """Where its weights are. ``replicated``: on the student's device, whole in every process; ``sharded``:
    divided among all processes and gathered layer by layer (the results are the same; with one process it is
    ``replicated``); ``cpu`` or ``cuda:1``: on a device of its own, from which its cache is copied to the
    student's."""

    @property
    def has_weights(self) -> bool:
        """Return whether a model runs for it: a ``token_identity`` has none."""
        return self.stand_in is None or self.stand_in.kind != "token_identity"

    @property
    def own_text(self) -> list[str]:
        """Return the names of the fields that make it read another text than the student."""
        fields = [field for field in ("template", "rationale") if getattr(self, field)]
        return fields if self.last_step else [*fields, "last_step"]
