"""The command line from outside: what it prints, how it exits, how little it imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kava_core.cli.app import main
from kava_core.errors import SpecError
from kava_core.specfile.sections.rules import RULES
from tests.support.repository import MINIMAL_SPEC, ROOT

HEAVY = ("torch", "transformers", "jaxtyping", "numpy", "beartype", "rich")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in a fresh process, saying which heavy modules it imported."""
    code = f"""
import atexit, sys
atexit.register(lambda: print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
from kava_core.cli.app import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *arguments]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("KAVA_")}
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment)


BROKEN = str(ROOT / "tests" / "specfile" / "broken_specs" / "two_places.yaml")


LIGHT = [
    ["--help"],
    ["check", "--help"],
    ["report", "--help"],
    ["check", BROKEN],
    ["check", "--rules"],
    ["plugins"],
    ["schema"],
    ["env"],
]
LIGHT += [["launch", "--help"], ["status", "--help"], ["profile", "--help"]]


@pytest.mark.parametrize("arguments", LIGHT)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    assert start(*arguments).stderr.splitlines()[-1] == "HEAVY []"


TREE = """\
  Distil the key-value caches of teachers into a student, as a spec file says.

Options:
  --check-shapes  Check every tensor's shape and type at run time (slow).
  --traceback     Show where an error was raised.
  -h, --help      Show this message and exit.

Commands:
  check       Check a spec: syntax, schema, rules, plugins and all shapes.
  train       Train, or go on with, every variant and seed of a spec.
  experiment  Run all variants and seeds; judge what they show.
  report      Write what experiments say: a page, figures, tables.
  launch      Check and submit what is not complete as one SLURM array.
  status      Show how far every run of a spec has come.
  cache       Run the teachers once and store what training needs of them.
  sample      Let a teacher write several rationales for every example.
  plan        Show shapes, parameters, memory and cost of a step.
  calibrate   Measure which layers resemble each other, and draw it.
  profile     Run a batch through every stage of every variant and show...
  export      Write a run's student as a plain transformers folder.
  eval        Let a run's student answer a file of tasks, and count what...
  latents     Show what a run's latent tokens say, and what they resemble.
  plugins     List the installed components and who registered them.
  schema      Print the JSON Schema of specs with what is installed.
  env         Print the versions a run depends on.
  new         Write a new plugin package or spec.
