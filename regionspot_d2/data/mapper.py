"""From a record of a dataset to the dict that a model takes: image, regions, cached mask tokens."""

from __future__ import annotations

import copy
import logging
import textwrap
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

from .images import MAX_PIXELS, ImageReadError, OneLineError, read_image
from .published_tokens import TokenSource
from .token_cache import TokenCacheError

logger = logging.getLogger(__name__)

# Counted as good from the start, or the first bad image would be too many.
_IMAGES_OF_CREDIT = 1000


class TooManyUnreadableError(OneLineError, RuntimeError):
    """More images cannot be used than ``DATALOADER.MAX_UNREADABLE_SHARE`` allows."""


class ImageSizeError(OneLineError, utils.SizeMismatchError):
    """An image file has another size than its record says."""


class SampleError(OneLineError, ValueError):
    """An image or its annotations cannot be used; the message names the file."""


class UnreadableImages:
    """Counts images that cannot be used in an epoch, and stops the run when they are too many.

    Args:
        max_share: of the images read and 1000 more; 0 stops at the first bad image.
        num_images: of an epoch, which each process counts for itself; None if there is only one.
            If over half of them are bad, that is too many for any share.
    """

    def __init__(self, max_share: float, num_images: int | None = None) -> None:
        self.max_share, self.num_images = max_share, num_images
        self.bad, self.good = set[Any](), 0

    def __len__(self) -> int:
        return len(self.bad) + self.good

    def add_good(self) -> None:
        self.good += 1
        if self.num_images and len(self) >= self.num_images:
            self.bad, self.good = set(), 0

    def add_bad(self, error: Exception, key: Any = None) -> None:
        """Logs a skipped image, which ``key`` identifies, and raises if there are too many."""
        key = len(self.bad) if key is None else key
        if key in self.bad:
            return  # another draw of the same image says nothing new
        self.bad.add(key)
        bad, seen = len(self.bad), len(self)
        logger.warning(f"Skipped an image ({bad} of {seen}): {error}")
        if (
            bad > self.max_share * (seen + _IMAGES_OF_CREDIT)
            or self.num_images
            and 2 * bad > self.num_images
        ):
            raise TooManyUnreadableError(
                f"{bad} of {seen} images could not be used, more than "
                f"DATALOADER.MAX_UNREADABLE_SHARE = {self.max_share:g} allows. The last: {error}"
            ) from error


class RegionMapper(DatasetMapper):
    """Detectron2's mapper for images with regions.

    *Live*, it augments image and boxes together as ``INPUT`` says; the model runs its localizer.
    *Cached*, it adds mask tokens from disk, and squashes the image to the square that the
    vision-language model would squash it to: the loss is that of live mode without augmentation.
    With ``augment_cached``, as published, the image alone is augmented. The tokens stay those of
    the whole, unflipped image, so what they say of a region's place is then wrong.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str = "RGB",
        token_caches: Mapping[str, TokenSource] | None = None,
        cached_image_size: int = 0,
        augment_cached: bool = False,
        max_unreadable_share: float | None = None,
        num_images: int | None = None,
        max_pixels: int = MAX_PIXELS,
        **stock: Any,
    ) -> None:
        """
        Args:
            token_caches: for training, by the name of the dataset.
            cached_image_size: side of the square in cached mode; 0 leaves images as they are.
            augment_cached: whether the image is augmented beside its cached tokens.
            max_unreadable_share, num_images: see :class:`UnreadableImages`; a share of None raises
                the first error.
            max_pixels: see :func:`~regionspot_d2.data.images.read_image`.
            stock: ``augmentations`` (of live mode, or of ``augment_cached``) and
                ``precomputed_proposal_topk``.
        """
        super().__init__(is_train, image_format=image_format, **stock)
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is '{image_format}'; it must be 'RGB' or 'BGR'.")
        self.token_caches, self.cached_image_size = dict(token_caches or {}), cached_image_size
        self.augment_cached = augment_cached
        share = max_unreadable_share
        self.unreadable = None if share is None else UnreadableImages(share, num_images)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        for key, value, plain in (
            ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, "none"),
            ("INPUT.CROP.ENABLED", cfg.INPUT.CROP.ENABLED, False),
        ):
            augmented = is_train and cfg.INPUT.TOKEN_CACHE and value != plain
            if augmented and not cfg.INPUT.AUGMENT_CACHED:
                raise ValueError(
                    f"{key} is {value!r}; with INPUT.TOKEN_CACHE it must be {plain!r}, because the "
                    "cached tokens are of the unchanged image. (INPUT.AUGMENT_CACHED: True does as "
                    "the published code, which augments the image beside them.)"
                )
        ret = super().from_config(cfg, is_train)
        augment_cached = is_train and bool(cfg.INPUT.TOKEN_CACHE) and cfg.INPUT.AUGMENT_CACHED
        if augment_cached:
            # Detectron2's own order is to crop each image, before it is resized.
            ret["augmentations"] = utils.build_augmentation(cfg, is_train)
            if cfg.INPUT.CROP.ENABLED:
                crop = T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)
                ret["augmentations"].append(T.RandomApply(crop, prob=0.5))
        # Masks and keypoints, which Detectron2's mapper would also load, are not for us.
        kept = {"is_train", "augmentations", "image_format", "precomputed_proposal_topk"}
        return {
            **{key: ret[key] for key in kept & ret.keys()},
            "cached_image_size": cfg.INPUT.CACHED_IMAGE_SIZE,
            "augment_cached": augment_cached,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
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
            TooManyUnreadableError: too many images were skipped.
            SampleError: the record is not in Detectron2's format.
            TokenCacheError: the cache does not fit the annotations.
        """
        try:
            sample = self._map(copy.deepcopy(dataset_dict))
        except (ImageReadError, utils.SizeMismatchError) as error:
            if self.unreadable is None:
                raise
            self.unreadable.add_bad(error, dataset_dict["file_name"])
            return None
        except TokenCacheError:
            raise
        except Exception as error:  # of Detectron2, NumPy and torch, for records of any content
            name, reason = dataset_dict.get("file_name"), textwrap.shorten(str(error), 200)
            raise SampleError(
                f"The image {dataset_dict.get('image_id')!r} ({name!r}) or its annotations cannot "
                f"be used: {type(error).__name__}: {reason}"
            ) from error
        if self.unreadable is not None:
            self.unreadable.add_good()
        return sample

    def _map(self, x: dict[str, Any]) -> dict[str, Any]:
        image = read_image(x["file_name"], max_pixels=self.max_pixels)
        try:
            utils.check_image_size(x, image)
        except utils.SizeMismatchError as error:
            raise ImageSizeError(" ".join(str(error).split())) from error
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
        if self.augment_cached:
            augmented = T.AugInput(image)
            self.augmentations(augmented)
            image = augmented.image
        x["image"] = _to_tensor(image)
        if side := self.cached_image_size:
            x["image"] = squash(x["image"], side)
        new_height, new_width = x["image"].shape[-2:]
        if (new_height, new_width) != (height, width):
            # Like the tokens, boxes keep their place in the whole image.
            instances.gt_boxes.scale(new_width / width, new_height / height)
            x["instances"] = Instances((new_height, new_width), **instances.get_fields())
        return x


def squash(image: Tensor, side: int) -> Tensor:
    """Squashes an image (3, H, W) to (3, side, side), float32, as the vision-language models do."""
    size = (side, side)
    return F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
