"""RegionSpot as the ROI heads of any two-stage detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import BitMasks, ImageList, Instances
from torch import Tensor, nn

from .regionspot import RegionSpot

# Side of the masks handed to Detectron2's paste, as large as its PointRend's.
_MASK_SIDE = 112


@ROI_HEADS_REGISTRY.register()
class RegionSpotROIHeads(nn.Module):
    """Names the boxes of a detector with the words of a vocabulary.

    The boxes come from the host, the detector's own ROI heads (``MODEL.ROI_HEADS.HOST``), which keep their box regression,
    losses and masks; or, without a host, straight from the proposal generator. Regions are named by :class:`RegionSpot`
    on the image itself, not on the detector's features.

    A checkpoint of the detector loads as it is: its ROI heads become those of the host.

    A result's score is the host's score of the box, or the sigmoid of a proposal's objectness, times the softmax over the
    words.
    """

    @configurable
    def __init__(
        self,
        *,
        regionspot: RegionSpot,
        host: nn.Module | None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
        vocabulary: Sequence[str] | None = None,
        max_detections: int = 100,
    ) -> None:
        """
        Args:
            regionspot: names regions.
            host: ROI heads of Detectron2's interface whose detections are named; None names proposals.
            pixel_mean: what the detector subtracted from its images, in ``input_format``.
            pixel_std: what it divided them by.
            input_format: channel order of the detector's images, "RGB" or "BGR".
            vocabulary: the words; by default those of the first data set of the config.
            max_detections: proposals named per image where there is no host.
        """
        super().__init__()
        self.regionspot = regionspot
        self.host = host
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        host = cfg.MODEL.ROI_HEADS.HOST
        return {
            "regionspot": RegionSpot(cfg),
            "host": ROI_HEADS_REGISTRY.get(host)(cfg, input_shape) if host else None,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: of the detector, normalised and padded.
            features: of its backbone, for the host.
            proposals: ``proposal_boxes`` and ``objectness_logits`` of each image.
            targets: in training ``gt_boxes`` and ``gt_classes``, places in the vocabulary.

        Returns:
            In training the proposals and the host's losses with ``loss_regionspot``; at inference ``Instances`` with
            ``pred_boxes``, ``scores``, ``pred_classes`` and, if masks are on, ``pred_masks``, and no losses. With a
            host, ``host_classes`` are the classes that it saw.
        """
        pixels = self._pixels(images)
        if self.training:
            if targets is None:
                raise ValueError(
                    "RegionSpotROIHeads needs targets (gt_boxes, gt_classes) to train."
                )
            losses: dict[str, Tensor] = {}
            if self.host is not None:
                proposals, losses = self.host(images, features, proposals, targets)
            return proposals, {**losses, **self._losses(pixels, targets)}
        if self.host is not None:
            found, _ = self.host(images, features, proposals)
        else:
            found = [self._to_detections(proposal) for proposal in proposals]
        return self._name(pixels, found), {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Adds the host's masks to detections; names stay as they are.

        Args:
            features: of the detector's backbone.
            instances: ``pred_boxes``, ``pred_classes`` and, unless those are the host's own, its ``host_classes``.
        """
        if self.host is None:
            return instances
        names = [found.pred_classes for found in instances]
        for found in instances:
            # The host has a mask for each of its own classes.
            if found.has("host_classes"):
                found.pred_classes = found.host_classes
        instances = self.host.forward_with_given_boxes(features, instances)
        for found, classes in zip(instances, names):
            found.pred_classes = classes
        return instances

    @property
    def words(self) -> list[str]:
        """The vocabulary in use."""
        if self.vocabulary is not None:
            return self.vocabulary
        dataset = self.regionspot.default_dataset
        words = None if dataset is None else MetadataCatalog.get(dataset).get("thing_classes")
        if not words:
            raise ValueError(
                "RegionSpotROIHeads has no words: set its vocabulary, or DATASETS.TEST to a data set whose "
                "'thing_classes' are in the MetadataCatalog."
            )
        return words

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.host is not None:
            for name in self.host.state_dict():
                if prefix + name in state_dict:
                    state_dict[f"{prefix}host.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _pixels(self, images: ImageList) -> list[Tensor]:
        pixels = images.tensor * self.pixel_std + self.pixel_mean
        if self.input_format == "BGR":
            pixels = pixels.flip(1)
        return [image[:, :h, :w].clamp(0, 255) for image, (h, w) in zip(pixels, images.image_sizes)]

    def _losses(self, pixels: list[Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        boxes = [target.gt_boxes for target in targets]
        logits, _ = self.regionspot.classify(pixels, boxes, [self.words] * len(pixels))
        losses = self.regionspot.losses(logits, [target.gt_classes for target in targets])
        return {"loss_regionspot": losses["loss_cls"]}

    def _to_detections(self, proposals: Instances) -> Instances:
        scores, best = proposals.objectness_logits.sigmoid().sort(descending=True)
        if self.max_detections >= 0:
            scores, best = scores[: self.max_detections], best[: self.max_detections]
        return Instances(
            proposals.image_size, pred_boxes=proposals.proposal_boxes[best], scores=scores
        )

    @torch.no_grad()
    def _name(self, pixels: list[Tensor], found: list[Instances]) -> list[Instances]:
        boxes = [instances.pred_boxes for instances in found]
        logits, mask_logits = self.regionspot.classify(pixels, boxes, [self.words] * len(pixels))
        for i, instances in enumerate(found):
            scores, classes = logits[i].softmax(1).max(1)
            instances.scores = instances.scores * scores
            if instances.has("pred_classes"):
                instances.host_classes = instances.pred_classes
            instances.pred_classes = classes
            if mask_logits is not None and not instances.has("pred_masks"):
                size = instances.image_size
                masks = self.regionspot.localizer.full_size_masks(mask_logits[i], size)
                # Detectron2 pastes masks into their boxes once the output size is known.
                crops = BitMasks(masks).crop_and_resize(boxes[i].tensor, _MASK_SIDE)
                instances.pred_masks = crops[:, None].float()
        return found
