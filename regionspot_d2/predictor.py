"""The Python interface: set an image once, then ask for any regions with any words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import length_hint
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
from .modeling import PointPrompts
from .modeling.localizer import Prompts
from .modeling.regionspot import EncodedImages, RegionSpot
from .modeling.vocabulary import check_names
from .regions import as_boxes, as_prompts

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
        self._checked: set[tuple[str, ...]] = set()
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
        # Reading a thousand names takes longer than naming a box; a vocabulary that comes back was read.
        if (
            isinstance(names, str)
            or set(map(type, names)) != {str}
            or tuple(names) not in self._checked
        ):
            check_names(names)
            self.model.text_embedder(names, self.model.device)
            self._checked.add(tuple(names))
        self.vocabulary = list(names)

    def set_image(self, image: ImageLike, *, channels: str = "RGB") -> None:
        """Encodes an image for the calls that follow.

        Args:
            image: a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W); values in 0..255.
            channels: "RGB" or "BGR", the order in an array or tensor.

        Raises:
            ValueError: if it is none of these.
            ImageReadError: if a file cannot be read.
        """
        with torch.no_grad():
            self._encoded = self.model.encode([_as_tensor(image, channels).to(self.model.device)])

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
        self._check_question(vocabulary, topk)
        image = self._image()
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        tokens, found_boxes, mask_logits = self._localize(image, prompts)
        [embeddings], _ = self.model.embed(image, [found_boxes], [tokens])
        return self._name(embeddings, found_boxes, mask_logits, self.image_size, topk)

    @torch.no_grad()
    def region_embeddings(self, **regions: Any) -> Tensor:
        """Embeds regions in the space of the words, for search and clustering.

        Args:
            **regions: ``boxes``, ``points``, ``point_labels`` and ``masks`` as for :meth:`predict`.

        Returns:
            (R, D), rows of unit length.
        """
        image = self._image()
        tokens, boxes, _ = self._localize(image, as_prompts(self.image_size, **regions))
        [embeddings], _ = self.model.embed(image, [boxes], [tokens])
        return embeddings

    @torch.no_grad()
    def attention_maps(self, **regions: Any) -> Tensor:
        """Where the trained head looks to name each region (paper, Figure 4).

        Args:
            **regions: ``boxes``, ``points``, ``point_labels`` and ``masks`` as for :meth:`predict`.

        Returns:
            (R, rows, columns) over the grid of image tokens, which covers the whole image. Each map sums to 1, less
            what a class token takes.

        Raises:
            ValueError: if the region head has no attention, as :class:`PooledRegionHead`.
        """
        head = self.model.region_head
        if not hasattr(head, "attention"):
            raise ValueError(f"{type(head).__name__} is not a trained head and has no attention.")
        image = self._image()
        tokens, _, _ = self._localize(image, as_prompts(self.image_size, **regions))
        maps = head.attention(tokens, image.image_tokens)
        prefix = self.model.vision_language.num_prefix_tokens
        return maps[:, prefix:].reshape(len(maps), *self.model.vision_language.grid_size)

    @torch.no_grad()
    def predict_batch(
        self,
        images: Iterable[ImageLike],
        boxes: Sequence[Any],
        *,
        channels: str = "RGB",
        vocabulary: Sequence[str] | None = None,
        topk: int = 1,
        batch_size: int = 8,
    ) -> list[Instances]:
        """Names boxes of many images, ``batch_size`` of them at a time.

        Only so many images are held at once; of the results, masks are the only large part. The image of
        :meth:`set_image` stays set.

        Args:
            images: as for :meth:`set_image`, of any sizes.
            boxes: per image (R, 4) XYXY, pixels of it; R may be 0.
            channels: "RGB" or "BGR", the order in arrays and tensors.
            vocabulary: the words; they stay set for later calls.
            topk: names per region.
            batch_size: images that the encoders see together; it changes speed and memory, not results.

        Returns:
            Per image what :meth:`predict` returns.

        Raises:
            ValueError: as :meth:`predict`, with the number of the image; or if there are not as many boxes as images.
        """
        self._check_question(vocabulary, topk)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least one image is expected.")
        count = length_hint(images, len(boxes))
        if count != len(boxes):
            raise ValueError(f"There are {count} images but boxes for {len(boxes)}.")
        results: list[Instances] = []
        following = iter(images)
        while chunk := list(islice(following, batch_size)):
            tensors, regions = [], []
            for number, image in enumerate(chunk, start=len(results)):
                if number >= len(boxes):
                    raise ValueError(f"There are more images than the {len(boxes)} with boxes.")
                try:
                    tensor = _as_tensor(image, channels)
                    regions.append(as_boxes(boxes[number], _size(tensor)).to(self.model.device))
                except ValueError as error:
                    raise ValueError(f"Image {number}: {error}") from error
                tensors.append(tensor.to(self.model.device))
            encoded = self.model.encode(tensors)
            embeddings, logits = self.model.embed(encoded, list(regions))
            for i, size in enumerate(encoded.image_sizes):
                mask_logits = None if logits is None else logits[i]
                results.append(self._name(embeddings[i], regions[i], mask_logits, size, topk))
        if len(results) < len(boxes):
            raise ValueError(f"There are {len(results)} images but boxes for {len(boxes)}.")
        return results

    def _check_question(self, vocabulary: Sequence[str] | None, topk: int) -> None:
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)
        if not self.vocabulary:
            raise ValueError(
                "There are no words yet: pass vocabulary=[...] or call set_vocabulary."
            )
        if topk < 1:
            raise ValueError(f"topk is {topk}; at least one name per region is expected.")

    def _image(self) -> EncodedImages:
        if self._encoded is None:
            raise ValueError("There is no image yet: call set_image first.")
        return self._encoded

    def _localize(
        self, image: EncodedImages, prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Boxes, Tensor | None]:
        """Mask tokens, boxes and, if masks are on, mask logits of the regions of all prompts."""
        tokens, boxes, masks = [], [], []
        for prompt in prompts:
            prompt = _to_device(prompt, self.model.device)
            # The box of a point is that of its mask.
            with_masks = self.model.with_masks or isinstance(prompt, PointPrompts)
            [found], logits = self.model.localize(image, [prompt], with_masks=with_masks)
            mask = logits[0] if logits is not None else None
            tokens.append(found)
            boxes.append(self.model.region_boxes(prompt, image.image_sizes[0], mask))
            if mask is not None and self.model.with_masks:
                masks.append(mask)
        return torch.cat(tokens), Boxes.cat(boxes), torch.cat(masks) if masks else None

    def _name(
        self,
        embeddings: Tensor,
        boxes: Boxes,
        mask_logits: Tensor | None,
        image_size: tuple[int, int],
        topk: int,
    ) -> Instances:
        probabilities = self.model.score(embeddings, self.vocabulary).softmax(1)
        scores, classes = probabilities.topk(min(topk, len(self.vocabulary)), dim=1)
        index = torch.arange(len(boxes), device=scores.device)[:, None].expand_as(classes).flatten()
        result = Instances(image_size)
        result.pred_boxes = boxes[index]
        result.scores = scores.flatten()
        result.pred_classes = classes.flatten()
        result.region_index = index
        if mask_logits is not None:
            masks = self.model.localizer.full_size_masks(mask_logits, image_size)
            result.pred_masks = masks[index]
        return result


def _as_tensor(image: ImageLike, channels: str) -> Tensor:
    """A copy of the image, which a caller may draw on later: RGB (3, H, W), 0..255, uint8 or float32."""
    if channels not in ("RGB", "BGR"):
        raise ValueError(f"channels is '{channels}'; it must be 'RGB' or 'BGR'.")
    if isinstance(image, (str, os.PathLike)):
        image, channels = read_image(image), "RGB"
    elif isinstance(image, Image.Image):
        image, channels = to_rgb_array(image), "RGB"
    if isinstance(image, Tensor):
        pixels = image.detach().clone()
        pixels = pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels
    elif isinstance(image, np.ndarray):
        pixels = torch.from_numpy(image.copy())
    else:
        raise ValueError(
            f"The image is of the type {type(image).__name__}; a path, a PIL image, an array or a tensor is expected."
        )
    if pixels.dim() == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    if pixels.dim() != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"The image has the shape {tuple(image.shape)}; (H, W, 3) is expected of an array, (3, H, W) of a tensor, "
            "(H, W) of a grey one."
        )
    if pixels.dtype != torch.uint8:
        pixels = _checked_range(pixels)
    pixels = pixels.permute(2, 0, 1)
    return (pixels.flip(0) if channels == "BGR" else pixels).contiguous()


def _checked_range(pixels: Tensor) -> Tensor:
    values = pixels.float()
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"The image has values from {low:g} to {high:g}; 0..255 is expected.")
    if 0 < high <= 1 and (pixels.is_floating_point() or pixels.dtype == torch.bool):
        raise ValueError(
            f"The image has values from {low:g} to {high:g}; 0..255 is expected. Multiply by 255 if 1 is white."
        )
    return values if pixels.is_floating_point() else pixels.to(torch.uint8)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _to_device(prompt: Prompts, device: torch.device) -> Prompts:
    if isinstance(prompt, PointPrompts):
        return PointPrompts(*(part.to(device) for part in prompt))
    return prompt.to(device)
