"""Record which components are installed, who registered them, and which plugins could not be loaded.

A registry is built from the entry points of the group ``kava``, then only read. kava's own components come
through the same door as everyone's.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from kava_core import hookspecs
from kava_core.config import ComponentConfig
from kava_core.declarations import declaration_fault
from kava_core.errors import (
    PluginError,
    SpecError,
    did_you_mean,
    failing_frame,
    is_request_to_stop,
    one_line,
    one_of,
)
from kava_core.hookspecs import KINDS
from kava_core.processes import guarded_import

GROUP = "kava"
"""The entry-point group of plugins."""

BUILT_IN = "kava"
"""The distribution whose components nobody can shadow."""

DISABLED_VARIABLE = "KAVA_DISABLE_PLUGINS"
"""Environment variable: comma-separated distributions or ``distribution:entry``; ``*``: all third parties."""


@dataclass(frozen=True)
class Registered:
    """A component and the plugin it came from."""

    kind: str
    config: type[ComponentConfig]
    distribution: str
    version: str
    entry: str
    module: str

    @property
    def name(self) -> str:
        """Return the component's name in a spec."""
        return self.config.component_name()

    @property
    def origin(self) -> str:
        """Return distribution and version, as one text."""
        return f"{self.distribution} {self.version}"

    @property
    def doc(self) -> str:
        """Return the first line of the declaration's docstring."""
        return (self.config.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class Failure:
    """A plugin, or one of its components, that cannot be used, and why."""

    plugin: str
    reason: str

    def __str__(self) -> str:
        return f"plugin {self.plugin} failed: {self.reason}"


@dataclass(frozen=True)
class Registry:
    """The installed components."""

    registered: tuple[Registered, ...]
    failures: tuple[Failure, ...] = ()
    clashes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Kind and name that several third parties register, and who: nobody's component can be used by it."""

    @classmethod
    def build(cls, disabled: Iterable[str] | None = None) -> Registry:
        """Load every plugin that is not disabled.

        A plugin that fails is remembered in ``failures``, a name that two third parties register in
        ``clashes``, and the others go on.

        Args:
            disabled: plugins to leave out; by default those named in ``KAVA_DISABLE_PLUGINS``.
        """
        if disabled is None:
            disabled = os.environ.get(DISABLED_VARIABLE, "").split(",")
        disabled_names = {_canonical_name(name) for name in disabled}
        loader = _Loader()
        for point in sorted(entry_points(group=GROUP), key=_built_in_first):
            if not _is_disabled(point, disabled_names):
                loader.load_plugin(point)
        clashes: dict[tuple[str, str], str] = {}
        registered = tuple(_without_clashes(loader.components, loader.failures, clashes))
        return cls(registered, tuple(loader.failures), clashes)

    def get(self, kind: str, name: str) -> type[ComponentConfig]:
        """Return the declaration of a component.

        Raises:
            SpecError: it is not registered; the message says what is possible.
            PluginError: two third parties register it; neither can be preferred silently.
        """
        return self._find_component(kind, name).config

    def names(self, kind: str) -> list[str]:
        """Return the registered names of one kind, sorted.

        Raises:
            SpecError: the kind does not exist.
        """
        return sorted(component.name for component in self._components_of_kind(kind))

    def configs(self, kind: str) -> list[type[ComponentConfig]]:
        """Return the declarations of one kind, sorted by name."""
        components = sorted(self._components_of_kind(kind), key=lambda component: component.name)
        return [component.config for component in components]

    def origin(self, kind: str, name: str) -> str:
        """Return who registered a component: distribution and version."""
        return self._find_component(kind, name).origin

    def table(self) -> list[Registered]:
        """Return every component, by kind (in the order of the hooks) and name."""
        kinds = list(KINDS)
        return sorted(self.registered, key=lambda component: (kinds.index(component.kind), component.name))

    def unknown(self, kind: str, name: str) -> str:
        """Describe a name that cannot be used in one line: what is possible, what is likely, what failed."""
        if (kind, name) in self.clashes:
            return self.clashes[kind, name]
        possible = self.names(kind)
        failed = "".join(f"; {failure}" for failure in self.failures)
        return f"no {kind} {name!r}; possible: {one_of(possible)}{did_you_mean(name, possible)}{failed}"

    def _components_of_kind(self, kind: str) -> list[Registered]:
        if kind not in KINDS:
            raise SpecError(f"no kind {kind!r}; possible: {one_of(KINDS)}{did_you_mean(kind, KINDS)}")
        return [component for component in self.registered if component.kind == kind]

    def _find_component(self, kind: str, name: str) -> Registered:
        for component in self._components_of_kind(kind):
            if component.name == name:
                return component
        if (kind, name) in self.clashes:
            raise PluginError(self.clashes[kind, name])
        raise SpecError(self.unknown(kind, name))


class _Loader:
    """A loader of plugins one by one, so that one that fails does not stop the others."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.components: list[Registered] = []
        self.failures: list[Failure] = []

    def load_plugin(self, point: EntryPoint) -> None:
        """Import one plugin, register its hooks and collect its components.

        What it writes to stdout goes to stderr.
        """
        plugin = _plugin_name(point)
        try:
            with guarded_import(None if _distribution_of(point)[0] == BUILT_IN else f"plugin {plugin}"):
                module = point.load()
                self._register_hooks(module, plugin)
                self.components += list(self._declared_components(module, point))
        except BaseException as error:
            if is_request_to_stop(error):
                raise
            self.failures.append(Failure(plugin, _failure_reason(error, point.module)))

    def _register_hooks(self, module: Any, plugin: str) -> None:
        hooks = [name for name in dir(module) if self.manager.parse_hookimpl_opts(module, name) is not None]
        if not hooks:
            raise PluginError(f"no function with @hookimpl; possible: {one_of(KINDS.values())}")
        for hook in hooks:
            if hook not in KINDS.values():
                raise PluginError(f"no hook {hook!r}{did_you_mean(hook, KINDS.values())}")
        self.manager.register(module, name=plugin)

    def _declared_components(self, module: Any, point: EntryPoint) -> Iterator[Registered]:
        distribution, version = _distribution_of(point)
        for kind, hook in KINDS.items():
            for implementation in getattr(self.manager.hook, hook).get_hookimpls():
                if implementation.plugin is not module:
                    continue
                for config in _checked_declarations(kind, hook, implementation.function()):
                    yield Registered(kind, config, distribution, version, point.name, point.module)


def _checked_declarations(kind: str, hook: str, returned: Any) -> Sequence[type[ComponentConfig]]:
    if not isinstance(returned, list | tuple):
        raise PluginError(f"{hook} must return a list of declarations, not {type(returned).__name__}")
    for declaration in returned:
        fault = declaration_fault(kind, declaration)
        if fault:
            raise PluginError(f"{hook}: {fault}")
    return returned


def _without_clashes(
    components: list[Registered], failures: list[Failure], clashes: dict[tuple[str, str], str]
) -> Iterator[Registered]:
    """Yield one owner for each name; names of two third parties have none.

    ``failures`` gain what would shadow a built-in, ``clashes`` what two third parties register.
    """
    owners: dict[tuple[str, str], list[Registered]] = defaultdict(list)
    for component in components:
        owners[component.kind, component.name].append(component)
    for (kind, name), (first, *others) in owners.items():
        told = [f"{kind} {name!r} is registered by {first.origin} and by {other.origin}" for other in others]
        if first.distribution == BUILT_IN:
            for other, clash in zip(others, told, strict=True):
                failures.append(Failure(f"{other.distribution}:{other.entry}", f"{clash}; built-ins stay"))
        elif told:
            clashes[kind, name] = f"{told[0]}; uninstall one or name it in {DISABLED_VARIABLE}"
            continue
        yield first


def _distribution_of(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "0")


def _plugin_name(point: EntryPoint) -> str:
    return f"{_distribution_of(point)[0]}:{point.name}"


def _built_in_first(point: EntryPoint) -> tuple[bool, str]:
    return _distribution_of(point)[0] != BUILT_IN, _plugin_name(point)


def _is_disabled(point: EntryPoint, disabled_names: set[str]) -> bool:
    distribution = _distribution_of(point)[0]
    names = {_canonical_name(distribution), _canonical_name(_plugin_name(point))}
    return bool(names & disabled_names) or ("*" in disabled_names and distribution != BUILT_IN)


def _canonical_name(name: str) -> str:
    """Write a distribution's name without case and with ``-``, ``_``, ``.`` alike (PEP 503)."""
    distribution, colon, entry = name.strip().partition(":")
    return re.sub(r"[-_.]+", "-", distribution).lower() + colon + entry


def _failure_reason(error: BaseException, module: str) -> str:
    """Return one line: the message of kava's own errors, with the type in front of others.

    What is no ``Exception`` also says where it was raised.
    """
    if isinstance(error, PluginError):
        return " ".join(str(error).split()) or "no message"
    where = "" if isinstance(error, Exception) else f" at {failing_frame(error, module.partition('.')[0])}"
    return one_line(error) + where
