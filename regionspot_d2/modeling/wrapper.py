"""A finished detector, its classes renamed in an open vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from .interfaces import to_rgb
from .prompts import BoxPrompts
from .regionspot import RegionSpot
from .vocabulary import check_names


class OpenVocabularyDetector(nn.Module):
    """A detector of Detectron2 with its own inputs and outputs, and the names of RegionSpot.

    The detector finds the regions and keeps its weights; RegionSpot names them on the same image.
    The score of a result is the detector's score times RegionSpot's softmax over the vocabulary: how
    sure it is that there is something, and what it is.
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
            detector: any model that takes Detectron2's dicts and returns ``[{"instances":
                Instances}]`` with ``pred_boxes`` and ``scores`` (Mask R-CNN, RetinaNet, FCOS, ...).
            regionspot: names regions.
            vocabulary: the class names.
            input_format: channel order of the detector's images (its ``INPUT.FORMAT``), "RGB" or
                "BGR".

        Raises:
            ValueError: the vocabulary has empty or repeated names, or the channel order is unknown.
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
        """Changes the class names; ``pred_classes`` are places in this list."""
        check_names(vocabulary)
        self.vocabulary = list(vocabulary)

    def train(self, mode: bool = True) -> OpenVocabularyDetector:
        """Stays in eval mode: only a finished detector is wrapped."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: the detector's own, with ``image`` (3, H, W) and optionally ``height``,
                ``width``.

        Returns:
            The detector's own outputs, best first, with ``pred_classes`` and ``scores`` replaced and
            all other fields, such as its masks, kept.
        """
        outputs = self.detector(batched_inputs)
        images, prompts = [], []
        for x, output in zip(batched_inputs, outputs):
            image = to_rgb(x["image"].to(self.regionspot.device), self.input_format)
            found = output["instances"]
            boxes = Boxes(found.pred_boxes.tensor.clone())
            # Results have the size that was asked for, the image the size that the detector saw.
            height, width = found.image_size
            boxes.scale(image.shape[2] / width, image.shape[1] / height)
            images.append(image)
            prompts.append(BoxPrompts(boxes))
        encoded = self.regionspot.encode(images)
        answers = self.regionspot.answer(encoded, prompts, with_masks=False)
        results = []
        for output, answer in zip(outputs, answers):
            found = output["instances"]
            named = self.regionspot.name(
                answer,
                self.vocabulary,
                region_scores=found.scores.to(self.regionspot.device),
                topk=1,
            ).to(found.scores.device)
            renamed = Instances(found.image_size, **found.get_fields())
            renamed.scores, renamed.pred_classes = named.scores, named.pred_classes
            best_first = renamed.scores.argsort(descending=True)
            results.append({**output, "instances": renamed[best_first]})
        return results


def wrap(
    detector: nn.Module,
    regionspot: RegionSpot,
    *,
    vocabulary: Sequence[str],
    input_format: str = "BGR",
) -> OpenVocabularyDetector:
    """Lets a finished detector name what it finds in any vocabulary.

    Example::

        model = regionspot_d2.wrap(build_model(detector_cfg), predictor.model, vocabulary=["cat"])
        [output] = model([{"image": image}])

    The arguments are those of :class:`OpenVocabularyDetector`.
    """
    return OpenVocabularyDetector(detector, regionspot, vocabulary, input_format=input_format)
