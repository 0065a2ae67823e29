"""PipelineSpec: everything a run is made of. Field docstrings are the spec reference in docs/.

The component fields are typed ``ComponentConfig`` here; ``kava_core.spec.bind`` narrows them to the
declarations that are installed.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from kava_core.config import ComponentConfig, KVLossConfig, Strict
from kava_core.spec.compare import CompareSpec, Name

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


Operations = Annotated[str, StringConstraints(pattern=r"^[-+*]+$")]


Format = Literal["fields", "gsm8k", "gsm8k_equations", "pal"]


class ChainData(Strict):
    """Generated chain arithmetic: ``7+3*2-5?`` modulo m, one written step per operation."""

    name: Literal["chain"] = "chain"
    separator: ClassVar[str] = " "
    """Text between two steps, as for jsonl; it cannot be changed."""
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
    train_skip: int = Field(0, ge=0)
    """Training examples left out before the first. A teacher with ``pretrain: {data: {train_skip: 8192}}``
    learns from others than a student of 8192, and both are judged by the same validation examples."""
    validation: Positive = 512
    """Validation examples, disjoint from all training examples."""
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
    format: Format = "fields"
    """``fields``: objects with prompt, reasoning (a text or a list of steps), answer; ``gsm8k``: question and
    answer, where the answer ends in ``#### number``, its lines are the steps, and calculations stand in
    ``<<…>>`` (removed); ``gsm8k_equations``: the same files, the calculations ``<<48/2=24>>`` alone as steps
    (1.3 % of GSM8K's examples have none, and so no reasoning); ``pal``: objects with ``input`` and a number
    ``target``, as PAL keeps SVAMP and MultiArith, without reasoning: to be judged by, not to learn from."""
    separator: str = Field("\n", min_length=1)
    """Text between two steps of the reasoning: a list of steps is joined by it, and the last step is found by
    it. A step of a list must not hold it."""
    train_limit: Positive | None = None
    """Use only the first examples of the training file."""
    train_skip: int = Field(0, ge=0)
    """Leave out the first examples of the training file, so that a teacher and its student may learn from
    different ones; ``train_limit`` counts from there."""
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
    format: Format = "fields"
    """As for jsonl."""
    separator: str = Field("\n", min_length=1)
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


class CurriculumSpec(Strict):
    """In stage k the student writes its first k steps as latent tokens, the others as text."""

    steps: Positive
    """Optimizer steps in a stage. The first stage is all text; the run must be long enough to reach the last,
    with all latent tokens."""
    tokens: Positive = 1
    """Latent tokens for a written step."""


class LatentSpec(Strict):
    """With ``trajectory: latent``: continuous tokens that the student writes to itself between prompt and
    answer, refined in Jacobi passes (PCCoT, arXiv 2506.18582; KaVa, arXiv 2510.02312)."""

    count: int = Field(6, ge=0)
    """Latent tokens. 0: the answer at once, the baseline without any reasoning."""
    passes: int = Field(3, ge=0)
    """Jacobi passes. ``count`` of them are sequential writing; 0: only learned embeddings, like pause
    tokens."""
    projection: Literal["none", "linear", "mlp"] = "mlp"
    """From the last hidden state at a place to the input of the next one."""
    begin: bool = True
    """Put a token ``<bot>`` before the latent ones, as KaVa does. Without it the first of them is written
    from the prompt's last token, which a model that has learnt written steps knows how to go on from."""
    step_cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the written steps' tokens at the latent ones, as in LOTUS: token i of
    the trace is to be read from where latent token i is written. A trace longer than the latent tokens is
    thinned evenly, a shorter one has labels at the first of them alone."""
    curriculum: CurriculumSpec | None = None
    """From written steps to latent tokens in stages (Coconut, arXiv 2412.06769); null: latent from the
    first step on."""

    @model_validator(mode="after")
    def _stages_reach_all(self) -> LatentSpec:
        if self.curriculum is not None and self.count % self.curriculum.tokens:
            raise ValueError(
                f"'curriculum.tokens': {self.count} latent tokens cannot be divided among steps of "
                f"{self.curriculum.tokens}"
            )
        return self


class CodiSpec(Strict):
    """CODI's term (arXiv 2502.21074): the hidden states of all layers at the token before the answer are
    drawn to a teacher's, by smooth L1 divided by the teacher's standard deviation in the layer, over the
    examples of one forward pass."""

    weight: float = Field(1.0, ge=0)
    """The term is multiplied by this and added to cross-entropy; it is a mean over examples and layers."""
    teacher: Name | None = None
    """Whose hidden states, of a model as deep and as wide as the student; default: the only teacher."""


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
    """Weight decay of AdamW, for the student and its latent tokens."""
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
    controls: bool = False
    """With latent tokens: also count exact matches after latent tokens that are all zero, and after those of
    another example. Answers that stay right did not need them."""

    @model_validator(mode="after")
    def _controls_write(self) -> EvaluateSpec:
        if self.controls and not self.generate:
            raise ValueError("'controls' needs 'generate: true'")
        if self.controls and min(self.batch_size, self.examples) < 2:
            raise ValueError("'controls' exchanges examples of a batch: 'batch_size' and 'examples' from 2")
        return self


class OnlineSpec(Strict):
    """Online distillation: the student writes a part of what it and its teachers read. Teachers then judge
    texts it would write, mistakes included, and not only the data's (on-policy, arXiv 2306.13649)."""

    share: float = Field(0.5, gt=0, le=1)
    """Share of every batch whose completions the student writes anew at every step. They have no
    cross-entropy (nor divergence of ``logits``): caches alone are compared there."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling."""
    max_new_tokens: Positive = 64
    """Longest completion."""


RESERVED = ("student", "alignment")
"""What records and tables call something else than a teacher."""


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
    codi: CodiSpec | None = None
    """With latent tokens: draw the hidden states before the answer to a teacher's."""
    logits: LogitsSpec | None = None
    """Distil next-token distributions as well, from teachers with the student's vocabulary."""
    data: DataSpec
    """Where examples come from."""
    train: TrainSpec
    """The optimisation."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Validation during training."""
    online: OnlineSpec | None = None
    """Let the student write a part of the texts; null: all are the data's."""
    store: StoreSpec | None = None
    """Train from aligned caches written before by ``kava cache``; null: run the teachers at every step."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0,), min_length=1)
    """One run for each. A seed fixes the student's weights, the data order and dropout."""
    variants: dict[Name, dict[str, Any]] = Field(default={})
    """Named changes of this spec: dotted path to new value, as on the command line. One run for each variant
    and seed; none: one variant, ``main``."""
    compare: CompareSpec | None = None
    """What ``kava experiment`` asks of the variants."""
    output: str = "runs"
    """Folder of run directories."""

    @model_validator(mode="after")
    def _fits_together(self) -> PipelineSpec:
        # A frozen model's own validator may complete it; copies of it would not be validated.
        self.__dict__["teachers"] = tuple(_as_student(teacher, self.student) for teacher in self.teachers)
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers must have different names, not {', '.join(names)}")
        if taken := [name for name in names if name in RESERVED]:
            raise ValueError(f"a teacher cannot be called {taken[0]!r}: records use that name")
        if self.losses and not self.teachers:
            raise ValueError("'losses' need at least one teacher")
        self._check_pretraining_data()
        self._check_texts()
        self._check_logits(names)
        self._check_latent()
        self._check_frozen()
        self._check_online()
        self._check_encoders()
        if self.train.stream and self.store is not None:
            raise ValueError("'train.stream' is about teachers that run; a store needs none")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("'seeds' must differ from one another")
        self._check_shuffled()
        return self

    def _check_shuffled(self) -> None:
        if not self.train.shuffle_teacher:
            return
        if self.store is not None:
            raise ValueError(
                "'train.shuffle_teacher' aligns every teacher's cache to another example, which no store "
                "holds; set 'store: null'"
            )
        if self.codi is not None and self.codi.weight:
            raise ValueError(
                "'train.shuffle_teacher' would give CODI's term another example's states as well; set "
                "'codi: null'"
            )

    def _check_frozen(self) -> None:
        if not self.student.frozen:
            return
        if self.student.lora is not None:
            raise ValueError("'student.frozen' leaves no use for 'lora'")
        if any(loss.share is not None for loss in self.losses):
            raise ValueError(
                "'share' weighs gradients of the student's weights; with 'frozen' there are none"
            )

    def _check_online(self) -> None:
        if self.online is None:
            return
        clashes = {"trajectory: latent": self.trajectory == "latent", "store": self.store is not None}
        if found := [name for name, clash in clashes.items() if clash]:
            raise ValueError(f"'online' does not go together with {', '.join(found)}")
        if not self.data.template.answer.partition("{answer}")[0].strip():
            raise ValueError(
                "'online' needs a marker before {answer} in 'data.template.answer' to find it by"
            )
        size, share = self.train.batch_size, self.online.share
        if round(share * size) == 0 or (share < 1 and round(share * size) == size):
            raise ValueError(
                f"'online.share': {share} of 'train.batch_size' {size} is none or all of it: use a larger "
                "batch (and less 'accumulate') or another share"
            )
        without_labels = {
            "logits": self.logits is not None,
            "losses with 'share'": any(loss.share is not None for loss in self.losses),
        }
        if share == 1 and (found := [name for name, given in without_labels.items() if given]):
            raise ValueError(f"'online.share': 1 leaves no labels for {', '.join(found)}")
        for teacher in self.teachers:
            if teacher.own_text:
                raise ValueError(
                    f"'online': teacher {teacher.name!r} reads another text than the student "
                    f"({teacher.own_text[0]}), but all are to read what the student writes"
                )

    def _check_encoders(self) -> None:
        if self.student.encoder:
            clashes = {
                "teachers": bool(self.teachers),
                "trajectory: latent": self.trajectory == "latent",
                "evaluate.generate: true": self.evaluate.generate,
                "student.lora": self.student.lora is not None,
                "student.gradient_checkpointing": self.student.gradient_checkpointing,
            }
            if found := [name for name, clash in clashes.items() if clash]:
                raise ValueError(f"'student.encoder': an encoder writes nothing; not with {', '.join(found)}")
        encoders = {teacher.name for teacher in self.teachers if teacher.encoder}
        asked: dict[str, str | None] = {"codi.teacher": self.codi.teacher if self.codi is not None else None}
        asked |= {f"logits.teachers: {name}": name for name in (self.logits and self.logits.teachers) or ()}
        if encoders and self.logits is not None and self.logits.teachers is None:
            raise ValueError("'logits.teachers': name teachers that are no encoders, which predict no tokens")
        for where, name in asked.items():
            if name in encoders:
                raise ValueError(f"'{where}': teacher {name!r} is an encoder: it has caches alone")

    def _check_latent(self) -> None:
        own = [teacher.name for teacher in self.teachers if teacher.itself is not None]
        if len(own) > 1:
            raise ValueError(f"only one teacher can be the student itself, not {', '.join(own)}")
        if self.trajectory != "latent":
            wanted = {"codi": self.codi is not None, "evaluate.controls": self.evaluate.controls}
            wanted |= {f"teacher {name!r}: itself": True for name in own}
            if found := [name for name, is_wanted in wanted.items() if is_wanted]:
                raise ValueError(f"{', '.join(found)}: needs 'trajectory: latent'")
            return
        self._check_codi()
        self._check_stages()
        unused = {
            "losses": bool(self.losses),
            "latent.step_cross_entropy": self.latent.step_cross_entropy > 0,
            "evaluate.controls": self.evaluate.controls,
        }
        if self.latent.count == 0 and (found := [name for name, given in unused.items() if given]):
            raise ValueError(f"'latent.count': 0 leaves no latent tokens for {', '.join(found)}")
        clashes = {
            "logits": self.logits is not None,
            "store": self.store is not None,
            "rotary: match": self.rotary == "match",
            "train.compile": self.train.compile is not None,
            "train.stream beside a teacher that is the student itself": bool(own) and self.train.stream,
            "student.frozen": self.student.frozen,
        }
        if found := [name for name, clash in clashes.items() if clash]:
            raise ValueError(f"'trajectory: latent' does not go together with {', '.join(found)} yet")

    def _check_codi(self) -> None:
        if self.codi is None:
            return
        names = [teacher.name for teacher in self.teachers]
        if self.codi.teacher is None and len(names) != 1:
            raise ValueError(
                f"'codi.teacher': name one of {', '.join(names) or 'the teachers: there is none'}"
            )
        if self.codi.teacher is not None and self.codi.teacher not in names:
            raise ValueError(
                f"'codi.teacher': no teacher {self.codi.teacher!r}; there are {', '.join(names)}"
            )

    def _check_stages(self) -> None:
        """A curriculum ends with all latent tokens, and has no use for what compares them before."""
        stages = self.latent.curriculum
        if stages is None:
            return
        if self.losses or self.codi is not None or self.latent.step_cross_entropy:
            raise ValueError(
                "'latent.curriculum' does not go together with losses, codi or step_cross_entropy"
            )
        needed = stages.steps * (self.latent.count // stages.tokens)
        if self.train.steps <= needed:
            raise ValueError(
                f"'latent.curriculum': all latent tokens are there after {needed} steps, but 'train.steps' "
                f"is {self.train.steps}"
            )

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
            own = teacher.own_text
            for field in ("token_warper", "time_warper"):
                warper = getattr(teacher.align, field)
                if warper is None:
                    continue
                if own and warper.same_text:
                    raise ValueError(
                        f"teacher {teacher.name!r} reads another text than the student ({own[0]}), but "
                        f"{field} {warper.name!r} compares the characters of one text; use segment"
                    )
                if self.trajectory == "latent" and warper.whole_text:
                    raise ValueError(
                        f"teacher {teacher.name!r}: {field} {warper.name!r} matches whole texts, and latent "
                        "tokens stand for the reasoning alone; use segment, uniform, crop or rkv"
                    )
                if self.trajectory != "latent" and warper.latent_only:
                    raise ValueError(
                        f"teacher {teacher.name!r}: {field} {warper.name!r} chooses tokens for latent ones "
                        "and needs 'trajectory: latent'; uniform, crop and segment do not"
                    )

    def _check_pretraining_data(self) -> None:
        for model in (self.student, *self.teachers):
            if model.pretrain is not None and model.pretrain.data:
                changed_data(self.data, model.pretrain.data)


def _as_student(teacher: TeacherSpec, student: StudentSpec) -> TeacherSpec:
    """The teacher with the student's model, where it is ``itself``; ValueError where it names another."""
    if teacher.itself is None:
        return teacher
    model = {name: getattr(student, name) for name in ModelSpec.model_fields}
    for name in ("quantize", "placement"):
        if name in teacher.model_fields_set and getattr(teacher, name) not in (None, "replicated"):
            raise ValueError(f"teacher {teacher.name!r} is the student itself: leave out {name!r}")
    for name in teacher.model_fields_set & set(model):
        if getattr(teacher, name) != model[name]:
            raise ValueError(f"teacher {teacher.name!r} is the student itself: leave out {name!r}")
    return teacher.model_copy(update=model)


def changed_data(data: DataSpec, changes: dict[str, Any]) -> DataSpec:
    """The section with some fields changed; ValueError where it does not take them."""
    made: DataSpec = type(data).model_validate(data.model_dump() | changes)
    return made
