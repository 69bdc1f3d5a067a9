"""What the demo draws: regions with their names, where the head looks, pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api

from ..modeling.vocabulary import clean_name
from .fonts import font_of
from .labels import Label, draw_labels, readable_on
from .names import printable

Annotation = Mapping[str, Any]
Color: TypeAlias = tuple[int, int, int]
#: The longer side of pictures, in pixels: larger images are drawn at this size.
MAX_SIDE = 2048
_PANELS_PER_ROW = 4


def by_region(annotations: Sequence[Annotation]) -> list[list[Annotation]]:
    """Groups annotations by region, or by box where they have no "region"."""
    regions: dict[Any, list[Annotation]] = {}
    for annotation in annotations:
        key = annotation.get("region", tuple(annotation["bbox"]))
        regions.setdefault(key, []).append(annotation)
    return list(regions.values())


def xyxy(annotation: Annotation) -> list[float]:
    """The box of an annotation as corners."""
    return BoxMode.convert(list(annotation["bbox"]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def draw_regions(
    image: np.ndarray,
    annotations: Sequence[Annotation],
    names: Mapping[int, str],
    *,
    legend: bool = True,
) -> np.ndarray:
    """Draws each region once, with all its names, its mask and its clicks.

    Labels never cover each other. Where the names of a region do not fit, its number stands for
    them: its track, or else its place as in the results.

    Args:
        image: (H, W, 3), uint8, RGB.
        annotations: those of this image, in COCO format.
        names: class names by category id.
        legend: whether to add, below the picture, the names that numbers stand for.

    Returns:
        (H', W', 3), uint8, RGB. W' and, without a legend, H' are those of the image, or smaller
        for one that is larger than :data:`MAX_SIDE`.
    """
    picture, annotations = _bounded(image, annotations, MAX_SIDE)
    regions = by_region(annotations)
    colors = [_color(region[0], i) for i, region in enumerate(regions)]
    for draw in (_draw_mask, _draw_box, _draw_clicks):
        for region, color in zip(regions, colors):
            draw(picture, region[0], color)
    labels = [
        Label(xyxy(region[0]), _lines(region, names), _number(region[0], i), color)
        for i, (region, color) in enumerate(zip(regions, colors))
    ]
    reach = 3 * _thickness(picture)
    clicks = [
        (x - reach, y - reach, x + reach, y + reach)
        for region in regions
        for x, y, _ in region[0].get("points", [])
    ]
    return draw_labels(picture, labels, kept_free=clicks, legend=legend)


def draw_attention(
    image: np.ndarray,
    maps: np.ndarray,
    annotations: Sequence[Annotation],
    names: Mapping[int, str],
) -> np.ndarray:
    """The regions, and beside them where the head looks to name each one (paper, Figure 4).

    Args:
        image: (H, W, 3), uint8, RGB.
        maps: (R, rows, columns) over the whole image, indexed by "region" of the annotations.
        annotations, names: as for :func:`draw_regions`.

    Returns:
        Panels in rows, (H', W', 3), uint8, RGB.
    """
    # Four of them stand in a row, which is then not much wider than one picture.
    image, annotations = _bounded(image, annotations, MAX_SIDE // 3)
    panels = [("regions", draw_regions(image, annotations, names))]
    for i, region in enumerate(by_region(annotations)):
        picture = _heat(image, maps[region[0]["region"]])
        _draw_box(picture, region[0], _color(region[0], i))
        panels.append((", ".join(_lines(region, names)), picture))
    return side_by_side(panels)


def side_by_side(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Arranges pictures in rows of up to four, each under its title."""
    height = max(picture.shape[0] for _, picture in panels)
    width = max(picture.shape[1] for _, picture in panels)
    rows = -(-len(panels) // _PANELS_PER_ROW)
    columns = -(-len(panels) // rows)
    size = max(11, min(height, width) // 18)
    gap, strip = size // 2, 2 * size
    # Video codecs need even sides.
    canvas_size = (columns * (width + gap) + gap, rows * (height + strip) + gap)
    canvas = Image.new("RGB", tuple(side + side % 2 for side in canvas_size), "white")
    for i, (title, picture) in enumerate(panels):
        x = gap + i % columns * (width + gap)
        y = i // columns * (height + strip)
        title = printable(title)  # an unprintable letter is an error of PIL
        file = font_of(title)
        font = ImageFont.truetype(file, size)
        if font.getlength(title) > width:
            font = ImageFont.truetype(file, max(6, int(size * width / font.getlength(title))))
        ImageDraw.Draw(canvas).text(
            (x, y + strip // 2), title, fill="black", font=font, anchor="lm"
        )
        canvas.paste(Image.fromarray(picture), (x, y + strip))
    return np.array(canvas)


def _bounded(
    image: np.ndarray, annotations: Sequence[Annotation], max_side: int
) -> tuple[np.ndarray, Sequence[Annotation]]:
    """A copy of an image, at most so large, and the annotations in its pixels."""
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image.copy(), annotations
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return picture, [_scaled(annotation, scale) for annotation in annotations]


def _scaled(annotation: Annotation, scale: float) -> Annotation:
    scaled = dict(annotation, bbox=[scale * value for value in annotation["bbox"]])
    if "points" in annotation:
        scaled["points"] = [[scale * x, scale * y, on] for x, y, on in annotation["points"]]
    mask = annotation.get("segmentation")
    if isinstance(mask, list):  # run-length encodings have a size of their own
        scaled["segmentation"] = [[scale * value for value in polygon] for polygon in mask]
    return scaled


def _draw_mask(picture: np.ndarray, annotation: Annotation, color: Color) -> None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return
    height, width = picture.shape[:2]
    if isinstance(segmentation, list):
        mask = mask_api.decode(mask_api.frPyObjects(segmentation, height, width)).max(2)
    else:
        mask = mask_api.decode(segmentation)
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    inside = mask > 0
    picture[inside] = (0.55 * picture[inside] + 0.45 * np.array(color)).astype(np.uint8)
    outline, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, outline, -1, color, max(1, _thickness(picture) // 2))


def _draw_box(picture: np.ndarray, annotation: Annotation, color: Color) -> None:
    height, width = picture.shape[:2]
    corners = np.array(xyxy(annotation)).clip(0, [width - 1, height - 1] * 2)
    x0, y0, x1, y1 = (round(value) for value in corners.tolist())
    thickness = _thickness(picture)
    # A rim of another lightness keeps the box visible on any color.
    cv2.rectangle(picture, (x0, y0), (x1, y1), readable_on(color), thickness + 2)
    cv2.rectangle(picture, (x0, y0), (x1, y1), color, thickness)


def _draw_clicks(picture: np.ndarray, annotation: Annotation, color: Color) -> None:
    """A dot where a click is on the region, a cross where it is beside it."""
    height, width = picture.shape[:2]
    radius, rim = 2 * _thickness(picture), readable_on(color)
    for x, y, on in annotation.get("points", []):
        center = (round(min(max(x, 0), width)), round(min(max(y, 0), height)))
        if on:
            cv2.circle(picture, center, radius + 2, rim, cv2.FILLED, cv2.LINE_AA)
            cv2.circle(picture, center, radius, color, cv2.FILLED, cv2.LINE_AA)
        else:
            for stroke, thickness in ((rim, radius + 1), (color, radius // 2)):
                cross = cv2.MARKER_TILTED_CROSS
                cv2.drawMarker(picture, center, stroke, cross, 3 * radius, thickness)


def _thickness(picture: np.ndarray) -> int:
    return max(2, max(picture.shape) // 400)


def _heat(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    # Interpolated, the map shows where it points, not where the cells of the grid end.
    heat = cv2.resize(attention, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_CUBIC)
    heat = np.clip(heat / max(float(attention.max()), 1e-12), 0, 1)
    colors = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
    # Without attention the photo stays visible, a little darker.
    opacity = 0.3 + 0.4 * np.sqrt(heat)[:, :, None]
    return ((1 - opacity) * image + opacity * colors).astype(np.uint8)


def _lines(region: Sequence[Annotation], names: Mapping[int, str]) -> list[str]:
    """The names of a region, each with its score; the first one with its track."""
    lines = []
    for annotation in region:
        # Ground truth has no scores.
        score = annotation.get("score")
        percent = "" if score is None else f" {100 * score:.0f}%"
        lines.append(printable(clean_name(names[annotation["category_id"]])) + percent)
    if "track_id" in region[0]:
        lines[0] = f"{_number(region[0], 0)} {lines[0]}"
    return lines


def _number(annotation: Annotation, place: int) -> str:
    track = annotation.get("track_id")
    return str(annotation.get("region", place)) if track is None else f"#{track}"


def _color(annotation: Annotation, place: int) -> Color:
    # A track, or a region, has the same color in every picture and every frame.
    number = annotation.get("track_id", annotation.get("region", place))
    colors = colormap(rgb=True, maximum=255)
    red, green, blue = colors[number % len(colors)].astype(int).tolist()
    return red, green, blue
