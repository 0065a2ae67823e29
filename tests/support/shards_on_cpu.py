"""``kava`` for tests of FSDP2 without a GPU: accelerate is told that CPU processes may shard.

accelerate (1.15) takes its FSDP path for accelerators alone; without one it ignores the config file's FSDP
section. Everything after that decision is the same code on both: ``fully_shard`` runs over gloo.

    accelerate launch --config_file specs/accelerate/fsdp2.yaml --num_processes 2 shards_on_cpu.py train SPEC
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from kava_core.cli.app import main

_begin = AcceleratorState.__init__


def _shard_on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
    _begin(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _shard_on_cpu  # type: ignore[method-assign]
    main(sys.argv[1:])
