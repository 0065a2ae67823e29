"""A plugin whose code was edited: what was made with the old code is told, and not used again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kava_core.build.data import make_data
from kava_core.build.layer_map_files import is_current, measured_from
from kava_core.build.provenance import plugin_code, used_configs
from kava_core.errors import Preempted, SpecError
from kava_core.jobs.cache import write_store
from kava_core.registry import Registry
from kava_core.runs.folder import Folder
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.sections.models import Pretrain
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.pretrain import pretraining_spec
from kava_core.train.run import run
from kava_core.versions import plugin_code_hash
from tests.support import tiny
from tests.support.hook_examples import add_distribution
from tests.support.stops import stop

DECLARATION = """\
from typing import Literal
from kava_core import hookimpl
from kava_plugins.kv_losses import MSEConfig
from kava_plugins.layer_mappers import CkaConfig

class Layers(CkaConfig):
    '''CKA under another name.'''
    name: Literal["acme_cka"] = "acme_cka"
    component = "acme_parts.mapper:Mapper"

class Loss(MSEConfig):
    '''A squared distance.'''
    name: Literal["acme_loss"] = "acme_loss"
    component = "acme_parts.loss:Loss"

@hookimpl
def kava_layer_mappers():
    return [Layers]

@hookimpl
def kava_kv_losses():
    return [Loss]
"""
LOSS = "from kava_plugins.kv_losses.mse import MSE as Loss\n"
MAPPER = "from kava_plugins.layer_mappers.cka import Cka as Mapper\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a plugin's package, installed without a list of files."""
    site = tmp_path / "site"
    folder = site / "acme_parts"
    folder.mkdir(parents=True)
    for name, text in {"__init__": DECLARATION, "loss": LOSS, "mapper": MAPPER}.items():
        (folder / f"{name}.py").write_text(text)
    add_distribution(site, "acme-parts", {"main": "acme_parts"})
    monkeypatch.syspath_prepend(str(site))
    yield folder
    for module in [name for name in sys.modules if name.partition(".")[0] == "acme_parts"]:
        del sys.modules[module]


def spec(output: Path, **changes: Any) -> PipelineSpec:
    """A short run of one teacher, whose loss and layer mapper are the plugin's."""
    teacher = tiny.FIELDS["teachers"][1] | {"align": {"layer_mapper": "acme_cka"}}
    fields = tiny.fields(teachers=[teacher], losses=["acme_loss"], train={"steps": 2}, **changes)
    fields["evaluate"]["generate"] = False
    return bind_spec_model(Registry.build()).model_validate(fields | {"output": str(output)})


def edit(package: Path, name: str = "loss.py") -> None:
    file = package / name
    file.write_text(file.read_text() + "# another text\n")


def test_a_finished_run_is_not_shown_for_an_edited_plugin(package: Path, tmp_path: Path) -> None:
    made = spec(tmp_path)
    result = run(made, variant="main", seed=0)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["plugin_code"] == plugin_code(used_configs(made))
    assert list(record["plugin_code"]) == ["acme-parts"]
    assert run(made, variant="main", seed=0).results == result.results
    edit(package)
    with pytest.raises(SpecError) as told:
        run(made, variant="main", seed=0)
    assert str(told.value) == (
        f"{result.folder}: the code of plugin acme-parts changed since this run began; give the run another "
        "name, or bring the old code back"
    )


