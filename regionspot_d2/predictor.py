"""The Python interface: set an image once, then ask about any regions in any vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from operator import index, length_hint
from os import PathLike
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor

from .checkpoint import RegionSpotCheckpointer
from .data.images import MAX_PIXELS, ImageLike, as_image_tensor
from .modeling.answers import EncodedImages
from .modeling.interfaces import image_size_of
from .modeling.prompts import BoxPrompts
from .modeling.questions import as_boxes, as_prompts
from .modeling.regionspot import RegionSpot
from .modeling.vocabulary import check_names


class RegionSpotPredictor:
    """Names regions of one image after another.

    Example::

        predictor = RegionSpotPredictor(cfg)
        predictor.set_image("street.jpg")
        found = predictor.predict(boxes=[[10, 20, 200, 300]], vocabulary=["dog", "bicycle"])
        print(predictor.vocabulary[found.pred_classes[0]], float(found.scores[0]))

    The image is encoded once. New regions cost the localizer's decoder, a new vocabulary a lookup.
    """

    def __init__(
        self, model: CfgNode | RegionSpot, *, vocabulary: Sequence[str] | None = None
    ) -> None:
        """
        Args:
            model: a model; or a config, from which it is built and its weights are loaded.
            vocabulary: class names for questions that bring none.
        """
        # Of image files; see INPUT.MAX_PIXELS.
        self.max_pixels: int = MAX_PIXELS
        if isinstance(model, CfgNode):
            self.max_pixels = model.INPUT.MAX_PIXELS
            weights = model.MODEL.WEIGHTS
            model = build_model(model)
            RegionSpotCheckpointer(model).load(weights)
        self.model: RegionSpot = model.eval()
        self.vocabulary: list[str] = []
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)
        self._encoded: EncodedImages | None = None

    def set_vocabulary(self, names: Sequence[str]) -> None:
        """Sets the class names of the calls that follow.

        Raises:
            ValueError: there are none, or one is empty, given twice, or unknown to the text side;
                or a known name would stand in for two.
        """
        self.vocabulary = self._names(names)

    @property
    def stood_in(self) -> dict[str, str]:
        """The names of :attr:`vocabulary` that the text side does not know as they are.

        Each comes with the known name whose embedding it gets: ``{"two red mugs": "mug"}``. Empty
        for a text encoder such as CLIP's, which takes any words.
        """
        return self.model.text_embedder.stood_in(self.vocabulary)

    def set_image(self, image: ImageLike, *, channels: str = "RGB") -> None:
        """Encodes an image for the calls that follow.

        Args:
            image, channels: see :func:`~regionspot_d2.data.images.as_image_tensor`.
        """
        pixels = self._pixels(image, channels)
        self._encoded = self.model.encode([pixels])
        # Now rather than in the first question: that is what "set once" promises.
        if not self.model.zoom:
            _ = self._encoded.image_tokens
        if self.model.region_head.needs_localizer or self.model.with_masks:
            _ = self._encoded.embeddings

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
        zoom: float | None = None,
    ) -> Instances:
        """Names regions of the image. Boxes, points and masks may be mixed in one question.

        The regions of an image attend to each other in a trained head: an answer depends on which
        others are asked in the same call.

        Args:
            boxes: (R1, 4) XYXY, pixels of the image.
            points: R2 regions, each (P, 2) XY in pixels of the image, P may differ; or (R2, 2).
            point_labels: like ``points``, 1 on the region, 0 on the background; by default all 1.
            masks: (R3, H, W).
            vocabulary: the class names; they stay set for later calls, unless this one is refused.
            topk: names per region.
            zoom: see :meth:`RegionSpot.answer`; by default ``MODEL.ZOOM``.

        Returns:
            ``Instances`` of the image's size, ``topk`` for each region in the order boxes, points,
            masks, best name first: ``pred_boxes``, ``scores`` (softmax over the vocabulary),
            ``pred_classes`` (places in :attr:`vocabulary`), ``region_index`` and, if masks are on,
            ``pred_masks`` (bool). Masks of more than 256 MB are made as they are read, see
            :class:`~regionspot_d2.modeling.lazy_masks.LazyMasks`.

        Raises:
            ValueError: there is no image, region or vocabulary, or one of them makes no sense.
        """
        topk = _count(topk, "topk", "name per region")
        names = self._names(vocabulary)
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        [answer] = self.model.answer(
            self._image(), [prompts], with_masks=self.model.with_masks, zoom=zoom
        )
        found = self.model.name(answer, names, topk=topk)
        self.vocabulary = names
        return found

    @torch.no_grad()
    def region_embeddings(self, *, zoom: float | None = None, **regions: Any) -> Tensor:
        """Embeds regions, given as for :meth:`predict`, in text space, for search and clustering.

        Returns:
            (R, D), rows of unit length.
        """
        prompts = as_prompts(self.image_size, **regions)
        [answer] = self.model.answer(self._image(), [prompts], with_masks=False, zoom=zoom)
        return answer.embeddings

    @torch.no_grad()
    def attention_maps(self, **regions: Any) -> Tensor:
        """Where the region head looks in the whole image, whatever the zoom, to name regions.

        Returns:
            (R, rows, columns), see :meth:`RegionSpot.attention`.
        """
        return self.model.attention(self._image(), as_prompts(self.image_size, **regions))

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
        zoom: float | None = None,
    ) -> list[Instances]:
        """Names boxes of many images, of which only ``batch_size`` are held at once.

        The image of :meth:`set_image` stays set.

        Args:
            images: as for :meth:`set_image`, of any sizes.
            boxes: per image (R, 4) XYXY, pixels of it; R may be 0.
            channels, vocabulary, topk, zoom: as for :meth:`set_image` and :meth:`predict`.
            batch_size: images that the encoders see together; it does not change results.

        Returns:
            Per image what :meth:`predict` returns.

        Raises:
            ValueError: as :meth:`predict`, with the number of the image; or there are not as many
                boxes as images.
        """
        topk = _count(topk, "topk", "name per region")
        batch_size = _count(batch_size, "batch_size", "image")
        names = self._names(vocabulary)
        if not isinstance(boxes, Sequence | np.ndarray | Tensor):
            raise ValueError(f"boxes is of the type {type(boxes).__name__}; pass a list of boxes.")
        if not isinstance(images, Iterable) or isinstance(images, str | PathLike):
            raise ValueError(f"images is {images!r:.60}; pass a list of images.")
        count = length_hint(images, len(boxes))
        if count != len(boxes):
            raise ValueError(f"There are {count} images but boxes for {len(boxes)}.")
        results: list[Instances] = []
        following = iter(images)
        while chunk := list(islice(following, batch_size)):
            pixels, prompts = [], []
            for number, image in enumerate(chunk, start=len(results)):
                if number >= len(boxes):
                    raise ValueError(f"There are more images than the {len(boxes)} with boxes.")
                try:
                    pixels.append(self._pixels(image, channels))
                    prompts.append(BoxPrompts(as_boxes(boxes[number], image_size_of(pixels[-1]))))
                except ValueError as error:
                    raise ValueError(f"Image {number}: {error}") from error
            encoded = self.model.encode(pixels)
            answers = self.model.answer(
                encoded, prompts, with_masks=self.model.with_masks, zoom=zoom
            )
            results += [self.model.name(answer, names, topk=topk) for answer in answers]
        if len(results) < len(boxes):
            raise ValueError(f"There are {len(results)} images but boxes for {len(boxes)}.")
        self.vocabulary = names
        return results

    def _names(self, vocabulary: Sequence[str] | None) -> list[str]:
        """The class names of a question, checked and embedded, but not yet set."""
        if vocabulary is not None:
            check_names(vocabulary)
            self.model.text_embedder(vocabulary, self.model.device)
            self.model.text_embedder.check_apart(vocabulary)
            return list(vocabulary)
        if not self.vocabulary:
            raise ValueError("There is no vocabulary: pass vocabulary=[...], or set_vocabulary.")
        return self.vocabulary

    def _pixels(self, image: ImageLike, channels: str) -> Tensor:
        pixels = as_image_tensor(image, channels, max_pixels=self.max_pixels)
        return pixels.to(self.model.device)

    def _image(self) -> EncodedImages:
        if self._encoded is None:
            raise ValueError("There is no image yet: call set_image first.")
        return self._encoded


def _count(value: Any, name: str, of: str) -> int:
    """A number of things, at least one: any type of whole numbers, but not True."""
    try:
        count = index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool | np.bool_):
        raise ValueError(
            f"{name} is {value!r:.60}; a whole number, at least one {of}, is expected."
        )
    return count
