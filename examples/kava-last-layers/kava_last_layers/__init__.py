"""A kava plugin with one layer mapper. This half is read by ``kava check``: no torch here."""

from typing import Literal

from kava_core import hookimpl
from kava_core.config import ComponentConfig


class LastLayersConfig(ComponentConfig):
    """Student layer i of L reads teacher layer T − L + i of T: the last layers meet."""

    name: Literal["last_layers"] = "last_layers"
    component = "kava_last_layers.mapper:LastLayersMapper"


@hookimpl
def kava_layer_mappers():
    """Register the layer mapper."""
    return [LastLayersConfig]
