"""Where regions come from: the command line, a file, the image itself, or a detector."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..detection import build_detector
from ..logits import LOGITS, look_like_logits, sigmoid
from ..modeling import Localizer, RegionSpot
from ..modeling.everything import Search
from .inputs import tell
from .region_files import RegionFile
from .region_formats import PIXELS, is_fraction


@dataclass(frozen=True)
class Regions:
    """Regions of one image, boxes first, as ``RegionSpotPredictor.predict`` takes them.

    Attributes:
        boxes: R1 boxes, XYXY, pixels of the image; None if the source gives only points.
        points: R2 regions, each a list of points (x, y), pixels of the image.
        point_labels: like ``points``, 1 on the region, 0 beside it.
        scores: (R1,) scores of the boxes, if their source has any.
    """

    boxes: Any | None = None
    points: list[list[list[float]]] | None = None
    point_labels: list[list[int]] | None = None
    scores: np.ndarray | None = None

    @property
    def clicks(self) -> dict[int, list[list[float]]]:
        """Points [x, y, label] of those regions that are given by points, by their place."""
        first = 0 if self.boxes is None else len(self.boxes)
        return {
            region: [[*point, label] for point, label in zip(points, labels)]
            for region, (points, labels) in enumerate(
                zip(self.points or [], self.point_labels or []), first
            )
        }


# Gives the regions of an image, from its path and its pixels (H, W, 3), uint8, RGB; or how the
# predictor shall look for them.
RegionSource: TypeAlias = Callable[[str, np.ndarray], Regions | Search]


def choose_source(
    args: argparse.Namespace, model: RegionSpot, class_names: Sequence[str]
) -> RegionSource:
    """The one source that the command line names."""
    if args.detector_config or args.detector:
        source, option = args.detector, f"--detector {args.detector}"
        if args.detector_config:
            source = f"detectron2:{args.detector_config}"
            option = f"--detector-config {args.detector_config}"
        if args.detector_weights:
            option += f" with --detector-weights {args.detector_weights}"
        return from_detector(source, args.detector_weights, class_names, str(model.device), option)
    if args.proposals and args.proposals != "sam":
        return from_file(args.proposals)
    if args.boxes or args.points:
        return from_arguments(args.boxes, args.points)
    return from_image(model.localizer, True if args.proposals else None)


def from_arguments(
    boxes: Sequence[str] | None = None, points: Sequence[str] | None = None
) -> RegionSource:
    """The same regions for every image, as --boxes and --points spell them."""
    labeled = [_parse_points(text) for text in points or []]
    regions = Regions(
        boxes=[_parse_box(text) for text in boxes] if boxes else None,
        points=[[point[:2] for point in region] for region in labeled] or None,
        point_labels=[[int(point[2]) for point in region] for region in labeled] or None,
    )
    return lambda path, image: regions


def _parse_box(text: str) -> list[float]:
    box = _numbers(text)
    if len(box) != 4:
        raise SystemExit(f"error: --boxes {text}: four numbers x0,y0,x1,y1 are expected.")
    if is_fraction(box):
        raise SystemExit(f"error: --boxes {text}: these are fractions of the image; {PIXELS}")
    return box


def _parse_points(text: str) -> list[list[float]]:
    points = [_numbers(point) for point in text.split(";")]
    # A point without a label lies on the region.
    points = [[*point, 1.0] if len(point) == 2 else point for point in points]
    if not all(len(point) == 3 and point[2] in (0, 1) for point in points):
        raise SystemExit(
            f"error: --points {text}: x,y or x,y,label is expected, with ';' between the points of "
            "one region; label 1 is on the region, 0 beside it."
        )
    if not any(label for _, _, label in points):
        raise SystemExit(f"error: --points {text}: at least one point on the region is expected.")
    if any(is_fraction(point[:2]) and any(v % 1 for v in point[:2]) for point in points):
        raise SystemExit(f"error: --points {text}: these are fractions of the image; {PIXELS}")
    return points


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def from_file(file: str) -> RegionSource:
    """The boxes that a file, or a folder of labels, has of each image; see demo/README.md."""
    try:
        listed = RegionFile(file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --proposals {file}: {error}") from error
    are_logits = any(look_like_logits(each.scores or []) for each in listed.entries.values())
    if are_logits:
        tell(f"--proposals {file}: {LOGITS}")

    def regions_of(path: str, image: np.ndarray) -> Regions:
        entry = listed.of(path)
        scores = None if entry.scores is None else np.asarray(entry.scores, np.float32)
        if scores is not None and are_logits:
            scores = sigmoid(scores)
        return Regions(boxes=entry.in_pixels(image.shape[1], image.shape[0]), scores=scores)

    return regions_of


def from_image(localizer: Localizer, by_masks: bool | None) -> RegionSource:
    """Whatever is found in each image.

    Args:
        localizer: the model's.
        by_masks: True asks the localizer for masks; None leaves the choice to the predictor.
    """
    if by_masks and not localizer.masks_are_fine:
        tell(
            f"--proposals sam: {type(localizer).__name__} was tuned to boxes and finds few regions "
            "or none; SAM (another --config-file) finds many, and so does this model without "
            "--proposals."
        )
    if by_masks is None:
        tell(
            "No regions are given: naming what is found in each image. (--boxes, --points, "
            "--proposals and --detector give regions.)"
        )
    search = Search(by_masks=localizer.masks_are_fine if by_masks is None else by_masks)
    return lambda path, image: search


def from_detector(
    source: str, weights: str | None, class_names: Sequence[str], device: str, option: str
) -> RegionSource:
    """What a detector finds, with its scores.

    Args:
        source, weights, class_names, device: as for
            :func:`~regionspot_d2.detection.build_detector`.
        option: what the command line says of it, for messages.
    """
    try:
        detector = build_detector(source, weights=weights, class_names=class_names, device=device)
    # Each library raises anything, from AssertionError to KeyError.
    except Exception as error:
        raise SystemExit(f"error: {option}: {error}") from error

    def regions_of(path: str, image: np.ndarray) -> Regions:
        found = detector(image)
        return Regions(boxes=found.boxes, scores=found.scores)

    return regions_of
