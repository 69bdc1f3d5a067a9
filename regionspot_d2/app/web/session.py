"""What a visitor of the web page has: a photo, regions on it, and the last answer.

Nothing here knows of the page; :mod:`~regionspot_d2.app.web.page` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_api

from ...data.images import ImageReadError, read_image
from ...modeling import RegionSpot
from ...modeling.vocabulary import clean_name
from ...predictor import RegionSpotPredictor
from ..drawing import Annotation, draw_attention, draw_regions, xyxy
from ..names import printable
from ..results import Entry, to_coco, to_entry
from ..run import MAX_GROUPED, MAX_MASKS
from .inputs import MAX_REGIONS, Box

#: Names that are shown of the selected region.
TOP = 5
# The longer side of the pictures that are drawn; a browser shows no more of a large photo.
_PICTURE_SIDE = 1600

Point = tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """The names of some regions of a photo.

    Attributes:
        entry: the best name of each region, as results of an image.
        names: class names by category id.
        tops: per region, by its number, its best names with their scores.
        note: what the visitor should know besides.
        attention: finds where the head looks for each region, (R, rows, columns).
    """

    entry: Entry
    names: dict[int, str]
    tops: dict[int, dict[str, float]]
    note: str
    attention: Callable[[], np.ndarray]

    @property
    def annotations(self) -> list[Annotation]:
        return self.entry["annotations"]

    def rows(self) -> list[list[Any]]:
        """For a table: number, name, score and box of each region."""
        return [
            [
                each["region"],
                printable(clean_name(self.names[each["category_id"]])),
                round(each["score"], 3),
                ", ".join(f"{value:.0f}" for value in xyxy(each)),
            ]
            for each in self.annotations
        ]

    def coco(self) -> dict[str, Any]:
        """The best name of each region as a dataset in COCO format."""
        return to_coco([self.entry], list(self.names.values()))


class Session:
    """A visitor's photo, regions and last answer. The model is shared by all visitors.

    Attributes:
        predictor: holds the photo as the encoders see it; another vocabulary is a lookup.
        boxes: that are drawn, XYXY, pixels of the photo.
        points: that were clicked, pixels of the photo; each is a region.
        answer: to the last question; None before the first.
        photo: (H, W, 3), uint8, RGB, made smaller if it is large; None if there is none.
        found_everything: whether the last answer is about regions that nobody drew.
    """

    def __init__(self, model: RegionSpot, max_pixels: int) -> None:
        """
        Args:
            model: that names the regions.
            max_pixels: of a photo; a larger one is refused before it is decoded.
        """
        self._model = model
        self._max_pixels = max_pixels
        self.clear()

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the photo in full size."""
        self._photo()
        return self.predictor.image_size

    def clear(self) -> None:
        """Forgets the photo and all that was asked about it."""
        # A new one: the old one holds what the encoders know of the photo.
        self.predictor = RegionSpotPredictor(self._model)
        self.boxes: list[Box] = []
        self.points: list[Point] = []
        self.answer: Answer | None = None
        self.photo: np.ndarray | None = None
        self._file: tuple[str, int] | None = None
        self._name = ""
        self.found_everything = False

    def set_photo(self, path: str, name: str, turns: int = 0) -> bool:
        """Reads and encodes a photo, unless it is the one that is set.

        Args:
            path: of its file; files of other contents have other paths.
            name: what the visitor calls it.
            turns: quarter turns to the right.

        Returns:
            Whether it is a new one, of which nothing was asked yet.

        Raises:
            ImageReadError: it cannot be read; there is no photo then.
        """
        if self._file == (path, turns):
            return False
        self.clear()
        try:
            pixels = read_image(path, max_pixels=self._max_pixels)
        except ImageReadError as error:
            # Visitors know the name of their file, not where the server put it.
            raise ImageReadError(str(error).replace(repr(path), repr(name))) from None
        pixels = np.ascontiguousarray(np.rot90(pixels, -turns))
        self.predictor.set_image(pixels)
        small = Image.fromarray(pixels)
        small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        self.photo, self._file, self._name = np.array(small), (path, turns), name
        return True

    def draw(self, boxes: list[Box]) -> bool:
        """Sets the boxes; returns whether they are others than before."""
        if boxes == self.boxes:
            return False
        self.boxes, self.found_everything = boxes, False
        return True

    def click(self, x: float, y: float) -> None:
        """Adds a region by a point in pixels of :attr:`photo`."""
        if len(self.points) >= MAX_REGIONS:
            raise ValueError(f"There are {MAX_REGIONS} points already, as many as are named.")
        self._photo()
        self.points.append((x / self._scale, y / self._scale))
        self.found_everything = False

    def ask(self, words: Sequence[str], zoom: float) -> None:
        """Names the boxes and points.

        Args:
            words: the vocabulary.
            zoom: see :meth:`RegionSpot.answer`; below 1 is the whole photo.

        Raises:
            ValueError: there is no photo or region, or the regions or words make no sense.
        """
        self._photo()
        if not self.boxes and not self.points:
            raise ValueError("There is no region: draw a box or click a point, or find regions.")
        regions: dict[str, Any] = {"boxes": self.boxes or None}
        regions["points"] = [[point] for point in self.points] or None
        found = self.predictor.predict(**regions, vocabulary=words, topk=TOP, zoom=_zoom(zoom))
        self.found_everything = False
        self._keep(found, regions)

    def ask_everything(self, words: Sequence[str], zoom: float) -> None:
        """Finds and names what there is, the best first; as :meth:`ask` otherwise."""
        self._photo()
        fine = self.predictor.model.localizer.masks_are_fine
        found = self.predictor.everything(
            vocabulary=words,
            topk=TOP,
            max_regions=MAX_MASKS if fine else MAX_GROUPED,
            zoom=_zoom(zoom),
        )
        self.found_everything = True
        self._keep(found, {"boxes": found.pred_boxes[_first(found)]})

    def ask_again(self, words: Sequence[str], zoom: float) -> None:
        """Asks the last question, with other words or another zoom."""
        (self.ask_everything if self.found_everything else self.ask)(words, zoom)

    def picture(self) -> np.ndarray:
        """The photo with the regions and their names, (H, W, 3), uint8, RGB."""
        answer = self._answer()
        return draw_regions(self._photo(), self._small(answer.annotations), answer.names)

    def points_picture(self) -> np.ndarray:
        """The photo with the points that were clicked."""
        picture = self._photo().copy()
        radius = max(4, max(picture.shape) // 100)
        for x, y in self.points:
            place = round(x * self._scale), round(y * self._scale)
            cv2.circle(picture, place, radius + 2, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(picture, place, radius, (220, 38, 38), -1, cv2.LINE_AA)
        return picture

    def region_at(self, x: float, y: float) -> int | None:
        """The number of the smallest region around a point of the picture, if there is one."""
        around = []
        for each in self._small(self._answer().annotations):
            x0, y0, x1, y1 = xyxy(each)
            if x0 <= x <= x1 and y0 <= y <= y1:
                around.append(((x1 - x0) * (y1 - y0), each["region"]))
        return min(around)[1] if around else None

    def attention(self, region: int) -> np.ndarray:
        """The region, and beside it where the head looks to name it, (H, W, 3), uint8, RGB.

        Raises:
            ValueError: the head has no attention to the image (``RegionHead.has_attention``).
        """
        answer = self._answer()
        of_region = [each for each in answer.annotations if each["region"] == region]
        maps = answer.attention()
        return draw_attention(self._photo(), maps, self._small(of_region), answer.names)

    @property
    def _scale(self) -> float:
        """Pixels of the pictures per pixel of the photo."""
        return self._photo().shape[1] / self.size[1]

    def _photo(self) -> np.ndarray:
        if self.photo is None:
            raise ValueError("There is no photo: upload one, or pick an example.")
        return self.photo

    def _answer(self) -> Answer:
        if self.answer is None:
            raise ValueError("Nothing was named yet.")
        return self.answer

    def _keep(self, found: Instances, regions: Mapping[str, Any]) -> None:
        predictor, names = self.predictor, self.predictor.vocabulary
        # Only a point can leave an empty mask, and with it nothing to name.
        found = found[found.pred_boxes.nonempty()]
        tops: dict[int, dict[str, float]] = {}
        for region, place, score in zip(
            *(values.tolist() for values in (found.region_index, found.pred_classes, found.scores))
        ):
            tops.setdefault(region, {})[printable(clean_name(names[place]))] = score
        pairs = [f"'{known}' for '{name}'" for name, known in predictor.stood_in.items()]
        self.answer = Answer(
            entry=to_entry(self._name, found[_first(found)]),
            names=dict(enumerate(names, start=1)),
            tops=tops,
            note=f"Known names stand in: {', '.join(pairs[:8])}." if pairs else "",
            attention=lambda: predictor.attention_maps(**regions).float().cpu().numpy(),
        )

    def _small(self, annotations: Sequence[Annotation]) -> list[Annotation]:
        """The annotations in pixels of the pictures."""
        scale = self._scale
        if scale == 1:
            return list(annotations)
        height, width = self._photo().shape[:2]
        small: list[Annotation] = []
        for each in annotations:
            changes: dict[str, Any] = {"bbox": [value * scale for value in each["bbox"]]}
            if "segmentation" in each:
                mask = mask_api.decode(each["segmentation"])
                mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
                changes["segmentation"] = mask_api.encode(np.asfortranarray(mask))
            small.append({**each, **changes})
        return small


def _first(found: Instances) -> Any:
    """Marks the best name of each region."""
    numbers = found.region_index
    return numbers.diff(prepend=numbers.new_tensor([-1])) > 0


def _zoom(value: float) -> float:
    # Of the slider: less than the region itself is the whole photo.
    return float(value) if value >= 1 else 0.0
