"""Panoptic quality by command, on a small set, with the numbers of an independent count."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from PIL import Image

import train_net
from regionspot_d2.data.datasets.panoptic import register_all_ade20k_panoptic
from regionspot_d2.evaluation import PanopticQualityEvaluator
from regionspot_d2.modeling.names import clean_name
from regionspot_d2.modeling.vocabulary import dataset_stuff_classes

from .tiny import tiny_cfg

NAMES = ["cat", "dog", "sky-other-merged", "grass-merged"]
METADATA = {
    "thing_classes": NAMES,
    "stuff_classes": NAMES,
    # Ids in the file, and places among the names.
    "thing_dataset_id_to_contiguous_id": {1: 0, 5: 1},
    "stuff_dataset_id_to_contiguous_id": {9: 2, 12: 3},
}
IDS = [1, 5, 9, 12]
SIZE = (48, 64)

Segments = tuple[np.ndarray, dict[int, int]]  # (H, W) numbers, and the class of each number


def write(folder: Path, truth: list[Segments], image_id: Any = int) -> None:
    """Writes a dataset in COCO's panoptic format, by the rules of its documentation."""
    (folder / "images").mkdir(parents=True)
    (folder / "truth").mkdir()
    images, annotations = [], []
    generator = np.random.default_rng(0)
    for number, (seg, classes) in enumerate(truth, start=1):
        pixels = generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        colors = np.stack([seg % 256, seg // 256 % 256, seg // 65536], axis=-1)
        Image.fromarray(colors.astype(np.uint8)).save(folder / "truth" / f"{number}.png")
        height, width = SIZE
        image = {"id": image_id(number), "file_name": f"{number}.jpg"}
        images.append({**image, "height": height, "width": width})
        segments = [
            {
                "id": i,
                "category_id": IDS[name],
                "area": int((seg == i).sum()),
                "bbox": [0, 0, width, height],
                "iscrowd": 0,
            }
            for i, name in classes.items()
        ]
        annotation = {"image_id": image_id(number), "file_name": f"{number}.png"}
        annotations.append({**annotation, "segments_info": segments})
    categories = [
        {"id": i, "name": name, "isthing": int(place < 2)}
        for place, (i, name) in enumerate(zip(IDS, NAMES))
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))


def count_quality(truth: list[Segments], found: list[Segments]) -> dict[str, float]:
    """PQ as its paper defines it: matches overlap by more than half; nothing is shared code."""
    totals = {name: [0.0, 0, 0, 0] for name in range(len(NAMES))}  # IoU, hits, false, missed
    for (true_seg, true_classes), (seg, classes) in zip(truth, found):
        hits = set()
        for i, name in true_classes.items():
            for j in (j for j, other in classes.items() if other == name):
                both = ((true_seg == i) & (seg == j)).sum()
                # Pixels without truth do not count against a prediction.
                either = ((true_seg == i) | ((seg == j) & (true_seg > 0))).sum()
                if both / either > 0.5:
                    totals[name][0] += both / either
                    totals[name][1] += 1
                    hits |= {("true", i), ("found", j)}
        for i, name in true_classes.items():
            totals[name][3] += ("true", i) not in hits
        for j, name in classes.items():
            unknown = ((seg == j) & (true_seg == 0)).sum() / (seg == j).sum()
            totals[name][2] += ("found", j) not in hits and unknown <= 0.5

    def mean(names: list[int]) -> float:
        there = [totals[n] for n in names if sum(totals[n][1:])]
        return 100 * float(np.mean([iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in there]))

    return {"PQ": mean([0, 1, 2, 3]), "PQ_th": mean([0, 1]), "PQ_st": mean([2, 3])}


def painted(*boxes: tuple[int, int, int, int, int]) -> Segments:
    """Segments from (x0, y0, x1, y1, class), the later ones on top."""
    seg = np.zeros(SIZE, np.int64)
    for number, (x0, y0, x1, y1, _) in enumerate(boxes, start=1):
        seg[y0:y1, x0:x1] = number * 300  # more than one byte of the color
    return seg, {n * 300: box[4] for n, box in enumerate(boxes, start=1)}


TRUTH = [
    painted((0, 0, 64, 20, 2), (0, 20, 64, 48, 3), (10, 10, 30, 30, 0), (40, 22, 60, 44, 1)),
    painted((0, 0, 64, 24, 2), (5, 26, 25, 46, 0), (30, 26, 50, 46, 0)),
]
FOUND = [
    painted((0, 0, 64, 22, 2), (0, 22, 64, 48, 3), (12, 10, 32, 30, 0), (40, 22, 48, 30, 1)),
    painted((0, 0, 60, 24, 2), (5, 26, 25, 40, 0), (30, 26, 50, 46, 1), (52, 30, 62, 40, 1)),
]


@pytest.fixture
def panoptic(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    register_coco_panoptic(
        "small_panoptic",
        METADATA,
        str(folder / "images"),
        str(folder / "truth"),
        str(folder / "panoptic.json"),
    )
    yield folder
    DatasetCatalog.remove("small_panoptic")
    MetadataCatalog.remove("small_panoptic")


@pytest.mark.parametrize("image_id", [int, lambda number: f"ADE_val_{number:08}"])
def test_quality_is_that_of_an_independent_count(panoptic, tmp_path, image_id):
    write(panoptic, TRUTH, image_id)
    evaluator = PanopticQualityEvaluator("small_panoptic", str(tmp_path / "results"))
    evaluator.reset()
    for number, (seg, classes) in enumerate(FOUND, start=1):
        segments = [
            {"id": i, "category_id": name, "isthing": name < 2} for i, name in classes.items()
        ]
        output = {"panoptic_seg": (torch.from_numpy(seg).int(), segments)}
        given = {"file_name": f"{number}.jpg", "image_id": image_id(number)}
        evaluator.process([given], [output])
    results = evaluator.evaluate()["panoptic_seg"]
    expected = count_quality(TRUTH, FOUND)
    assert {key: results[key] for key in expected} == pytest.approx(expected)
    assert 20 < expected["PQ_th"] < expected["PQ"] < expected["PQ_st"] < 100
    assert "panopticapi" not in sys.modules


@pytest.fixture
def cfg(tmp_path, panoptic, tiny_models, empty_cache):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "PanopticRegionSpot"
    cfg.DATASETS.TEST = ("small_panoptic",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = -1.0
    cfg.MODEL.EVERYTHING.POINTS_PER_SIDE = 3
    # Random masks are bad and unstable.
    cfg.MODEL.EVERYTHING.PRED_IOU_THRESH = -100.0
    cfg.MODEL.EVERYTHING.STABILITY_THRESH = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 1
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    yield cfg
    for name in ("detectron2", "fvcore", "regionspot_d2"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).handlers.clear()


def evaluate(cfg) -> dict[str, Any]:
    file = Path(cfg.OUTPUT_DIR).with_suffix(".yaml")
    file.write_text(cfg.dump())
    args = argparse.Namespace(
        config_file=str(file), opts=[], eval_only=True, resume=False, num_gpus=0
    )
    return train_net.main(args)


def test_train_net_evaluates_panoptic_quality(cfg, panoptic, monkeypatch):
    write(panoptic, TRUTH)
    found: list[Segments] = []
    process = PanopticQualityEvaluator.process

    def spy(self, inputs, outputs):
        for output in outputs:
            seg, segments = output["panoptic_seg"]
            found.append((seg.numpy().copy(), {s["id"]: s["category_id"] for s in segments}))
            assert len(output["instances"]) >= len(segments) > 0
        process(self, inputs, outputs)

    monkeypatch.setattr(PanopticQualityEvaluator, "process", spy)
    results = evaluate(cfg)["panoptic_seg"]
    expected = count_quality(TRUTH, found)
    assert {key: results[key] for key in expected} == pytest.approx(expected)
    table = (Path(cfg.OUTPUT_DIR) / "results_table.md").read_text()
    assert "Panoptic quality" in table and "small_panoptic" in table


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("META_ARCHITECTURE", "RegionSpot", "LOAD_PROPOSALS|PanopticRegionSpot"),
        ("EVALUATION_BACKEND", "reference", "reference needs the package panopticapi: pip install"),
    ],
)
def test_what_is_missing_is_told(cfg, panoptic, monkeypatch, key, value, message):
    write(panoptic, TRUTH)
    monkeypatch.setitem(sys.modules, "panopticapi", None)
    (cfg.TEST if key in cfg.TEST else cfg.MODEL)[key] = value
    with pytest.raises((ValueError, ImportError), match=message):
        evaluate(cfg)


def test_annotations_that_are_not_there(cfg):
    with pytest.raises(ValueError, match="annotations of 'small_panoptic' are not there"):
        evaluate(cfg)


def test_things_and_stuff_of_the_known_datasets(tmp_path):
    for name, things, stuff in [
        ("coco_2017_val_panoptic", 80, 53),
        ("ade20k_panoptic_val", 100, 50),
    ]:
        places, names = dataset_stuff_classes(name), MetadataCatalog.get(name).thing_classes
        assert (len(names) - len(places), len(places)) == (things, stuff)
        words = [clean_name(names[i]) for i in sorted(places)]
        assert {"house", "sand", "sea"} <= set(words)
        assert not any("merged" in w or "other" in w or "stuff" in w for w in words)
    with pytest.raises(ValueError, match="coco_2017_val_panoptic_separated"):
        dataset_stuff_classes("coco_2017_val_panoptic_separated")


def test_ade20k_is_read_with_names_for_ids(tmp_path, monkeypatch):
    folder = tmp_path / "ADEChallengeData2016"
    write(folder, TRUTH, lambda number: f"ADE_val_{number}")
    (folder / "panoptic.json").rename(folder / "ade20k_panoptic_val.json")
    names = ("ade20k_panoptic_train", "ade20k_panoptic_val")
    before = {n: (DatasetCatalog.pop(n), dict(MetadataCatalog.pop(n).as_dict())) for n in names}
    try:
        register_all_ade20k_panoptic(str(tmp_path))
        records = DatasetCatalog.get("ade20k_panoptic_val")
        assert [r["image_id"] for r in records] == ["ADE_val_1", "ADE_val_2"]
        assert records[0]["file_name"].endswith("images/validation/1.jpg")
    finally:
        for name, (load, metadata) in before.items():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
            DatasetCatalog.register(name, load)
            MetadataCatalog.get(name).set(**{k: v for k, v in metadata.items() if k != "name"})
