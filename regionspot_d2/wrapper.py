"""A finished detector, its classes re-named in an open vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from .modeling import RegionSpot
from .modeling.vocabulary import check_names


class OpenVocabularyDetector(nn.Module):
    """A detector of Detectron2 with the detector's own inputs and outputs, and the names of RegionSpot.

    The detector finds the regions and keeps its weights; RegionSpot names them on the same image. The score of a result is
    the detector's score times RegionSpot's softmax over the words: sure that it is something, and sure what it is.
    """

    def __init__(
        self,
        detector: nn.Module,
        regionspot: RegionSpot,
        vocabulary: Sequence[str],
        *,
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            detector: any model that takes Detectron2's dicts and returns ``[{"instances": Instances}]`` with
                ``pred_boxes`` and ``scores`` (Mask R-CNN, Cascade R-CNN, RetinaNet, FCOS, ...).
            regionspot: names regions.
            vocabulary: the words.
            input_format: channel order of the detector's images (its ``INPUT.FORMAT``), "RGB" or "BGR".

        Raises:
            ValueError: if the vocabulary has empty or repeated names, or the channel order is unknown.
        """
        super().__init__()
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"input_format is '{input_format}'; it must be 'RGB' or 'BGR'.")
        self.detector = detector
        self.regionspot = regionspot
        self.input_format = input_format
        self.set_vocabulary(vocabulary)
        self.eval()

    def set_vocabulary(self, vocabulary: Sequence[str]) -> None:
        """Changes the words; ``pred_classes`` are places in this list."""
        check_names(vocabulary)
        self.vocabulary = list(vocabulary)

    def train(self, mode: bool = True) -> OpenVocabularyDetector:
        """Stays in eval mode: a detector around which RegionSpot stands is finished."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: the detector's own, with ``image`` (3, H, W) and optionally ``height``, ``width``.

        Returns:
            The detector's own outputs, best first, with ``pred_classes`` and ``scores`` replaced and all other fields,
            such as its masks, kept.
        """
        outputs = self.detector(batched_inputs)
        images, boxes = [], []
        for x, output in zip(batched_inputs, outputs):
            image = x["image"].to(self.regionspot.device)
            images.append(image if self.input_format == "RGB" else image.flip(0))
            found = output["instances"]
            box = Boxes(found.pred_boxes.tensor.clone()).to(self.regionspot.device)
            # Results have the size that was asked for, the image the size that the detector saw.
            height, width = found.image_size
            box.scale(image.shape[2] / width, image.shape[1] / height)
            boxes.append(box)
        encoded = self.regionspot.encode(images)
        tokens, _ = self.regionspot.localize(encoded, list(boxes), with_masks=False)
        embeddings, _ = self.regionspot.embed(encoded, list(boxes), tokens)
        return [
            {**output, "instances": self._name(output["instances"], embedding)}
            for output, embedding in zip(outputs, embeddings)
        ]

    def _name(self, found: Instances, embeddings: torch.Tensor) -> Instances:
        logits = self.regionspot.score(embeddings, self.vocabulary).to(found.scores.device)
        scores, classes = logits.softmax(1).max(1)
        named = Instances(found.image_size, **found.get_fields())
        named.scores = found.scores * scores
        named.pred_classes = classes
        return named[named.scores.argsort(descending=True)]


def wrap(
    detector: nn.Module,
    regionspot: RegionSpot,
    *,
    vocabulary: Sequence[str],
    input_format: str = "BGR",
) -> OpenVocabularyDetector:
    """Lets a finished detector name what it finds with any words.

    Example::

        detector = build_model(detector_cfg)
        model = regionspot_d2.wrap(detector, predictor.model, vocabulary=["cat", "dog"])
        [output] = model([{"image": image}])

    Args:
        detector, regionspot, vocabulary, input_format: as for :class:`OpenVocabularyDetector`.
    """
    return OpenVocabularyDetector(detector, regionspot, vocabulary, input_format=input_format)
