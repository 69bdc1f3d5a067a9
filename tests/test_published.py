"""The published protocol: converted heads give its results, and each of its switches is one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from PIL import Image
from pycocotools import mask as mask_codes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regionspot_d2.engine import RegionSpotTrainer, load_config

from . import tiny
from .datasets_on_disk import annotation, write_images
from .published_steps import Pair, PublishedModel
from .tools import ROOT, load_tool

NAME = "published_protocol"
NAMES = [category["name"] for category in LVIS_CATEGORIES[:28]] + [
    "wall-other-merged",
    "food-stuff",
    "rain_coat",
    "tree-merged",
]
# Of the images 1 to 4. With 32 names the first two have more pairs than the 900 that are kept.
BOXES = (45, 40, 0, 5)


@pytest.fixture
def folder(tmp_path: Path, tiny_models: None, empty_cache: Path) -> Iterator[Path]:
    yield tmp_path
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)
    for name in ("detectron2", "fvcore", "regionspot_d2"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).handlers.clear()


def glip_boxes(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Random boxes with scores, as GLIP's json has them; image 3 is not in it."""
    rng, found = np.random.default_rng(5), {}
    for entry, count in zip(entries, BOXES):
        size = np.array([entry["width"], entry["height"]])
        corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1)
        boxes = (corners * 0.8 * size).reshape(-1, 4) + [0, 0, 4, 4]
        # So different that the best of all pairs are not those of the most certain names.
        scores = np.sort(rng.uniform(0.3, 1, count) ** 5)[::-1]
        if count:
            found[str(entry["id"])] = {"boxes": boxes.tolist(), "scores": scores.tolist()}
    return found


def write_dataset(folder: Path, model: PublishedModel) -> dict[int, list[Pair]]:
    """Writes images, boxes and annotations; returns the pairs expected of each image.

    Some names of the annotations are right, so that AP is more than 0, and image 1 has a crowd.
    """
    entries = write_images(folder / "images", [f"{n}.png" for n in "abcd"])
    glip = glip_boxes(entries)
    (folder / "glip.json").write_text(json.dumps(glip))
    expected, annotations = {}, []
    for entry in entries:
        image = Image.open(folder / "images" / entry["file_name"])
        found = glip.get(str(entry["id"]), {"boxes": [], "scores": []})
        pairs = []
        if found["boxes"]:
            pairs = model.name_boxes(image, found["boxes"], np.array(found["scores"]), NAMES)
        expected[entry["id"]] = pairs
        for pair in pairs[:60:9]:
            own = annotation(len(annotations) + 1, entry["id"], xywh(pair), pair.name + 1)
            annotations.append({**own, "segmentation": encoded(pair)})
    crowd = annotation(len(annotations) + 1, 1, [5.0, 5.0, 50.0, 40.0], iscrowd=1)
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    content = {"images": entries, "categories": categories, "annotations": [*annotations, crowd]}
    (folder / "instances.json").write_text(json.dumps(content))
    return expected


def converted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedModel:
    """Writes a checkpoint in the authors' layout, the frozen models' own files, and the head."""
    state = tiny.published_checkpoint()
    torch.save({"model": state}, folder / "published.pth")
    sam, clip = tiny.build_tiny_sam(), tiny.tiny_open_clip()
    torch.save(sam.state_dict(), folder / "sam.pth")
    torch.save(clip.state_dict(), folder / "clip.pt")
    files = [str(folder / name) for name in ("published.pth", "head.safetensors")]
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *files])
    load_tool("convert_checkpoint").main()
    return PublishedModel(state, sam, clip, ffn_dim=96)


