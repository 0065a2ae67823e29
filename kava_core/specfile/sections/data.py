"""Describe where examples come from and how they become text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.types import Positive


class Template(Strict):
    """How an example becomes text. Braces name the example's fields.

    Example: ``{prompt: "Q: {prompt}\\nA: ", reasoning: "{reasoning}\\n", answer: "#### {answer}"}``.
    """

    prompt: str = "{prompt}\n"
    """The part that is given. It has no cross-entropy, unless ``train.loss_on: all``."""
    reasoning: str = "{reasoning}\n"
    """The written steps, between prompt and answer."""
    answer: str = "#### {answer}"
    """The answer. The text before ``{answer}`` is the marker that evaluation looks for."""

    @model_validator(mode="after")
    def _fields_present(self) -> Template:
        for field in ("prompt", "reasoning", "answer"):
            if getattr(self, field).count("{" + field + "}") != 1:
                raise ValueError(f"'{field}' must contain {{{field}}} exactly once")
        return self


Operations = Annotated[str, StringConstraints(pattern=r"^[-+*]+$")]
"""Arithmetic operations, one character each, such as ``+-*``."""

Format = Literal["fields", "gsm8k", "gsm8k_equations", "pal"]


class ChainData(Strict):
    """Generated chain arithmetic: ``7+3*2-5?`` modulo m, worked from left to right, one written step for each
    operation."""

    name: Literal["chain"] = "chain"
    separator: ClassVar[str] = " "
    """Text between two written steps, as for jsonl; it cannot be changed."""
    steps: Positive = 5
    """Number of operations in a chain."""
    modulus: int = Field(10, ge=2)
    """The modulus m: all results are 0 to m − 1."""
    operations: Operations = "+-*"
    """The operations that a chain is drawn from, such as ``+-`` for sums and differences alone."""
    groups: Annotated[tuple[Operations, ...], Field(min_length=1)] | None = None
    """Sets of operations, such as ``["+-", "*"]``. Each chain draws from one of them alone, which is the
    label of its task, and ``operations`` is not used. For teachers (or a fuser) that are good at some
    tasks."""
    train: Positive = 8192
    """Number of training examples."""
    train_skip: int = Field(0, ge=0)
    """Number of training examples left out before the first. A teacher with ``pretrain: {data: {train_skip:
    8192}}`` learns from other examples than a student with ``train: 8192``, and both are judged by the same
    validation examples."""
    validation: Positive = 512
    """Number of validation examples, disjoint from all training examples."""
    seed: int = 0
    """Seed of the examples. It is the same for every variant and every training seed."""
    template: Template = Template(prompt="{prompt}?", reasoning="{reasoning}", answer=" #{answer}")
    """How an example becomes text. Its reasoning is the intermediate results, each after a space."""


class JsonlData(Strict):
    """Examples from JSON-lines files, one JSON object a line."""

    name: Literal["jsonl"] = "jsonl"
    train: str
    """File of training examples, such as ``data/gsm8k/train.jsonl``."""
    validation: str
    """File of validation examples, such as ``data/gsm8k/test.jsonl``."""
    format: Format = "fields"
    """What an object of the file holds. ``fields``: prompt, reasoning (a text or a list of steps) and answer;
    ``gsm8k``: question and answer, which ends in ``#### number`` and whose lines are the steps (calculations
    in ``<<…>>`` are removed); ``gsm8k_equations``: the same files, with the calculations ``<<48/2=24>>``
    alone as steps (1.3 % of GSM8K's examples have none, and so no reasoning); ``pal``: ``input`` and a number
    ``target``, as in PAL's files of SVAMP and MultiArith, without reasoning: to be judged by, not to learn
    from."""
    separator: str = Field("\n", min_length=1)
    """Text between two steps of the reasoning. A list of steps is joined by it, and the last step is found by
    it; no step of a list may contain it."""
    train_limit: Positive | None = None
    """Number of examples used from the training file, from the first on; null: all."""
    train_skip: int = Field(0, ge=0)
    """Number of examples left out at the start of the training file, so that a teacher and its student may
    learn from different ones; ``train_limit`` counts from there."""
    validation_limit: Positive | None = None
    """Number of examples used from the validation file, from the first on; null: all."""
    template: Template = Template()
    """How an example becomes text."""


class HubData(Strict):
    """Examples from the ``datasets`` hub or a local dataset folder (needs the extra ``hub``)."""

    name: Literal["hub"] = "hub"
    path: str
    """Name or folder, as for ``datasets.load_dataset``, such as ``openai/gsm8k``."""
    config: str | None = None
    """Configuration of the dataset, such as ``main``."""
    revision: str | None = None
    """Commit or tag on the hub."""
    train: str = "train"
    """Split of training examples (slices such as ``train[:1000]`` work)."""
    validation: str = "test"
    """Split of validation examples, as for ``train``."""
    format: Format = "fields"
    """What a row holds, as for jsonl."""
    separator: str = Field("\n", min_length=1)
    """Text between two steps of the reasoning, as for jsonl."""
    columns: dict[Literal["prompt", "reasoning", "answer"], str] = Field(default={})
    """With ``format: fields``: the dataset's column for each field whose name differs. Example:
    ``{prompt: question}``."""
    template: Template = Template()
    """How an example becomes text."""


DataSpec = Annotated[ChainData | JsonlData | HubData, Field(discriminator="name")]


def change_data(data: DataSpec, changes: dict[str, Any]) -> DataSpec:
    """Return the block ``data`` with some fields changed.

    Raises:
        pydantic.ValidationError: there is no such field, or it does not take the value.
    """
    changed: DataSpec = type(data).model_validate(data.model_dump() | changes)
    return changed
