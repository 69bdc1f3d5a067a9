"""Fixtures that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from . import tiny


@pytest.fixture
def tiny_models() -> Iterator[None]:
    """Lets configs name "tiny" as the architecture of SAM and of CLIP."""
    with tiny.registered_tiny_models():
        yield


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the project's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("REGIONSPOT_CACHE", str(folder))
    return folder


@pytest.fixture
def vocabularies(tiny_models: None, empty_cache: Path) -> Iterator[None]:
    """Registers the vocabularies ``tiny.WORDS``; what ``tiny.tiny_model`` needs."""
    for name, words in tiny.WORDS.items():
        MetadataCatalog.get(name).thing_classes = words
    yield
    for name in tiny.WORDS:
        MetadataCatalog.remove(name)
