"""The Python interface: set an image once, then ask about any regions in any vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from .calibration import calibrated
from .checkpoint import build_regionspot
from .data.images import MAX_PIXELS, ImageLike
from .image_session import ImageSession
from .modeling.everything import Search, name_everything
from .modeling.panoptic import panoptic_segments, stuff_places
from .modeling.questions import as_count, as_prompts, box_batches
from .modeling.regionspot import RegionSpot
from .modeling.scoring import Scoring
from .modeling.words import Vocabulary, Words, as_vocabulary, grouped_vocabulary, with_background
from .pretrained import read_pretrained, write_pretrained
from .renaming import rename_detections


class RegionSpotPredictor(ImageSession):
    """Names regions of one image after another.

    Example::

        predictor = RegionSpotPredictor.from_pretrained("mini")
        predictor.set_image("street.jpg")
        found = predictor.predict(boxes=[[10, 20, 200, 300]], vocabulary=["dog", "bicycle"])
        print(predictor.vocabulary[found.pred_classes[0]], float(found.scores[0]))

    The image is encoded once. New regions cost the localizer's decoder, a new vocabulary a lookup.
    """

    def __init__(self, model: CfgNode | RegionSpot, *, vocabulary: Words | None = None) -> None:
        """
        Args:
            model: a model; or a config, from which it is built and its weights are loaded.
            vocabulary: class names for questions that bring none.
        """
        self._cfg: CfgNode | None = None
        if isinstance(model, CfgNode):
            self._cfg = calibrated(model).clone()
            model = build_regionspot(self._cfg)
        if not isinstance(model, RegionSpot):
            raise ValueError(
                f"model is of the type {type(model).__name__}; a config, as "
                "regionspot_d2.engine.load_config reads it, or a RegionSpot is expected."
            )
        super().__init__(model, MAX_PIXELS if self._cfg is None else self._cfg.INPUT.MAX_PIXELS)
        self._vocabulary: Vocabulary | None = None
        vocabulary = self.model.scoring.words if vocabulary is None else vocabulary
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        vocabulary: Words | None = None,
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
        write_pretrained(folder, self._cfg, self.model.region_head, self._vocabulary)

    @property
    def vocabulary(self) -> list[str]:
        """The class names in use; ``pred_classes`` are places in it."""
        return [] if self._vocabulary is None else list(self._vocabulary.names)

    @vocabulary.setter
    def vocabulary(self, words: Words) -> None:
        self._vocabulary = None
        if not isinstance(words, Sequence) or len(words):
            self.set_vocabulary(words)

    @property
    def words(self) -> Vocabulary:
        """The vocabulary in use with all its texts, groups and background names.

        Raises:
            ValueError: there is none yet.
        """
        return self._question(None, None, None, None, None)[0]

    def set_vocabulary(self, words: Words, *, background: Sequence[str] | None = None) -> None:
        """Sets the vocabulary, and the background names, of the calls that follow.

        Args:
            words: class names, or what :func:`~regionspot_d2.modeling.words.as_vocabulary` takes.
            background: see :meth:`predict`.

        Raises:
            ValueError: there are no names, or one is empty, given twice, or unknown to the text
                side; or a known name would stand in for two.
        """
        self._vocabulary = self._question(words, background, None, None, None)[0]

    @property
    def stood_in(self) -> dict[str, str]:
        """The names of the vocabulary that the text side does not know as they are.

        Each comes with the known name whose embedding it gets: ``{"two red mugs": "mug"}``. Empty
        for a text encoder such as CLIP's, which takes any words.
        """
        return (
            {} if self._vocabulary is None else self.model.text_embedder.stood_in(self._vocabulary)
        )

    @torch.no_grad()
    def predict(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
        vocabulary: Words | None = None,
        topk: int = 1,
        zoom: float | None = None,
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        scores: str | None = None,
        groups: Mapping[str, Words] | None = None,
    ) -> Instances:
        """Names regions of the image. Boxes, points and masks may be mixed in one question.

        The regions of an image attend to each other in a trained head: an answer depends on which
        others are asked in the same call.

        Args:
            boxes: (R1, 4) XYXY, pixels of the image.
            points: R2 regions, each (P, 2) XY in pixels of the image, P may differ; or (R2, 2).
            point_labels: like ``points``, 1 on the region, 0 on the background; by default all 1.
            masks: (R3, H, W).
            vocabulary: the class names, or what
                :func:`~regionspot_d2.modeling.words.as_vocabulary` takes. With ``background`` and
                ``groups`` it stays set for later calls, unless this one is refused.
            topk: names per region.
            zoom: see :meth:`RegionSpot.answer`; by default ``MODEL.ZOOM``.
            background: names that take part and are never answered; by default, in a call that sets
                a vocabulary, ``MODEL.NAMING.BACKGROUND``.
            threshold: names that score less become class -1, none of these; by default
                ``MODEL.NAMING.THRESHOLD``. In a hierarchy the deepest name that does not is given.
            scores: "softmax" or "sigmoid"; by default ``MODEL.NAMING.SCORES``.
            groups: instead of ``vocabulary``, several that answer each region one by one:
                ``{"object": [...], "color": [...]}``. :attr:`vocabulary` is then all their names.

        Returns:
            ``Instances`` of the image's size, ``topk`` for each region in the order boxes, points,
            masks, best name first: ``pred_boxes``, ``scores``, ``pred_classes`` (places in
            :attr:`vocabulary`, or -1), ``region_index``, with several groups ``group_index`` (each
            region has ``topk`` of each group) and, if masks are on, ``pred_masks`` (bool). Masks of
            more than 256 MB are made as they are read, see
            :class:`~regionspot_d2.modeling.lazy_masks.LazyMasks`.

        Raises:
            ValueError: there is no image, region or vocabulary, or one of them makes no sense.
        """
        topk = as_count(topk, "topk", "name per region")
        words, scoring = self._question(vocabulary, background, threshold, scores, groups)
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        [answer] = self.model.answer(
            self._image(), [prompts], with_masks=self.model.with_masks, zoom=zoom
        )
        found = self.model.name(answer, words, scoring=scoring, topk=topk)
        self._vocabulary = words
        return found

    @torch.no_grad()
    def everything(
        self,
        *,
        vocabulary: Words | None = None,
        topk: int = 1,
        score_thresh: float = 0.0,
        max_regions: int = 100,
        zoom: float | None = None,
        search: Search | None = None,
        panoptic: bool = False,
        stuff: Sequence[str] = (),
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        scores: str | None = None,
        groups: Mapping[str, Words] | None = None,
    ) -> Any:
        """Finds and names every region of the image, once.

        A localizer whose masks are fine finds them under a grid of points, on what
        :meth:`set_image` encoded. Otherwise they are grouped from the image tokens.

        Args:
            vocabulary, topk, zoom, background, threshold, scores, groups: as for :meth:`predict`.
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
        words, scoring = self._question(vocabulary, background, threshold, scores, groups)
        places = stuff_places(stuff, words.names, panoptic)
        found = name_everything(
            self.model,
            self._image(),
            words,
            Search() if search is None else search,
            scoring=scoring,
            with_masks=panoptic or self.model.with_masks,
            topk=1 if panoptic else topk,
            score_thresh=score_thresh,
            max_regions=max_regions,
            zoom=zoom,
        )
        self._vocabulary = words
        return panoptic_segments(found, places) if panoptic else found

    @torch.no_grad()
    def predict_batch(
        self,
        images: Iterable[ImageLike],
        boxes: Sequence[Any],
        *,
        channels: str = "RGB",
        vocabulary: Words | None = None,
        topk: int = 1,
        batch_size: int = 8,
        zoom: float | None = None,
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        scores: str | None = None,
        groups: Mapping[str, Words] | None = None,
    ) -> list[Instances]:
        """Names boxes of many images, of any sizes, of which only ``batch_size`` are held at once.

        The image of :meth:`set_image` stays set.

        Args:
            boxes: per image (R, 4) XYXY, pixels of it; R may be 0.
            images, channels: as for :meth:`set_image`; the others as for :meth:`predict`.
            batch_size: images that the encoders see together; it does not change results.

        Returns:
            Per image what :meth:`predict` returns.

        Raises:
            ValueError: as :meth:`predict`, with the image's number; or both differ in number.
        """
        topk = as_count(topk, "topk", "name per region")
        words, scoring = self._question(vocabulary, background, threshold, scores, groups)
        results: list[Instances] = []
        read = partial(self._pixels, channels=channels)
        for pixels, prompts in box_batches(images, boxes, read, batch_size):
            answers = self.model.answer(
                self.model.encode(pixels), prompts, with_masks=self.model.with_masks, zoom=zoom
            )
            results += [
                self.model.name(answer, words, scoring=scoring, topk=topk) for answer in answers
            ]
        self._vocabulary = words
        return results

    rename = rename_detections

    def _question(
        self,
        words: Words | None,
        background: Sequence[str] | None,
        threshold: float | None,
        scores: str | None,
        groups: Mapping[str, Words] | None,
    ) -> tuple[Vocabulary, Scoring]:
        """The vocabulary of a question, checked and embedded but not yet set; what a score is."""
        scoring = self.model.scoring.changed(threshold, scores)
        if words is not None and groups is not None:
            raise ValueError("vocabulary and groups were given; groups are vocabularies, pass one.")
        vocabulary = self._vocabulary
        if groups is not None:
            vocabulary = scoring.joined(grouped_vocabulary(groups))
        elif words is not None:
            vocabulary = scoring.joined(as_vocabulary(words))
        if vocabulary is None:
            raise ValueError("There is no vocabulary: pass vocabulary=[...], or set_vocabulary.")
        if background is not None:
            vocabulary = with_background(vocabulary, background)
        if vocabulary is not self._vocabulary:
            self.model.text_embedder(vocabulary, self.model.device)
            self.model.text_embedder.check_apart(vocabulary)
        scoring.warn_of_one_name(vocabulary)
        return vocabulary, scoring
