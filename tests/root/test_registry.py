"""The registry: plugins that behave, and plugins that fail in every way we could think of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from textwrap import dedent
from typing import Literal

import pytest

from kava_core import processes
from kava_core.config import KVLossConfig
from kava_core.declarations import declaration_fault
from kava_core.errors import PluginError, SpecError
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry

Install = Callable[..., None]

GOOD = """
    from typing import Literal
    from kava_core import hookimpl
    from kava_core.config import ComponentConfig, KVLossConfig

    class Ours(ComponentConfig):
        '''Ours: the first line.

        And more.
        '''
        name: Literal["ours"] = "ours"
        component = "acme_maps.impl:Ours"

    @hookimpl
    def kava_layer_mappers():
        return [Ours]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with one module and one entry point on the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def put(distribution: str, source: str, *, entry: str = "main", version: str = "1.2") -> None:
        module = distribution.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(dedent(source))
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[kava]\n{entry} = {module}\n")

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def only_failure(registry: Registry) -> str:
    """The text of the one failure there must be, while the built-ins are all there."""
    assert "fixed" in registry.names("fuser")
    (failure,) = registry.failures
    return str(failure)


def test_built_ins_come_by_entry_point() -> None:
    registry = Registry.build()
    assert registry.failures == ()
    assert registry.names("layer_mapper") == ["chosen", "cka", "last_aligned", "learned", "ratio"]
    assert registry.names("head_adapter") == ["flat", "structured"]
    assert registry.names("time_warper") == [
        *("char_iou", "crop", "identity", "linear", "pad"),
        *("random", "rkv", "segment", "streaming", "uniform"),
    ]
    assert registry.names("dim_projector") == ["calibrated", "elastic", "identity", "linear"]
    assert {"mercator", "mse", "relation", "smooth_l1"} <= set(registry.names("kv_loss"))
    assert registry.origin("fuser", "fixed").startswith("kava ")


def test_third_party_component(install: Install) -> None:
    install("acme-maps", GOOD)
    registry = Registry.build()
    assert "ours" in registry.names("layer_mapper")
    assert registry.get("layer_mapper", "ours").__name__ == "Ours"
    assert registry.origin("layer_mapper", "ours") == "acme-maps 1.2"
    (row,) = [one for one in registry.table() if one.name == "ours"]
    assert (row.kind, row.entry, row.doc) == ("layer_mapper", "main", "Ours: the first line.")


