"""From a GLIP json with known misses, through every file, to the AP computed by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Instances

from regionspot_d2 import add_regionspot_config
from regionspot_d2.data import register_coco_format
from regionspot_d2.data.build import build_test_loader
from regionspot_d2.data.proposal_sources import from_glip_json
from regionspot_d2.data.proposals import fit_to_dataset, write_proposals
from regionspot_d2.evaluation import build_evaluator

from .datasets_on_disk import write_coco

NAME = "glip_to_ap"
CAT, DOG = 0, 1
# Boxes XYXY, scores and what the fake model calls them. The dataset has two cats and two dogs.
GLIP = {
    # Both found.
    "1": [([4.25, 6.5, 24.25, 37.25], 0.9, CAT), ([30.0, 10.0, 63.5, 30.0], 0.7, DOG)],
    # The dog of image 2 is missed; image 3 has no objects and is not in the file.
    "2": [],
    # One box misses the cat, the other is a dog where there is none.
    "4": [([10.0, 10.0, 18.0, 18.0], 0.8, CAT), ([30.0, 5.0, 60.0, 40.0], 0.95, DOG)],
}


class FakeModel(torch.nn.Module):
    """Names every proposal by its class in ``GLIP``, with certainty."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results = []
        for x in batched_inputs:
            proposals = x["proposals"]
            names = {score: name for _, score, name in GLIP.get(str(x["image_id"]), [])}
            found = Instances((x["height"], x["width"]))
            found.pred_boxes = proposals.proposal_boxes
            found.scores = proposals.objectness_logits
            classes = [names[round(float(s), 4)] for s in proposals.objectness_logits]
            found.pred_classes = torch.tensor(classes, dtype=torch.int64)
            results.append({"instances": found})
        return results


def test_known_misses_give_the_ap_computed_by_hand(tmp_path):
    register_coco_format([[NAME, *write_coco(tmp_path)]])
    entries = {
        key: {"boxes": [b for b, _, _ in v], "scores": [s for _, s, _ in v], "labels": [1] * len(v)}
        for key, v in GLIP.items()
    }
    (tmp_path / "glip.json").write_text(json.dumps(entries))
    proposals = from_glip_json(str(tmp_path / "glip.json"))
    records = DatasetCatalog.get(NAME)
    file = str(tmp_path / "glip.pkl")
    fitted = fit_to_dataset(proposals, records, "glip.json")
    assert write_proposals(file, records, fitted, {"source": "glip"})["images_without_boxes"] == 2

    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST = (NAME,), (file,)
    cfg.MODEL.LOAD_PROPOSALS, cfg.MODEL.MASK_ON = True, False
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    loader = build_test_loader(cfg, NAME)
    results = inference_on_dataset(FakeModel(), loader, build_evaluator(cfg, NAME))

    # Each class reaches recall 1/2, which is 51 of COCO's 101 recall points: the right box of the
    # cat comes first (precision 1), that of the dog second (precision 1/2).
    points = 51 / 101
    assert results["bbox"]["AP-cat"] == pytest.approx(100 * points)
    assert results["bbox"]["AP-dog"] == pytest.approx(100 * points / 2)
    assert results["bbox"]["AP"] == pytest.approx(100 * points * 3 / 4)

    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
