"""The results table: each number with the protocol that produced it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..data.datasets import ODINW_13, ODINW_35
from ..data.datasets.vocabularies import head_training_names
from ..data.proposals import box_recall, read_proposals, select

# The kind of AP by evaluator type and the suffix of the metrics, after "bbox" or "segm".
_KINDS = {
    "lvis": {"": "LVIS standard, 300 per image", "_fixed": "LVIS Fixed, 10,000 per class"},
    "coco": {"": "COCO, 100 per image and class"},
    "coco_panoptic_seg": {},
}
_ODINW = {"ODinW-13": ODINW_13, "ODinW-35": ODINW_35}
_GROUPS = ("", "r", "c", "f", "seen", "unseen")
_METRICS = ("AP", "AP50", "AP75", *(f"AP{group}" for group in _GROUPS[1:]))
_SOURCES = {
    "gt": "ground truth",
    "glip": "GLIP",
    "sam": "SAM's automatic masks",
    "detector": "detector",
    "results": "results json",
    "proposals": "proposal file",
}


def write_report(cfg: CfgNode, results: Mapping[str, Any]) -> str:
    """Writes ``results_table.md`` and ``.json`` to ``OUTPUT_DIR``, and returns the Markdown text.

    ``results`` are what ``Trainer.test(cfg, model)`` returned. Call it in the main process only.
    """
    # JSON has no NaN: numbers that could not be computed become None.
    report = json.loads(json.dumps(_collect(cfg, results)), parse_constant=lambda _: None)
    text = _to_markdown(report)
    PathManager.mkdirs(cfg.OUTPUT_DIR)
    for name, content in (("md", text), ("json", json.dumps(report, indent=1))):
        with PathManager.open(os.path.join(cfg.OUTPUT_DIR, f"results_table.{name}"), "w") as file:
            file.write(content + "\n")
    return text


def _collect(cfg: CfgNode, results: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the JSON file: results, and the protocol behind them."""
    # DefaultTrainer.test returns the results of a single dataset without its name.
    if not set(results) <= set(cfg.DATASETS.TEST):
        results = {cfg.DATASETS.TEST[0]: results}
    detection, classification, panoptic = [], [], []
    for index, dataset in enumerate(cfg.DATASETS.TEST):
        metrics = results.get(dataset)
        if not metrics:
            continue
        metadata = MetadataCatalog.get(dataset)
        common = {"dataset": dataset, "split": metadata.get("split"), **_describe_boxes(cfg, index)}
        for suffix, kind in _KINDS[metadata.get("evaluator_type", "coco")].items():
            found = {"box": metrics.get("bbox" + suffix), "mask": metrics.get("segm" + suffix)}
            if found := {name: values for name, values in found.items() if values is not None}:
                detection.append({**common, "ap_kind": kind, **found})
        if "panoptic_seg" in metrics:
            panoptic.append({**common, **metrics["panoptic_seg"]})
        if "region_classification" in metrics:
            accuracies = metrics["region_classification"]
            classification.append({**common, **accuracies, "regions": int(accuracies["regions"])})
    localizer, vision_language = cfg.MODEL.LOCALIZER, cfg.MODEL.VISION_LANGUAGE
    model = {
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "localizer": f"{localizer.NAME} {localizer.ARCH}",
        "vision-language": f"{vision_language.NAME} {vision_language.ARCH}",
        "region head": cfg.MODEL.REGION_HEAD.NAME,
        "weights": cfg.MODEL.WEIGHTS or "none",
    }
    return {
        "model": model,
        "protocol": _describe_protocol(cfg),
        "detection": detection,
        "region_classification": classification,
        "panoptic": panoptic,
        "odinw": [{"name": k, **v} for k, v in summarize_odinw(results).items()],
    }


