"""PipelineSpec: everything a run is made of. Field docstrings are the spec reference in docs/.

The component fields are typed ``ComponentConfig`` here; ``kava_core.spec.bind`` narrows them to the
declarations that are installed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from kava_core.config import ComponentConfig, KVLossConfig, Strict

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
"""A name that is also a folder: letters, digits, ``_ . -``, not starting with a dot."""

Positive = Annotated[int, Field(gt=0)]


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
    """A causal language model: from a folder or hub name, or with random weights from a config."""

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

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (always non-reentrant: the reentrant form detaches keys)."""


class AlignSpec(Strict):
    """How one teacher's cache is brought to the student's axes. Each field is a component's name, or a
    mapping with its name and parameters."""

    layer_mapper: ComponentConfig = Field(default={"name": "ratio"})  # type: ignore[assignment]
    """t_layer → layer."""
    layers: Literal["mean", "concat"] = "mean"
    """Where a student layer reads several teacher layers: their mean with the mapper's weights, or side by
    side along the width, for the projector to choose from."""
    head_adapter: ComponentConfig = Field(default={"name": "structured"})  # type: ignore[assignment]
    """t_head → head."""
    token_warper: ComponentConfig | None = None
    """A time warper that first brings the teacher's tokens to the student's (say, char_iou); time_warper then
    works among the student's positions. Both are applied as one map."""
    time_warper: ComponentConfig = Field(default={"name": "segment"})  # type: ignore[assignment]
    """t_time → time."""
    dim_projector: ComponentConfig = Field(default={"name": "calibrated"})  # type: ignore[assignment]
    """t_dim → dim."""
    direction: Literal["to_student", "to_teacher"] = "to_student"
    """Which side the head adapter and the projector map: the teacher's cache to the student's heads and
    width, or the student's cache up to the teacher's, which stays as it is (FitNets)."""


class Template(Strict):
    """How an example becomes text. Braces name the example's fields."""

    prompt: str = "{prompt}\n"
    """The part that is given; no loss on it."""
    reasoning: str = "{reasoning}\n"
    """The written steps."""
    answer: str = "#### {answer}"
    """The answer; text before ``{answer}`` is the marker that evaluation looks for."""

    @model_validator(mode="after")
    def _fields_present(self) -> Template:
        for field in ("prompt", "reasoning", "answer"):
            if getattr(self, field).count("{" + field + "}") != 1:
                raise ValueError(f"'{field}' must contain {{{field}}} exactly once")
        return self


class TeacherSpec(ModelSpec):
    """A model whose cache is distilled. It is never trained here, saved or wrapped.

    Teachers with the same model (but, say, other texts) share its weights.
    """

    name: Name
    """How tables and weights call this teacher."""
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


Operations = Annotated[str, StringConstraints(pattern=r"^[-+*]+$")]


class ChainData(Strict):
    """Generated chain arithmetic: ``7+3*2-5?`` modulo m, one written step per operation."""

    name: Literal["chain"] = "chain"
    steps: Positive = 5
    """Operations in a chain."""
    modulus: int = Field(10, ge=2)
    """All results are taken modulo this."""
    operations: Operations = "+-*"
    """Operations drawn from."""
    groups: Annotated[tuple[Operations, ...], Field(min_length=1)] | None = None
    """Each chain's operations come from one of these alone, which is its task label; ``operations`` is not
    looked at then. For teachers (or a fuser) that are good at some tasks."""
    train: Positive = 8192
    """Training examples."""
    validation: Positive = 512
    """Validation examples, disjoint from the training examples."""
    seed: int = 0
    """Seed of the examples; the same for every variant and training seed."""
    template: Template = Template(prompt="{prompt}?", reasoning="{reasoning}", answer=" #{answer}")
    """Text of an example. The reasoning is the intermediate results, each after a space."""


class JsonlData(Strict):
    """Examples from JSON-lines files."""

    name: Literal["jsonl"] = "jsonl"
    train: str
    """File of training examples."""
    validation: str
    """File of validation examples."""
    format: Literal["fields", "gsm8k"] = "fields"
    """``fields``: objects with prompt, reasoning, answer; ``gsm8k``: question and answer, where the answer
    ends in ``#### number`` and calculations stand in ``<<…>>`` (removed)."""
    train_limit: Positive | None = None
    """Use only the first examples of the training file."""
    validation_limit: Positive | None = None
    """Use only the first examples of the validation file."""
    template: Template = Template()
    """Text of an example."""


