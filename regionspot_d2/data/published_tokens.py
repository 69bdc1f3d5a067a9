"""The mask tokens that the RegionSpot authors publish, and the choice between them and a cache.

Their archive has a folder per dataset with a file ``<image id>.pth`` per image. A file holds
``mask_tokens`` and, for each of them, a class: a number in their own list of classes. The lists are
other versions than those of the datasets, so numbers are matched with class names. What is trained
on are always the classes of the annotations; those of a file tell whether its regions are the same.
"""

from __future__ import annotations

import logging
import os
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor

from .datasets.annotations import read_categories
from .datasets.vocabularies import shipped_names
from .images import ImageReadError
from .token_cache import CacheManifest, TokenCache, TokenCacheError, find_manifest

logger = logging.getLogger(__name__)

# The authors' folders. Their Objects365 is version 1.
_FOLDERS = {
    "objects365_v1_train": "objects365",
    "v3det_train": "v3det",
    "openimages_v6_train": "openimages",
}
_CLASS_FILE = "categories.json"


class PublishedTokens:
    """Reads a folder of published files.

    The class 0, which is in no list, fits any class: what the authors mean by it is not known.
    (Their training takes it for the first class.)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_classes: int,
        classes: Mapping[int, frozenset[int]] | None = None,
    ) -> None:
        """
        Args:
            folder: has the files of one dataset.
            num_classes: of the dataset.
            classes: for each number of the authors' list the contiguous ids of its name in the
                dataset, see :func:`match_classes`; by default number 1 is the first class.
        """
        self.folder = Path(folder)
        own = {i + 1: frozenset({i}) for i in range(num_classes)}
        self.classes = own if classes is None else classes

    def read(self, image_id: int | str, classes: Tensor | None = None) -> Tensor:
        """The tokens of one image.

        Args:
            image_id: as in the annotations that the authors used.
            classes: (R,) contiguous ids of the annotated regions. Regions whose class the dataset
                does not have fit any class or, if there are more regions than these, are left out.

        Returns:
            (R, token_dim) in the dtype of the file.

        Raises:
            ImageReadError: the file is missing or damaged, or its regions are not of ``classes``.
            TokenCacheError: the file has a number that the list of classes does not have.
        """
        numbers, tokens = self._load(image_id)
        if classes is None:
            return tokens
        allowed = [self.classes.get(number, frozenset()) for number in numbers]
        wanted = classes.tolist()
        every = list(range(len(numbers)))
        named = [row for row in every if allowed[row] or not numbers[row]]
        for rows in (every, named):
            if len(rows) == len(wanted) and all(
                not allowed[row] or index in allowed[row] for row, index in zip(rows, wanted)
            ):
                return tokens[rows]
        raise ImageReadError(
            f"The published tokens of the image {image_id!r} are of the classes "
            f"{[min(found, default=None) for found in allowed]}, its annotations of {wanted}: not "
            "the same regions."
        )

    def _load(self, image_id: int | str) -> tuple[list[int], Tensor]:
        path = self.folder / f"{image_id}.pth"
        try:
            if not path.is_file():
                raise FileNotFoundError
            content = torch.load(path, map_location="cpu", weights_only=True)
            numbers = torch.as_tensor(content["classes"]).reshape(-1)
            tokens = torch.as_tensor(content["mask_tokens"])
            tokens = tokens.reshape(len(numbers), tokens.shape[-1])
            if not torch.equal(numbers, numbers.long().to(numbers.dtype)):
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
        found = numbers.long().tolist()
        for number in found:
            if number and number not in self.classes:
                raise TokenCacheError(
                    f"'{path}' has the class {number}; 1 to {max(self.classes)} are expected. If "
                    f"its classes are of another list, put that list into "
                    f"'{self.folder / _CLASS_FILE}' (see datasets/README.md)."
                )
        return found, tokens

    def check_images(self, image_ids: Iterable[int | str]) -> None:
        """Warns of images that have no file; TokenCacheError if none has one."""
        with os.scandir(self.folder) as entries:
            files = {entry.name for entry in entries}
        ids = list(image_ids)
        missing = [image_id for image_id in ids if f"{image_id}.pth" not in files]
        if not missing:
            return
        if len(missing) == len(ids):
            raise TokenCacheError(
                f"None of the {len(ids)} images has a file in '{self.folder}'; the first would be "
                f"'{missing[0]}.pth'. The files are named by the image ids of the annotations that "
                "they were made with: train on those (DATASETS.COCO_FORMAT)."
            )
        logger.warning(
            f"{len(missing)} of {len(ids)} images have no file in '{self.folder}', the first is "
            f"'{missing[0]}.pth'. They are skipped, up to DATALOADER.MAX_UNREADABLE_SHARE."
        )


def match_classes(
    published: Mapping[int, str], class_names: Sequence[str]
) -> dict[int, frozenset[int]]:
    """Finds the classes of a list in a dataset, by name.

    Names are the same if they are spelled alike or, failing that, differ only in case, underscores
    and blanks. Several classes may have one name: V3Det has some twice.

    Args:
        published: the names by their numbers.
        class_names: of the dataset, in the order of its contiguous ids.

    Returns:
        The contiguous ids by number; none where the dataset does not have the name.
    """
    exact: dict[str, set[int]] = defaultdict(set)
    alike: dict[str, set[int]] = defaultdict(set)
    for index, name in enumerate(class_names):
        exact[name].add(index)
        alike[_plain(name)].add(index)
    return {
        number: frozenset(exact.get(name) or alike.get(_plain(name)) or ())
        for number, name in published.items()
    }


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def has_tokens(root: str | os.PathLike[str], dataset_name: str) -> bool:
    """Whether a folder of caches has finished or published tokens of a dataset."""
    folder = _find_folder(root, dataset_name)
    manifest = find_manifest(folder)
    return _is_published(folder) if manifest is None else not manifest.missing_shards(folder)


def open_token_cache(root: str | os.PathLike[str], wanted: CacheManifest) -> TokenSource:
    """Opens the tokens of a dataset in ``root``; raises a TokenCacheError if they do not fit."""
    folder = _find_folder(root, wanted.dataset)
    if find_manifest(folder) is None and _is_published(folder):
        return _open_published(folder, wanted)
    return TokenCache(folder, wanted)


def _find_folder(root: str | os.PathLike[str], dataset_name: str) -> Path:
    """The folder of a dataset's own name or, if there is none, that of the authors' archive."""
    own = Path(root) / dataset_name
    published = Path(root) / _FOLDERS.get(dataset_name, dataset_name)
    return published if published.exists() and not own.exists() else own


def _is_published(folder: Path) -> bool:
    return next(folder.glob("*.pth"), None) is not None


def _open_published(folder: Path, wanted: CacheManifest) -> PublishedTokens:
    published, source = _class_list(folder, wanted)
    classes = match_classes(published, wanted.class_names)
    strange = [published[number] for number, found in classes.items() if not found]
    message = (
        f"'{folder}' holds published tokens; what made them cannot be checked. "
        f"Their classes are numbered by {source}: {len(classes) - len(strange)} of "
        f"{len(classes)} are classes of '{wanted.dataset}' by name"
    )
    if strange:
        message += f", {len(strange)} are not ({textwrap.shorten(', '.join(strange), 80)})"
    log_first_n(logging.WARNING, f"{message}.", key="message", name=__name__)
    return PublishedTokens(folder, len(wanted.class_names), classes)


def _class_list(folder: Path, wanted: CacheManifest) -> tuple[dict[int, str], str]:
    """The names that the numbers in the files stand for, and where they come from."""
    file = folder / _CLASS_FILE
    if file.is_file():
        return {c["id"]: c["name"] for c in read_categories(str(file))}, f"'{file}'"
    archive = {published: dataset for dataset, published in _FOLDERS.items()}
    names = shipped_names(archive.get(folder.name, ""))
    if names is not None:
        return dict(enumerate(names, start=1)), "the list in this package"
    return dict(enumerate(wanted.class_names, start=1)), f"the order of '{wanted.dataset}'"


TokenSource = TokenCache | PublishedTokens
