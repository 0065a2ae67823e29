"""Define the base of components' declarations: what a spec file can say about them. No torch here.

A component has two halves. Its *declaration* is a pydantic class with a name, documented parameters and
the import path of its *implementation*, a ``torch.nn.Module``. Specs are validated against declarations
alone, so a mistake in a spec is reported before torch is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kava_core.errors import PluginError, failing_frame, is_request_to_stop
from kava_core.processes import guarded_import

Part = Literal["keys", "values", "queries"]
"""The three tensors of an attention layer."""

PARTS: tuple[Part, ...] = ("keys", "values", "queries")
"""All three parts, in the order in which they are always listed."""


class Strict(BaseModel):
    """A frozen model without unknown fields and NaN; field docstrings become the spec's documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class ComponentConfig(Strict):
    """Base of every component's declaration.

    Subclass it with ``name: Literal["my_name"] = "my_name"``, one documented field per parameter, and
    ``component = "my_package.my_module:MyClass"``.
    """

    name: str
    """The word that chooses this component in a spec."""

    component: ClassVar[str]
    """Import path ``module:Class`` of the implementation."""

    same_text: ClassVar[bool] = False
    """True for a time warper that is right only if teacher and student read the same text."""

    whole_text: ClassVar[bool] = False
    """True for a time warper that matches whole texts: latent tokens would be matched with the prompt."""

    latent_only: ClassVar[bool] = False
    """True for a time warper that needs a student of latent tokens."""

    @model_validator(mode="after")
    def _check_rate_has_effect(self) -> Self:
        if getattr(self, "learning_rate", None) is not None and not getattr(self, "trainable", True):
            raise ValueError("'learning_rate' has no effect with 'trainable: false'; change one of them")
        return self

    def build(self, **runtime: Any) -> Any:
        """Import the implementation and construct it: ``Class(config, **runtime)``."""
        return self.implementation()(self, **runtime)

    @classmethod
    def implementation(cls) -> Any:
        """Import and return the class named by ``component``.

        Raises:
            PluginError: it cannot be imported.
        """
        module, _, attribute = cls.component.partition(":")
        package = module.partition(".")[0]
        try:
            return getattr(_import_guarded(module, cls.component_name()), attribute)
        except BaseException as error:  # importing a plugin's module can raise anything
            if is_request_to_stop(error):
                raise
            where = "" if isinstance(error, Exception) else f" at {failing_frame(error, package)}"
            reason = f"cannot import {cls.component!r}: {type(error).__name__}: {error}{where}"
            raise PluginError(f"component {cls.component_name()!r}: {reason}") from error

    @classmethod
    def component_name(cls) -> str:
        """Return the registered name: the default of the ``name`` field."""
        return str(cls.model_fields["name"].default)


def _import_guarded(module: str, component: str) -> Any:
    """Import a component's module; what it writes to stdout goes to stderr."""
    if module in sys.modules:
        return import_module(module)
    is_own = module.startswith("kava_plugins.")
    with guarded_import(None if is_own else f"component {component!r} ({module})"):
        return import_module(module)


class WeightedTerm(Strict):
    """Base of every term's declaration: how much it counts beside the student's cross-entropy."""

    weight: float = Field(1.0, ge=0)
    """λ: the loss is multiplied by this and added to the student's cross-entropy. 0 switches it off."""

    share: float | None = Field(None, gt=0)
    """Sets λ before the first step: the norm of the loss's gradient over the student's weights is then this
    share of cross-entropy's. ``weight`` must be left out."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How λ goes over the run, from its first value to ``end`` times that."""

    end: float = Field(0.0, ge=0)
    """With another schedule than constant: the factor of λ at the last step."""

    @model_validator(mode="after")
    def _check_one_weight(self) -> Self:
        if self.share is not None and self.weight != 1.0:
            raise ValueError("'share' sets the weight; leave 'weight' out")
        return self


class KVLossConfig(WeightedTerm, ComponentConfig):
    """Base of every KV loss's declaration: its weight and what it looks at."""

    parts: tuple[Part, ...] = Field(("keys", "values"), min_length=1)
    """Which tensors are compared."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)] | Literal["all"] = "all"
    """Student layers the loss looks at, counted from 0 (negative: from the last)."""

    basis_free: ClassVar[bool] = False
    """True if head counts and widths of student and target may differ."""