class HubData(Strict):
    """Examples from a ``datasets`` hub name or local dataset folder (needs the extra ``hub``)."""

    name: Literal["hub"] = "hub"
    path: str
    """Name or folder, as for ``datasets.load_dataset``."""
    config: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Commit or tag on the hub."""
    train: str = "train"
    """Split of training examples (slices such as ``train[:1000]`` work)."""
    validation: str = "test"
    """Split of validation examples."""
    format: Literal["fields", "gsm8k"] = "fields"
    """As for jsonl."""
    columns: dict[Literal["prompt", "reasoning", "answer"], str] = Field(default={})
    """With ``fields``: the dataset's column for each field, where the names differ."""
    template: Template = Template()
    """Text of an example."""


DataSpec = Annotated[ChainData | JsonlData | HubData, Field(discriminator="name")]


DivergenceKind = Literal["forward", "reverse", "jeffreys"]


class LogitsSpec(Strict):
    """Beside KV losses: the student's next-token distribution against that of teachers with its vocabulary.

    Each such teacher runs to the end then, its language-model head included. Positions count where both
    completions agree so far, the prompts may differ.
    """

    weight: float = Field(1.0, ge=0)
    """The term is multiplied by this and added to cross-entropy; it is a mean over labelled tokens and
    teachers."""
    temperature: float = Field(1.0, gt=0)
    """Both distributions are softened by it; the term is multiplied by its square."""
    kind: DivergenceKind = "forward"
    """``forward``: KL(teacher ‖ student); ``reverse``: KL(student ‖ teacher); ``jeffreys``: their sum."""
    teachers: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Names of the teachers; default: all."""


class LatentSpec(Strict):
    """With ``trajectory: latent``: continuous tokens that the student writes to itself between prompt and
    answer, refined in Jacobi passes (PCCoT, arXiv 2506.18582; KaVa, arXiv 2510.02312)."""

    count: Positive = 6
    """Latent tokens."""
    passes: int = Field(3, ge=0)
    """Jacobi passes. ``count`` of them are sequential writing; 0: only learned embeddings, like pause
    tokens."""
    projection: Literal["none", "linear", "mlp"] = "mlp"
    """From the last hidden state at a place to the input of the next one."""
    begin: bool = True
    """Put a token ``<bot>`` before the latent ones, as KaVa does. Without it the first of them is written
    from the prompt's last token, which a model that has learnt written steps knows how to go on from."""


class TrainSpec(Strict):
    """The optimisation."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 32
    """Examples in a forward pass of one process."""
    accumulate: Positive = 1
    """Forward passes in a step; the loss is that of the whole batch, whatever this is."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, for the student and for trainable aligners."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW, for the student alone."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype of the student's and teachers' forward passes."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Backend of torch.compile for the student's forward pass; answers are written uncompiled."""
    stream: bool = False
    """Align a teacher's cache while it runs, one of its layers alive at a time: the same gradient with less
    memory, for long texts and large teachers. Where an aligner is trained or the student is lifted, the
    losses are formed meanwhile; then not with ``target: fused``, nor with a fuser that looks at targets."""
    max_length: Positive = 1024
    """Examples longer than this in any tokenizer are left out, and counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens with cross-entropy: reasoning and answer, or the prompt as well."""
    calibration_examples: Positive = 256
    """Training examples shown to calibrated components before the first step."""
    shuffle_teacher: bool = False
    """Control: every example gets the teacher cache of another example of its batch."""
    log_every: Positive = 10
    """Steps between lines in metrics.jsonl."""
    save_every: Positive = 200
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Complete checkpoints kept."""
    workers: int = Field(0, ge=0)
    """Data loader processes."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Trackers beside metrics.jsonl."""


class StoreSpec(Strict):
    """The teachers' aligned caches on disk: ``kava cache`` writes them, training then runs no teacher."""

    folder: str
    """Folder of stores. Each is named by a hash of everything it depends on: weights, tokenizers, examples,
    alignment, what is compared."""
    dtype: Literal["bfloat16", "int8", "float32"] = "bfloat16"
    """How numbers are stored. ``int8``: with a float32 scale for each layer, head and position."""
    shard_mb: Positive = 512
    """Size of a file, in MiB."""


class EvaluateSpec(Strict):
    """Validation during training."""

    every: Positive = 100
    """Steps between evaluations."""
    examples: Positive = 256
    """Validation examples used."""
    batch_size: Positive = 64
    """Examples in a forward pass."""
    generate: bool = True
    """Also write answers and count exact matches."""
    max_new_tokens: Positive = 64
    """Longest written answer."""


