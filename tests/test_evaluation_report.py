"""The results table names the protocol behind each number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators

from regionspot_d2 import add_regionspot_config
from regionspot_d2.data import ODINW_13, ODINW_35
from regionspot_d2.data.proposals import (
    Proposals,
    from_ground_truth,
    read_proposals,
    write_proposals,
)
from regionspot_d2.evaluation import (
    COCOAPEvaluator,
    LVISAPEvaluator,
    build_evaluator,
    summarize_odinw,
    write_report,
)

from . import synthetic_lvis as data

LVIS, COCO = "synthetic_report_lvis_val", "synthetic_report_coco_val"


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[CfgNode]:
    content = data.annotations(np.random.default_rng(0), num_images=4)
    for i, annotation in enumerate(content["annotations"]):
        # Six boxes side by side in each image.
        x, y, side = 10 + 30 * (i % 6), 40, 20
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        annotation.update(bbox=[x, y, side, side], area=side**2, segmentation=[polygon])
    data.register_lvis(LVIS, content, tmp_path)
    data.register_coco(COCO, content, tmp_path)
    records = DatasetCatalog.get(LVIS)
    files = []
    truth = from_ground_truth(records)
    # Half of the boxes of each image: a recall of 50 %.
    half = {key: Proposals(boxes[:3], scores[:3]) for key, (boxes, scores) in truth.items()}
    for proposals, info in (
        (truth, {"source": "gt"}),
        (half, {"source": "glip", "file": "a.json"}),
    ):
        files.append(str(tmp_path / f"{info['source']}.pkl"))
        write_proposals(files[-1], records, proposals, info)
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.TRAIN = ("objects365_v1_train", "v3det_train")
    cfg.DATASETS.TEST = (LVIS, COCO)
    cfg.DATASETS.PROPOSAL_FILES_TEST = tuple(files)
    cfg.TEST.DETECTIONS_PER_IMAGE = -1
    yield cfg
    data.forget(LVIS, COCO)


def oracle_results(cfg: CfgNode, dataset: str) -> dict[str, Any]:
    evaluator = build_evaluator(cfg, dataset)
    evaluator.reset()
    for x, found in data.oracle_outputs(DatasetCatalog.get(dataset), 9, masks=cfg.MODEL.MASK_ON):
        evaluator.process([x], [{"instances": found}])
    return evaluator.evaluate()


def test_evaluators_are_chosen_by_metadata(cfg: CfgNode) -> None:
    assert isinstance(build_evaluator(cfg, LVIS), LVISAPEvaluator)
    assert isinstance(build_evaluator(cfg, COCO), COCOAPEvaluator)
    cfg.TEST.REGION_CLASSIFICATION = True
    assert isinstance(build_evaluator(cfg, COCO), DatasetEvaluators)
    MetadataCatalog.get("synthetic_report_other").evaluator_type = "sem_seg"
    with pytest.raises(ValueError, match="synthetic_report_other.*'sem_seg'"):
        build_evaluator(cfg, "synthetic_report_other")
    data.forget("synthetic_report_other")


def test_what_the_head_was_trained_on_decides_which_names_are_seen(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ()
    assert "APseen" not in oracle_results(cfg, LVIS)["bbox"]
    cfg.DATASETS.HEAD_TRAINED_ON = ["objects365_v1_train"]
    results = {dataset: oracle_results(cfg, dataset) for dataset in cfg.DATASETS.TEST}
    assert {"APseen", "APunseen"} <= results[LVIS]["bbox"].keys()
    line = "- seen: classes with a name or synonym in objects365_v1_train"
    assert line in write_report(cfg, results).splitlines()
    cfg.DATASETS.HEAD_TRAINED_ON = [365]
    with pytest.raises(ValueError, match="HEAD_TRAINED_ON is .365.; names of datasets"):
        build_evaluator(cfg, LVIS)
    cfg.DATASETS.HEAD_TRAINED_ON = ["objects365_v1_train"]
    # It holds for a head that is trained further, too.
    cfg.DATASETS.TRAIN = (COCO,)
    assert line in write_report(cfg, results).splitlines()


def test_files_of_several_datasets_are_kept_apart(cfg: CfgNode) -> None:
    for dataset in cfg.DATASETS.TEST:
        oracle_results(cfg, dataset)
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    assert (folder / LVIS / "lvis_instances_results.json").exists()
    assert (folder / COCO / "coco_instances_results.json").exists()


def test_table_of_several_datasets(cfg: CfgNode) -> None:
    cfg.TEST.FIXED_AP = True
    cfg.TEST.REGION_CLASSIFICATION = True
    cfg.MODEL.MASK_ON = True
    results = {dataset: oracle_results(cfg, dataset) for dataset in cfg.DATASETS.TEST}
    text = write_report(cfg, results)

    table = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in row] for row in table]
    rows = [dict(zip(header, row)) for row in rows]
    standard, fixed, coco = rows[:3]
    assert standard["dataset"] == fixed["dataset"] == LVIS and standard["split"] == "val"
    assert standard["AP kind"] == "LVIS standard, 300 per image"
    assert fixed["AP kind"] == "LVIS Fixed, 10,000 per class"
    assert coco["AP kind"] == "COCO, 100 per image and class" and coco["images"] == "4"
    assert standard["boxes"] == "ground truth" and standard["recall@.5"] == "100.00"
    assert coco["boxes"] == "GLIP (a.json)" and coco["recall@.5"] == "50.00"
    for row in rows[:2]:
        assert row["box AP"] == row["box APr"] == row["box APunseen"] == "100.00"
        assert row["mask AP50"] == "100.00"
    assert coco["box AP"] == "100.00" and coco["box APr"] == "-"
    assert (
        "- seen: classes with a name or synonym in objects365_v1_train; not known: the names of "
        in text
    )
    assert "all (region, name) pairs" in text
    assert "without a limit" not in text

    report = json.loads((Path(cfg.OUTPUT_DIR) / "results_table.json").read_text())
    assert (Path(cfg.OUTPUT_DIR) / "results_table.md").read_text() == text + "\n"
    assert [row["regions"] for row in report["region_classification"]] == [24, 24]
    assert report["region_classification"][0]["top1r"] == 100
    assert report["detection"][1]["proposal_file"].endswith("gt.pkl")


def test_table_of_one_dataset(cfg: CfgNode) -> None:
    """DefaultTrainer.test returns a single dataset's results without its name; NaN becomes null."""
    cfg.DATASETS.TEST = (COCO,)
    cfg.TEST.FIXED_AP = True
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    cfg.MODEL.LOAD_PROPOSALS = False
    text = write_report(cfg, {"bbox": {"AP": 12.5, "AP50": float("nan")}})
    assert "| the model's own" in text and "| 12.50 " in text
    assert "recall" not in text and "mask" not in text
    assert "the model kept 300 results per image" in text
    report = json.loads((Path(cfg.OUTPUT_DIR) / "results_table.json").read_text())
    assert report["detection"][0]["box"] == {"AP": 12.5, "AP50": None}


