"""From a record of a dataset to the dict that a model takes: image, regions, cached mask tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor

from .images import ImageReadError, read_image
from .published_tokens import TokenSource

logger = logging.getLogger(__name__)

# Counted as good from the start, or the first bad image would be too many.
_IMAGES_OF_CREDIT = 1000


class UnreadableImages:
    """Counts images that cannot be used, and stops the run when they are too many.

    ``max_share`` is of the images read and 1000 more; 0 stops at the first bad image.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.bad = self.good = 0

    def add_good(self) -> None:
        self.good += 1

    def add_bad(self, error: Exception) -> None:
        """Logs a skipped image; raises a RuntimeError if there are too many."""
        self.bad += 1
        logger.warning(f"Skipped an image ({self.bad} of {self.bad + self.good}): {error}")
        if self.bad > self.max_share * (self.bad + self.good + _IMAGES_OF_CREDIT):
            raise RuntimeError(
                f"{self.bad} of {self.bad + self.good} images could not be used, more than "
                f"DATALOADER.MAX_UNREADABLE_SHARE = {self.max_share:g} allows. The last: {error}"
            ) from error


class RegionMapper(DatasetMapper):
    """Detectron2's mapper for images with regions.

    *Live*, it augments image and boxes together as ``INPUT`` says; the model runs its localizer.
    *Cached*, it adds mask tokens from disk, and squashes the image to the square that the
    vision-language model would squash it to: the loss is that of live mode without augmentation.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str = "RGB",
        token_caches: Mapping[str, TokenSource] | None = None,
        cached_image_size: int = 0,
        max_unreadable_share: float | None = None,
        **stock: Any,
    ) -> None:
        """
        Args:
            token_caches: for training, by the name of the dataset.
            cached_image_size: side of the square in cached mode; 0 leaves images as they are.
            max_unreadable_share: see :class:`UnreadableImages`; None raises the first error.
            stock: ``augmentations`` (of live mode) and ``precomputed_proposal_topk``.
        """
        super().__init__(is_train, image_format=image_format, **stock)
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is '{image_format}'; it must be 'RGB' or 'BGR'.")
        self.token_caches, self.cached_image_size = dict(token_caches or {}), cached_image_size
        share = max_unreadable_share
        self.unreadable = None if share is None else UnreadableImages(share)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        for key, value, plain in (
            ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, "none"),
            ("INPUT.CROP.ENABLED", cfg.INPUT.CROP.ENABLED, False),
        ):
            if is_train and cfg.INPUT.TOKEN_CACHE and value != plain:
                raise ValueError(
                    f"{key} is {value!r}; with INPUT.TOKEN_CACHE it must be {plain!r}, because the "
                    "cached tokens are of the unchanged image."
                )
        ret = super().from_config(cfg, is_train)
        # Masks and keypoints, which Detectron2's mapper would also load, are not for us.
        kept = {"is_train", "augmentations", "image_format", "precomputed_proposal_topk"}
        return {
            **{key: ret[key] for key in kept & ret.keys()},
            "cached_image_size": cfg.INPUT.CACHED_IMAGE_SIZE,
            "max_unreadable_share": cfg.DATALOADER.MAX_UNREADABLE_SHARE if is_train else None,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Maps a record in Detectron2's format; it has ``dataset_name`` if there are caches.

        Returns:
            The record with ``image`` (3, H, W), uint8, or float32 if squashed; in training
            ``instances`` with ``gt_boxes`` (XYXY, pixels of ``image``) and ``gt_classes``, and from
            a cache ``mask_tokens`` (R, token_dim); else ``proposals`` if the record has some.
            None for an image that is skipped: Detectron2's ``MapDataset`` then takes another.

        Raises:
            ImageReadError, SizeMismatchError: the image may not be skipped.
            RuntimeError: too many images were skipped.
            TokenCacheError: the cache does not fit the annotations.
        """
        try:
            sample = self._map(copy.deepcopy(dataset_dict))
        except (ImageReadError, utils.SizeMismatchError) as error:
            if self.unreadable is None:
                raise
            self.unreadable.add_bad(error)
            return None
        if self.unreadable is not None:
            self.unreadable.add_good()
        return sample

    def _map(self, x: dict[str, Any]) -> dict[str, Any]:
        image = read_image(x["file_name"])
        utils.check_image_size(x, image)
        if self.image_format == "BGR":
            image = image[:, :, ::-1]
        if self.is_train and self.token_caches and x["dataset_name"] in self.token_caches:
            return self._map_cached(x, image, self.token_caches[x["dataset_name"]])
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        x["image"] = _to_tensor(augmented.image)
        size = augmented.image.shape[:2]
        if self.is_train:
            x.pop("proposal_boxes", None)
            self._transform_annotations(x, transforms, size)
        else:
            x.pop("annotations", None)
            utils.transform_proposals(x, size, transforms, proposal_topk=self.proposal_topk)
        return x

    def _map_cached(
        self, x: dict[str, Any], image: np.ndarray, cache: TokenSource
    ) -> dict[str, Any]:
        # Tokens were extracted for these very regions, from this method without augmentation. It
        # drops crowds, clips boxes to the image, and drops those without area.
        height, width = image.shape[:2]
        self._transform_annotations(x, T.TransformList([]), (height, width))
        instances = x["instances"]
        x["mask_tokens"] = cache.read(x["image_id"], instances.gt_classes)
        x["image"] = _to_tensor(image)
        if side := self.cached_image_size:
            x["image"] = squash(x["image"], side)
            instances.gt_boxes.scale(side / width, side / height)
            x["instances"] = Instances((side, side), **instances.get_fields())
        return x


def squash(image: Tensor, side: int) -> Tensor:
    """Squashes an image (3, H, W) to (3, side, side), float32, as the vision-language models do."""
    size = (side, side)
    return F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
