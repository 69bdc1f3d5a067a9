"""An auto-annotation function for CVAT: finds and names regions in the frames of a task, as boxes.

    cvat-cli task auto-annotate 42 --function-file integrations/cvat.py \\
        -p model=str:mini -p vocabulary=str:cat,dog

The task needs labels of these names, or --allow-unmatched-labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models
from PIL import Image

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.datasets.vocabularies import VOCABULARIES, known_vocabulary


class RegionSpotFunction:
    """A detection function of CVAT's SDK (``cvat_sdk.auto_annotation.DetectionFunction``).

    Boxes with less than the caller's confidence, or ``threshold`` if it has none, are left out.
    """

    def __init__(
        self,
        predictor: RegionSpotPredictor,
        vocabulary: Sequence[str],
        *,
        threshold: float = 0.0,
        max_regions: int = 100,
    ) -> None:
        self.predictor = predictor
        self.threshold = threshold
        self.max_regions = max_regions
        predictor.set_vocabulary(vocabulary)
        labels = [
            cvataa.label_spec(name, i, type="rectangle")
            for i, name in enumerate(predictor.vocabulary)
        ]
        self.spec = cvataa.DetectionFunctionSpec(labels=labels)

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: Image.Image
    ) -> list[models.LabeledShapeRequest]:
        """Finds and names the regions of a frame: rectangles with scores, best first."""
        least = self.threshold if context.conf_threshold is None else context.conf_threshold
        self.predictor.set_image(image)
        found = self.predictor.everything(max_regions=self.max_regions).to("cpu")
        found = found[found.scores >= least]
        return [
            cvataa.rectangle(label, box, score=score)
            for label, box, score in zip(
                found.pred_classes.tolist(),
                found.pred_boxes.tensor.tolist(),
                found.scores.tolist(),
            )
        ]


def create(
    model: str = "mini", vocabulary: str = "coco", threshold: float = 0.0, max_regions: int = 100
) -> RegionSpotFunction:
    """What ``cvat-cli`` calls, with its ``-p name=type:value``.

    Args:
        model: a name, a config or a folder, as :meth:`RegionSpotPredictor.from_pretrained` takes.
        vocabulary: class names with commas between them, or one of ``VOCABULARIES``.
        threshold, max_regions: see :class:`RegionSpotFunction`.
    """
    known = vocabulary in VOCABULARIES
    names = known_vocabulary(vocabulary) if known else [n.strip() for n in vocabulary.split(",")]
    predictor = RegionSpotPredictor.from_pretrained(model)
    return RegionSpotFunction(predictor, names, threshold=threshold, max_regions=max_regions)
