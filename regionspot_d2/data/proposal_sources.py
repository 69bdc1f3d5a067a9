"""Where proposals come from: the result files of other detectors, or the output of a model.

A new source is a function that returns :data:`~.proposals.ProposalsByImage`, or
:class:`~.proposals.Proposals` for one image. Ground truth is in :mod:`~.proposals`.
"""

from __future__ import annotations

from reprlib import repr as shown  # short, however long or deep a value is
from typing import Any

import numpy as np
from detectron2.structures import BoxMode, Instances

from ..safe_loading import read_json
from .proposals import Proposals, ProposalsByImage, as_probabilities


def from_glip_json(json_file: str) -> ProposalsByImage:
    """Reads boxes in the format in which GLIP's results are published.

    Args:
        json_file: ``{image id: {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}``, in pixels of
            the original image; ``labels`` and other keys are ignored.

    Raises:
        ValueError: the file has another format; the message names the first offending image.
    """
    content = read_json(json_file)
    if not isinstance(content, dict) or "annotations" in content:
        raise ValueError(
            f"{json_file} is not a GLIP json: it must map image ids to 'boxes' and 'scores', but "
            f"{_describe(content)}."
        )
    found = {}
    for image_id, entry in content.items():
        where = f"{json_file}: image {shown(image_id)}"
        if not isinstance(entry, dict) or not {"boxes", "scores"} <= entry.keys():
            raise ValueError(f"{where} must have 'boxes' and 'scores', but has {_content(entry)}.")
        found[str(image_id)] = _parse(where, entry["boxes"], entry["scores"])
    return as_probabilities(found, json_file)


def from_results_json(json_file: str) -> ProposalsByImage:
    """Reads the boxes of COCO or LVIS results, e.g. Detectron2's ``coco_instances_results.json``.

    Args:
        json_file: a list of ``{"image_id", "bbox": [x, y, w, h], "score"}``, in pixels of the
            original image; other keys are ignored.

    Raises:
        ValueError: the file has another format; the message names the first offending entry.
    """
    content = read_json(json_file)
    if not isinstance(content, list):
        raise ValueError(
            f"{json_file} is not a results json: it must be a list of 'image_id', 'bbox' and "
            f"'score', but {_describe(content)}."
        )
    grouped: dict[str, tuple[list[Any], list[Any]]] = {}
    for index, entry in enumerate(content):
        if not isinstance(entry, dict) or not {"image_id", "bbox", "score"} <= entry.keys():
            raise ValueError(
                f"{json_file}: entry {index} must have 'image_id', 'bbox' and 'score', but has "
                f"{_content(entry)}."
            )
        if type(entry["image_id"]) not in (int, str):
            raise ValueError(
                f"{json_file}: entry {index} has the image_id {shown(entry['image_id'])}; a whole "
                "number or a text is expected."
            )
        boxes, scores = grouped.setdefault(str(entry["image_id"]), ([], []))
        boxes.append(entry["bbox"])
        scores.append(entry["score"])
    found = {}
    for image_id, lists in grouped.items():
        # In float64, or x + w would be rounded twice.
        xywh, values = _parse(f"{json_file}: image {shown(image_id)}", *lists, dtype=np.float64)
        found[image_id] = Proposals.create(
            BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS), values
        )
    return as_probabilities(found, json_file)


def from_instances(instances: Instances) -> Proposals:
    """Takes the regions of one image from a detector's output, or a region proposal network's.

    ``objectness_logits`` of a proposal network become probabilities.
    """
    if instances.has("pred_boxes"):
        boxes, scores = instances.pred_boxes, instances.scores
    else:
        boxes, scores = instances.proposal_boxes, instances.objectness_logits.sigmoid()
    return Proposals.create(boxes.tensor.detach().cpu(), scores.detach().cpu())


def _content(entry: Any) -> str:
    return f"the keys {sorted(entry)[:6]}" if isinstance(entry, dict) else shown(entry)


def _describe(content: Any) -> str:
    if isinstance(content, list):
        return "this is a list, as a results json is (--source results)"
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return "this is an annotation file (register it as a dataset and use --source gt)"
    entries = list(content.values()) if isinstance(content, dict) else []
    if entries and all(isinstance(entry, dict) and "boxes" in entry for entry in entries):
        return "this maps image ids to boxes, as GLIP's json does (--source glip)"
    return f"this has {_content(content)}"


def _parse(where: str, boxes: Any, scores: Any, dtype: type = np.float32) -> Proposals:
    """Arrays of one image's boxes (N, 4) and scores (N,); ValueError for the first bad region."""
    if not isinstance(boxes, list) or not isinstance(scores, list) or len(boxes) != len(scores):
        counts = [len(each) if isinstance(each, list) else "no list of" for each in (boxes, scores)]
        raise ValueError(
            f"{where} must have as many scores as boxes, but has {counts[0]} boxes and {counts[1]} "
            "scores."
        )
    rows, values = _numbers(boxes, (len(boxes), 4), dtype), _numbers(scores, (len(scores),))
    if rows is not None and values is not None:
        return Proposals(rows, values)
    for index, (box, score) in enumerate(zip(boxes, scores)):
        if _numbers(box, (4,), dtype) is None:
            raise ValueError(f"{where}, region {index}: the box is {shown(box)}, not four numbers.")
        if _numbers(score, ()) is None:
            raise ValueError(f"{where}, region {index}: the score is {shown(score)}, not a number.")
    raise ValueError(f"{where} has boxes or scores that are not numbers.")


def _numbers(values: Any, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray | None:
    try:
        array: np.ndarray = np.asarray(values, dtype=dtype)
    except (OverflowError, TypeError, ValueError):
        return None
    if array.size == 0 and 0 in shape:  # no regions, in a list without inner lists
        array = array.reshape(shape)
    return array if array.shape == shape and np.isfinite(array).all() else None
