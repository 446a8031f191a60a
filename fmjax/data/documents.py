"""The records of a split, in their order."""

from collections.abc import Mapping
from typing import Any

from fmjax import data
from fmjax.data import sources


def documents_of(settings: Mapping[str, Any]) -> list[sources.Document]:
    """The records of the training split in their order, where none is left out."""
    read = data.settings.read(data.settings.DataSettings, settings, "data")
    return [d for d in sources.read(read, print).documents() if d.split == "train"]