def test_table_is_ordered_by_hook_and_name() -> None:
    rows = [(row.kind, row.name) for row in Registry.build().table()]
    assert rows[:3] == [("head_adapter", "flat"), ("head_adapter", "structured"), ("time_warper", "char_iou")]
    kinds = list(dict.fromkeys(kind for kind, _ in rows))
    assert kinds == list(KINDS)
    assert rows == sorted(rows, key=lambda row: (kinds.index(row[0]), row[1]))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit(3)", "SystemExit: 3 at acme_bad.py:1"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 at acme_bad.py:2"),
        ("\nraise KeyboardInterrupt", "KeyboardInterrupt: no message at acme_bad.py:2"),
        ("class Odd(BaseException): ...\nraise Odd('x')", "Odd: x at acme_bad.py:2"),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("def broken(:", "SyntaxError: invalid syntax (acme_bad.py, line 1)"),
        (
            "x = 1",
            "no function with @hookimpl; possible: kava_dim_projectors, kava_fusers, kava_head_adapters, "
            "kava_kv_losses, kava_layer_mappers, kava_time_warpers",
        ),
        (
            GOOD.replace("kava_layer_mappers", "kava_layer_maps"),
            "no hook 'kava_layer_maps'; did you mean 'kava_layer_mappers'?",
        ),
        (
            GOOD.replace("[Ours]", "Ours"),
            "kava_layer_mappers must return a list of declarations, not ModelMetaclass",
        ),
        (
            GOOD.replace("[Ours]", "[int]"),
            "kava_layer_mappers: <class 'int'> is not a subclass of ComponentConfig",
        ),
        (
            GOOD.replace("kava_layer_mappers", "kava_kv_losses"),
            "kava_kv_losses: <class 'acme_bad.Ours'> is not a subclass of KVLossConfig",
        ),
        (
            GOOD.replace('Literal["ours"] = "ours"', 'str = "ours"'),
            "kava_layer_mappers: class Ours needs a field like name: Literal['my_name'] = 'my_name' "
            "(lower case, digits, _)",
        ),
        (
            GOOD.replace('"ours"', '"Ours!"'),
            "kava_layer_mappers: class Ours needs a field like name: Literal['my_name'] = 'my_name' "
            "(lower case, digits, _)",
        ),
        (
            GOOD.replace("acme_maps.impl:Ours", "acme_maps.impl.Ours"),
            "kava_layer_mappers: class Ours needs component = 'package.module:Class', "
            "not 'acme_maps.impl.Ours'",
        ),
        (
            GOOD.replace("'''", '"""')
            .replace('"""Ours: the first line.', '"""'.ljust(3))
            .replace("And more.", ""),
            "kava_layer_mappers: class Ours needs a docstring; it is shown by 'kava plugins'",
        ),
        (GOOD.replace("return [Ours]", "return 1 / 0"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_fails_is_remembered_and_the_others_work(
    install: Install, source: str, reason: str
) -> None:
    install("acme-bad", source)
    assert only_failure(Registry.build()) == f"plugin acme-bad:main failed: {reason}"


def test_wrong_hook_signature(install: Install) -> None:
    install("acme-bad", GOOD.replace("kava_layer_mappers()", "kava_layer_mappers(teacher)"))
    told = only_failure(Registry.build())
    assert told.startswith("plugin acme-bad:main failed: PluginValidationError: ")
    assert "teacher" in told
    assert "\n" not in told


def test_failures_are_quoted_when_a_name_is_unknown(install: Install) -> None:
    install("acme-bad", "raise ImportError('no CUDA')")
    with pytest.raises(SpecError) as caught:
        Registry.build().get("layer_mapper", "ratoi")
    assert str(caught.value) == (
        "no layer_mapper 'ratoi'; possible: chosen, cka, last_aligned, learned, ratio; "
        "did you mean 'ratio'?; plugin acme-bad:main failed: ImportError: no CUDA"
    )


def test_unknown_kind() -> None:
    with pytest.raises(SpecError) as caught:
        Registry.build().names("layer_maper")
    assert str(caught.value) == (
        "no kind 'layer_maper'; "
        "possible: dim_projector, fuser, head_adapter, kv_loss, layer_mapper, time_warper; "
        "did you mean 'layer_mapper'?"
    )


def test_a_name_of_two_third_parties_fails_only_where_it_is_used(install: Install) -> None:
    install("acme-maps", GOOD)
    install("zeta-maps", GOOD, version="3")
    registry = Registry.build()
    clash = (
        "layer_mapper 'ours' is registered by acme-maps 1.2 and by zeta-maps 3; "
        "uninstall one or name it in KAVA_DISABLE_PLUGINS"
    )
    with pytest.raises(PluginError) as caught:
        registry.get("layer_mapper", "ours")
    assert str(caught.value) == clash
    assert registry.clashes == {("layer_mapper", "ours"): clash}
    assert registry.names("layer_mapper") == ["chosen", "cka", "last_aligned", "learned", "ratio"]
    assert Registry.build(disabled=["zeta_maps"]).origin("layer_mapper", "ours") == "acme-maps 1.2"


def test_ctrl_c_during_an_import_stops_kava(install: Install) -> None:
    install("acme-slow", "import signal\nsignal.raise_signal(signal.SIGINT)\n")
    with pytest.raises(KeyboardInterrupt):
        Registry.build()


def test_two_distributions_with_one_entry_name(install: Install) -> None:
    install("acme-maps", GOOD, entry="layer_mappers")
    install("zeta-maps", GOOD.replace('"ours"', '"theirs"'), entry="layer_mappers")
    assert {"ours", "theirs"} <= set(Registry.build().names("layer_mapper"))


def test_built_ins_cannot_be_shadowed(install: Install) -> None:
    install("aaa-first", GOOD.replace('"ours"', '"ratio"'))
    registry = Registry.build()
    version = registry.origin("layer_mapper", "ratio").removeprefix("kava ")
    assert registry.get("layer_mapper", "ratio").__module__ == "kava_plugins.layer_mappers"
    assert only_failure(registry) == (
        "plugin aaa-first:main failed: "
        f"layer_mapper 'ratio' is registered by kava {version} and by aaa-first 1.2; built-ins stay"
    )


def test_what_a_plugin_writes_goes_to_stderr(install: Install, capfd: pytest.CaptureFixture[str]) -> None:
    """By print, to the descriptor itself, and from another process."""
    loud = "import os\nprint('one')\nos.write(1, b'two\\n')\nos.system('echo three')\n"
    install("acme-loud", loud + dedent(GOOD))
    assert "ours" in Registry.build().names("layer_mapper")
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "after\n"
    assert {"one", "two", "three"} <= set(captured.err.split())


def test_a_plugin_that_takes_long_is_named(
    install: Install, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SLOW_IMPORT_SECONDS", 0.05)
    install("acme-slow", "import time\ntime.sleep(0.3)\n" + dedent(GOOD))
    assert "ours" in Registry.build().names("layer_mapper")
    told = capfd.readouterr().err
    assert told == "plugin acme-slow:main: its import has taken 0.05 s and goes on; Ctrl-C stops kava\n"


@pytest.mark.parametrize("disabled", ["acme-maps", "Acme_Maps", "acme.maps:main", "*", "other, acme-maps"])
def test_disabled_by_environment(install: Install, monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    install("acme-maps", "raise ValueError")
    monkeypatch.setenv("KAVA_DISABLE_PLUGINS", disabled)
    registry = Registry.build()
    assert registry.failures == ()
    assert registry.names("layer_mapper") == ["chosen", "cka", "last_aligned", "learned", "ratio"]
    assert "acme_maps" not in sys.modules


def test_another_entry_of_a_distribution_stays_enabled(install: Install) -> None:
    install("acme-maps", GOOD)
    assert "ours" in Registry.build(disabled=["acme-maps:other"]).names("layer_mapper")


def test_without_built_ins_every_kind_is_empty() -> None:
    registry = Registry.build(disabled=["kava"])
    assert registry.table() == []


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Registry.build().failures = ()  # type: ignore[misc]


@pytest.mark.parametrize("name", ["ce", "loss", "perplexity"])
def test_a_loss_cannot_take_the_name_of_a_metric(name: str) -> None:
    class Named(KVLossConfig):
        """A loss."""

        name: Literal["x"] = "x"
        component = "acme:Acme"

    Named.model_fields["name"].default = name
    Named.model_fields["name"].annotation = Literal[name]
    told = declaration_fault("kv_loss", Named)
    assert told == f"class Named: {name!r} is the name of a metric; choose another name"
