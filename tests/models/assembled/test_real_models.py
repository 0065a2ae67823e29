"""The two real pretrained models, where ``KAVA_REAL_MODELS`` names them: files, cuts and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_core.data.examples import render_example
from kava_core.data.splits import load_splits
from kava_core.data.tokenizers import load_tokenizer
from kava_core.jobs.export import export_student
from kava_core.models.assembled.cut_config import layer_list
from kava_core.models.config import model_config
from kava_core.models.load import load_model
from kava_core.specfile.sections.models import ModelSpec
from kava_core.train.run import run
from tests.support import tiny
from tests.support.files.real_models import real_gguf, real_model

TEXT = "The capital of France is Paris. 12 + 30 = 42, and the capital of Germany is"


def load(path: Path, **fields: Any) -> Any:
    spec = ModelSpec(path=str(path), **fields)
    return load_model(spec, load_tokenizer(spec), seed=0, where="student").eval()


def token_ids(path: Path) -> Tensor:
    ids: Tensor = load_tokenizer(ModelSpec(path=str(path)))(TEXT, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def logits_of_layers(model: Any, kept: tuple[int, ...], ids: Tensor) -> Tensor:
    """Run the whole model and hand on what every other layer was given."""

    def pass_over(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    found = layer_list(model, model.config.num_hidden_layers)
    assert found is not None
    for index, layer in enumerate(found[1]):
        if index not in kept:
            layer.register_forward_hook(pass_over, with_kwargs=True)
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


@pytest.mark.slow
def test_the_gguf_file_is_the_folder_made_of_it() -> None:
    file, folder = real_gguf("smollm2-135m"), real_model("smollm2-135m")
    ids = token_ids(file)
    assert torch.equal(ids, token_ids(folder))
    from_file = load(file)
    with torch.no_grad():
        assert torch.equal(from_file(ids).logits, load(folder)(ids).logits)
        written = from_file.generate(ids, max_new_tokens=2, do_sample=False)
    assert "Berlin" in load_tokenizer(str(folder)).decode(written[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kept"), [("smollm2-135m", (0, 1, 7, 20, 29)), ("gemma3-270m", (0, 4, 5, 11, 12, 17))]
)
def test_a_cut_model_passes_over_the_other_layers(name: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    """Gemma's full attention is in layers 5, 11 and 17, with another RoPE base than the others."""
    folder = real_model(name)
    ids = token_ids(folder)
    cut = load(folder, keep_layers=kept)
    expected = logits_of_layers(load(folder), kept, ids)
    with torch.no_grad():
        torch.testing.assert_close(cut(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        cut.save_pretrained(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_gemmas_windows_are_cut_with_its_layers() -> None:
    folder = real_model("gemma3-270m")
    spec = ModelSpec(path=str(folder), keep_layers=(0, 5, 6, 17))
    sliding, full = "sliding_attention", "full_attention"
    assert model_config(spec, where="student").layer_types == [sliding, full, sliding, full]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_the_exported_student_has_the_reported_loss(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed by transformers alone, token by token, on the validation examples."""
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    path = real_model("smollm2-135m") if source == "folder" else real_gguf("smollm2-135m")
    fields = tiny.fields(train={"steps": 1, "batch_size": 2, "calibration_examples": 2})
    fields |= {
        "student": {"path": str(path), "keep_layers": "influence:4"},
        "teachers": [{"name": "whole", "path": str(path), "align": {"layer_mapper": "ratio"}}],
        "losses": [{"name": "mse", "weight": 0.1}],
        "evaluate": {"every": 1, "examples": 4, "generate": False},
        "output": str(tmp_path / "runs"),
    }
    made = type(tiny.spec()).model_validate(fields)
    result = run(made, variant="main", seed=0)
    export_student(result.folder, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    losses = []
    for example in load_splits(made.data, root=Path.cwd()).validation[:4]:
        text = render_example(example, made.data.template)
        begin = len(tokenizer(text.prompt_part.text)["input_ids"])
        ids = torch.tensor([[*tokenizer(text.text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].log_softmax(-1)
        losses += [-log_probabilities[t - 1, ids[0, t]].item() for t in range(begin, ids.shape[1])]
    assert sum(losses) / len(losses) == pytest.approx(result.results["ce"], rel=1e-5)
