"""Files of --examples: a folder for each name, a COCO json, or what Exemplars.save wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import sha256_of_file
from ..safe_loading import read_json
from .inputs import images_below, plain_name, tell
from .names import one_line
from .own_outputs import OwnOutputs
from .region_formats import is_coco, read_coco, shown

_EXPECTED = (
    "a folder with a folder of images for each name, a COCO json, or a .safetensors file of "
    "Exemplars.save is expected."
)
# Of one image, by class name: XYXY, pixels of it; None stands for the whole image.
_Boxes = dict[str, list[list[float]] | None]


@dataclass
class Examples:
    """What --examples names, before a model sees it.

    Attributes:
        source: what the command line gives.
        files: all that is read; no output may replace one.
        names: in the order of the vocabulary; empty for a .safetensors file, which has its own.
        regions: the examples, by image.
    """

    source: str
    files: list[Path]
    names: list[str] = field(default_factory=list)
    regions: dict[Path, _Boxes] = field(default_factory=dict)

    def digest(self) -> str:
        """Changes with the content of the files, and with the name that each image shows."""
        rows: list[Any] = [sha256_of_file(path) for path in self.files]
        rows += [self.names, list(self.regions.values())]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def find_examples(source: str) -> Examples:
    """Finds the examples, or exits with one line that says what is wrong with them."""
    try:
        path = Path(source)
        if path.is_dir():
            found = _of_folder(path)
        elif not path.is_file():
            raise ValueError(f"there is no such file or folder; {_EXPECTED}")
        elif path.suffix.lower() == ".safetensors":
            return Examples(source, [path])
        elif path.suffix.lower() == ".json":
            found = _of_coco(path)
        else:
            raise ValueError(f"it is no folder, json or .safetensors file; {_EXPECTED}")
        check_names_apart(found.names)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --examples {source}: {error}") from error
    return found


def _of_folder(folder: Path) -> Examples:
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    names = [path.name for path in inside if path.is_dir()]
    images = images_below(str(folder), f"--examples {folder}", OwnOutputs())
    images = [path for path in images if not path.name.startswith(".")]
    shown_by = {path: path.relative_to(folder).parts[0] for path in images}
    for path in images:
        if path.parent == folder:
            raise ValueError(f"the image '{path.name}' is in no folder of a name; {_EXPECTED}")
    if not names:
        raise ValueError(f"there are no folders in it; {_EXPECTED}")
    for name in names:
        if name not in shown_by.values():
            raise ValueError(f"the folder '{name}' has no image; at least one is expected.")
    return Examples(str(folder), images, names, {path: {shown_by[path]: None} for path in images})


def _of_coco(file: Path) -> Examples:
    content = read_json(str(file))
    known = isinstance(content, dict) and is_coco(content)
    if not known or not isinstance(content.get("categories"), list):
        raise ValueError(f"it has no lists images, annotations and categories; {_EXPECTED}")
    read_coco(content)  # what is wrong with an image or a box is told
    names = _categories(content)
    places = {image["id"]: image["file_name"] for image in content["images"]}
    paths: dict[str, Path] = {}
    found = Examples(str(file), [file])
    for i, annotation in enumerate(content["annotations"]):
        if annotation.get("iscrowd"):
            continue
        category = annotation.get("category_id")
        if type(category) not in (int, str) or category not in names:
            raise ValueError(
                f"annotation {i} (counted from 0) has the category_id {shown(category)}; that of "
                "one of the categories is expected."
            )
        image = places[annotation["image_id"]]
        path = paths[image] = paths.get(image) or _image_beside(file, image)
        x, y, width, height = annotation["bbox"]
        boxes = found.regions.setdefault(path, {}).setdefault(names[category], [])
        assert boxes is not None
        boxes.append([x, y, x + width, y + height])
    found.files += found.regions
    seen = {name for boxes in found.regions.values() for name in boxes}
    found.names = [name for name in names.values() if name in seen]
    if not seen:
        raise ValueError("it has no annotation that is no crowd; boxes of examples are expected.")
    if without := [name for name in names.values() if name not in seen]:
        tell(
            one_line(
                f"--examples {file}: {len(without)} of {len(names)} categories have no box and are "
                f"left out, such as '{without[0]}'."
            )
        )
    return found


def _categories(content: Mapping[str, Any]) -> dict[int | str, str]:
    """The names of categories, by their ids."""
    names: dict[int | str, str] = {}
    for i, category in enumerate(content["categories"]):
        fits = isinstance(category, dict) and type(category.get("id")) in (int, str)
        if not fits or not isinstance(category.get("name"), str) or not category["name"].strip():
            raise ValueError(f"category {i} (counted from 0) has no id or no name.")
        names[category["id"]] = category["name"]
    return names


def _image_beside(file: Path, name: str) -> Path:
    """An image by its path, beside the json or in the folder images beside it."""
    for path in (file.parent / name, file.parent / "images" / name):
        if path.is_file():
            return path
    raise ValueError(f"the image {shown(name)} is neither beside it nor in images/ beside it.")


def check_names_apart(names: list[str]) -> None:
    """Checks that no two are spellings of one name; ValueError if not."""
    seen: dict[str, str] = {}
    for name in names:
        if (plain := plain_name(name)) in seen:
            raise ValueError(f"'{seen[plain]}' and '{name}' are one name; rename or join them.")
        seen[plain] = name
