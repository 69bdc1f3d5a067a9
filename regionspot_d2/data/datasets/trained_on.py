"""Which photos a head was trained on, as its file notes it, and whether it is evaluated on them.

The note is a dict: "datasets" has their names, "photos" what :func:`photos_of` says of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from .annotations import checked_annotations
from .corrections import KEY_LENGTH

logger = logging.getLogger(__name__)


def trained_on(datasets: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """The note of a head that is trained on registered datasets.

    Args:
        datasets: their names.
        before: the note of the weights that training starts from; {} if there is none.
    """
    photos = _keys(before.get("photos", "")).union(*map(_keys, map(_photos, datasets)))
    names = dict.fromkeys([*before.get("datasets", ()), *datasets])
    return {"datasets": list(names), "photos": "".join(sorted(photos))}


def warn_of_known_photos(note: Mapping[str, Any], dataset: str, photos: str | None = None) -> None:
    """Warns if a head was trained on photos that it is evaluated on.

    Args:
        note: the head's.
        dataset: the dataset, for the message.
        photos: what :func:`photos_of` says of it; by default it is registered.
    """
    keys = _keys(_photos(dataset) if photos is None else photos)
    known = len(keys & _keys(note.get("photos", "")))
    if known:
        what = f"{known} of the {len(keys)} photos of '{dataset}', by their names and sizes"
    elif dataset in note.get("datasets", ()):
        what = f"'{dataset}'"
    else:
        return
    logger.warning(
        f"The head was trained on {what}: the results tell what it remembers, not how it names "
        "other photos."
    )


def _photos(dataset: str) -> str:
    metadata = MetadataCatalog.get(dataset)
    return checked_annotations(dataset).photos if metadata.get("json_file") else ""


def _keys(photos: str) -> set[str]:
    return {photos[i : i + KEY_LENGTH] for i in range(0, len(photos), KEY_LENGTH)}
