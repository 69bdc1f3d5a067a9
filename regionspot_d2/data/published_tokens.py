"""The token files that the RegionSpot authors publish, and the choice between them and a cache."""

from __future__ import annotations

import logging
import os
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from .images import ImageReadError
from .token_cache import CacheManifest, TokenCache, TokenCacheError, find_manifest

logger = logging.getLogger(__name__)


class PublishedTokens:
    """Reads a file ``<image id>.pth`` per image, with ``mask_tokens`` and 1-based ``classes``."""

    def __init__(self, folder: str | os.PathLike[str], num_classes: int) -> None:
        self.folder, self.num_classes = Path(folder), num_classes

    def read(self, image_id: int | str, classes: Tensor | None = None) -> Tensor:
        """The tokens of one image, (R, token_dim) in the dtype of the file.

        Raises:
            ImageReadError: the file is missing or damaged, or its regions are not of ``classes``.
            TokenCacheError: the file has a class that the dataset does not have.
        """
        path = self.folder / f"{image_id}.pth"
        try:
            if not path.is_file():
                raise FileNotFoundError
            content = torch.load(path, map_location="cpu", weights_only=True)
            numbers = torch.as_tensor(content["classes"]).reshape(-1)
            stored = numbers.long() - 1
            tokens = torch.as_tensor(content["mask_tokens"]).reshape(len(stored), -1)
            if not torch.equal(numbers, (stored + 1).to(numbers.dtype)):
                raise ValueError("its classes are not whole numbers")
            if not (tokens.is_floating_point() and tokens.isfinite().all()):
                raise ValueError("its tokens are not finite numbers")
        except FileNotFoundError as error:
            raise ImageReadError(f"Image {image_id!r} has no tokens: no file '{path}'.") from error
        except Exception as error:  # a damaged file raises nearly anything
            raise ImageReadError(
                f"'{path}' does not hold 'mask_tokens' and 'classes' of the same length: "
                f"{textwrap.shorten(str(error), 200)}"
            ) from error
        wrong = stored[(stored < 0) | (stored >= self.num_classes)]
        if len(wrong):
            raise TokenCacheError(
                f"'{path}' has the class {int(wrong[0]) + 1}; 1 to {self.num_classes} are expected."
            )
        if classes is not None and stored.tolist() != classes.tolist():
            raise ImageReadError(
                f"The published tokens of the image {image_id!r} are of the classes "
                f"{stored.tolist()}, its annotations of {classes.tolist()}: not the same regions."
            )
        return tokens


def has_tokens(root: str | os.PathLike[str], dataset_name: str) -> bool:
    """Whether a folder of caches has finished or published tokens of a dataset."""
    folder = Path(root) / dataset_name
    manifest = find_manifest(folder)
    return _is_published(folder) if manifest is None else not manifest.missing_shards(folder)


def open_token_cache(root: str | os.PathLike[str], wanted: CacheManifest) -> TokenSource:
    """Opens the tokens of a dataset in ``root``; raises a TokenCacheError if they do not fit."""
    folder = Path(root) / wanted.dataset
    if find_manifest(folder) is None and _is_published(folder):
        logger.warning(f"'{folder}' holds published tokens; what made them cannot be checked.")
        return PublishedTokens(folder, len(wanted.class_names))
    return TokenCache(folder, wanted)


def _is_published(folder: Path) -> bool:
    return next(folder.glob("*.pth"), None) is not None


TokenSource = TokenCache | PublishedTokens
