"""What the command line says of errors raised inside components."""

from kava_core.cli.app import explain_error
from kava_core.errors import CheckpointError, NonFiniteError, PluginError


def noted(error: Exception, *notes: str) -> Exception:
    for note in notes:
        error.add_note(note)
    return error


def test_own_errors_stay_what_they_are() -> None:
    error = CheckpointError("folder: altered")
    assert explain_error(error) is error


def test_own_errors_raised_in_a_component_name_it() -> None:
    known = explain_error(noted(NonFiniteError("keys hold NaN"), "in kv_loss 'mse' (kava 0.1.0)"))
    assert isinstance(known, NonFiniteError)
    assert str(known) == "kv_loss 'mse' (kava 0.1.0): keys hold NaN"


def test_foreign_errors_raised_in_a_component_are_the_plugins() -> None:
    said = "Type-check error.\nActual value: f32[2]\nExpected type: Float[Tensor, '3'].\nmore"
    known = explain_error(noted(TypeError(said), "in layer_mapper 'x' (acme 2), teacher 'a'", "in outer"))
    assert isinstance(known, PluginError)
    assert str(known) == (
        "layer_mapper 'x' (acme 2), teacher 'a': TypeError: Type-check error. Actual value: f32[2] "
        "Expected type: Float[Tensor, '3']. (--traceback shows where)"
    )


def test_bugs_keep_their_traceback() -> None:
    assert explain_error(ValueError("a bug in kava")) is None
