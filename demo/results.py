"""What a run has found, written down image by image, so that a run that was stopped can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as mask_api

# Of one image: "file_name", "height", "width", and "annotations" in COCO format, still without ids.
Entry = dict[str, Any]


def to_entry(file_name: str, found: Instances) -> Entry:
    """The results of one image; "region" of an annotation is the place of its region among those asked."""
    height, width = found.image_size
    found = found.to("cpu")
    annotations = instances_to_coco_json(found, 0)
    for annotation, region in zip(annotations, found.region_index.tolist()):
        annotation["region"] = region
        annotation["category_id"] += 1
        annotation["iscrowd"] = 0
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if "segmentation" in annotation:
            annotation["area"] = int(mask_api.area(annotation["segmentation"]))
    return {"file_name": file_name, "height": height, "width": width, "annotations": annotations}


def to_coco(entries: Sequence[Entry], names: Sequence[str]) -> dict[str, Any]:
    """A COCO data set with scores."""
    images, annotations = [], []
    for image_id, entry in enumerate(entries, start=1):
        image = {key: entry[key] for key in ("file_name", "height", "width")}
        images.append({"id": image_id, **image})
        for annotation in entry["annotations"]:
            numbers = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**annotation, **numbers})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


class Record:
    """A file with the settings of a run, and then a line for each image that is finished."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            path: the file.
            settings: what decides over the results, by the option's name.
            resume: whether to go on with an existing file, instead of beginning anew.

        Raises:
            SystemExit: if the file was begun with other settings.
        """
        self.entries: dict[str, Entry] = {}
        lines = _whole_lines(path) if resume and path.exists() else []
        if lines:
            begun = json.loads(lines[0])
            now = json.loads(json.dumps(settings))
            other = [option for option in now if begun.get(option) != now[option]]
            if other:
                raise SystemExit(
                    f"error: --resume: {path} was begun with another {', '.join(other)}. Go on with the same, or "
                    "leave out --resume to begin anew."
                )
            self.entries = {entry["file_name"]: entry for entry in map(json.loads, lines[1:])}
        self._file = path.open("a" if lines else "w", encoding="utf-8")
        if not lines:
            self._write(settings)

    def add(self, entry: Entry) -> None:
        """Notes that an image is finished."""
        self.entries[entry["file_name"]] = entry
        self._write(entry)

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file; one that a killed run left unfinished is cut off."""
    with path.open("r+b") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return whole.decode("utf-8").splitlines()


class OtherResults:
    """Results of another run of the demo, to be drawn beside ours."""

    def __init__(self, file: str) -> None:
        """
        Args:
            file: a json as the demo writes it.

        Raises:
            SystemExit: if it cannot be read as that.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            images = {image["id"]: image["file_name"] for image in content["images"]}
            self.names = {c["id"]: c["name"] for c in content["categories"]}
            self._annotations: dict[str, list[dict[str, Any]]] = {n: [] for n in images.values()}
            for annotation in content["annotations"]:
                self._annotations[images[annotation["image_id"]]].append(annotation)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: --compare {file}: {error}") from error
        except (KeyError, TypeError) as error:
            raise SystemExit(
                f"error: --compare {file}: results.json of another run of the demo is expected, with images, "
                "categories and annotations."
            ) from error
        self._by_name = {Path(name).name: name for name in self._annotations}

    def of(self, file_name: str) -> list[dict[str, Any]] | None:
        """The annotations of an image, by its path or else by its name; None if it is not there."""
        known = file_name if file_name in self._annotations else None
        return self._annotations.get(known or self._by_name.get(Path(file_name).name, ""))
