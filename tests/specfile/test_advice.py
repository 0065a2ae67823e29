"""What is allowed and probably a mistake."""

import pytest

from kava_core.specfile.advice import advice_on
from tests.support import tiny


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"dtype": "bfloat16"}, ["student.dtype: a weight of 0.02 in bfloat16 moves only by 4e-05"]),
        ({"dtype": "float16"}, ["student.dtype: a weight of 0.02 in float16 moves only by 5e-06"]),
        ({"dtype": "bfloat16", "lora": {"rank": 2}}, []),
        ({"dtype": "bfloat16", "frozen": True}, []),
    ],
)
def test_sixteen_bit_weights(changes: dict[str, object], told: list[str]) -> None:
    spec = tiny.spec(student=changes)
    found = list(advice_on(spec))
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))
