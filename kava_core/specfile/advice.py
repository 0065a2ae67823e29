"""Give advice on a spec that may be what was meant, but seldom is."""

from __future__ import annotations

from collections.abc import Iterator

from kava_core.specfile.sections.pipeline import PipelineSpec

USUAL_WEIGHT = 0.02
"""Standard deviation that most transformers are initialised with."""
HALF_UNIT = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Half a unit in the last place of 1.0, by number format."""


def advice_on(spec: PipelineSpec) -> Iterator[str]:
    """Yield a line for everything in a spec that is allowed and probably a mistake."""
    student, rate = spec.student, spec.train.learning_rate
    if student.dtype in HALF_UNIT and student.lora is None and not student.frozen:
        smallest = HALF_UNIT[student.dtype] * USUAL_WEIGHT
        yield (
            f"student.dtype: a weight of {USUAL_WEIGHT} in {student.dtype} moves only by {smallest:.1g} or "
            f"more at once, and AdamW's updates are about train.learning_rate, {rate:g}: keep the student in "
            "float32 and set train.precision: bf16"
        )
