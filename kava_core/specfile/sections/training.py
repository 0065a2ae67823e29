"""Describe the optimisation, the store, validation and online distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.types import Positive


class TrainSpec(Strict):
    """The optimisation, by AdamW. Example: ``{steps: 2000, batch_size: 32, learning_rate: 1e-4}``."""

    steps: Positive
    """Number of optimizer steps."""
    batch_size: Positive = 32
    """Number of examples in a forward pass of one process."""
    accumulate: Positive = 1
    """Number of forward passes in a step. The loss is that of the whole batch, however it is divided."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, for the student and for trainable aligners."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, to 0 at the last step; ``constant``: not at all."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW, for the student and its latent tokens."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a longer one is scaled down to it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype of the student's and teachers' forward passes."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Backend of torch.compile for the student's forward pass. Answers are written uncompiled."""
    stream: bool = False
    """Align a teacher's cache while it runs, so that only one of its layers is in memory at a time: the same
    gradient with less memory, for long texts and large teachers. If an aligner is trained, or ``direction``
    is ``to_teacher``, the losses are formed meanwhile; then it does not go with ``target: fused``, nor with a
    fuser that looks at targets."""
    max_length: Positive = 1024
    """Largest number of tokens of an example. One that is longer in any tokenizer is left out, and
    counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens have cross-entropy: those of reasoning and answer, or those of the prompt as well."""
    calibration_examples: Positive = 256
    """Number of training examples shown to calibrated components before the first step."""
    shuffle_teacher: bool = False
    """Give every example the teacher cache of another example of its batch. This is a control."""
    log_every: Positive = 10
    """Number of steps between two lines of metrics.jsonl."""
    save_every: Positive = 200
    """Number of steps between two checkpoints."""
    keep_checkpoints: Positive = 2
    """Number of complete checkpoints that are kept, the newest."""
    workers: int = Field(0, ge=0)
    """Number of data loader processes; 0: the training process loads its own data."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that get the numbers of metrics.jsonl as well, such as ``[tensorboard]``."""


class StoreSpec(Strict):
    """The teachers' aligned caches on disk. ``kava cache`` writes them; training then runs no teacher.

    Example: ``{folder: stores, dtype: int8}``.
    """

    folder: str
    """Folder of all stores. Each store is a folder in it, named by a hash of everything it depends on:
    weights, tokenizers, examples, alignment, and what is compared."""
    dtype: Literal["bfloat16", "int8", "float32"] = "bfloat16"
    """Number format of what is stored. ``int8`` has a float32 scale for each layer, head and position."""
    shard_mb: Positive = 512
    """Size at which a file is closed and the next one begun, in MiB."""


class EvaluateSpec(Strict):
    """Validation during training. Example: ``{every: 200, examples: 512}``."""

    every: Positive = 100
    """Number of steps between two evaluations."""
    examples: Positive = 256
    """Number of validation examples that are used."""
    batch_size: Positive = 64
    """Number of examples in a forward pass."""
    generate: bool = True
    """Also write answers and count exact matches."""
    max_new_tokens: Positive = 64
    """Largest number of tokens of a written answer."""
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
    """Online distillation: the student writes a part of the texts that it and its teachers read.

    Teachers then read what the student would write, mistakes included, and not the data's texts alone
    (on-policy distillation, arXiv 2306.13649). Example: ``{share: 0.25}``.
    """

    share: float = Field(0.5, gt=0, le=1)
    """Share of every batch, from 0 to 1, whose completions the student writes anew at every step. They have
    no cross-entropy, nor the term of ``logits``: caches alone are compared there."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the sampling; below 1 it is closer to the most likely text."""
    max_new_tokens: Positive = 64
    """Largest number of tokens of a written completion."""