def test_recall_is_that_of_the_boxes_that_are_loaded(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = (COCO,)
    # Two of the six boxes of each image.
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 2
    assert "| 33.33 " in write_report(cfg, {"bbox": {"AP": 1.0}})


@pytest.mark.parametrize("made_for, expected", [(COCO, "100.00"), ("another", "50.00")])
def test_recall_of_another_dataset_is_not_reported(cfg, made_for, expected) -> None:
    path = cfg.DATASETS.PROPOSAL_FILES_TEST[1]
    proposals, _ = read_proposals(path)
    # A dataset of the same images, with only the objects that the boxes enclose.
    records = [{**x, "annotations": x["annotations"][:3]} for x in DatasetCatalog.get(COCO)]
    write_proposals(path, records, proposals, {"dataset": made_for, "source": "glip"})
    cfg.DATASETS.TEST = (COCO,)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (path,)
    assert f"| {expected} " in write_report(cfg, {"bbox": {"AP": 1.0}})


def test_odinw() -> None:
    thirteen = {name: {"bbox": {"AP": float(i)}} for i, name in enumerate(ODINW_13)}
    thirteen[ODINW_13[0]]["bbox"]["AP"] = float("nan")
    thirteen[ODINW_13[12]]["bbox"]["AP"] = 90.0
    other = {"coco_2017_val": {"bbox": {"AP": 50.0}}}
    mean = (sum(range(12)) + 90) / 13
    assert summarize_odinw({**thirteen, **other}) == {
        "ODinW-13": {"mean": pytest.approx(mean), "median": 6.0, "sets": 13}
    }
    both = summarize_odinw({name: {"bbox": {"AP": 10.0}} for name in ODINW_35})
    assert both.keys() == {"ODinW-13", "ODinW-35"} and both["ODinW-35"]["sets"] == 35
    some = {"odinw_pothole_test": {"bbox": {"AP": 1.0}}, "odinw_dice_test": {"bbox": {"AP": 4.0}}}
    assert summarize_odinw(some) == {"ODinW": {"mean": 2.5, "median": 2.5, "sets": 2}}
    assert summarize_odinw(other) == {}


def test_odinw_in_the_table(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("odinw_pothole_test", "odinw_dice_test")
    cfg.DATASETS.TEST = names
    cfg.MODEL.LOAD_PROPOSALS = False
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [None] * 7)
    text = write_report(cfg, {name: {"bbox": {"AP": 20.0}} for name in names})
    assert "| test " in text and "| ODinW (2 sets)" in text and "| 20.00 " in text
