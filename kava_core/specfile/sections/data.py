"""Describe where examples come from and how they become text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.types import Positive


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


def change_data(data: DataSpec, changes: dict[str, Any]) -> DataSpec:
    """The section with some fields changed; ValueError where it does not take them."""
    made: DataSpec = type(data).model_validate(data.model_dump() | changes)
    return made
