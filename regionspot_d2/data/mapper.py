"""From a record of a dataset to the dict a model takes: image, regions, and mask tokens if they are on disk."""

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
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .images import ImageReadError, read_image
from .token_cache import AnyTokenCache

logger = logging.getLogger(__name__)

# So many images are taken as read and good before the first, or a single bad one would be a large share.
_IMAGES_OF_CREDIT = 1000


class UnreadableImages:
    """Counts images that cannot be used, and stops the run when they are too many."""

    def __init__(self, max_share: float) -> None:
        """
        Args:
            max_share: of the images read by this process and a thousand more, so that the first bad image of a run
                is not too many; 0 stops at the first.
        """
        self.max_share = max_share
        self.bad = 0
        self.good = 0

    def add_good(self) -> None:
        self.good += 1

    def add_bad(self, error: Exception) -> None:
        """Logs an image that is skipped.

        Raises:
            RuntimeError: too many have been.
        """
        self.bad += 1
        logger.warning(f"Skipped an image ({self.bad} of {self.bad + self.good}): {error}")
        if self.bad > self.max_share * (self.bad + self.good + _IMAGES_OF_CREDIT):
            raise RuntimeError(
                f"{self.bad} of {self.bad + self.good} images could not be used, which is more than "
                f"DATALOADER.MAX_UNREADABLE_SHARE = {self.max_share:g} allows. The last: {error}"
            ) from error


class RegionMapper(DatasetMapper):
    """Detectron2's mapper for images with regions.

    *Live*, it reads the image, augments image and boxes together as ``INPUT`` says, and the model runs its localizer.
    *Cached*, mask tokens, boxes and classes come from disk, and the image is squashed here to the square that the
    vision-language model would squash it to, in the same way: the loss is that of live mode without augmentation.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        image_format: str = "RGB",
        precomputed_proposal_topk: int | None = None,
        token_caches: Mapping[str, AnyTokenCache] | None = None,
        cached_image_size: int = 0,
        max_unreadable_share: float | None = None,
    ) -> None:
        """
        Args:
            is_train: whether annotations are used, or proposals.
            augmentations: of image and boxes, without a token cache.
            image_format: channel order, "RGB" or "BGR".
            precomputed_proposal_topk: best proposals to keep, if the records have any.
            token_caches: by the name of a dataset, in training. Records of its images then need no annotations,
                except with tokens in the published layout.
            cached_image_size: side S of the square that images are squashed to where a cache is used; 0 leaves them.
            max_unreadable_share: share of the images that may be skipped, see :class:`UnreadableImages`; None raises
                the error of the first.
        """
        super().__init__(
            is_train,
            augmentations=augmentations,
            image_format=image_format,
            precomputed_proposal_topk=precomputed_proposal_topk,
        )
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is '{image_format}'; it must be 'RGB' or 'BGR'.")
        self.token_caches = dict(token_caches or {})
        self.cached_image_size = cached_image_size
        self.unreadable = (
            None if max_unreadable_share is None else UnreadableImages(max_unreadable_share)
        )

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        is_train: bool = True,
        *,
        token_caches: Mapping[str, AnyTokenCache] | None = None,
    ) -> dict[str, Any]:
        if token_caches:
            _refuse_augmentation(cfg)
        ret = super().from_config(cfg, is_train)
        return {
            "is_train": is_train,
            "augmentations": ret["augmentations"],
            "image_format": ret["image_format"],
            "precomputed_proposal_topk": ret.get("precomputed_proposal_topk"),
            "token_caches": token_caches,
            "cached_image_size": cfg.INPUT.CACHED_IMAGE_SIZE,
            "max_unreadable_share": cfg.DATALOADER.MAX_UNREADABLE_SHARE if is_train else None,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """
        Args:
            dataset_dict: a record in Detectron2's format, with ``dataset_name`` if there are token caches.

        Returns:
            The record with ``image`` (3, H, W), uint8, or float32 if squashed; in training ``instances`` with
            ``gt_boxes`` (XYXY, pixels of ``image``) and ``gt_classes``, and from a cache ``mask_tokens``
            (R, token_dim); else ``proposals`` if the record has boxes of them. None in place of an image that is
            skipped: Detectron2's ``MapDataset`` then takes another.

        Raises:
            ImageReadError: the image cannot be read, and may not be skipped.
            SizeMismatchError: the image has not the size its record says, and may not be skipped.
            RuntimeError: too many images have been skipped.
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
        cache = self.token_caches.get(x["dataset_name"]) if self.token_caches else None
        if cache is not None and self.is_train:
            return self._map_cached(x, image, cache)
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
        self, x: dict[str, Any], image: np.ndarray, cache: AnyTokenCache
    ) -> dict[str, Any]:
        regions = cache.read(x["image_id"])
        height, width = image.shape[:2]
        boxes = regions.boxes
        if boxes is None:
            boxes = self._annotated_boxes(x, (height, width), regions.classes)
        x.pop("annotations", None)
        x["image"] = _to_tensor(image)
        if self.cached_image_size:
            x["image"] = squash(x["image"], self.cached_image_size)
        size = (x["image"].shape[1], x["image"].shape[2])
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_boxes.scale(size[1] / width, size[0] / height)
        instances.gt_classes = regions.classes
        x["instances"] = instances
        x["mask_tokens"] = regions.tokens
        return x

    def _annotated_boxes(
        self, x: dict[str, Any], image_size: tuple[int, int], classes: Tensor
    ) -> Tensor:
        """Boxes of published tokens, which come without: those of the annotations, if the classes agree in order."""
        self._transform_annotations(x, T.TransformList([]), image_size)
        instances = x["instances"]
        if instances.gt_classes.tolist() != classes.tolist():
            raise ImageReadError(
                f"The published tokens of the image {x['image_id']!r} are of the classes {classes.tolist()}, its "
                f"annotations of {instances.gt_classes.tolist()}: not of the same regions."
            )
        return instances.gt_boxes.tensor


def squash(image: Tensor, side: int) -> Tensor:
    """Squashes an image to a square as the vision-language models do, which then leave it as it is.

    Args:
        image: (3, H, W), 0..255.
        side: of the square.

    Returns:
        (3, side, side), float32, 0..255.
    """
    return F.interpolate(
        image[None].float(), size=(side, side), mode="bilinear", align_corners=False
    )[0]


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _refuse_augmentation(cfg: CfgNode) -> None:
    for key, value, plain in (
        ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, "none"),
        ("INPUT.CROP.ENABLED", cfg.INPUT.CROP.ENABLED, False),
    ):
        if value != plain:
            raise ValueError(
                f"{key} is {value!r}; with INPUT.TOKEN_CACHE it must be {plain!r}, because the tokens on disk are of "
                "the image as it is."
            )
