"""The documents: their Python runs as printed, and the files they point to exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot_d2.files import WeightsNotFoundError

from .test_roi_heads import MASK_RCNN, build_model, zoo_cfg

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), ROOT / "demo" / "README.md", ROOT / "datasets" / "README.md"]
)


def python_blocks(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch) -> dict:
    """The folder and the names that a reader of the examples has."""
    generator = np.random.default_rng(0)
    photo = generator.integers(0, 256, (320, 400, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    # The zoo's weights are on a model hub; the detector is Detectron2's own, random.
    monkeypatch.setattr(
        "detectron2.model_zoo.get", lambda name, trained: build_model(zoo_cfg(name))
    )
    return {"image": torch.from_numpy(photo).permute(2, 0, 1).flip(0)}


def run(blocks: list[str], names: dict) -> dict:
    try:
        for block in blocks:
            exec(compile(block, "example", "exec"), names)
    except WeightsNotFoundError as error:
        pytest.skip(f"the packages of the mini model cannot be had: {error}")
    return names


def test_getting_started(as_a_reader):
    blocks = python_blocks("GETTING_STARTED.md")
    assert any("wrap(" in block and MASK_RCNN.split("/")[0] in block for block in blocks)
    names = run(blocks, as_a_reader)
    assert len(names["names"]) == 2 and set(names["names"]) <= {"cat", "dog", "sofa"}
    assert len(names["found"]) == 2
    assert names["vectors"].shape == (1, names["predictor"].model.vision_language.text_dim)
    assert [row["image_id"] for row in names["rows"]] == [1, 1]
    expected = names["found"].pred_boxes.tensor.numpy()
    np.testing.assert_allclose(names["detections"].xyxy, expected)
    assert [len(found) for found in names["results"]] == [1, 0]
    found = names["output"]["instances"]
    assert len(found) > 0 and found.has("pred_masks")
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


def test_demo_readme(as_a_reader, capsys):
    run(python_blocks("demo/README.md"), as_a_reader)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and all(re.match(r"(cat|dog|sofa) 0\.\d+", line) for line in lines)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_name_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (document.parent / target).exists(), f"{document.name} points to {target}"
    for command in re.findall(r"python ((?:tools|demo)/\w+\.py|train_net\.py)", text):
        assert (ROOT / command).is_file(), f"{document.name} runs {command}"
    for config in re.findall(r"(?<![\w/])configs/[\w/]+\.yaml", text):
        assert (ROOT / config).is_file(), f"{document.name} names {config}"
