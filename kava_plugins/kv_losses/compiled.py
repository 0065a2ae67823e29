"""Small tensor functions under ``torch.compile`` where asked for; they run uncompiled wherever that fails."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

SWITCH = "KAVA_COMPILE_LOSSES"
"""Environment variable: ``1`` compiles the losses' inner functions. Compiling takes a C++ compiler (CPU) or
Triton (GPU) and some ten seconds at the first step; on a CPU it saves about a tenth of the attention
divergence (see benchmarks/attention_kl.py), so it is off unless asked for."""


class Compiled:
    """``function``, compiled at its first call if the environment asks for it.

    A failure is told once as a warning and remembered: the function then runs as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Callable[..., Any] | None = None
        self._failed = False

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        if self._failed or os.environ.get(SWITCH) != "1" or arguments[0].is_meta:
            return self.function(*arguments)
        try:
            return self._compile()(*arguments)
        except Exception as error:  # a compiler can raise anything
            self._failed = True
            warnings.warn(f"{self.function.__name__} runs uncompiled: {error}", stacklevel=2)
            return self.function(*arguments)

    def _compile(self) -> Callable[..., Any]:
        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=True, fullgraph=True)
        return self._compiled
