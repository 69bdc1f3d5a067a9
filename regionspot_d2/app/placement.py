"""Where labels go: beside their boxes, inside the picture, and none over another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# What a place costs for each step away from the one above the box, against covering one whole box.
_STEP = 0.02
# Corners that are tried where there is no room beside a box: farther off, nobody finds its number.
_MAX_CORNERS = 400
# What labels of more than one form may cover: a share of the picture, but in a small one more, as
# many pixels as some labels have. The rest is to be seen.
_MAX_COVERED, _COVERED_IN_SMALL = 0.3, 20_000


@dataclass(frozen=True)
class Place:
    """Where the label of a region goes.

    Attributes:
        form: which of its forms it takes, from 0.
        x0, y0, x1, y1: the corners, whole pixels; x1 and y1 are outside.
    """

    form: int
    x0: int
    y0: int
    x1: int
    y1: int


def place_labels(
    boxes: np.ndarray,
    sizes: Sequence[Sequence[tuple[int, int]]],
    picture_size: tuple[int, int],
    kept_free: Sequence[Sequence[float]] = (),
) -> list[Place | None]:
    """Finds a place for the label of each box.

    Every region first gets its smallest form. Then, one after another, each gets the best form for
    which there is room between all the others, until enough of the picture is covered.

    Args:
        boxes: (R, 4) XYXY, pixels of the picture.
        sizes: per region the (width, height) of the forms of its label, the best first and the
            smallest last.
        picture_size: (H, W).
        kept_free: rectangles XYXY that no label shall cover.

    Returns:
        Per region its place, or None if there is none even for the smallest form. No two places
        have a pixel in common, and all lie in the picture.
    """
    taken = np.empty((len(boxes) + len(kept_free), 4))
    taken[: len(boxes)] = np.inf  # nowhere
    taken[len(boxes) :] = np.reshape(kept_free, (-1, 4))
    places: list[Place | None] = [None] * len(boxes)
    most = max(_MAX_COVERED * picture_size[0] * picture_size[1], _COVERED_IN_SMALL)
    covered = 0
    for nearby in (True, False):
        for i, forms in enumerate(sizes):
            others = np.delete(taken, i, 0)
            for form in [len(forms) - 1] if nearby else range(len(forms) - 1):
                size = forms[form]
                area = 0 if nearby else size[0] * size[1]
                if covered + area > most:
                    continue
                corner = _find(i, boxes, size, picture_size, others, nearby=nearby)
                if corner is not None:
                    covered += area
                    taken[i] = (*corner, *np.add(corner, size))
                    places[i] = Place(form, *taken[i].astype(int).tolist())
                    break
    return places


def _find(
    i: int,
    boxes: np.ndarray,
    size: tuple[int, int],
    picture_size: tuple[int, int],
    taken: np.ndarray,
    *,
    nearby: bool,
) -> tuple[int, int] | None:
    """The best free corner for a label of one size, beside its box or, if need be, near it."""
    for search in (_beside, _near) if nearby else (_beside,):
        corners = search(boxes[i], size, picture_size)
        places = np.concatenate([corners, corners + size], axis=1)
        inside = (corners >= 0).all(1) & (places[:, 2:] <= picture_size[::-1]).all(1)
        free = np.flatnonzero(inside & ~(_shared(places, taken) > 0).any(1))
        if len(free):
            # A label that hides a small box says less than one that covers a bit of a large one.
            areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1)
            cost = (_shared(places[free], boxes) / areas).sum(1) + _STEP * free
            x, y = corners[free[cost.argmin()]]
            return int(x), int(y)
    return None


def _beside(box: np.ndarray, size: tuple[int, int], picture_size: tuple[int, int]) -> np.ndarray:
    """Upper left corners on the edges of a box, outside and inside, the usual ones first."""
    (x0, y0, x1, y1), (width, height) = box, size
    right, middle = x1 - width, (x0 + x1 - width) / 2
    columns = [x0, right, middle, (x0 + middle) / 2, (right + middle) / 2, x0 - width, x1]
    rows = [y0 - height, y0, y1, y1 - height, (y0 + y1 - height) / 2]
    corners = np.array([(x, y) for y in rows for x in columns]).round()
    # A label that would stick out is moved in, as far as it is needed.
    return corners.clip(0, np.maximum(np.subtract(picture_size[::-1], size), 0)).astype(int)


def _near(box: np.ndarray, size: tuple[int, int], picture_size: tuple[int, int]) -> np.ndarray:
    """Upper left corners in the picture, the nearest to the middle of a box first."""
    xs = np.arange(0, picture_size[1] - size[0] + 1, max(1, size[0] // 2))
    ys = np.arange(0, picture_size[0] - size[1] + 1, max(1, size[1] // 2))
    corners = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    away = np.abs(corners + np.divide(size, 2) - (box[:2] + box[2:]) / 2).sum(1)
    return corners[away.argsort(kind="stable")[:_MAX_CORNERS]]


def _shared(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """(N, M): how many pixels rectangles have in common."""
    upper_left = np.maximum(these[:, None, :2], those[None, :, :2])
    lower_right = np.minimum(these[:, None, 2:], those[None, :, 2:])
    with np.errstate(invalid="ignore"):  # of rectangles that are nowhere
        return np.nan_to_num((lower_right - upper_left).clip(0), nan=0.0, posinf=0.0).prod(2)
