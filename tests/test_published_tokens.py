"""The mask tokens that the authors publish: their folders, their classes, their image ids.

Files are small and made here, in the layout that the authors' training reads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from regionspot_d2.data.images import ImageReadError
from regionspot_d2.data.published_tokens import (
    PublishedTokens,
    has_tokens,
    match_classes,
    open_token_cache,
)
from regionspot_d2.data.token_cache import CacheManifest, TokenCacheError

MANIFEST = CacheManifest("mine", "a1", ("cat", "dog"), "SamLocalizer", "vit_b", "mask", "b2")


def write(folder: Path, image_id: int | str, classes: list[int], seed: int = 0) -> torch.Tensor:
    """Writes the tokens of an image, each a region of one of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = torch.randn(len(classes), 1, 8, generator=torch.Generator().manual_seed(seed))
    torch.save({"mask_tokens": stored, "classes": classes}, folder / f"{image_id}.pth")
    return stored[:, 0]


def write_classes(folder: Path, *names: str) -> None:
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "categories.json").write_text(json.dumps({"categories": categories}))


def manifest(dataset: str, *names: str) -> CacheManifest:
    return dataclasses.replace(MANIFEST, dataset=dataset, class_names=names)


def opened(root: Path, dataset: str, *names: str) -> PublishedTokens:
    source = open_token_cache(root, manifest(dataset, *names))
    assert isinstance(source, PublishedTokens)
    return source


def test_published_layout(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    stored = torch.randn(3, 256)
    torch.save({"mask_tokens": stored, "classes": torch.tensor([1, 2, 1])}, folder / "7.pth")
    assert has_tokens(tmp_path, "mine")
    cache = open_token_cache(tmp_path, MANIFEST)
    assert isinstance(cache, PublishedTokens)
    assert torch.equal(cache.read(7), stored)
    assert torch.equal(cache.read(7, torch.tensor([0, 1, 0])), stored)
    with pytest.raises(
        ImageReadError, match=r"7 are of the classes \[0, 1, 0\], .* of \[0, 1, 1\]"
    ):
        cache.read(7, torch.tensor([0, 1, 1]))
    torch.save({"mask_tokens": stored[:, None], "classes": [1, 2, 2]}, folder / "8.pth")
    assert torch.equal(cache.read(8), stored)
    with pytest.raises(ImageReadError, match=r"no file '.*9\.pth'"):
        cache.read(9)
    (folder / "9.pth").write_bytes(b"PK")
    with pytest.raises(ImageReadError, match=r"9\.pth' does not hold 'mask_tokens'"):
        cache.read(9)
    for wrong in (-1, 3):
        torch.save({"mask_tokens": stored, "classes": [1, wrong, 1]}, folder / "9.pth")
        with pytest.raises(TokenCacheError, match=rf"9\.pth' has the class {wrong}; 1 to 2"):
            cache.read(9)


def test_published_files_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"mask_tokens": Evil(), "classes": [1]}, tmp_path / "1.pth")
    with pytest.raises(ImageReadError, match="1.pth"):
        PublishedTokens(tmp_path, 1).read(1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("folder", "dataset"),
    [
        ("objects365", "objects365_v1_train"),
        ("v3det", "v3det_train"),
        ("openimages", "openimages_v6_train"),
    ],
)
def test_the_folders_of_the_archive(tmp_path: Path, folder: str, dataset: str) -> None:
    assert not has_tokens(tmp_path, dataset)
    stored = write(tmp_path / folder, 5, [1])
    assert has_tokens(tmp_path, dataset) and not has_tokens(tmp_path, "objects365_v2_train")
    assert torch.equal(opened(tmp_path, dataset, "cat", "dog").read(5), stored)
    # A folder of the dataset's own name comes first.
    own = write(tmp_path / dataset, 5, [1], seed=1)
    assert torch.equal(opened(tmp_path, dataset, "cat", "dog").read(5), own)


