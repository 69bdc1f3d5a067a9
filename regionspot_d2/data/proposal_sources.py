"""Where regions come from: annotations, the result files of other detectors, the output of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from .proposals import DatasetDict, Proposals, ProposalsByImage, ground_truth_boxes


def from_ground_truth(records: Sequence[DatasetDict]) -> ProposalsByImage:
    """The annotated boxes of a dataset, with score 1. Crowds are no regions and are left out.

    Args:
        records: Detectron2's dataset dicts.

    Raises:
        ValueError: if the dataset has no annotations, as test sets do.
    """
    _require_annotations(records)
    found = {}
    for record in records:
        boxes = ground_truth_boxes(record)
        found[str(record["image_id"])] = Proposals.create(boxes, np.ones(len(boxes)))
    return found


def from_glip_json(json_file: str) -> ProposalsByImage:
    """Boxes as GLIP's results are handed around: ``{image id: {"boxes": [[x0, y0, x1, y1]], "scores": [...]}}``.

    Args:
        json_file: boxes XYXY, pixels of the original image; ``labels`` and other keys are ignored.

    Raises:
        ValueError: if the file has another form, naming the first image that has.
    """
    content = _read_json(json_file)
    if not isinstance(content, dict) or "annotations" in content:
        raise ValueError(
            f"{json_file} is not a GLIP json: it must map image ids to 'boxes' and 'scores', and {_describe(content)}."
        )
    found = {}
    for image_id, entry in content.items():
        if not isinstance(entry, dict) or not {"boxes", "scores"} <= entry.keys():
            has = f"the keys {sorted(entry)}" if isinstance(entry, dict) else repr(entry)[:40]
            raise ValueError(
                f"{json_file}: image '{image_id}' must have 'boxes' and 'scores', and has {has}."
            )
        found[str(image_id)] = _parse(json_file, image_id, entry["boxes"], entry["scores"])
    return found


def from_results_json(json_file: str) -> ProposalsByImage:
    """Boxes of a COCO or LVIS results file, e.g. Detectron2's ``coco_instances_results.json``.

    Args:
        json_file: a list of ``{"image_id", "bbox": [x, y, w, h], "score"}``; other keys are ignored.

    Raises:
        ValueError: if the file has another form, naming the first entry that has.
    """
    content = _read_json(json_file)
    if not isinstance(content, list):
        raise ValueError(
            f"{json_file} is not a results json: it must be a list of 'image_id', 'bbox', 'score', and "
            f"{_describe(content)}."
        )
    grouped: dict[str, tuple[list[Any], list[Any]]] = {}
    for index, entry in enumerate(content):
        if not isinstance(entry, dict) or not {"image_id", "bbox", "score"} <= entry.keys():
            has = f"the keys {sorted(entry)}" if isinstance(entry, dict) else repr(entry)[:40]
            raise ValueError(
                f"{json_file}: entry {index} must have 'image_id', 'bbox' and 'score', and has {has}."
            )
        boxes, scores = grouped.setdefault(str(entry["image_id"]), ([], []))
        boxes.append(entry["bbox"])
        scores.append(entry["score"])
    found = {}
    for image_id, (boxes, scores) in grouped.items():
        xywh, kept_scores = _parse(json_file, image_id, boxes, scores, dtype=np.float64)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        found[image_id] = Proposals.create(xyxy, kept_scores)
    return found


def from_instances(instances: Instances) -> Proposals:
    """Regions of one image from a Detectron2 model's output.

    Args:
        instances: ``pred_boxes`` and ``scores`` of a detector, or ``proposal_boxes`` and ``objectness_logits`` of a
            region proposal network, whose logits become probabilities.
    """
    if instances.has("pred_boxes"):
        boxes, scores = instances.pred_boxes, instances.scores
    else:
        boxes, scores = instances.proposal_boxes, instances.objectness_logits.sigmoid()
    return Proposals.create(boxes.tensor.detach().cpu(), scores.detach().cpu())


def _require_annotations(records: Iterable[DatasetDict]) -> None:
    if not any(record.get("annotations") for record in records):
        raise ValueError(
            "The dataset has no annotations, so it has no ground-truth boxes. Test sets without public annotations "
            "need boxes of another source."
        )


def _read_json(json_file: str) -> Any:
    with PathManager.open(json_file) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{json_file} is not a json file: {error}") from error


def _describe(content: Any) -> str:
    if isinstance(content, list):
        return "this is a list, as a results json is (--source results)"
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return "this is an annotation file (register it as a dataset and use --source gt)"
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(entry, dict) and "boxes" in entry for entry in content.values())
    ):
        return "this maps image ids to boxes, as GLIP's json does (--source glip)"
    if isinstance(content, dict):
        return f"this has the keys {sorted(content)[:6]}"
    return f"this is {repr(content)[:40]}"


def _parse(
    json_file: str, image_id: str, boxes: Any, scores: Any, dtype: type = np.float32
) -> Proposals:
    if not isinstance(boxes, list) or not isinstance(scores, list) or len(boxes) != len(scores):
        raise ValueError(
            f"{json_file}: image '{image_id}' must have as many scores as boxes, and has "
            f"{len(boxes) if isinstance(boxes, list) else 'no list of'} boxes and "
            f"{len(scores) if isinstance(scores, list) else 'no list of'} scores."
        )
    rows = _numbers(boxes, (len(boxes), 4), dtype)
    if rows is None:
        index = next(i for i, box in enumerate(boxes) if _numbers(box, (4,), dtype) is None)
        raise ValueError(
            f"{json_file}: image '{image_id}', region {index}: the box is {boxes[index]!r}, not four numbers."
        )
    values = _numbers(scores, (len(scores),), np.float32)
    if values is None:
        index = next(i for i, score in enumerate(scores) if _numbers(score, (), np.float32) is None)
        raise ValueError(
            f"{json_file}: image '{image_id}', region {index}: the score is {scores[index]!r}, not a number."
        )
    return Proposals(rows, values)


def _numbers(values: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    try:
        array: np.ndarray = np.asarray(values, dtype=dtype)
    except (TypeError, ValueError):
        return None
    array = array.reshape(shape) if array.size == 0 else array
    return array if array.shape == shape and np.isfinite(array).all() else None
