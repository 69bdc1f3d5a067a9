"""Results in the formats of labelling and training tools, by supervision's own writers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from .drawing import Annotation, by_region, xyxy
from .inputs import IMAGE_SUFFIXES, tell
from .names import OutputFolder, printable
from .results import Entry

#: What --format takes, and what each writes into the folder of the results.
FORMATS = {"yolo": "data.yaml", "voc": "annotations", "csv": "results.csv"}


def check_formats(formats: Sequence[str]) -> None:
    """Exits with one line if supervision, an optional package, is needed and not there."""
    if not formats:
        return
    try:
        import supervision  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: --format {' '.join(formats)}: the package {error.name} is missing: "
            "pip install regionspot_d2[demo]"
        ) from error


def write_formats(
    formats: Sequence[str], entries: Sequence[Entry], names: Sequence[str], folder: OutputFolder
) -> None:
    """Writes the boxes of all images; those of YOLO and Pascal VOC with the best name of each.

    Args:
        formats: keys of :data:`FORMATS`.
        entries: the results of the images.
        names: the vocabulary; YOLO's class ids are places in it.
        folder: where they belong.

    Raises:
        SystemExit: they cannot be written.
    """
    writers = {"yolo": _write_yolo, "voc": _write_voc, "csv": _write_csv}
    for name in formats:
        try:
            writers[name](entries, [printable(each) for each in names], folder)
        except OSError as error:
            raise SystemExit(f"error: --format {name}: {error}") from error


def _write_yolo(entries: Sequence[Entry], names: list[str], folder: OutputFolder) -> None:
    from supervision.dataset.formats.yolo import detections_to_yolo_annotations, save_data_yaml

    save_data_yaml(str(folder.path / FORMATS["yolo"]), names)
    labels = folder.inside("labels")
    for entry in entries:
        found = _detections(_best(entry))
        lines = detections_to_yolo_annotations(found, (entry["height"], entry["width"]))
        _write(labels, entry, ".txt", "".join(f"{line}\n" for line in lines))


def _write_voc(entries: Sequence[Entry], names: list[str], folder: OutputFolder) -> None:
    from supervision.dataset.formats.pascal_voc import detections_to_pascal_voc

    annotations = folder.inside(FORMATS["voc"])
    for entry in entries:
        file_name = printable(Path(entry["file_name"]).name)
        shape = (entry["height"], entry["width"], 3)
        text = detections_to_pascal_voc(_detections(_best(entry)), names, file_name, shape)
        _write(annotations, entry, ".xml", text)


def _write_csv(entries: Sequence[Entry], names: list[str], folder: OutputFolder) -> None:
    from supervision import CSVSink

    with CSVSink(str(folder.path / FORMATS["csv"])) as sink:
        for entry in entries:
            annotations = entry["annotations"]
            columns = {
                "file_name": printable(entry["file_name"]),
                "class_name": [names[each["category_id"] - 1] for each in annotations],
                "region": [each["region"] for each in annotations],
            }
            sink.append(_detections(annotations), columns)


def _best(entry: Entry) -> list[Annotation]:
    return [region[0] for region in by_region(entry["annotations"])]


def _detections(annotations: Sequence[Annotation]) -> Any:
    from supervision import Detections

    # Only CSVSink writes them, in a column that it always has; -1 is no track, as in supervision.
    tracks = [each.get("track_id", -1) for each in annotations]
    return Detections(
        tracker_id=np.array(tracks, int) if max(tracks, default=-1) > 0 else None,
        xyxy=np.array([xyxy(each) for each in annotations], np.float32).reshape(-1, 4),
        class_id=np.array([each["category_id"] - 1 for each in annotations], int),
        confidence=np.array([each["score"] for each in annotations], np.float32),
    )


def _write(folder: OutputFolder, entry: Entry, ending: str, text: str) -> None:
    """Writes a file that is named after an image, as the tools expect it: a.jpg has a.txt."""
    image = Path(entry["file_name"])
    stem = image.stem if image.suffix.lower() in IMAGE_SUFFIXES else image.name
    [path] = folder.claim_for(image, stem, ending)
    if path.stem != stem:
        name = printable(stem)
        tell(f"{printable(image)}: its boxes are in {path.name}; the name {name} was not free.")
    with write_atomically(path, "w") as file:
        file.write(text)
