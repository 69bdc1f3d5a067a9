"""Class lists come with the package: no download, no other package and no mini model is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regionspot_d2.data.datasets.vocabularies import (
    VOCABULARIES,
    class_synonyms,
    known_vocabulary,
    shipped_names,
)

ROOT = Path(__file__).resolve().parent.parent


def test_names_are_listed_once_in_the_dataset_s_order() -> None:
    sizes = {name: len(known_vocabulary(name)) for name in VOCABULARIES}
    assert sizes == {"lvis": 1203, "coco": 80, "objects365": 365, "openimages": 498}
    assert {name: len(class_synonyms(name)) for name in VOCABULARIES} == {
        **sizes,
        "openimages": 500,
    }
    for name in VOCABULARIES:
        names = known_vocabulary(name)
        assert len(set(names)) == len(names)
        assert all(each == each.strip() for each in names)
    firsts = [known_vocabulary(name)[:2] for name in VOCABULARIES]
    assert firsts[:3] == [
        ["aerosol_can", "air_conditioner"],
        ["person", "bicycle"],
        ["Person", "Sneakers"],
    ]


def test_misspellings_are_synonyms() -> None:
    [row] = [names for names in class_synonyms("objects365") if "Moniter/TV" in names]
    assert row == ["Monitor/TV", "Moniter/TV", "Monitor", "TV"]
    assert "Moniter/TV" not in known_vocabulary("objects365")
    assert "Moniter/TV" in (shipped_names("objects365_v2_val") or [])


def test_training_sets() -> None:
    assert len(shipped_names("openimages_v6_train") or []) == 601
    assert len(shipped_names("objects365_v1_train") or []) == 365
    assert shipped_names("coco_2017_val") is None


def test_an_unknown_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="no vocabulary 'voc'; there are lvis, coco, objects365"):
        known_vocabulary("voc")


PAPERS_MODEL = """
import numpy as np
import regionspot_d2
from regionspot_d2 import RegionSpotPredictor, mini
from regionspot_d2.data.datasets.vocabularies import known_vocabulary
from tests import tiny

assert regionspot_d2.__file__.startswith({package!r}), regionspot_d2.__file__
assert mini.__all__ == []
tiny.register_tiny_models()
predictor = RegionSpotPredictor(tiny.tiny_cfg(), vocabulary=known_vocabulary("openimages")[:20])
predictor.set_image(np.zeros((60, 80, 3), np.uint8))
found = predictor.predict(boxes=[[5, 5, 40, 50], [20, 10, 70, 55]])
assert len(found) == 2
print(predictor.vocabulary[int(found.pred_classes[0])])
"""


def test_the_papers_model_runs_without_the_folder_of_the_mini_model(
    tmp_path: Path, empty_cache: Path
) -> None:
    package = tmp_path / "regionspot_d2"
    ignored = shutil.ignore_patterns("mini", "__pycache__")
    shutil.copytree(ROOT / "regionspot_d2", package, ignore=ignored)
    (package / "mini").mkdir()
    (package / "mini" / "__init__.py").write_text("__all__ = []\n")
    done = subprocess.run(
        [sys.executable, "-c", PAPERS_MODEL.format(package=str(package))],
        cwd=tmp_path,
        # No package index either, so that nothing can be downloaded.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "PIP_NO_INDEX": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in known_vocabulary("openimages")
    assert not (empty_cache / "packages").exists()
