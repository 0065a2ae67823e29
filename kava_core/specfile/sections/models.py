"""Describe the student, its teachers, and where their weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.align import AlignSpec
from kava_core.specfile.sections.compare import Name
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.types import Positive


class TrainTokenizer(Strict):
    """Train a tokenizer on the spec's own training texts (cached)."""

    kind: Literal["chars", "bpe", "unigram", "wordpiece"] = "bpe"
    """``chars``: one token per character; ``bpe``: byte-level; ``unigram``: like SentencePiece."""
    vocab_size: Positive = 512
    """Upper bound of the vocabulary, special tokens included."""


class Pretrain(Strict):
    """Train this model from its random weights on the spec's training data before anything else (cached)."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 64
    """Examples in a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the cosine schedule, after a warm-up of 5 % of the steps."""
    seed: int = 0
    """Seed of the weights and of the data order."""
    data: dict[str, Any] = Field(default={})
    """Changes of the spec's ``data`` for this training alone, such as ``{groups: ["+-"]}``; a teacher's own
    ``template`` is not used unless it stands here. A tokenizer that is to be trained sees the examples of the
    spec, not of the changes."""


class ModelSpec(Strict):
    """A causal language model (or an encoder): from a folder or hub name, or with random weights from a
    config."""

    path: str | None = None
    """Folder or hub name, as for ``AutoModelForCausalLM.from_pretrained``. Safetensors only."""
    revision: str | None = None
    """Commit or tag on the hub."""
    config: dict[str, Any] | None = None
    """A transformers config with ``model_type``: random weights of that architecture. ``vocab_size`` and the
    special token ids are filled in from the tokenizer."""
    tokenizer: str | TrainTokenizer | None = None
    """Folder or hub name, or a tokenizer to train; default: ``path``."""
    pretrain: Pretrain | None = None
    """Only with ``config``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights. For mixed precision keep a student in float32 and set ``train.precision``."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    encoder: bool = False
    """Of a teacher: an encoder (BERT, RoBERTa, ELECTRA, or that of T5), as ``AutoModelForTextEncoding`` loads
    it. Its positions see the whole text, later ones too. With ``pretrain`` it learns to restore corrupted
    texts. As a student it can only do that, without teachers."""

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
        return self


class Lora(Strict):
    """Low-rank adapters instead of full training (needs the extra ``lora``)."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: Positive = 32
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class StudentSpec(ModelSpec):
    """The model that is trained."""

    lora: Lora | None = None
    """Train adapters instead of all weights."""
    frozen: bool = False
    """Its weights stay as they are; only aligners and routers are trained. A control: the KV loss falls by
    what they alone can do."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (always non-reentrant: the reentrant form detaches keys)."""


class SelfSpec(Strict):
    """The student as its own teacher: one model reads the written steps and writes the latent tokens."""

    cross_entropy: float = Field(1.0, ge=0)
    """Weight of its cross-entropy on the written steps and the answer, a mean over their tokens, which
    trains it too."""


class TeacherSpec(ModelSpec):
    """A model whose cache is distilled. It is never trained here, saved or wrapped, except as ``itself``.

    Teachers with the same model (but, say, other texts) share its weights.
    """

    name: Name
    """How tables and weights call this teacher."""
    itself: SelfSpec | None = None
    """This teacher is the student, at its present weights, reading the written steps: self-distillation. Its
    cache is a target without gradient. Needs ``trajectory: latent``; the model's own fields are then the
    student's and are left out."""
    last_step: bool = True
    """Whether it reads the last written step, which holds the answer; KaVa leaves it out. An example of one
    step is then read without any."""
    template: Template | None = None
    """The text this teacher reads, where it is not the student's: say, worked examples before the prompt, or
    the marks of a chat. Default: ``data.template``."""
    rationale: Annotated[int, Field(ge=0)] = 0
    """Which of an example's rationales this teacher reads: 0 is the student's, 1 the first of its field
    ``rationales``, and so on, counted round where an example has fewer. ``kava sample`` writes them."""
    align: AlignSpec = Field(default={})  # type: ignore[assignment]
    """How its cache is brought to the student's axes."""
    quantize: Literal["int8", "int4", "nf4"] | None = None
    """Round the weights of its linear layers to 8 or 4 bits (needs the extra ``quantize``); embeddings, head
    and cache keep their dtype. ``int8``, ``int4``: torchao (int4 takes no less memory than int8); ``nf4``:
    bitsandbytes, half a byte a weight."""
    placement: str = Field("replicated", pattern=r"^(replicated|sharded|cpu|cuda(:[0-9]+)?)$")
    """Where its weights are. ``replicated``: on the student's device, whole in every process; ``sharded``:
    divided among all processes and gathered layer by layer (the same result; with one process as
    ``replicated``); ``cpu``, ``cuda:1``: on a device of its own, from which its cache comes to the
    student's."""

    @property
    def own_text(self) -> list[str]:
        """The fields that make it read another text than the student."""
        found = [field for field in ("template", "rationale") if getattr(self, field)]
        return found if self.last_step else [*found, "last_step"]
