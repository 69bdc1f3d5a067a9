"""RegionSpot inside and around other detectors: as their ROI heads, or as what renames them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor, nn

from ..arrays import check_channels
from .inputs import detected_regions, given_image
from .interfaces import to_rgb
from .prompts import BoxPrompts
from .regionspot import RegionSpot
from .vocabulary import dataset_class_names
from .words import Words, as_vocabulary, checked_words

# Side of the masks handed to Detectron2's paste, as large as its PointRend's.
_MASK_SIDE = 112


@ROI_HEADS_REGISTRY.register()
class RegionSpotROIHeads(nn.Module):
    """Names the boxes of a detector, on the image itself rather than on the detector's features.

    The boxes come from the host, the detector's own ROI heads (``MODEL.ROI_HEADS.HOST``), which
    keep their box regression, losses and masks; or, without a host, from the proposal generator. A
    score is the host's, or the sigmoid of a proposal's objectness, times the softmax over the
    vocabulary.

    A checkpoint of the detector loads as it is: its ROI heads become those of the host.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        regionspot: RegionSpot,
        host: ROIHeads | None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
        vocabulary: Words | None = None,
        max_detections: int = 100,
    ) -> None:
        """
        Args:
            regionspot: names the boxes.
            host: Detectron2's ROI heads whose detections are named; None names the proposals.
            pixel_mean, pixel_std: how the detector normalized its images, in ``input_format``.
            input_format: channel order of the detector's images, "RGB" or "BGR".
            vocabulary: class names; by default those of the first dataset of the config.
            max_detections: proposals named per image where there is no host.

        Raises:
            ValueError: ``regionspot`` is something else, the vocabulary has empty or repeated
                names, or the channel order is unknown.
        """
        super().__init__()
        _check_regionspot(regionspot)
        check_channels(input_format, "INPUT.FORMAT")
        self.regionspot = regionspot
        self.host = host
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.vocabulary = None if vocabulary is None else checked_words(vocabulary)
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
            images, features: of the detector, normalized and padded; of its backbone.
            proposals: ``proposal_boxes`` and ``objectness_logits`` of each image.
            targets: in training ``gt_boxes`` and ``gt_classes``, places in the vocabulary.

        Returns:
            In training the proposals and the host's losses with ``loss_regionspot``; at inference
            ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes`` and, if masks are on,
            ``pred_masks``, and no losses. With a host, ``host_classes`` are the classes it saw.
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
        if self.host is None:
            return self._name(pixels, list(map(self._to_detections, proposals))), {}
        return self._name(pixels, self.host(images, features, proposals)[0]), {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Adds the host's masks to detections, whose names stay as they are."""
        if self.host is None:
            return instances
        names = [found.pred_classes for found in instances]
        for found in instances:
            # The host has a mask for each of its own classes. Without these, classes are its own.
            if found.has("host_classes"):
                found.pred_classes = found.host_classes
        instances = self.host.forward_with_given_boxes(features, instances)
        for found, classes in zip(instances, names):
            found.pred_classes = classes
        return instances

    @property
    def class_names(self) -> list[str]:
        """The class names in use."""
        return list(as_vocabulary(self._words, repeats=True).names)

    @property
    def _words(self) -> Words:
        if self.vocabulary is not None:
            return self.vocabulary
        return dataset_class_names(self.regionspot.default_dataset)

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
        return [
            to_rgb(image[:, :height, :width].clamp(0, 255), self.input_format)
            for image, (height, width) in zip(pixels, images.image_sizes)
        ]

    def _losses(self, pixels: list[Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        model = self.regionspot
        prompts = [BoxPrompts(target.gt_boxes) for target in targets]
        answers = model.answer(model.encode(pixels), prompts, with_masks=False)
        logits = [model.score(answer.embeddings, self.class_names) for answer in answers]
        losses = model.losses(logits, [target.gt_classes for target in targets])
        return {"loss_regionspot": losses["loss_cls"]}

    def _to_detections(self, proposals: Instances) -> Instances:
        scores, best = proposals.objectness_logits.sigmoid().sort(descending=True)
        if self.max_detections >= 0:
            scores, best = scores[: self.max_detections], best[: self.max_detections]
        boxes = proposals.proposal_boxes[best]
        return Instances(proposals.image_size, pred_boxes=boxes, scores=scores)

    @torch.no_grad()
    def _name(self, pixels: list[Tensor], found: list[Instances]) -> list[Instances]:
        model = self.regionspot
        with_masks = model.with_masks and not all(x.has("pred_masks") for x in found)
        prompts = [BoxPrompts(instances.pred_boxes) for instances in found]
        answers = model.answer(model.encode(pixels), prompts, with_masks=with_masks)
        for instances, answer in zip(found, answers):
            named = model.name(answer, self._words, region_scores=instances.scores, topk=1)
            if instances.has("pred_classes"):
                instances.host_classes = instances.pred_classes
            instances.scores, instances.pred_classes = named.scores, named.pred_classes
            if named.has("pred_masks") and not instances.has("pred_masks"):
                # Detectron2 pastes masks into their boxes once the output size is known.
                boxes = instances.pred_boxes.tensor
                crops = boxes.new_zeros(len(boxes), 1, _MASK_SIDE, _MASK_SIDE)
                for crop, mask, box in zip(crops, named.pred_masks, boxes):
                    crop[:] = BitMasks(mask[None]).crop_and_resize(box[None], _MASK_SIDE)
                instances.pred_masks = crops
        # Whoever reads a detector's classes knows none but those of the vocabulary.
        return [instances[instances.pred_classes >= 0] for instances in found]


class OpenVocabularyDetector(nn.Module):
    """A finished detector with its own inputs and outputs, and the names of RegionSpot.

    A score is the detector's times the softmax over the vocabulary: how sure it is that there is
    something, and what it is.
    """

    def __init__(
        self,
        detector: nn.Module,
        regionspot: RegionSpot,
        vocabulary: Words,
        *,
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            detector: any model that takes Detectron2's dicts and returns ``[{"instances":
                Instances}]`` with ``pred_boxes`` and ``scores`` (Mask R-CNN, RetinaNet, FCOS, ...).
            regionspot: names the regions that it finds.
            vocabulary: class names.
            input_format: the detector's ``INPUT.FORMAT``, "RGB" or "BGR".

        Raises:
            ValueError: an argument has another type, the vocabulary has empty or repeated names or
                one that the text side cannot read, or the channel order is unknown.
        """
        super().__init__()
        if not isinstance(detector, nn.Module):
            kind = type(detector).__name__
            raise ValueError(f"detector is of the type {kind}; a model (nn.Module) is expected.")
        _check_regionspot(regionspot)
        check_channels(input_format, "input_format")
        self.detector = detector
        self.regionspot = regionspot
        self.input_format = input_format
        self.set_vocabulary(vocabulary)
        self.eval()

    def set_vocabulary(self, vocabulary: Words) -> None:
        """Changes the class names; ``pred_classes`` are places in this list."""
        words = checked_words(vocabulary)
        self.regionspot.scoring.warn_of_one_name(
            self.regionspot.scoring.joined(as_vocabulary(words))
        )
        # Which names the text side cannot read, it tells now.
        self.regionspot.text_embedder(words, self.regionspot.device)
        self.vocabulary = words

    def train(self, mode: bool = True) -> OpenVocabularyDetector:
        """Stays in eval mode: only a finished detector is wrapped."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Runs the detector on its own inputs.

        Returns:
            Its own outputs, best first, with ``pred_classes`` and ``scores`` replaced and all other
            fields, such as its masks, kept.

        Raises:
            ValueError: the detector's outputs are not what :meth:`__init__` says.
        """
        given = [given_image(i, x) for i, x in enumerate(batched_inputs)]
        outputs = self.detector(batched_inputs)
        images, prompts = [], []
        for i, (pixels, output) in enumerate(zip(given, outputs)):
            image = to_rgb(pixels.to(self.regionspot.device), self.input_format)
            found = detected_regions(i, batched_inputs[i], output)
            boxes = Boxes(found.pred_boxes.tensor.clone())
            # Results have the size that was asked for, the image the size that the detector saw.
            height, width = found.image_size
            boxes.scale(image.shape[2] / width, image.shape[1] / height)
            images.append(image)
            prompts.append(BoxPrompts(boxes))
        model = self.regionspot
        results = []
        for output, answer in zip(
            outputs, model.answer(model.encode(images), prompts, with_masks=False)
        ):
            found = output["instances"]
            scores = found.scores.to(model.device)
            named = model.name(answer, self.vocabulary, region_scores=scores, topk=1)
            renamed = Instances(found.image_size, **found.get_fields())
            renamed.scores = named.scores.to(found.scores)
            renamed.pred_classes = named.pred_classes.to(found.scores.device)
            renamed = renamed[renamed.pred_classes >= 0]
            best_first = renamed.scores.argsort(descending=True)
            results.append({**output, "instances": renamed[best_first]})
        return results


def _check_regionspot(model: Any) -> None:
    if not isinstance(model, RegionSpot):
        raise ValueError(
            f"regionspot is of the type {type(model).__name__}; a RegionSpot is expected, such as "
            "the 'model' of a RegionSpotPredictor."
        )


def wrap(
    detector: nn.Module,
    regionspot: RegionSpot,
    *,
    vocabulary: Words,
    input_format: str = "BGR",
) -> OpenVocabularyDetector:
    """Lets a finished detector name what it finds in any vocabulary.

    Example::

        model = regionspot_d2.wrap(build_model(detector_cfg), predictor.model, vocabulary=["cat"])
        [output] = model([{"image": image}])

    The arguments are those of :class:`OpenVocabularyDetector`.
    """
    return OpenVocabularyDetector(detector, regionspot, vocabulary, input_format=input_format)
