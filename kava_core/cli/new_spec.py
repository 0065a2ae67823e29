"""Write a small spec that runs as it is, with a comment at everything that is changed first."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from kava_core.errors import KavaError, SpecError

TEMPLATE = Path(__file__).parent / "templates" / "spec.yaml.txt"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
"""What a spec's ``name`` may be."""


def write_spec(name: str, output: Path) -> Path:
    """Write ``output/NAME.yaml`` and return its path.

    Raises:
        SpecError: the name is no name.
        KavaError: the file exists or cannot be written.
    """
    if not NAME.fullmatch(name):
        raise SpecError(f"name {name!r}: must be letters, digits and '_ . -', not starting with a sign")
    file = output / f"{name}.yaml"
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(name=name, file=file)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise KavaError(f"{file}: exists already; choose another name or --output") from error
    except OSError as error:
        raise KavaError(f"{file}: cannot be written: {error.strerror}") from error
    return file
