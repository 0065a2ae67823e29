"""benchmarks/latent.py at a tiny size: what it times is what it says. Times themselves are not asserted."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest
import torch

from tests.support.repository import ROOT

TINY: dict[str, Any] = {"student": (32, 2, 4, 2), "teachers": [(48, 3, 4, 2)], "batch": 2, "time": 0}


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with one size more."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("latent")
    monkeypatch.setitem(module.SIZES, "tiny", TINY)
    return module


@pytest.mark.parametrize(("count", "passes"), [(5, 2), (3, 3), (4, 0), (1, 1)])
def test_reading_again_takes_the_same_step(latent: Any, count: int, passes: int) -> None:
    """Loss and every gradient."""
    forms = (latent.PLAIN, latent.AGAIN)
    kept, again = (latent.latent_step(form, TINY, count, passes, "cpu") for form in forms)
    torch.testing.assert_close(kept.loss(), again.loss())
    for a, b in zip(gradients(kept), gradients(again), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def gradients(step: Any) -> tuple[torch.Tensor | None, ...]:
    return torch.autograd.grad(step.loss(), list(step.distiller.parameters()), allow_unused=True)


def test_every_step_has_its_terms_and_passes(latent: Any) -> None:
    """The student's passes: 1 over written steps; T + 1 with latent tokens; as its own teacher one more."""
    steps = latent.make_steps(TINY, 5, 2, "cpu")
    passes = {form: latent.counted(step.distiller.student, step)[0] for form, step in steps.items()}
    three = dict.fromkeys((latent.PLAIN, latent.AGAIN, latent.FROZEN), 3)
    assert passes == {latent.COT: 1, latent.ITSELF: 4, **three}
    terms = {form: set(found_in(step)) - {"loss", "ce"} for form, step in steps.items()}
    assert not terms[latent.COT] | terms[latent.PLAIN] | terms[latent.AGAIN]
    assert len(terms[latent.FROZEN]) == 1
    assert terms[latent.ITSELF] == terms[latent.FROZEN] | {"codi", "reading_ce"}


def found_in(step: Any) -> dict[str, torch.Tensor]:
    found = step.distiller(step.batch["student"], step.batch["teachers"], step.items)
    assert all(torch.isfinite(value) for value in found.values())
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_have_their_length_and_passes(latent: Any, batch: int) -> None:
    """One pass for every written token, and T for the latent ones."""
    model, forms = latent.make_answers(TINY, batch, 5, 2, "cpu")
    assert forms[latent.COT]().shape == (batch, 69)
    assert forms["latent"]().shape == (batch, 4)
    assert latent.counted(model, forms[latent.COT])[0] == 69
    assert latent.counted(model, forms["latent"])[0] == 2 + 4


def test_the_tables_have_as_many_cells_as_columns(latent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(latent.LATENTS, "2x1", (2, 1))
    options = argparse.Namespace(rounds=2, device="cpu")
    rows = latent.step_rows("tiny", "2x1", options)
    assert len(rows) == len(latent.FORMS)
    for part, row in (("step", rows[0]), ("answer", latent.answer_row("tiny", "2x1", 1, options))):
        assert row.count("|") == len(latent.HEADS[part].split(", ")) + 1
