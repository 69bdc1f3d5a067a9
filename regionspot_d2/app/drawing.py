"""What the demo draws: regions with their names, where the head looks, pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from PIL import Image, ImageDraw, ImageFont

from ..modeling.names import clean_name
from .fonts import LabelVisualizer, font_of
from .names import printable

Annotation = Mapping[str, Any]
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
    image: np.ndarray, annotations: Sequence[Annotation], names: Mapping[int, str]
) -> np.ndarray:
    """Draws each region once, with all its names.

    Args:
        image: (H, W, 3), uint8, RGB.
        annotations: those of this image, in COCO format.
        names: class names by category id.

    Returns:
        (H, W, 3), uint8, RGB.
    """
    regions = by_region(annotations)
    # An empty list of polygons where there is no mask: Detectron2 wants an entry per region.
    masks = [region[0].get("segmentation") or [] for region in regions]
    visualizer = LabelVisualizer(image)
    visualizer.overlay_instances(
        boxes=np.array([xyxy(region[0]) for region in regions]).reshape(-1, 4),
        labels=[_label(region, names) for region in regions],
        masks=masks,
        assigned_colors=[_color(region[0], i) for i, region in enumerate(regions)],
    )
    return visualizer.picture()


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
    regions = by_region(annotations)
    boxed = image.copy()
    for i, region in enumerate(regions):
        _draw_box(boxed, region[0], i)
    panels = [("regions", draw_regions(boxed, annotations, names))]
    for i, region in enumerate(regions):
        picture = _heat(image, maps[region[0]["region"]])
        _draw_box(picture, region[0], i)
        panels.append((_label(region, names), picture))
    return side_by_side(panels)


def side_by_side(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Arranges pictures of one size in rows of up to four, each under its title."""
    height, width = panels[0][1].shape[:2]
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


def _draw_box(picture: np.ndarray, annotation: Annotation, place: int) -> None:
    x0, y0, x1, y1 = (round(value) for value in xyxy(annotation))
    thickness = max(2, max(picture.shape) // 200)
    # A dark rim keeps the box visible on any color.
    cv2.rectangle(picture, (x0, y0), (x1, y1), (0, 0, 0), thickness + 2)
    color = (255 * _color(annotation, place)).tolist()
    cv2.rectangle(picture, (x0, y0), (x1, y1), color, thickness)


def _heat(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    # Interpolated, the map shows where it points, not where the cells of the grid end.
    heat = cv2.resize(attention, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_CUBIC)
    heat = np.clip(heat / max(float(attention.max()), 1e-12), 0, 1)
    colors = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
    # Without attention the photo stays visible, a little darker.
    opacity = 0.3 + 0.4 * np.sqrt(heat)[:, :, None]
    return ((1 - opacity) * image + opacity * colors).astype(np.uint8)


def _label(region: Sequence[Annotation], names: Mapping[int, str]) -> str:
    words = []
    for annotation in region:
        # Ground truth has no scores.
        score = annotation.get("score")
        percent = "" if score is None else f" {100 * score:.0f}%"
        words.append(printable(clean_name(names[annotation["category_id"]])) + percent)
    return ", ".join(words)


def _color(annotation: Annotation, place: int) -> np.ndarray:
    # A region has the same color in every picture and every frame.
    colors = colormap(rgb=True, maximum=1)
    return colors[annotation.get("region", place) % len(colors)]
