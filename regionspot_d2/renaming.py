"""What any detector found, as the supervision package holds it, with RegionSpot's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import supervision

    from .data.images import ImageLike
    from .predictor import RegionSpotPredictor


def rename_detections(
    predictor: RegionSpotPredictor,
    detections: supervision.Detections,
    image: ImageLike,
    *,
    vocabulary: Sequence[str] | None = None,
    channels: str = "RGB",
    zoom: float | None = None,
) -> supervision.Detections:
    """Gives the detections of one image the names of RegionSpot.

    Example::

        detections = supervision.Detections.from_ultralytics(yolo("street.jpg")[0])
        renamed = predictor.rename(detections, "street.jpg", vocabulary=["tram"])

    The image of :meth:`RegionSpotPredictor.set_image` stays set.

    Args:
        predictor: names the boxes.
        detections: of any detector or tracker; ``xyxy`` in pixels of the image.
        image, channels, vocabulary, zoom: as for :meth:`RegionSpotPredictor.predict_batch`.

    Returns:
        New detections in the same order: ``class_id`` is a place in ``predictor.vocabulary``,
        ``data["class_name"]`` the name, and ``confidence`` the detector's, if it has one, times the
        softmax over the vocabulary. Masks, ``tracker_id`` and other data are kept.

    Raises:
        ValueError: a box makes no sense, or the confidence is not in 0..1.
    """
    scores = detections.confidence
    if scores is not None and not ((scores >= 0) & (scores <= 1)).all():  # nor NaN
        raise ValueError("detections.confidence has values outside 0..1; probabilities are wanted.")
    [named] = predictor.predict_batch(
        [image], [detections.xyxy], channels=channels, vocabulary=vocabulary, zoom=zoom
    )
    confidence = named.scores.float().cpu().numpy()
    places = named.pred_classes.cpu().numpy()
    names = np.array([predictor.vocabulary[place] for place in places], dtype=str)
    return replace(
        detections,
        class_id=places,
        confidence=confidence if scores is None else confidence * scores,
        data={**detections.data, "class_name": names},
    )
