"""Labels of regions: readable, none over another, and a legend for names that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .fonts import draw_text, shortened, text_size
from .placement import place_labels

_PADDING = 2  # pixels between the text of a label and its edge
_LEGEND_ROWS = 64  # that a legend has, however small the picture
_KEPT_IN_LEGEND = 0.8  # of the width of the longest line, at least
_WIDEST = 0.6  # of a line in a label, in widths of the picture
# Half of the contrast between black and white, as WCAG measures contrast: there, both are as far.
_MIDDLE_LUMINANCE = 0.179


@dataclass(frozen=True)
class Label:
    """What is written at a region.

    Attributes:
        box: XYXY, pixels of the picture, whose place the label depends on.
        lines: the names, best first.
        number: what stands for them where they do not fit.
        color: of the region, RGB, 0..255.
    """

    box: Sequence[float]
    lines: list[str]
    number: str
    color: tuple[int, int, int]


def draw_labels(
    picture: np.ndarray,
    labels: Sequence[Label],
    *,
    kept_free: Sequence[Sequence[float]] = (),
    legend: bool = True,
) -> np.ndarray:
    """Draws labels beside their boxes, and a legend below the picture if some do not fit.

    Args:
        picture: (H, W, 3), uint8, RGB.
        labels: of its regions.
        kept_free: rectangles XYXY that labels shall not cover.
        legend: whether to explain numbers.

    Returns:
        (H', W, 3), uint8, RGB; H' is H without a legend.
    """
    if not labels:
        return picture
    height, width = picture.shape[:2]
    font = font_size(picture)
    forms = []
    for label in labels:
        lines = [shortened(line, font, _WIDEST * width) for line in label.lines]
        forms.append([lines, [label.number]])
    sizes = [[_block_size(lines, font) for lines in each] for each in forms]
    boxes = np.array([label.box for label in labels]).clip(0, [width, height] * 2)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    numbered = []
    places = place_labels(boxes, sizes, (height, width), kept_free)
    for label, each, place in zip(labels, forms, places):
        if place is None or place.form > 0:
            numbered.append(label)
        if place is not None:
            _draw_block(draw, (place.x0, place.y0), each[place.form], font, label.color)
    drawn = np.array(canvas)
    if legend and numbered:
        drawn = np.concatenate([drawn, _legend(numbered, width, height, font)])
    return drawn


def font_size(picture: np.ndarray) -> int:
    """Of labels, in pixels: readable, and in a tiny picture no more than a sixth of it."""
    height, width = picture.shape[:2]
    readable = min(28, max(11, round((height * width) ** 0.5 / 45)))
    return min(readable, max(5, min(height, width) // 6))


def readable_on(color: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, whichever contrasts more with a color: 4.5 to 1 or more, by WCAG."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in color)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > _MIDDLE_LUMINANCE else (255, 255, 255)


def _block_size(lines: Sequence[str], font: int) -> tuple[int, int]:
    sizes = [text_size(line, font) for line in lines]
    return max(width for width, _ in sizes) + 2 * _PADDING, sum(height for _, height in sizes)


def _draw_block(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: int,
    color: tuple[int, int, int],
) -> None:
    (x, y), (width, height) = corner, _block_size(lines, font)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    for line in lines:
        draw_text(draw, (x + _PADDING, y), line, font, readable_on(color))
        y += text_size(line, font)[1]


def _legend(labels: Sequence[Label], width: int, max_height: int, font: int) -> np.ndarray:
    """What numbers stand for, in columns: (H, width, 3), uint8, RGB."""
    texts = [", ".join(label.lines) for label in labels]
    indent = max(_block_size([label.number], font)[0] for label in labels) + 2 * _PADDING
    widest = max(text_size(text, font)[0] for text in texts)
    # The longest lose their ends where that makes room for one more column.
    columns = max(1, width // round(indent + _KEPT_IN_LEGEND * widest + font))
    column = min(width // columns, indent + widest + font)
    row = 2 + max(text_size(label.number + text, font)[1] for label, text in zip(labels, texts))
    # Hundreds of rows would be no picture any more: the results have the rest.
    rows = min(-(-len(labels) // columns), max(_LEGEND_ROWS, max_height // row))
    shown = rows * columns
    if left_out := len(labels[shown:]):
        texts[shown - 1] = f"... and {left_out + 1} more in the results"
    canvas = Image.new("RGB", (width, rows * row + 2 * _PADDING), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, text) in enumerate(zip(labels[:shown], texts)):
        x, y = i // rows * column, _PADDING + i % rows * row
        if not left_out or i < shown - 1:
            _draw_block(draw, (x, y), [label.number], font, label.color)
        text = shortened(text, font, column - indent - font // 2)
        draw_text(draw, (x + indent, y), text, font, "black")
    return np.array(canvas)