def test_a_stopped_run_does_not_go_on_with_an_edited_plugin(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec(tmp_path)
    with monkeypatch.context() as patched:
        stop(patched, 0)
        with pytest.raises(Preempted):
            run(made, variant="main", seed=0)
    before = (package / "loss.py").read_text()
    edit(package)
    with pytest.raises(SpecError, match="the code of plugin acme-parts changed since this run began"):
        run(made, variant="main", seed=0)
    (package / "loss.py").write_text(before)
    assert run(made, variant="main", seed=0).results["steps"] == 2


def test_a_store_of_an_edited_plugin_is_not_read(package: Path, tmp_path: Path) -> None:
    made = spec(tmp_path, store={"folder": str(tmp_path / "stores")})
    assert write_store(made, seed=0) is not None
    edit(package, "mapper.py")
    with pytest.raises(SpecError, match=r"is out of date: code of plugin acme-parts changed; to make a new"):
        run(made, variant="main", seed=0)


def test_a_layer_map_of_an_edited_plugin_is_measured_anew_and_refused_by_name(
    package: Path, tmp_path: Path
) -> None:
    made = spec(tmp_path)
    result = run(made, variant="main", seed=0)
    file = result.folder / "layer_maps" / "gpt.safetensors"
    teacher, data = made.teachers[0], make_data(made)
    mapper = teacher.align.layer_mapper
    assert is_current(file, measured_from(made, teacher, mapper, data, seed=0))
    fields = made.model_dump(mode="json") | {"name": "named"}
    fields["teachers"][0]["align"]["layer_mapper"] = {"name": "acme_cka", "map": str(file)}
    edit(package, "mapper.py")
    assert not is_current(file, measured_from(made, teacher, mapper, data, seed=0))
    named = type(made).model_validate_json(json.dumps(fields))
    with pytest.raises(SpecError) as told:
        run(named, variant="main", seed=0)
    assert str(told.value) == (
        f"teacher 'gpt': layer_mapper.map: {file}: the code of plugin acme-parts changed since it was "
        "measured; measure again with kava calibrate, or leave 'map' out"
    )


@pytest.mark.usefixtures("package")
def test_a_pretrained_model_depends_on_no_plugin(tmp_path: Path) -> None:
    """It is trained by cross-entropy alone, so its key needs none of their code."""
    made = spec(tmp_path)
    teacher = made.teachers[0].model_copy(update={"pretrain": Pretrain(steps=1)})
    plan = type(made).model_validate(
        made.model_dump(mode="json", exclude={"teachers"})
        | {"teachers": [teacher.model_dump(mode="json")], "losses": [], "variants": {}}
    )
    assert used_configs(pretraining_spec(plan, plan.teachers[0])) == []


def test_records_without_code_of_plugins_are_taken(tmp_path: Path) -> None:
    """Those of kava before it hashed plugins."""
    folder = Folder.planned(tiny.spec(tmp_path), "main", 0)
    folder.path.mkdir(parents=True)
    folder.begin({"data": {}})
    folder.check_plugin_code({"acme": "0" * 64})


def test_own_components_are_not_hashed() -> None:
    assert plugin_code(used_configs(tiny.spec())) == {}


# which files count


def test_byte_code_and_hidden_files_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bare"
    for name in ("__init__.py", "table.csv", "__pycache__/a.pyc", ".cache/x.py", "a.py~", "b.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {"bare/__init__.py": "__init__.py", "bare/table.csv": "table.csv"}
    lines = [f"{hashlib.sha256(text.encode()).hexdigest()} {name}\n" for name, text in files.items()]
    assert plugin_code_hash(None, ["bare.deep"]) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("namespace", [False, True])
def test_a_module_alone_and_one_in_a_shared_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: bool
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    place = tmp_path / "shared_space" if namespace else tmp_path
    place.mkdir(exist_ok=True)
    (place / "only_one.py").write_text("1")
    (place / "of_others.py").write_text("2")
    module = "shared_space.only_one" if namespace else "only_one"
    line = f"{hashlib.sha256(b'1').hexdigest()} {module.replace('.', '/')}.py\n"
    assert plugin_code_hash(None, [module]) == hashlib.sha256(line.encode()).hexdigest()


class Recorded:
    """A distribution with a list of files."""

    def __init__(self, site: Path, files: list[str], origin: dict[str, Any] | None = None) -> None:
        from importlib.metadata import PathDistribution

        info = site / "x-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1\n")
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
        self.distribution = PathDistribution(info)


def test_the_recorded_files_count_wherever_they_are(tmp_path: Path) -> None:
    """Also those of a helper package without an entry point, which no module names."""
    (tmp_path / "helper").mkdir()
    (tmp_path / "helper" / "inner.py").write_text("1")
    made = Recorded(tmp_path, ["helper/inner.py", "x-1.dist-info/METADATA", "../../bin/x", "gone.py"])
    before = plugin_code_hash(made.distribution, [])
    line = f"{hashlib.sha256(b'1').hexdigest()} helper/inner.py\n"
    assert before == hashlib.sha256(line.encode()).hexdigest()


def test_an_editable_install_counts_all_packages_of_its_source_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "project" / "src"
    for name in ("edited_one/__init__.py", "edited_helper/__init__.py"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("1")
    (tmp_path / "project" / "notes.py").write_text("not installed")
    monkeypatch.syspath_prepend(str(source))
    origin = {"url": (tmp_path / "project").as_uri(), "dir_info": {"editable": True}}
    made = Recorded(tmp_path / "site", ["_edited_one.pth"], origin)
    (tmp_path / "site" / "_edited_one.pth").write_text(str(source))
    one = hashlib.sha256(b"1").hexdigest()
    text = f"{one} edited_helper/__init__.py\n{one} edited_one/__init__.py\n"
    assert plugin_code_hash(made.distribution, ["edited_one"]) == hashlib.sha256(text.encode()).hexdigest()