def evaluation_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """``configs/published/eval_lvis_glip.yaml``, with tiny towers and the small dataset."""
    data = [[NAME, str(folder / "instances.json"), str(folder / "images")]]
    proposals = str(folder / "glip.pkl")
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.LOCALIZER.ARCH": "tiny",
        "MODEL.LOCALIZER.WEIGHTS": str(folder / "sam.pth"),
        "MODEL.VISION_LANGUAGE.ARCH": "tiny",
        "MODEL.VISION_LANGUAGE.WEIGHTS": str(folder / "clip.pt"),
        "MODEL.REGION_HEAD.FFN_DIM": 96,
        "MODEL.WEIGHTS": str(folder / "head.safetensors"),
        "DATASETS.COCO_FORMAT": data,
        "DATASETS.TEST": (NAME,),
        "DATASETS.PROPOSAL_FILES_TEST": (proposals,),
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": str(folder / "output"),
    }
    flat = [part for item in options.items() for part in item]
    tool = load_tool("prepare_proposals")
    coco_format = ["DATASETS.COCO_FORMAT", str(data)]
    arguments = ["--dataset", NAME, "--source", "glip", "--boxes", str(folder / "glip.json")]
    monkeypatch.setattr(
        "sys.argv", ["prepare_proposals.py", *arguments, "--output", proposals, *coco_format]
    )
    tool.invoke_main()
    file = ROOT / "configs" / "published" / "eval_lvis_glip.yaml"
    return load_config(str(file), flat, training=False, testing=True)


def average_precision(folder: Path, results: list[dict[str, Any]], task: str) -> float:
    """By pycocotools itself, in percent."""
    truth = COCO(str(folder / "instances.json"))
    evaluation = COCOeval(truth, truth.loadRes(results), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def xywh(pair: Pair) -> list[float]:
    x0, y0, x1, y1 = pair.box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def encoded(pair: Pair) -> dict[str, Any]:
    code = mask_codes.encode(np.asfortranarray(pair.mask_logits > 0))
    return {**code, "counts": code["counts"].decode()}


def as_results(expected: dict[int, list[Pair]], task: str) -> list[dict[str, Any]]:
    results = []
    for image_id, pairs in expected.items():
        for pair in pairs:
            own = {"image_id": image_id, "category_id": pair.name + 1, "score": pair.score}
            is_box = task == "bbox"
            shape = {"bbox": xywh(pair)} if is_box else {"segmentation": encoded(pair)}
            results.append({**own, **shape})
    return results


def test_a_converted_head_gives_the_published_results(folder, monkeypatch):
    model = converted(folder, monkeypatch)
    expected = write_dataset(folder, model)
    cfg = evaluation_config(folder, monkeypatch)
    metrics = RegionSpotTrainer.evaluate_checkpoint(cfg)

    file = folder / "output" / "inference" / NAME / "coco_instances_results.json"
    results = json.loads(file.read_text())
    assert [len(expected[image]) for image in (1, 2, 3, 4)] == [300, 300, 0, 160]
    assert len(results) == 760
    for image_id, pairs in expected.items():
        found = [result for result in results if result["image_id"] == image_id]
        own = {(pair.region, pair.name): pair for pair in pairs}
        boxes = {pair.region: pair.box for pair in pairs}
        seen = set()
        for result in found:
            x, y, w, h = result["bbox"]
            box = np.array([x, y, x + w, y + h])
            region = min(boxes, key=lambda i: np.abs(boxes[i] - box).max())
            pair = own[region, result["category_id"] - 1]
            seen.add((region, pair.name))
            assert result["score"] == pytest.approx(pair.score, abs=1e-5)
            np.testing.assert_allclose(box, pair.box, atol=1e-5)
            wrong = mask_codes.decode(result["segmentation"]) != (pair.mask_logits > 0)
            assert np.abs(pair.mask_logits[wrong]).max(initial=0) < 1e-5
        assert len(found) == len(seen) == len(own)
    for task in ("bbox", "segm"):
        ap = average_precision(folder, as_results(expected, task), task)
        assert 0 < ap < 100 and metrics[task]["AP"] == pytest.approx(ap, abs=1e-3)