"""


def test_the_tree_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert out.partition("\n\n")[2] == TREE
    assert "completion" not in out


def test_check_says_which_levels_ran(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "check", str(MINIMAL_SPEC), "seeds=[0,1]", "variants={a: {losses: []}, b: {}}"
    )
    assert (code, err) == (0, "")
    levels = {line.split()[0]: line for line in out.splitlines()}
    assert list(levels) == ["syntax", "schema", "rules", "plugins", "shapes"]
    assert levels["schema"] == "schema   ok   variants: a, b; seeds: 0, 1"
    assert "time_warper segment" in levels["plugins"]
    assert "kv_loss relation" in levels["plugins"]


def test_check_prints_the_rules_without_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "--rules")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["RULE", "WHEN", "WHAT", "MUST", "BE", "SO", "THEN"]
    assert [line.split()[0] for line in lines[1:]] == [rule.name for rule in RULES]
    (online_store,) = [line for line in lines if line.startswith("online-store ")]
    assert re.search(r"  `online` is given +`store` is null: texts are new at every step$", online_store)


def test_check_stops_at_the_level_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", str(MINIMAL_SPEC), "train.steps=0")
    assert (code, out) == (2, "syntax   ok   strict YAML\n")
    assert err == "override train.steps=0: train.steps: must be more than 0, not 0\n"


@pytest.mark.parametrize(
    ("implementation", "told"),
    [
        (
            None,
            "component 'acme': cannot import 'acme_loss_impl:Acme': "
            "ModuleNotFoundError: No module named 'acme_loss_impl'",
        ),
        (
            "raise RuntimeError('no\\ndriver')",
            "component 'acme': cannot import 'acme_loss_impl:Acme': RuntimeError: no driver",
        ),
        (
            "import sys; sys.exit(0)",
            "component 'acme': cannot import 'acme_loss_impl:Acme': SystemExit: 0 at acme_loss_impl.py:1",
        ),
        (
            "raise KeyboardInterrupt('mine')",
            "component 'acme': cannot import 'acme_loss_impl:Acme': "
            "KeyboardInterrupt: mine at acme_loss_impl.py:1",
        ),
        (
            "other = 1",
            "component 'acme': cannot import 'acme_loss_impl:Acme': "
            "AttributeError: module 'acme_loss_impl' has no attribute 'Acme'",
        ),
    ],
)
def test_check_imports_implementations(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    implementation: str | None,
    told: str,
) -> None:
    (tmp_path / "acme_loss.py").write_text(
        "from typing import Literal\n"
        "from kava_core import hookimpl\n"
        "from kava_core.config import KVLossConfig\n"
        "class Acme(KVLossConfig):\n"
        "    'A loss.'\n"
        "    name: Literal['acme'] = 'acme'\n"
        "    component = 'acme_loss_impl:Acme'\n"
        "@hookimpl\n"
        "def kava_kv_losses():\n"
        "    return [Acme]\n"
    )
    if implementation is not None:
        (tmp_path / "acme_loss_impl.py").write_text(implementation)
    info = tmp_path / "acme_loss-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-loss\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kava]\nmain = acme_loss\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, err = run(capsys, "check", str(MINIMAL_SPEC), "losses=[acme]")
    for module in ("acme_loss", "acme_loss_impl"):
        sys.modules.pop(module, None)
    assert (code, err) == (3, f"kv_loss 'acme' (acme-loss 1.0): {told}\n")


def test_plugins_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plugins")
    assert code == 0
    (row,) = [line for line in out.splitlines() if line.split()[:2] == ["fuser", "fixed"]]
    assert row.split(maxsplit=4)[2] == "kava"
    assert row.endswith("Give every teacher a constant weight, the same everywhere.")
    listed = json.loads(run(capsys, "plugins", "--format", "json")[1])
    assert listed["failures"] == []
    assert {"fuser", "kv_loss"} <= {one["kind"] for one in listed["components"]}
    assert all(one["doc"] for one in listed["components"])


def test_plugins_shows_failures_and_still_exits_0(tmp_path: Path) -> None:
    (tmp_path / "acme_broken.py").write_text("raise ImportError('no driver')")
    info = tmp_path / "acme_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kava]\nmain = acme_broken\n")
    done = start("plugins", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "plugin acme-broken:main failed: ImportError: no driver"


def test_plugins_with_nothing_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAVA_DISABLE_PLUGINS", "kava,*")
    assert run(capsys, "plugins") == (0, "", "")


def test_schema_to_stdout_and_to_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = run(capsys, "schema")[1]
    assert json.loads(printed)["title"] == "PipelineSpec"
    assert run(capsys, "schema", "--output", str(tmp_path / "schema.json")) == (0, "", "")
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == printed
    code, _, err = run(capsys, "schema", "--output", str(tmp_path / "no" / "schema.json"))
    assert (code, err) == (1, f"{tmp_path}/no/schema.json: cannot be written: No such file or directory\n")


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    rows = dict(line.split(maxsplit=1) for line in run(capsys, "env")[1].splitlines())
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["torch"] == version("torch")
    assert "cuda" not in rows


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAVA_TRACEBACK", "1")
    with pytest.raises(SpecError):
        main(["check", "nope.yaml"])
    monkeypatch.delenv("KAVA_TRACEBACK")
    done = start("--traceback", "check", "nope.yaml")
    assert "Traceback (most recent call last):" in done.stderr
    assert "Traceback" not in start("check", "nope.yaml").stderr


def test_usage_errors_exit_2_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "chek")
    assert code == 2
    assert "Did you mean 'check'" in err
    assert run(capsys, "check")[0] == 2
    assert run(capsys, "check", str(MINIMAL_SPEC), "--stesp=3")[0] == 2


def test_check_shapes_reaches_this_process_and_its_children() -> None:
    code = (
        "import os, sys\n"
        "from kava_core.cli.app import main\n"
        "try:\n"
        "    main(['--check-shapes', 'env'])\n"
        "except SystemExit:\n"
        "    print(os.environ['KAVA_SHAPE_CHECK'], 'jaxtyping' in sys.modules, 'torch' in sys.modules)\n"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("KAVA_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited)
    assert done.stdout.splitlines()[-1] == "1 True False"


def test_check_under_shape_checking() -> None:
    done = start("check", str(MINIMAL_SPEC), KAVA_SHAPE_CHECK="1")
    assert done.returncode == 0, done.stderr
