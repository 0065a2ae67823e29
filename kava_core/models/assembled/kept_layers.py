"""Say which layers of a model are kept, from what the spec asks and how many it has."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.errors import SpecError
from kava_core.specfile.sections.models import KeepLayers

EVEN, INFLUENCE = "even", "influence"


def kept_layers(asked: KeepLayers, depth: int, *, where: str) -> tuple[int, ...]:
    """Return the numbers of the kept layers, ascending from 0.

    For ``influence:n``, which takes a measurement, these are the first n: enough where only the number of
    layers counts.

    Args:
        asked: the spec's ``keep_layers``.
        depth: number of layers of the whole model.
        where: how errors name the section.

    Raises:
        SpecError: the model has no such layers.
    """
    if not isinstance(asked, str):
        if asked[-1] >= depth:
            raise SpecError(
                f"{where}: keep_layers: no layer {asked[-1]}: the model has layers 0 to {depth - 1}"
            )
        return tuple(asked)
    rule, count = layer_rule(asked)
    if count > depth:
        raise SpecError(f"{where}: keep_layers: {asked}: the model has only {depth} layers")
    return even_layers(count, depth) if rule == EVEN else tuple(range(count))


def layer_rule(asked: str) -> tuple[str, int]:
    """Return the rule's name and the number of layers that ``keep_layers`` gives as a text."""
    rule, _, count = asked.partition(":")
    return rule, int(count)


def is_measured(asked: KeepLayers | None) -> bool:
    """Return whether the kept layers take a measurement of the model on texts."""
    return isinstance(asked, str) and layer_rule(asked)[0] == INFLUENCE


def even_layers(count: int, depth: int) -> tuple[int, ...]:
    """Return ``count`` layers at equal distances, the first and the last among them; a half is rounded up.

    Args:
        count: number of kept layers, at least 2.
        depth: number of layers of the whole model.
    """
    gaps = count - 1
    return tuple((2 * index * (depth - 1) + gaps) // (2 * gaps) for index in range(count))


def most_influential(influence: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the ``count`` layers of the largest influence, ascending; of equal ones the earlier.

    Args:
        influence: of every layer of the whole model.
        count: number of kept layers.
    """
    by_influence = sorted(range(len(influence)), key=lambda layer: (-influence[layer], layer))
    return tuple(sorted(by_influence[:count]))
