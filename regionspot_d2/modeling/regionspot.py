"""RegionSpot, the meta-architecture: regions and a vocabulary in, named regions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from ..arrays import check_channels, check_limit
from ..files import local_weights
from . import naming
from .answers import Answer, answer_regions, attention_maps
from .compiling import compile_layers
from .encoded import EncodedImages
from .inputs import input_images, input_regions
from .interfaces import (
    LOCALIZER_REGISTRY,
    REGION_HEAD_REGISTRY,
    VISION_LANGUAGE_REGISTRY,
    Localizer,
    RegionHead,
    VisionLanguageModel,
)
from .precision import check_precision, precisions
from .prompts import BoxPrompts, Prompts
from .region_head import FocalLoss
from .scoring import Scoring
from .views import Zoom, check_zoom
from .vocabulary import TextEmbedder, dataset_class_names
from .words import Words, as_vocabulary


@META_ARCH_REGISTRY.register()
class RegionSpot(nn.Module):
    """Names any region of an image with any vocabulary (Yang et al., NeurIPS 2024).

    A frozen localizer turns regions into mask tokens, a frozen vision-language model images into
    tokens and class names into vectors; the region head, the only trained part, joins them.

    Every use takes three steps: :meth:`encode` images, :meth:`answer` a question, :meth:`name` it.
    """

    @configurable
    def __init__(
        self,
        *,
        localizer: Localizer,
        vision_language: VisionLanguageModel,
        region_head: RegionHead,
        text_embedder: TextEmbedder,
        loss: FocalLoss | None = None,
        with_masks: bool = True,
        nearest_masks: bool = False,
        score_thresh: float = 0.0,
        max_detections: int = 300,
        keep_before_proposal_score: int = 0,
        input_format: str = "RGB",
        default_dataset: str | None = None,
        max_regions: int = 1000,
        zoom: float = 0.0,
        zoom_max_views: int = 64,
        zoom_in_training: bool = False,
        precision: str = "float32",
        compile: bool = False,
        scoring: Scoring | None = None,
    ) -> None:
        """
        Args:
            localizer, vision_language, region_head, text_embedder: the parts of the model.
            loss: of training; by default the paper's, averaged over all regions.
            with_masks: whether inference gives ``pred_masks``.
            nearest_masks: makes them in the published way, see ``name_regions``.
            score_thresh, max_detections, keep_before_proposal_score: what inference keeps, as
                ``score_thresh``, ``max_pairs`` and ``keep_before_region_score`` of
                :func:`~regionspot_d2.modeling.naming.name_regions`.
            input_format: channel order of ``image`` in the inputs, "RGB" or "BGR".
            default_dataset: its class names serve an input without ``dataset_name``.
            max_regions: of an image that the region head sees together; more are named in groups.
            zoom, zoom_in_training: by default for :meth:`answer`, and whether in training too.
            zoom_max_views: of an image, see :class:`~regionspot_d2.modeling.views.ViewFinder`.
            precision, compile: MODEL.PRECISION and MODEL.COMPILE, as ``config.py`` explains them.
            scoring: what a score is, by default a softmax over the vocabulary.
        """
        super().__init__()
        check_channels(input_format, "INPUT.FORMAT")
        self.max_regions = check_limit(max_regions, "MODEL.REGION_HEAD.MAX_REGIONS")
        self.zoom = check_zoom(zoom, "MODEL.ZOOM")
        self.zoom_max_views = check_limit(zoom_max_views, "MODEL.ZOOM_MAX_VIEWS")
        self.zoom_in_training = zoom_in_training
        self.precision = check_precision(precision, "MODEL.PRECISION")
        self.localizer = localizer
        self.vision_language = vision_language
        self.region_head = region_head
        self.text_embedder = text_embedder
        self.loss = loss or FocalLoss()
        self.scoring = scoring or Scoring()
        self.with_masks = with_masks
        self.nearest_masks = nearest_masks
        self.score_thresh = score_thresh
        self.max_detections = max_detections
        self.keep_before_proposal_score = keep_before_proposal_score
        self.input_format = input_format
        self.default_dataset = default_dataset
        if compile:
            compile_layers([localizer, vision_language, region_head])

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        # Both before anything is built: a missing file is told at once. A bare word may be a tag.
        for key in ("LOCALIZER", "VISION_LANGUAGE"):
            if set(weights := cfg.MODEL[key].WEIGHTS) & set("./"):
                local_weights(weights, f"MODEL.{key}.WEIGHTS")
        localizer = LOCALIZER_REGISTRY.get(cfg.MODEL.LOCALIZER.NAME)(cfg)
        vision_language = VISION_LANGUAGE_REGISTRY.get(cfg.MODEL.VISION_LANGUAGE.NAME)(cfg)
        head = REGION_HEAD_REGISTRY.get(cfg.MODEL.REGION_HEAD.NAME)
        return {
            "localizer": localizer,
            "vision_language": vision_language,
            "region_head": head(cfg, localizer, vision_language),
            "text_embedder": TextEmbedder.from_config(cfg, vision_language),
            "loss": FocalLoss.from_config(cfg),
            "with_masks": cfg.MODEL.MASK_ON,
            "nearest_masks": cfg.TEST.NEAREST_MASKS,
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "keep_before_proposal_score": cfg.TEST.KEEP_BEFORE_PROPOSAL_SCORE,
            "input_format": cfg.INPUT.FORMAT,
            "default_dataset": next(iter((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)), None),
            "max_regions": cfg.MODEL.REGION_HEAD.MAX_REGIONS,
            "zoom": cfg.MODEL.ZOOM,
            "zoom_max_views": cfg.MODEL.ZOOM_MAX_VIEWS,
            "zoom_in_training": cfg.INPUT.ZOOM_TRAIN,
            "precision": cfg.MODEL.PRECISION,
            "compile": cfg.MODEL.COMPILE,
            "scoring": Scoring.from_config(cfg),
        }

    @property
    def device(self) -> torch.device:
        return self.vision_language.logit_scale.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's dicts, one per image:
                * image: (3, H, W), 0..255, channels as ``input_format`` says.
                * dataset_name: its ``thing_classes`` in the ``MetadataCatalog`` are the vocabulary.
                * instances (training): ``gt_boxes`` and ``gt_classes``.
                * mask_tokens (training, optional): (R, T) of those boxes; the localizer then rests.
                * proposals (inference): ``proposal_boxes`` and, as ``objectness_logits``, their
                  scores in 0..1, which Detectron2's own proposals get by a sigmoid.
                * height, width (inference, optional): of the output, by default those of ``image``.

        Returns:
            In training ``{"loss_cls": Tensor}``; at inference see :meth:`inference`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        tokens = None
        if all("mask_tokens" in x for x in batched_inputs):
            tokens = [x["mask_tokens"].to(self.device).float() for x in batched_inputs]
        images = input_images(batched_inputs, self.input_format, self.device)
        prompts = [BoxPrompts(target.gt_boxes) for target in targets]
        answers = self.answer(self.encode(images), prompts, with_masks=False, mask_tokens=tokens)
        logits = [
            self.score(answer.embeddings, self._class_names(x))
            for answer, x in zip(answers, batched_inputs)
        ]
        return self.losses(logits, [target.gt_classes for target in targets])

    @torch.no_grad()
    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Names regions.

        Args:
            batched_inputs: as for :meth:`forward`.
            detected_instances: regions found elsewhere (``pred_boxes``, XYXY in pixels of
                ``image``, and optionally ``scores``), instead of ``proposals`` in the inputs.
            do_postprocess: whether to scale results to ``height``, ``width`` and put them in dicts.

        Returns:
            ``{"instances": Instances}``, or ``Instances``, per image, as
            :func:`~regionspot_d2.modeling.naming.name_regions` makes them, best first.

        Raises:
            ValueError: an input has no image or regions, or boxes or scores that make no sense.
        """
        images = input_images(batched_inputs, self.input_format, self.device)
        regions = input_regions(batched_inputs, detected_instances, self.device)
        prompts = [BoxPrompts(boxes) for boxes, _ in regions]
        answers = self.answer(self.encode(images), prompts, with_masks=self.with_masks)
        results = []
        for x, answer, (_, scores) in zip(batched_inputs, answers, regions):
            height, width = answer.image_size
            size = (int(x.get("height", height)), int(x.get("width", width)))
            found = self.name(
                answer,
                self._class_names(x),
                region_scores=scores,
                score_thresh=self.score_thresh,
                max_pairs=self.max_detections,
                keep_before_region_score=self.keep_before_proposal_score,
                output_size=size if do_postprocess else None,
            )
            results.append({"instances": found} if do_postprocess else found)
        return results

    def encode(self, images: Sequence[Tensor], *, differentiable: bool = False) -> EncodedImages:
        """Prepares images for questions; each frozen encoder runs when it is first needed.

        Args:
            images: RGB, 0..255, each (3, H, W) of its own size, on the model's device.
            differentiable: see :class:`EncodedImages`.
        """
        parts = self.vision_language, self.localizer
        dtypes = precisions(self.precision, parts[0].logit_scale, training=self.training)
        return EncodedImages(tuple(images), *parts, *dtypes, differentiable)

    def answer(
        self,
        encoded: EncodedImages,
        prompts: Sequence[Prompts],
        *,
        with_masks: bool,
        mask_tokens: Sequence[Tensor] | None = None,
        zoom: float | None = None,
        max_views: int | None = None,
    ) -> list[Answer]:
        """Embeds regions in text space.

        Args:
            encoded: from :meth:`encode`.
            prompts: the regions of each image, pixels of the image; there may be none.
            with_masks: False skips whatever only masks need.
            mask_tokens: (R, T) of each image if known; the localizer then rests.
            zoom: the side of the view in which a region is seen, in longer sides of the region; 0
                is the whole image. By default ``MODEL.ZOOM``, unless in training.
            max_views: of an image, with ``zoom``. By default ``MODEL.ZOOM_MAX_VIEWS``.

        Returns:
            An answer per image, with its regions in the order asked.

        Raises:
            ValueError: ``zoom`` is neither 0 nor at least 1.
        """
        if zoom is None:
            zoom = self.zoom if self.zoom_in_training or not self.training else 0.0
        closely = Zoom(check_zoom(zoom), max_views or self.zoom_max_views) if zoom else None
        return answer_regions(
            encoded,
            self.region_head,
            [prompt.to(self.device) for prompt in prompts],
            with_masks=with_masks,
            mask_tokens=mask_tokens,
            max_regions=self.max_regions,
            zoom=closely,
        )

    @torch.no_grad()
    def attention(self, encoded: EncodedImages, prompts: Prompts) -> Tensor:
        """Where the region head looks to name each region of one image (paper, Figure 4).

        Returns:
            (R, rows, columns) over the grid of image tokens, which covers the whole image. Each map
            sums to 1, less what a class token takes.

        Raises:
            ValueError: the region head has no attention, or there are more than ``max_regions``.
        """
        return attention_maps(encoded, self.region_head, prompts.to(self.device), self.max_regions)

    def score(self, embeddings: Tensor, words: Words) -> Tensor:
        """Compares regions (R, D), rows of unit length, with a vocabulary of M members.

        Returns:
            Logits (R, M), float32: cosines times the vision-language model's temperature, of a
            member with several vectors the largest.
        """
        vocabulary = as_vocabulary(words, repeats=True)
        vectors = self.text_embedder(vocabulary, embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):  # a cosine x 100 needs digits
            scale = self.vision_language.logit_scale.float().exp()
            return vocabulary.reduce(embeddings.float() @ vectors.T * scale)

    def name(self, answer: Answer, words: Words, **rules: Any) -> Instances:
        """Names the regions of an image.

        Args:
            answer: from :meth:`answer`.
            words: the vocabulary, see :func:`~regionspot_d2.modeling.words.as_vocabulary`.
            **rules: of :func:`~regionspot_d2.modeling.naming.name_regions`; the ``scoring`` is by
                default that of the model.

        Returns:
            What that function returns, with ``pred_masks`` if the answer has masks.
        """
        rules = {"scoring": self.scoring, "masks_by_nearest": self.nearest_masks, **rules}
        vocabulary = rules["scoring"].joined(as_vocabulary(words, repeats=True))
        together = max(1, naming.MAX_PAIRS_TOGETHER // len(vocabulary.members))
        logits = (self.score(part, vocabulary) for part in answer.embeddings.split(together))
        rules = {"masks": answer.mask_logits and answer.masks, **rules, "vocabulary": vocabulary}
        return naming.name_regions(logits, answer.boxes, answer.image_size, **rules)

    def losses(self, logits: list[Tensor], gt_classes: list[Tensor]) -> dict[str, Tensor]:
        """See :class:`~regionspot_d2.modeling.region_head.FocalLoss`."""
        return {"loss_cls": self.loss(logits, gt_classes)}

    def _class_names(self, x: dict[str, Any]) -> list[str]:
        return dataset_class_names(x.get("dataset_name", self.default_dataset))
