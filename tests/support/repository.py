"""Places in the repository, and the real data beside it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINIMAL_SPEC = Path(__file__).with_name("minimal_spec.yaml")
SHARED_DATA = Path(os.environ.get("KAVA_SHARED_DATA") or ROOT.parent / "shared" / "data")
