"""RegionSpot, the meta-architecture: regions and words in, named regions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..files import cache_dir, local_weights
from .localizer import LOCALIZER_REGISTRY, Localizer, PointPrompts, Prompts
from .region_head import REGION_HEAD_REGISTRY
from .vision_language import VISION_LANGUAGE_REGISTRY, VisionLanguageModel
from .vocabulary import TextEmbedder

# Boxes of point prompts are read off masks of this long side, in pixels.
_POINT_BOX_SIDE = 256


@dataclass
class EncodedImages:
    """What the frozen models know of images before any region is asked for.

    Attributes:
        image_sizes: (H, W) of each image.
        image_tokens: (B, L, W) of the vision-language model.
        embeddings: one of the localizer per image; empty where mask tokens are at hand already, or until a mask is
            asked for if the region head reads no mask tokens.
        images: the images themselves, for a localizer that runs late.
    """

    image_sizes: list[tuple[int, int]]
    image_tokens: Tensor
    embeddings: list[Tensor]
    images: list[Tensor]


@META_ARCH_REGISTRY.register()
class RegionSpot(nn.Module):
    """Names any region of an image with any words (Yang et al., "Recognize Any Regions", NeurIPS 2024).

    A frozen localizer turns regions into mask tokens, a frozen vision-language model turns the image into tokens and
    the words into embeddings; the region head, the only trained part, joins them.
    """

    @configurable
    def __init__(
        self,
        *,
        localizer: Localizer,
        vision_language: VisionLanguageModel,
        region_head: nn.Module,
        text_embedder: TextEmbedder,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        with_masks: bool = True,
        score_thresh: float = 0.0,
        max_detections: int = 300,
        keep_before_proposal_score: int = 0,
        input_format: str = "RGB",
        default_dataset: str | None = None,
    ) -> None:
        """
        Args:
            localizer: prompts to mask tokens, frozen.
            vision_language: images to tokens and words to embeddings, frozen.
            region_head: mask tokens and image tokens to region embeddings.
            text_embedder: embeds vocabularies with ``vision_language``.
            focal_alpha: alpha of the focal loss.
            focal_gamma: gamma of the focal loss.
            with_masks: whether inference gives ``pred_masks``.
            score_thresh: results below this score are dropped.
            max_detections: results kept per image, (region, name) pairs by score; negative keeps all.
            keep_before_proposal_score: if positive, only so many pairs, by softmax alone, go on to be multiplied by
                the score of their region: the order of the published code.
            input_format: channel order of ``image`` in the inputs, "RGB" or "BGR".
            default_dataset: data set whose names serve an input without ``dataset_name``.
        """
        super().__init__()
        self.localizer = localizer
        self.vision_language = vision_language
        self.region_head = region_head
        self.text_embedder = text_embedder
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.with_masks = with_masks
        self.score_thresh = score_thresh
        self.max_detections = max_detections
        self.keep_before_proposal_score = keep_before_proposal_score
        self.input_format = input_format
        self.default_dataset = default_dataset

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        # Both before anything is built: a missing file is told at once.
        for key in ("LOCALIZER", "VISION_LANGUAGE"):
            if cfg.MODEL[key].WEIGHTS:
                local_weights(cfg.MODEL[key].WEIGHTS, f"MODEL.{key}.WEIGHTS")
        localizer = LOCALIZER_REGISTRY.get(cfg.MODEL.LOCALIZER.NAME)(cfg)
        vision_language = VISION_LANGUAGE_REGISTRY.get(cfg.MODEL.VISION_LANGUAGE.NAME)(cfg)
        build_head = REGION_HEAD_REGISTRY.get(cfg.MODEL.REGION_HEAD.NAME)
        datasets = tuple(cfg.DATASETS.TEST) + tuple(cfg.DATASETS.TRAIN)
        return {
            "localizer": localizer,
            "vision_language": vision_language,
            "region_head": build_head(cfg, localizer, vision_language),
            "text_embedder": TextEmbedder(vision_language, cache_dir() / "vocabularies"),
            "focal_alpha": cfg.MODEL.REGION_HEAD.FOCAL_ALPHA,
            "focal_gamma": cfg.MODEL.REGION_HEAD.FOCAL_GAMMA,
            "with_masks": cfg.MODEL.MASK_ON,
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "keep_before_proposal_score": cfg.TEST.KEEP_BEFORE_PROPOSAL_SCORE,
            "input_format": cfg.INPUT.FORMAT,
            "default_dataset": datasets[0] if datasets else None,
        }

    @property
    def device(self) -> torch.device:
        return self.vision_language.logit_scale.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's dicts, one per image:

                * image: (3, H, W), 0..255, channels as ``input_format`` says.
                * dataset_name: its ``thing_classes`` in the ``MetadataCatalog`` are the words.
                * instances (training): ``gt_boxes`` and ``gt_classes``.
                * mask_tokens (training, optional): (R, token_dim) of those boxes, when they were extracted before;
                  the localizer then does not run.
                * proposals (inference): ``proposal_boxes`` and their scores as ``objectness_logits``.
                * height, width (inference, optional): size of the output; by default that of ``image``.

        Returns:
            In training ``{"loss_cls": Tensor}``; at inference a list of ``{"instances": Instances}``, see
            :meth:`inference`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        tokens = None
        if all("mask_tokens" in x for x in batched_inputs):
            dtype = torch.get_default_dtype()
            tokens = [x["mask_tokens"].to(self.device, dtype) for x in batched_inputs]
        logits, _ = self.classify(
            self._images(batched_inputs),
            [target.gt_boxes for target in targets],
            [self._words(x) for x in batched_inputs],
            tokens,
        )
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
            detected_instances: regions found elsewhere (``pred_boxes``, XYXY in pixels of ``image``, and optionally
                ``scores``), instead of ``proposals`` in the inputs.
            do_postprocess: whether results are scaled to ``height``, ``width`` and wrapped in dicts.

        Returns:
            A list of ``{"instances": Instances}``, or of ``Instances``, with ``pred_boxes``, ``scores`` (softmax over
            the words times the score of the region), ``pred_classes``, ``region_index`` (place of the region in the
            input) and, if masks are on, ``pred_masks`` (bool, at output size), best first.

        Raises:
            ValueError: if an input has no regions, or boxes that are not finite numbers.
        """
        images = self._images(batched_inputs)
        boxes, box_scores = self._regions(batched_inputs, detected_instances)
        encoded = self.encode(images)
        vocabularies = [self._words(x) for x in batched_inputs]
        logits, mask_logits = self.classify(encoded, list(boxes), vocabularies)
        results = []
        for i, size in enumerate(encoded.image_sizes):
            found = self._select(logits[i], boxes[i], box_scores[i], size)
            output_size = size
            if do_postprocess:
                x = batched_inputs[i]
                output_size = (int(x.get("height", size[0])), int(x.get("width", size[1])))
                found = detector_postprocess(found, *output_size)
            if mask_logits is not None:
                # Several names of a region share its mask, and dropped regions never reach full size.
                rows, places = found.region_index.unique(return_inverse=True)
                masks = self.localizer.full_size_masks(mask_logits[i][rows], size, output_size)
                found.pred_masks = masks[places]
            results.append({"instances": found} if do_postprocess else found)
        return results

    def encode(self, images: list[Tensor], *, with_localizer: bool = True) -> EncodedImages:
        """Runs the frozen image encoders.

        Args:
            images: RGB, 0..255, each (3, H, W) of its own size, on the model's device.
            with_localizer: False where mask tokens are at hand.
        """
        with_localizer = with_localizer and (self._uses_mask_tokens or self.with_masks)
        with torch.no_grad():
            return EncodedImages(
                image_sizes=[(image.shape[-2], image.shape[-1]) for image in images],
                image_tokens=self.vision_language(images),
                embeddings=self.localizer.encode_image(images) if with_localizer else [],
                images=images,
            )

    @property
    def _uses_mask_tokens(self) -> bool:
        return getattr(self.region_head, "uses_mask_tokens", True)

    def classify(
        self,
        images: list[Tensor] | EncodedImages,
        regions: list[Prompts],
        vocabularies: Sequence[Sequence[str]],
        mask_tokens: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Scores regions against words.

        Args:
            images: RGB, 0..255, each (3, H, W); or what :meth:`encode` made of them.
            regions: per image R boxes (XYXY), points or masks, pixels of the image. R may be 0.
            vocabularies: per image its C names.
            mask_tokens: per image (R, token_dim) if known; the localizer then does not run.

        Returns:
            Per image the logits (R, C): cosines times the vision-language model's temperature; and per image mask
            logits (R, 1, h, w), None with ``mask_tokens`` or if masks are off.
        """
        embeddings, mask_logits = self.embed(images, regions, mask_tokens)
        return [self.score(e, names) for e, names in zip(embeddings, vocabularies)], mask_logits

    def embed(
        self,
        images: list[Tensor] | EncodedImages,
        regions: list[Prompts],
        mask_tokens: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Embeds regions in the space of the words.

        Args:
            images, regions, mask_tokens: as for :meth:`classify`.

        Returns:
            Per image region embeddings (R, D), rows of unit length; and mask logits as for :meth:`classify`.
        """
        if not isinstance(images, EncodedImages):
            images = self.encode(images, with_localizer=mask_tokens is None)
        mask_logits: list[Tensor] | None = None
        if mask_tokens is None:
            # The box of a point is that of its mask.
            points = any(isinstance(region, PointPrompts) for region in regions)
            with_masks = points or (self.with_masks and not self.training)
            mask_tokens, mask_logits = self.localize(images, regions, with_masks=with_masks)
        boxes = []
        for i, (region, size) in enumerate(zip(regions, images.image_sizes)):
            logits = mask_logits[i] if mask_logits is not None else None
            box = self.region_boxes(region, size, logits)
            boxes.append(box.tensor / box.tensor.new_tensor([size[1], size[0]] * 2))
        embeddings = self.region_head(mask_tokens, images.image_tokens, boxes)
        return embeddings, mask_logits

    def localize(
        self, images: EncodedImages, regions: list[Prompts], *, with_masks: bool
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Runs the localizer's decoder: ``Localizer.forward`` on images that are encoded already.

        It does not run for a region head that reads no mask tokens, unless masks are wanted; the tokens are then zeros.
        """
        if not (with_masks or self._uses_mask_tokens):
            width = self.localizer.token_dim
            return [images.image_tokens.new_zeros(len(region), width) for region in regions], None
        if not images.embeddings:
            with torch.no_grad():
                images.embeddings = self.localizer.encode_image(images.images)
        found = [
            self.localizer.decode(*args, with_masks=with_masks)
            for args in zip(images.embeddings, images.image_sizes, regions)
        ]
        masks = [mask for _, mask in found if mask is not None]
        return [token for token, _ in found], masks if with_masks else None

    def region_boxes(
        self, region: Prompts, image_size: tuple[int, int], mask_logits: Tensor | None = None
    ) -> Boxes:
        """Boxes of regions: of boxes themselves, of masks their bounds, of points those around them and their masks.

        Args:
            region: R prompts on one image.
            image_size: its (H, W).
            mask_logits: (R, 1, h, w); needed for points.

        Returns:
            R boxes, XYXY, pixels of the image, inside it.
        """
        if isinstance(region, Boxes):
            boxes = Boxes(region.tensor.clone())
        elif isinstance(region, BitMasks):
            boxes = region.get_bounding_boxes()
        else:
            if mask_logits is None:
                raise ValueError(
                    "The box of a point is the box of its mask; pass the mask logits with it."
                )
            scale = min(1.0, _POINT_BOX_SIDE / max(image_size))
            size = tuple(max(1, round(length * scale)) for length in image_size)
            masks = self.localizer.full_size_masks(mask_logits, image_size, (size[0], size[1]))
            boxes = BitMasks(masks).get_bounding_boxes()
            boxes.scale(image_size[1] / size[1], image_size[0] / size[0])
            boxes = _around_points(boxes.tensor, masks.flatten(1).any(1), region, image_size)
        boxes = boxes.to(self.device)
        boxes.clip(image_size)
        return boxes

    def score(self, region_embeddings: Tensor, names: Sequence[str]) -> Tensor:
        """Compares regions with words.

        Args:
            region_embeddings: (R, D), rows of unit length.
            names: C class names.

        Returns:
            Logits (R, C), float32: cosines times the vision-language model's temperature.
        """
        words = self.text_embedder(names, region_embeddings.device)
        # A cosine times 100 needs more digits than half precision has.
        with torch.autocast(region_embeddings.device.type, enabled=False):
            scale = self.vision_language.logit_scale.float().exp()
            return region_embeddings.float() @ words.T * scale

    def losses(self, logits: list[Tensor], gt_classes: list[Tensor]) -> dict[str, Tensor]:
        """Sigmoid focal loss, summed over the words, averaged over the regions of all images and processes.

        Args:
            logits: per image (R, C); C may differ.
            gt_classes: per image (R,), in 0..C-1.

        Returns:
            ``{"loss_cls": Tensor}``.
        """
        count = sum(len(classes) for classes in gt_classes)
        total = sum(
            sigmoid_focal_loss(
                logit,
                F.one_hot(classes, logit.shape[1]).to(logit.dtype),
                alpha=self.focal_alpha,
                gamma=self.focal_gamma,
                reduction="sum",
            )
            for logit, classes in zip(logits, gt_classes)
        )
        if has_event_storage():
            correct = sum(int((x.argmax(1) == y).sum()) for x, y in zip(logits, gt_classes))
            get_event_storage().put_scalar("[metric]accuracy", correct / max(count, 1))
        return {"loss_cls": total / _mean_over_processes(count, self.device)}

    def _images(self, batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
        images = [x["image"].to(self.device) for x in batched_inputs]
        return images if self.input_format == "RGB" else [image.flip(0) for image in images]

    def _words(self, x: dict[str, Any]) -> Sequence[str]:
        name = x.get("dataset_name", self.default_dataset)
        if name is None:
            raise ValueError(
                "An input without 'dataset_name' has no words: set it to a data set in the MetadataCatalog "
                "that has 'thing_classes', or name one in DATASETS.TEST."
            )
        words = MetadataCatalog.get(name).get("thing_classes")
        if not words:
            raise ValueError(
                f"The data set '{name}' has no 'thing_classes' in the MetadataCatalog; "
                f'MetadataCatalog.get("{name}").thing_classes = [...] sets the vocabulary.'
            )
        return words

    def _regions(
        self, batched_inputs: list[dict[str, Any]], detected_instances: list[Instances] | None
    ) -> tuple[list[Boxes], list[Tensor]]:
        boxes, scores = [], []
        for i, x in enumerate(batched_inputs):
            if detected_instances is not None:
                given = detected_instances[i].to(self.device)
                box = given.pred_boxes
                score = given.scores if given.has("scores") else box.tensor.new_ones(len(box))
            elif "proposals" in x:
                given = x["proposals"].to(self.device)
                box, score = given.proposal_boxes, given.objectness_logits
            else:
                raise ValueError(
                    f"Input {i} ({x.get('file_name', 'no file name')}) has no regions: it needs 'proposals' "
                    "(MODEL.LOAD_PROPOSALS: True with DATASETS.PROPOSAL_FILES_TEST), or detected_instances."
                )
            bad = (~box.tensor.isfinite()).any(1).nonzero()
            if len(bad):
                raise ValueError(
                    f"Box {int(bad[0])} of input {i} ({x.get('file_name', 'no file name')}) is not finite: "
                    f"{box.tensor[bad[0, 0]].tolist()}."
                )
            boxes.append(box)
            scores.append(score.float())
        return boxes, scores

    def _select(
        self, logits: Tensor, boxes: Boxes, box_scores: Tensor, image_size: tuple[int, int]
    ) -> Instances:
        names = logits.shape[1]
        probabilities = logits.softmax(1).flatten()
        pairs = torch.arange(len(probabilities), device=logits.device)
        if 0 < self.keep_before_proposal_score < len(pairs):
            pairs = probabilities.topk(self.keep_before_proposal_score).indices
        scores = probabilities[pairs] * box_scores[pairs // names]
        above = scores > self.score_thresh
        pairs, scores = pairs[above], scores[above]
        if 0 <= self.max_detections < len(pairs):
            scores, best = scores.topk(self.max_detections)
        else:
            scores, best = scores.sort(descending=True, stable=True)
        pairs = pairs[best]
        found = Instances(image_size)
        found.pred_boxes = Boxes(boxes.tensor[pairs // names])
        found.scores = scores
        found.pred_classes = pairs % names
        found.region_index = pairs // names
        return found


def _mean_over_processes(count: int, device: torch.device) -> float:
    """Regions per process, so that averaged gradients are those of one process with the whole batch."""
    if comm.get_world_size() == 1:
        return max(count, 1)
    total = torch.tensor(float(count), device=device)
    torch.distributed.all_reduce(total)
    return max(total.item(), 1.0) / comm.get_world_size()


def _around_points(
    boxes: Tensor, found: Tensor, region: PointPrompts, image_size: tuple[int, int]
) -> Boxes:
    """Widens the boxes of masks to hold the points on their regions, which a poor mask leaves out.

    Args:
        boxes: (R, 4), XYXY; of no meaning where the mask is empty.
        found: (R,) bool, whether there is a mask.
        region: R point prompts, in the same frame.
        image_size: (H, W) of the image; a point on its far edge means the last pixel.
    """
    inside = (region.labels == 1)[..., None]
    height, width = image_size
    pixels = region.points.floor().minimum(region.points.new_tensor([width - 1, height - 1]))
    first = pixels.masked_fill(~inside, torch.inf).amin(1)
    last = pixels.masked_fill(~inside, -torch.inf).amax(1) + 1
    start = torch.where(found[:, None], torch.minimum(boxes[:, :2], first), first)
    end = torch.where(found[:, None], torch.maximum(boxes[:, 2:], last), last)
    around = torch.cat([start, end], dim=1)
    # Background points alone, and no mask.
    return Boxes(around.where(around.isfinite(), around.new_zeros(())))
