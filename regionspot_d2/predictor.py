"""The Python interface: set an image once, then ask for any regions with any words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor

from .checkpoint import RegionSpotCheckpointer
from .data.images import read_image, to_rgb_array
from .modeling.regionspot import EncodedImages, RegionSpot
from .modeling.vocabulary import check_names
from .regions import as_boxes, as_masks, as_points

ImageLike: TypeAlias = str | os.PathLike | np.ndarray | Image.Image | Tensor


class RegionSpotPredictor:
    """Names regions of one image after another.

    Example::

        predictor = RegionSpotPredictor(cfg)
        predictor.set_image("street.jpg")
        found = predictor.predict(boxes=[[10, 20, 200, 300]], vocabulary=["dog", "bicycle"])
        print(predictor.vocabulary[found.pred_classes[0]], float(found.scores[0]))

    The image is encoded once. New regions cost the localizer's decoder, new words a text lookup.
    """

    def __init__(
        self, model: CfgNode | RegionSpot, *, vocabulary: Sequence[str] | None = None
    ) -> None:
        """
        Args:
            model: a config, from which the model is built and its weights loaded; or a model.
            vocabulary: words for :meth:`predict` calls that bring none.
        """
        if isinstance(model, CfgNode):
            weights = model.MODEL.WEIGHTS
            model = build_model(model)
            RegionSpotCheckpointer(model).load(weights)
        self.model: RegionSpot = model.eval()
        self.vocabulary: list[str] = []
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)
        self._encoded: EncodedImages | None = None

    def set_vocabulary(self, names: Sequence[str]) -> None:
        """Sets the words of the calls that follow.

        Args:
            names: class names.

        Raises:
            ValueError: if there are none, or one is empty, given twice, or unknown to the text side.
        """
        check_names(names)
        self.model.text_embedder(names, self.model.device)
        self.vocabulary = list(names)

    def set_image(self, image: ImageLike, *, channels: str = "RGB") -> None:
        """Encodes an image for the calls that follow.

        Args:
            image: a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W), 0..255.
            channels: "RGB" or "BGR", the order in an array or tensor.
        """
        with torch.no_grad():
            self._encoded = self.model.encode([self._to_tensor(image, channels)])

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the image that was set."""
        return self._image().image_sizes[0]

    @torch.no_grad()
    def predict(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
        vocabulary: Sequence[str] | None = None,
        topk: int = 1,
    ) -> Instances:
        """Names regions of the image. Prompts of all kinds may be mixed; they are regions of one question.

        The regions of an image attend to each other in a trained head: an answer depends on which others are asked
        in the same call.

        Args:
            boxes: (R1, 4) XYXY, pixels of the image.
            points: R2 regions, each (P, 2) XY in pixels of the image, P may differ; or (R2, 2).
            point_labels: like ``points``, 1 on the region, 0 on the background; by default all 1.
            masks: (R3, H, W).
            vocabulary: the words; they stay set for later calls.
            topk: names per region.

        Returns:
            ``Instances`` of the image's size, ``topk`` for each region in the order boxes, points, masks, best name
            first: ``pred_boxes``, ``scores`` (softmax over the words), ``pred_classes`` (places in
            :attr:`vocabulary`), ``region_index`` and, if masks are on, ``pred_masks`` (bool).

        Raises:
            ValueError: if there is no image, no region or no vocabulary, or a region or name cannot be meant.
        """
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)
        if not self.vocabulary:
            raise ValueError(
                "There are no words yet: pass vocabulary=[...] or call set_vocabulary."
            )
        if topk < 1:
            raise ValueError(f"topk is {topk}; at least one name per region is expected.")
        tokens, found_boxes, mask_logits = self._localize(boxes, points, point_labels, masks)
        [embeddings], _ = self.model.embed(self._image(), [found_boxes], [tokens])
        probabilities = self.model.score(embeddings, self.vocabulary).softmax(1)
        scores, classes = probabilities.topk(min(topk, len(self.vocabulary)), dim=1)
        index = (
            torch.arange(len(tokens), device=scores.device)[:, None].expand_as(classes).flatten()
        )
        result = Instances(self.image_size)
        result.pred_boxes = found_boxes[index]
        result.scores = scores.flatten()
        result.pred_classes = classes.flatten()
        result.region_index = index
        if self.model.with_masks and mask_logits is not None:
            full = self.model.localizer.full_size_masks(mask_logits, self.image_size)
            result.pred_masks = full[index]
        return result

    @torch.no_grad()
    def region_embeddings(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
    ) -> Tensor:
        """Embeds regions in the space of the words, for search and clustering.

        Args:
            boxes, points, point_labels, masks: as for :meth:`predict`.

        Returns:
            (R, D), rows of unit length.
        """
        tokens, found_boxes, _ = self._localize(boxes, points, point_labels, masks)
        [embeddings], _ = self.model.embed(self._image(), [found_boxes], [tokens])
        return embeddings

    @torch.no_grad()
    def attention_maps(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
    ) -> Tensor:
        """Where the trained head looks to name each region (paper, Figure 4).

        Args:
            boxes, points, point_labels, masks: as for :meth:`predict`.

        Returns:
            (R, rows, columns) over the grid of image tokens, which covers the whole image. Each map sums to 1, less
            what a class token takes.

        Raises:
            ValueError: if the region head has no attention, as :class:`PooledRegionHead`.
        """
        head = self.model.region_head
        if not hasattr(head, "attention"):
            raise ValueError(f"{type(head).__name__} is not a trained head and has no attention.")
        tokens, _, _ = self._localize(boxes, points, point_labels, masks)
        maps = head.attention(tokens, self._image().image_tokens)
        prefix = self.model.vision_language.num_prefix_tokens
        return maps[:, prefix:].reshape(len(maps), *self.model.vision_language.grid_size)

    def predict_batch(
        self,
        images: Sequence[ImageLike],
        boxes: Sequence[Any],
        *,
        vocabulary: Sequence[str] | None = None,
        topk: int = 1,
    ) -> list[Instances]:
        """Names boxes of many images.

        Args:
            images: as for :meth:`set_image`.
            boxes: per image (R, 4) XYXY, pixels of it.
            vocabulary: the words; they stay set for later calls.
            topk: names per region.

        Returns:
            Per image what :meth:`predict` returns.
        """
        if len(images) != len(boxes):
            raise ValueError(f"There are {len(images)} images but boxes for {len(boxes)}.")
        results = []
        for image, box in zip(images, boxes):
            self.set_image(image)
            results.append(self.predict(boxes=box, vocabulary=vocabulary, topk=topk))
        return results

    def _image(self) -> EncodedImages:
        if self._encoded is None:
            raise ValueError("There is no image yet: call set_image first.")
        return self._encoded

    def _localize(
        self, boxes: Any, points: Any, point_labels: Any, masks: Any
    ) -> tuple[Tensor, Boxes, Tensor | None]:
        image = self._image()
        if boxes is None and points is None and masks is None:
            raise ValueError("There are no regions: pass boxes=, points= or masks=.")
        prompts: list[Any] = []
        if boxes is not None:
            prompts.append(as_boxes(boxes, self.image_size))
        if points is not None:
            count = sum(len(prompt) for prompt in prompts)
            prompts.append(as_points(points, point_labels, self.image_size, count))
        if masks is not None:
            count = sum(len(getattr(prompt, "points", prompt)) for prompt in prompts)
            prompts.append(as_masks(masks, self.image_size, count))
        tokens, found_boxes, mask_logits = [], [], []
        for prompt in prompts:
            prompt = _to_device(prompt, self.model.device)
            with_masks = self.model.with_masks or points is not None
            found, logits = self.model.localize(image, [prompt], with_masks=with_masks)
            tokens.append(found[0])
            mask_logits += logits or []
            logit = logits[0] if logits is not None else None
            found_boxes.append(self.model.region_boxes(prompt, self.image_size, logit))
        return (
            torch.cat(tokens),
            Boxes.cat(found_boxes),
            torch.cat(mask_logits) if mask_logits else None,
        )

    def _to_tensor(self, image: ImageLike, channels: str) -> Tensor:
        if channels not in ("RGB", "BGR"):
            raise ValueError(f"channels is '{channels}'; it must be 'RGB' or 'BGR'.")
        if isinstance(image, (str, os.PathLike)):
            array, channels = read_image(os.fspath(image)), "RGB"
        elif isinstance(image, Image.Image):
            array, channels = to_rgb_array(image), "RGB"
        elif isinstance(image, Tensor):
            array = (
                image.detach().permute(1, 2, 0).cpu().numpy() if image.dim() == 3 else image.numpy()
            )
        else:
            array = image
        if array.ndim == 2:
            array = np.repeat(array[..., None], 3, axis=2)
        if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise ValueError(
                f"The image has the shape {array.shape}; (H, W, 3) is expected of an array, (3, H, W) of a tensor."
            )
        if channels == "BGR":
            array = array[..., ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
        return tensor.to(self.model.device)


def _to_device(prompt: Any, device: torch.device) -> Any:
    if isinstance(prompt, tuple):
        return type(prompt)(*(part.to(device) for part in prompt))
    return prompt.to(device)
