"""Make a short name for what a spec asks for."""

from __future__ import annotations

import hashlib
import json

from kava_core.specfile.sections.pipeline import PipelineSpec

NOT_IN_DIGEST = {"name", "seeds", "variants", "compare", "output"}
"""Fields that the path of a run's folder shows already, and what is asked of several runs."""


def spec_digest(spec: PipelineSpec) -> str:
    """Return ten hex digits of the sha256 of the resolved spec; they are the same on every machine."""
    fields = spec.model_dump(mode="json", exclude=NOT_IN_DIGEST)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:10]