def test_classes_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # "cat" is the first class there and the last one here; "yak" and "emu" are not here.
    write_classes(tmp_path / "v3det", "cat", "yak", "Sea_Lion", "dog", "emu")
    stored = write(tmp_path / "v3det", 7, [4, 1, 3])
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path, "v3det_train", "dog", "sea lion", "cat")
    [line] = [record.getMessage() for record in caplog.records]
    assert (
        "categories.json': 3 of 5 are classes of 'v3det_train' by name, 2 are not (yak, emu)"
        in line
    )
    assert torch.equal(source.read(7, torch.tensor([0, 2, 1])), stored)
    with pytest.raises(
        ImageReadError, match=r"classes \[0, 2, 1\], its annotations of \[0, 1, 2\]"
    ):
        source.read(7, torch.tensor([0, 1, 2]))


def test_regions_of_classes_that_the_dataset_lacks(tmp_path: Path) -> None:
    write_classes(tmp_path / "v3det", "cat", "yak", "dog")
    stored = write(tmp_path / "v3det", 7, [3, 2, 1])
    source = opened(tmp_path, "v3det_train", "cat", "dog")
    # The annotations have the region under another name, or do not have it.
    assert torch.equal(source.read(7, torch.tensor([1, 1, 0])), stored)
    assert torch.equal(source.read(7, torch.tensor([1, 0])), stored[[0, 2]])
    for others in ([0, 1], [1], [1, 1, 1], [1, 0, 0, 0]):
        with pytest.raises(ImageReadError, match=r"classes \[1, None, 0\].*not the same regions"):
            source.read(7, torch.tensor(others))


def test_the_class_0_fits_any_class(tmp_path: Path) -> None:
    stored = write(tmp_path, 7, [0, 2])
    source = PublishedTokens(tmp_path, 2)
    for index in (0, 1):
        assert torch.equal(source.read(7, torch.tensor([index, 1])), stored)
    for others in ([0, 0], [1]):
        with pytest.raises(ImageReadError, match="not the same regions"):
            source.read(7, torch.tensor(others))


def test_names_that_two_classes_have() -> None:
    names = ["timer", "Timer", "cat", "crane", "crane"]
    published = {1: "timer", 2: "crane", 3: "Cat", 4: "TIMER", 5: "yak", 9: "Timer"}
    assert match_classes(published, names) == {
        1: {0},
        2: {3, 4},
        3: {2},
        4: {0, 1},
        5: frozenset(),
        9: {1},
    }


def test_lists_that_come_with_the_package(tmp_path: Path) -> None:
    for folder in ("objects365", "openimages"):
        write(tmp_path / folder, 1, [2, 3])
    # Sneakers and chair; container and magpie.
    tokens = opened(tmp_path, "objects365_v1_train", "Chair", "Person", "Sneakers")
    assert len(tokens.read(1, torch.tensor([2, 0]))) == 2
    tokens = opened(tmp_path, "openimages_v6_train", "Magpie", "Container")
    assert len(tokens.read(1, torch.tensor([1, 0]))) == 2
    write(tmp_path / "openimages", 2, [602])
    with pytest.raises(
        TokenCacheError, match=r"has the class 602; 1 to 601 .*openimages/categories"
    ):
        tokens.read(2)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"categories": []}', '{"categories": [1]}'])
def test_a_list_of_classes_that_is_none(tmp_path: Path, content: str) -> None:
    write(tmp_path / "v3det", 1, [1])
    (tmp_path / "v3det" / "categories.json").write_text(content)
    with pytest.raises(ValueError, match=r"v3det/categories\.json has no 'categories'") as caught:
        opened(tmp_path, "v3det_train", "cat")
    assert "\n" not in str(caught.value)


def test_images_without_a_file_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for image_id in (1, 2):
        write(tmp_path, image_id, [1])
    source = PublishedTokens(tmp_path, 1)
    source.check_images([2, 1])
    assert not caplog.records
    source.check_images(iter([1, 5, 2, 6]))
    assert "2 of 4 images have no file" in caplog.text and "5.pth" in caplog.text
    with pytest.raises(TokenCacheError, match=r"None of the 2 images .*'0a1b\.pth'.*COCO_FORMAT"):
        source.check_images(["0a1b", "0a1c"])


def test_an_image_without_regions(tmp_path: Path) -> None:
    write(tmp_path, 1, [])
    assert PublishedTokens(tmp_path, 1).read(1, torch.zeros(0)).shape == (0, 8)