def summarize_odinw(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Averages box AP over the datasets of ODinW, where no predictions (NaN) count as 0.

    Mean and median differ widely: GroundingDINO-T has 22.3 and 11.9 on the 35 datasets.

    Returns:
        ``mean``, ``median`` and ``sets`` (how many) under "ODinW-13" and "ODinW-35" if ``results``
        have all their datasets, on GLIP's splits; else under "ODinW", over those that are there.
    """
    there = tuple(name for name in results if name.startswith("odinw_"))
    complete = {name: sets for name, sets in _ODINW.items() if set(sets) <= set(there)}
    if there and not complete:
        complete = {"ODinW": there}
    summary = {}
    for name, sets in complete.items():
        ap = np.nan_to_num([results[dataset]["bbox"]["AP"] for dataset in sets])
        averages = {"mean": float(ap.mean()), "median": float(np.median(ap))}
        summary[name] = {**averages, "sets": len(sets)}
    return summary


def _to_markdown(report: Mapping[str, Any]) -> str:
    parts = ["# Results"]
    if report["detection"]:
        parts.append(_table([_detection_cells(row) for row in report["detection"]]))
    if report["region_classification"]:
        rows = [_classification_cells(row) for row in report["region_classification"]]
        parts.append("Names of given regions, in percent\n\n" + _table(rows))
    if report["panoptic"]:
        parts.append("Panoptic quality\n\n" + _table(report["panoptic"]))
    if report["odinw"]:
        parts.append(_table([_odinw_cells(row) for row in report["odinw"]]))
    notes = {**report["model"], **report["protocol"]}
    parts.append("\n".join(f"- {key}: {value}" for key, value in notes.items()))
    return "\n\n".join(parts)


def _describe_boxes(cfg: CfgNode, index: int) -> dict[str, Any]:
    """The origin of a test set's boxes, their recall, and the number of images."""
    dataset = cfg.DATASETS.TEST[index]
    if not cfg.MODEL.LOAD_PROPOSALS:
        return {"images": len(DatasetCatalog.get(dataset)), "boxes": "the model's own"}
    path = cfg.DATASETS.PROPOSAL_FILES_TEST[index]
    proposals, info = read_proposals(path)
    topk = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
    images, recall = info.get("images"), info.get("recall")
    # The file's own numbers are those of all its boxes, for the dataset that it was made for.
    if info.get("dataset") != dataset or any(len(p.boxes) > topk for p in proposals.values()):
        records = DatasetCatalog.get(dataset)
        images = len(records)
        recall = box_recall({k: select(v, topk=topk) for k, v in proposals.items()}, records)
    origin = os.path.basename(info.get("file", info.get("config", "")))
    name = _SOURCES.get(info.get("source", ""), os.path.basename(path))
    return {
        "images": images,
        "boxes": f"{name} ({origin})" if origin else name,
        "proposal_file": path,
        **({k: 100 * recall[k] for k in ("recall_50", "recall_50_95")} if recall else {}),
    }


def _describe_protocol(cfg: CfgNode) -> dict[str, str]:
    limit, first = cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.KEEP_BEFORE_PROPOSAL_SCORE
    kept = "all" if limit < 0 else f"the best {limit}"
    protocol = {
        "results": f"a region may have several names; {kept} (region, name) pairs of an image "
        f"with a score above {cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST:g}, no NMS",
        "score": "probability of the name times the score of the region"
        + (f", among the {first} most probable pairs" if first > 0 else ""),
        "AP computed by": cfg.TEST.EVALUATION_BACKEND,
    }
    if cfg.TEST.FIXED_AP and limit >= 0:
        kept = f"the model kept {limit} results per image; without a limit"
        protocol["Fixed AP"] = f"{kept} (TEST.DETECTIONS_PER_IMAGE: -1) it may be higher"
    if training := head_training_names(cfg):
        known = ", ".join(training.known) or "no known vocabulary"
        protocol["seen"] = f"classes with a name or synonym in {known}"
        if training.unknown:
            protocol["seen"] += f"; not known: the names of {', '.join(training.unknown)}"
    return protocol


def _common_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    recall = {"recall@.5": row.get("recall_50"), "recall@.5:.95": row.get("recall_50_95")}
    return {**{key: row[key] for key in ("dataset", "split", "images", "boxes")}, **recall}


def _detection_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    columns = itertools.product(("box", "mask"), _METRICS)
    ap = {f"{task} {metric}": row.get(task, {}).get(metric) for task, metric in columns}
    return {**_common_cells(row), "AP kind": row["ap_kind"], **ap}


def _classification_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    columns = itertools.product(_GROUPS, ("top1", "top5", "mAcc1", "mAcc5"))
    accuracies = {f"{metric} {group}".strip(): row.get(metric + group) for group, metric in columns}
    counts = {"regions": row["regions"], "decided": row["decided5"]}
    return {**_common_cells(row), **counts, **accuracies, "ECE": row.get("ece")}


def _odinw_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    name = f"{row['name']} ({row['sets']} sets)"
    return {"sets": name, "average box AP": row["mean"], "median box AP": row["median"]}


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    cells = [[_format(row[key]) for key in columns] for row in rows]
    return tabulate(cells, headers=columns, tablefmt="pipe", disable_numparse=True)


def _format(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
