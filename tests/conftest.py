"""Fixtures that many tests share."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.files import WeightsNotFoundError

from . import tiny


@pytest.fixture(autouse=True)
def open_loggers() -> Iterator[None]:
    """Lets tests read what is logged, also after a program that keeps its log to itself."""
    yield
    for name in ("detectron2", "fvcore", "regionspot_d2"):
        logging.getLogger(name).propagate = True


@pytest.fixture(scope="session", autouse=True)
def ears_for_ctrl_c() -> None:
    """What nohup or & has started ignores Ctrl-C, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def short_goodbyes() -> Iterator[None]:
    """Torch waits this long for the workers of a loader that failed; by default five seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture
def tiny_models() -> Iterator[None]:
    """Lets configs name "tiny" as the architecture of SAM and of CLIP."""
    with tiny.registered_tiny_models():
        yield


@pytest.fixture(scope="session")
def mini_predictor() -> RegionSpotPredictor:
    """The shipped model, which tests share and leave as it is; without its packages they skip."""
    try:
        return RegionSpotPredictor.from_pretrained("mini", device="cpu")
    except WeightsNotFoundError as error:
        pytest.skip(f"the packages of the mini model are missing: {error}")


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


@pytest.fixture
def hub(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Gives the folder of a repository's files in the cache of the hub, without a net."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def snapshot(name: str) -> Path:
        root = empty_cache / "hub" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0" * 40)
        (root / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
        return root / "snapshots" / ("0" * 40)

    return snapshot
