"""The Python interface: set an image once, then ask about any regions in any vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from .checkpoint import build_regionspot
from .data.images import MAX_PIXELS, ImageLike, as_image_tensor
from .modeling.encoded import EncodedImages
from .modeling.everything import Search, name_everything
from .modeling.panoptic import panoptic_segments, stuff_places
from .modeling.questions import as_count, as_prompts, box_batches
from .modeling.regionspot import RegionSpot
from .modeling.vocabulary import check_names
from .pretrained import read_pretrained, write_pretrained
from .renaming import rename_detections


class RegionSpotPredictor:
    """Names regions of one image after another.

    Example::

        predictor = RegionSpotPredictor.from_pretrained("mini")
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
        self.max_pixels: int = MAX_PIXELS  # of image files; see INPUT.MAX_PIXELS
        self._cfg: CfgNode | None = None
        if isinstance(model, CfgNode):
            self._cfg, model = model.clone(), build_regionspot(model)
            self.max_pixels = self._cfg.INPUT.MAX_PIXELS
        if not isinstance(model, RegionSpot):
            raise ValueError(
                f"model is of the type {type(model).__name__}; a config, as "
                "regionspot_d2.engine.load_config reads it, or a RegionSpot is expected."
            )
        self.model: RegionSpot = model.eval()
        self.vocabulary: list[str] = [] if vocabulary is None else self._names(vocabulary)
        self._encoded: EncodedImages | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        vocabulary: Sequence[str] | None = None,
        zoom: float | None = None,
    ) -> RegionSpotPredictor:
        """Builds a predictor from a name such as "mini", a config, a folder, or an id on the hub.

        Args:
            source, device, precision, zoom: see :func:`~regionspot_d2.pretrained.read_pretrained`.
            vocabulary: class names for questions that bring none; by default the folder's.
        """
        cfg, names = read_pretrained(source, device=device, precision=precision, zoom=zoom)
        return cls(cfg, vocabulary=names if vocabulary is None else vocabulary)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes model and vocabulary; see :func:`~regionspot_d2.pretrained.write_pretrained`."""
        write_pretrained(folder, self._cfg, self.model.region_head, self.vocabulary)

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
        encoded = self.model.encode([self._pixels(image, channels)])
        # Now rather than in the first question: that is what "set once" promises.
        if not self.model.zoom:
            _ = encoded.image_tokens
        if self.model.region_head.needs_localizer or self.model.with_masks:
            _ = encoded.embeddings
        self._encoded = encoded

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
        topk = as_count(topk, "topk", "name per region")
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
    def everything(
        self,
        *,
        vocabulary: Sequence[str] | None = None,
        topk: int = 1,
        score_thresh: float = 0.0,
        max_regions: int = 100,
        zoom: float | None = None,
        search: Search | None = None,
        panoptic: bool = False,
        stuff: Sequence[str] = (),
    ) -> Any:
        """Finds and names every region of the image, once.

        A localizer whose masks are fine finds them under a grid of points, on what
        :meth:`set_image` encoded. Otherwise they are grouped from the image tokens.

        Args:
            vocabulary, topk, zoom: as for :meth:`predict`.
            score_thresh: regions whose best name does not score more are left out.
            max_regions: the best that are kept.
            search: how regions are looked for.
            panoptic: whether to give each pixel to one region.
            stuff: with ``panoptic``, class names whose regions are merged, such as "sky".

        Returns:
            ``Instances`` as :meth:`predict`, the best region first; a score is that of the name
            times that of the region. With ``panoptic`` what
            :func:`~regionspot_d2.modeling.panoptic.panoptic_segments` returns.

        Raises:
            ValueError: as :meth:`predict`, and for ``stuff`` outside the vocabulary.
        """
        topk = as_count(topk, "topk", "name per region")
        max_regions = as_count(max_regions, "max_regions", "region")
        names = self._names(vocabulary)
        places = stuff_places(stuff, names, panoptic)
        found = name_everything(
            self.model,
            self._image(),
            names,
            Search() if search is None else search,
            with_masks=panoptic or self.model.with_masks,
            topk=1 if panoptic else topk,
            score_thresh=score_thresh,
            max_regions=max_regions,
            zoom=zoom,
        )
        self.vocabulary = names
        return panoptic_segments(found, places) if panoptic else found

    @torch.no_grad()
    def region_embeddings(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
        zoom: float | None = None,
    ) -> Tensor:
        """Embeds regions, given as for :meth:`predict`, in text space, for search and clustering.

        Returns:
            (R, D), rows of unit length.
        """
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        [answer] = self.model.answer(self._image(), [prompts], with_masks=False, zoom=zoom)
        return answer.embeddings

    @torch.no_grad()
    def attention_maps(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
    ) -> Tensor:
        """Where the region head looks in the whole image, whatever the zoom, to name regions.

        Returns:
            (R, rows, columns), see :meth:`RegionSpot.attention`.
        """
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        return self.model.attention(self._image(), prompts)

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
        """Names boxes of many images, of any sizes, of which only ``batch_size`` are held at once.

        The image of :meth:`set_image` stays set.

        Args:
            boxes: per image (R, 4) XYXY, pixels of it; R may be 0.
            images, channels, vocabulary, topk, zoom: as for :meth:`set_image`, :meth:`predict`.
            batch_size: images that the encoders see together; it does not change results.

        Returns:
            Per image what :meth:`predict` returns.

        Raises:
            ValueError: as :meth:`predict`, with the image's number; or both differ in number.
        """
        topk = as_count(topk, "topk", "name per region")
        names = self._names(vocabulary)
        results: list[Instances] = []
        read = partial(self._pixels, channels=channels)
        for pixels, prompts in box_batches(images, boxes, read, batch_size):
            answers = self.model.answer(
                self.model.encode(pixels), prompts, with_masks=self.model.with_masks, zoom=zoom
            )
            results += [self.model.name(answer, names, topk=topk) for answer in answers]
        self.vocabulary = names
        return results

    rename = rename_detections

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
        return as_image_tensor(image, channels, max_pixels=self.max_pixels).to(self.model.device)

    def _image(self) -> EncodedImages:
        if self._encoded is not None:
            return self._encoded
        raise ValueError("There is no image yet: call set_image first.")
