"""The token files that the RegionSpot authors publish, and the choice between them and a cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .cache_manifest import CacheManifest, TokenCacheError
from .images import ImageReadError
from .token_cache import TokenCache, find_manifest

logger = logging.getLogger(__name__)


class PublishedTokens:
    """Reads a folder with a file ``<image id>.pth`` for each image.

    A file is a dict of ``mask_tokens`` (R tokens) and ``classes`` (R ids, of which the first is 1).
    """

    def __init__(self, folder: str | os.PathLike[str], class_names: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.num_classes = len(class_names)

    def read(self, image_id: int | str, classes: Tensor | None = None) -> Tensor:
        """The tokens of one image's annotated regions.

        Args:
            classes: (R,) contiguous ids of the annotated regions, if they are to be compared.

        Returns:
            (R, token_dim), in the dtype of the file.

        Raises:
            ImageReadError: the file is missing or damaged, or not of these regions.
            TokenCacheError: the file has a class that the dataset does not have.
        """
        path = self.folder / f"{image_id}.pth"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            stored = torch.as_tensor(content["classes"], dtype=torch.int64).reshape(-1) - 1
            tokens = torch.as_tensor(content["mask_tokens"]).reshape(len(stored), -1)
        except FileNotFoundError as error:
            raise ImageReadError(f"Image {image_id!r} has no tokens: no file '{path}'.") from error
        except Exception as error:  # a damaged file raises nearly anything
            raise ImageReadError(
                f"'{path}' does not hold 'mask_tokens' and 'classes' of the same length ({error})."
            ) from error
        wrong = stored[(stored < 0) | (stored >= self.num_classes)]
        if len(wrong):
            raise TokenCacheError(
                f"'{path}' has the class {int(wrong[0]) + 1}; 1 to {self.num_classes} are expected."
            )
        if classes is not None and stored.tolist() != classes.tolist():
            raise ImageReadError(
                f"The published tokens of image {image_id!r} are of the classes {stored.tolist()}, "
                f"but its annotations are of {classes.tolist()}: these are other regions."
            )
        return tokens


def has_tokens(root: str | os.PathLike[str], dataset_name: str) -> bool:
    """Whether a folder of caches has finished or published tokens of a dataset."""
    folder = Path(root) / dataset_name
    manifest = find_manifest(folder)
    if manifest is None:
        return next(folder.glob("*.pth"), None) is not None
    return not manifest.missing_shards(folder)


def open_token_cache(root: str | os.PathLike[str], wanted: CacheManifest) -> TokenSource:
    """Opens the tokens of ``wanted.dataset``, in the folder of that name below ``root``.

    Raises:
        TokenCacheError: they are missing or unfinished, or were not made from what is wanted.
            Published files do not say what they were made from.
    """
    folder = Path(root) / wanted.dataset
    if find_manifest(folder) is None and next(folder.glob("*.pth"), None) is not None:
        logger.warning(f"'{folder}' holds published tokens; what made them cannot be checked.")
        return PublishedTokens(folder, wanted.class_names)
    return TokenCache(folder, wanted)


TokenSource = TokenCache | PublishedTokens