class PipelineSpec(Strict):
    """A student, its teachers, how their caches are aligned, fused and compared, and the run."""

    name: Name
    """Name of the run; its folder under ``output``."""
    student: StudentSpec
    """The model that is trained."""
    teachers: tuple[TeacherSpec, ...] = ()
    """The models that are distilled."""
    rotary: Literal["strip", "keep", "match"] = "strip"
    """``strip``: compare keys and queries without rotation, undone by each model's own angles; ``keep``: as
    cached; ``match``: the teacher's rotation is undone and, once aligned, done again with the student's
    positions and base."""
    target: Literal["separate", "fused"] = "separate"
    """``separate``: the student is compared with every teacher, and the losses are averaged with the fuser's
    weights; ``fused``: the aligned caches are averaged first, which only means something where they share a
    basis (calibrated projections of two teachers do not)."""
    fuser: ComponentConfig = Field(default={"name": "fixed"})  # type: ignore[assignment]
    """How much each teacher counts, where and when."""
    losses: tuple[KVLossConfig, ...] = ()
    """KV losses, added to the student's cross-entropy. None: cross-entropy alone."""
    trajectory: Literal["text", "latent"] = "text"
    """What stands between prompt and answer of the student: written steps, or ``latent`` tokens, which are
    compared with the teachers' reasoning. Teachers always read written steps."""
    latent: LatentSpec = LatentSpec()
    """The latent tokens."""
    logits: LogitsSpec | None = None
    """Distil next-token distributions as well, from teachers with the student's vocabulary."""
    data: DataSpec
    """Where examples come from."""
    train: TrainSpec
    """The optimisation."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Validation during training."""
    store: StoreSpec | None = None
    """Train from aligned caches written before by ``kava cache``; null: run the teachers at every step."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0,), min_length=1)
    """One run for each. A seed fixes the student's weights, the data order and dropout."""
    variants: dict[Name, dict[str, Any]] = Field(default={})
    """Named changes of this spec: dotted path to new value, as on the command line. One run for each variant
    and seed; none: one variant, ``main``."""
    output: str = "runs"
    """Folder of run directories."""

    @model_validator(mode="after")
    def _fits_together(self) -> PipelineSpec:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers must have different names, not {', '.join(names)}")
        if self.losses and not self.teachers:
            raise ValueError("'losses' need at least one teacher")
        self._check_pretraining_data()
        self._check_texts()
        self._check_logits(names)
        self._check_latent()
        if self.train.stream and self.store is not None:
            raise ValueError("'train.stream' is about teachers that run; a store needs none")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("'seeds' must differ from one another")
        if self.store is not None and self.train.shuffle_teacher:
            raise ValueError(
                "'train.shuffle_teacher' aligns every teacher's cache to another example, which no store "
                "holds; set 'store: null'"
            )
        return self

    def _check_latent(self) -> None:
        if self.trajectory != "latent":
            return
        clashes = {
            "logits": self.logits is not None,
            "store": self.store is not None,
            "rotary: match": self.rotary == "match",
            "train.compile": self.train.compile is not None,
        }
        if found := [name for name, clash in clashes.items() if clash]:
            raise ValueError(f"'trajectory: latent' does not go together with {', '.join(found)} yet")

    def _check_logits(self, names: list[str]) -> None:
        if self.logits is None:
            return
        if not names:
            raise ValueError("'logits' needs at least one teacher")
        if unknown := [name for name in self.logits.teachers or () if name not in names]:
            raise ValueError(f"'logits.teachers': no teacher {unknown[0]!r}; there are {', '.join(names)}")
        if self.train.shuffle_teacher:
            raise ValueError(
                "'train.shuffle_teacher' puts another example beside the student, whose tokens are others; "
                "set 'logits: null'"
            )
        if self.store is not None:
            raise ValueError(
                "'logits' needs teachers that run, and a store holds no logits; set 'store: null'"
            )

    def _check_texts(self) -> None:
        for teacher in self.teachers:
            own = [field for field in ("template", "rationale") if getattr(teacher, field)]
            for field in ("token_warper", "time_warper"):
                warper = getattr(teacher.align, field)
                if own and getattr(warper, "same_text", False):
                    raise ValueError(
                        f"teacher {teacher.name!r} reads another text than the student ({own[0]}), but "
                        f"{field} {warper.name!r} compares the characters of one text; use segment"
                    )

    def _check_pretraining_data(self) -> None:
        for model in (self.student, *self.teachers):
            if model.pretrain is not None and model.pretrain.data:
                changed_data(self.data, model.pretrain.data)


def changed_data(data: DataSpec, changes: dict[str, Any]) -> DataSpec:
    """The section with some fields changed; ValueError where it does not take them."""
    made: DataSpec = type(data).model_validate(data.model_dump() | changes)
    return made
