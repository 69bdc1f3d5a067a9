"""Proposals: the boxes of a dataset's images, checked, selected, measured, written and read.

A proposal file is Detectron2's: a pickled dict of ``ids``, ``boxes``, ``objectness_logits`` (here
the scores of the source) and ``bbox_mode``. Ours also hold ``info``: where the boxes come from and
how many objects they cover. ``ground_truth://<dataset>`` stands for the boxes of the annotations.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from reprlib import repr as shown  # short, however long or deep a value is
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager
from torchvision.ops import nms

from ..files import write_atomically
from ..logits import LOGITS, look_like_logits, sigmoid
from ..safe_loading import load_pickle

logger = logging.getLogger(__name__)

DatasetDict = dict[str, Any]
Records = Sequence[DatasetDict]
_GROUND_TRUTH = "ground_truth://"


class Proposals(NamedTuple):
    """The regions of one image."""

    boxes: np.ndarray  # float32 (N, 4), XYXY, pixels of the original image
    scores: np.ndarray  # float32 (N,)

    @classmethod
    def create(cls, boxes: Any, scores: Any) -> Proposals:
        """Accepts any array-like; without boxes, their shape becomes (0, 4)."""
        rows = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        return cls(rows, np.asarray(scores, dtype=np.float32).reshape(-1))


def as_probabilities(found: ProposalsByImage, source: str) -> ProposalsByImage:
    """Takes the scores of all images for logits if one is below 0 or above 1, and says so.

    Detectron2's region proposal networks write logits, as its key ``objectness_logits`` says;
    multiplied into the scores of names, negative ones would drop their regions.
    """
    if not any(look_like_logits(scores) for _, scores in found.values()):
        return found
    logger.warning(f"{source}: {LOGITS}")
    return {key: Proposals(boxes, sigmoid(scores)) for key, (boxes, scores) in found.items()}


# By str(image_id), as in Detectron2: the keys of a JSON file are strings, image ids often numbers.
ProposalsByImage = dict[str, Proposals]


def fit_to_dataset(proposals: ProposalsByImage, records: Records, source: str) -> ProposalsByImage:
    """Checks regions from ``source`` against Detectron2's records of the images they are for.

    Returns:
        An entry for each image, in the dataset's order, without boxes where the source has none.
        Boxes without area are dropped, as Detectron2 does when it loads them.

    Raises:
        ValueError: a number is not finite, no image is in the dataset, or most boxes lie outside
            their images. The message names the first offender.
    """
    ids = [str(record["image_id"]) for record in records]
    known = set(ids)
    if unknown := [image_id for image_id in proposals if image_id not in known]:
        message = (
            f"{source}: {len(unknown)} of {len(proposals)} image ids are not in the dataset, the "
            f"first is '{unknown[0]}' (the dataset's first is '{ids[0]}')"
        )
        if len(unknown) == len(proposals):
            raise ValueError(f"{message}. Are these boxes of another dataset?")
        logger.warning(f"{message}; they are ignored.")
    found = [proposals.get(image_id) or Proposals.create([], []) for image_id in ids]
    counts = [len(scores) for _, scores in found]
    first, image = np.cumsum([0, *counts]), np.repeat(np.arange(len(ids)), counts)
    sizes = np.array([(r["width"], r["height"]) for r in records], dtype=np.float32)[image]
    # All images at once, because a file may have millions of boxes.
    boxes, scores = (np.concatenate(arrays) for arrays in zip(*found))

    def region(row: int, detail: str = "") -> str:
        return f"image '{ids[image[row]]}'{detail}, region {row - first[image[row]]}"

    for what, values in (("box", boxes), ("score", scores)):
        if not np.isfinite(values).all():
            row = np.argwhere(~np.isfinite(values))[0][0]
            value = values[row].tolist()
            raise ValueError(f"{source}: {region(row)}: the {what} is {value}, not finite.")
    has_area, outside = _judge(boxes, sizes)
    if outside.any():
        row = int(np.argmax(outside))
        size = " ({:g} x {:g})".format(*sizes[row])
        message = (
            f"{source}: {outside.sum()} of {len(boxes)} boxes do not lie in their image, the first "
            f"is {region(row, size)}: {boxes[row].tolist()}."
        )
        if outside.mean() > 0.5:
            raise ValueError(
                f"{message} Boxes must be XYXY (in a results json XYWH), in pixels of the original "
                "image; are these of a resized image, or fractions of its size?"
            )
        logger.warning(message)
    if not has_area.all():
        logger.warning(
            f"{source}: {(~has_area).sum()} of {len(boxes)} boxes have no area and are dropped, "
            f"the first is {region(int(np.argmin(has_area)))}."
        )
    kept = zip(found, np.split(has_area, first[1:-1]))
    return dict(zip(ids, (Proposals(each.boxes[keep], each.scores[keep]) for each, keep in kept)))


def _judge(boxes: np.ndarray, image_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes (N, 4) have an area, and which do not fit images (N, 2) of width and height."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    inside = np.clip(boxes[:, 2:], 0, image_sizes) - np.clip(boxes[:, :2], 0, image_sizes)
    has_area = (sizes > 0).all(axis=1)
    share = inside.prod(axis=1) / np.where(has_area, sizes.prod(axis=1), 1)
    # A box within the first pixel is rare; one in fractions of the image is a common mistake.
    fractions = ((boxes >= 0) & (boxes <= 1)).all(axis=1)
    return has_area, (sizes < 0).any(axis=1) | (has_area & ((share < 0.5) | fractions))


def select(
    proposals: Proposals,
    *,
    topk: int | None = None,
    min_score: float | None = None,
    nms_threshold: float | None = None,
) -> Proposals:
    """Selects regions of one image, best first; equal scores keep their order.

    Drops those below ``min_score``, then those that overlap a better one by an IoU above
    ``nms_threshold``, then all but the ``topk`` best.
    """
    boxes, scores = proposals
    order = np.argsort(-scores, kind="stable")
    if min_score is not None:
        order = order[scores[order] >= min_score]
    if nms_threshold is not None:
        # On sorted boxes, so that equal scores keep their order.
        kept = nms(torch.from_numpy(boxes[order]), torch.from_numpy(scores[order]), nms_threshold)
        order = order[kept.sort().values.numpy()]
    return Proposals(boxes[order[:topk]], scores[order[:topk]])


def box_recall(proposals: ProposalsByImage, records: Records) -> dict[str, float] | None:
    """The share of annotated boxes that some region covers. Crowds do not count.

    Returns:
        ``objects`` (their number), ``recall_50`` (covered at IoU 0.5) and ``recall_50_95`` (the
        mean over IoU 0.5, 0.55, ..., 0.95), both in 0..1; None without annotated boxes.
    """
    thresholds, covered, objects = torch.linspace(0.5, 0.95, 10), torch.zeros(10), 0
    for record in records:
        truth = ground_truth_boxes(record)
        objects += len(truth)
        boxes = proposals[str(record["image_id"])].boxes
        if len(truth) and len(boxes):
            iou = pairwise_iou(Boxes(truth), Boxes(boxes))
            covered += (iou.max(dim=1).values[:, None] >= thresholds).sum(dim=0)
    if not objects:
        return None
    at_50, mean = (covered / objects)[0].item(), (covered / objects).mean().item()
    return {"objects": objects, "recall_50": at_50, "recall_50_95": mean}


def ground_truth_boxes(record: DatasetDict) -> np.ndarray:
    """An image's annotated boxes except crowds: float32 (N, 4), XYXY, original pixels."""
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record.get("annotations", [])
        if not annotation.get("iscrowd", 0)
    ]
    return np.asarray(boxes, dtype=np.float32).reshape(-1, 4)


def from_ground_truth(records: Records) -> ProposalsByImage:
    """The annotated boxes of a dataset except crowds, with score 1; ValueError if it has none."""
    if not any(record.get("annotations") for record in records):
        raise ValueError("The dataset has no annotations to take boxes from; use another source.")
    boxes = {str(record["image_id"]): ground_truth_boxes(record) for record in records}
    return {key: Proposals.create(found, np.ones(len(found))) for key, found in boxes.items()}


def write_proposals(
    output: str, records: Records, proposals: ProposalsByImage, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes what :func:`fit_to_dataset` made, or a selection of it, to a proposal file.

    Returns ``info`` as in the file, with numbers of images and boxes and the :func:`box_recall`.
    """
    complete = _describe(proposals, records, info)
    content = {
        "ids": [record["image_id"] for record in records],
        "boxes": [proposals[str(record["image_id"])].boxes for record in records],
        "objectness_logits": [proposals[str(record["image_id"])].scores for record in records],
        "bbox_mode": int(BoxMode.XYXY_ABS),
        "info": complete,
    }
    with write_atomically(output) as file:
        pickle.dump(content, file)
    return complete


def _describe(proposals: ProposalsByImage, records: Records, info: Mapping) -> dict[str, Any]:
    counts = [len(proposals[str(record["image_id"])].boxes) for record in records]
    numbers = {"images": len(counts), "images_without_boxes": counts.count(0), "boxes": sum(counts)}
    return {**info, **numbers, "recall": box_recall(proposals, records)}


def proposals_exist(path: str) -> bool:
    """Whether there is such a proposal file, or the dataset of ``ground_truth://<dataset>``."""
    name = path.removeprefix(_GROUND_TRUTH)
    return PathManager.isfile(path) if name == path else name in DatasetCatalog


def read_proposals(path: str) -> tuple[ProposalsByImage, dict[str, Any]]:
    """Reads a proposal file (of Detectron 1, too) or ``ground_truth://<dataset>``.

    Returns:
        The regions, and ``info``, which is empty in files that we did not write.

    Raises:
        ValueError: it is not a proposal file, or holds more than arrays; none of it was run.
    """
    found, mode, info = _load(path)
    for key, (boxes, scores) in found.items():
        found[key] = Proposals.create(BoxMode.convert(boxes, mode, BoxMode.XYXY_ABS), scores)
    return found, info


def attach_proposals(records: Records, path: str, dataset: str) -> list[DatasetDict]:
    """Copies records with proposals, best first, as Detectron2's loader, which runs any pickle.

    Raises:
        ValueError: as :func:`read_proposals`, or an image of the dataset is missing.
    """
    found, mode, _ = _load(path)
    attached = []
    for record in records:
        if str(record["image_id"]) not in found:
            raise ValueError(
                f"The proposal file '{path}' has no image '{record['image_id']}' of the dataset "
                f"'{dataset}'. Was it made for another dataset?"
            )
        boxes, scores = found[str(record["image_id"])]
        order = scores.argsort()[::-1]
        fields = {"proposal_boxes": boxes[order], "proposal_objectness_logits": scores[order]}
        attached.append({**record, **fields, "proposal_bbox_mode": mode})
    return attached


def _load(path: str) -> tuple[ProposalsByImage, BoxMode, dict[str, Any]]:
    """Boxes and scores with the types and the box mode of the file, and ``info``."""
    if path.startswith(_GROUND_TRUTH):
        name = path.removeprefix(_GROUND_TRUTH)
        records = DatasetCatalog.get(name)
        regions = fit_to_dataset(from_ground_truth(records), records, name)
        info = _describe(regions, records, {"dataset": name, "source": "gt"})
        return regions, BoxMode.XYXY_ABS, info
    loaded = load_pickle(path)
    content = loaded if isinstance(loaded, dict) else {}
    # Detectron 1 calls two of them "indexes" and "scores".
    ids: Any = content.get("ids", content.get("indexes"))
    scores: Any = content.get("objectness_logits", content.get("scores"))
    boxes: Any = content.get("boxes")
    if not all(map(_is_list, (ids, boxes, scores))):
        raise ValueError(
            f"{path} is not a proposal file: it must hold lists 'ids', 'boxes' and "
            f"'objectness_logits', but holds {shown(sorted(map(str, content)))}."
        )
    if not len(ids) == len(boxes) == len(scores):
        raise ValueError(
            f"{path} is damaged: it has {len(ids)} image ids, boxes of {len(boxes)} images, scores "
            f"of {len(scores)} images."
        )
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if not isinstance(mode, int) or mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"{path}: bbox_mode is {shown(mode)}; 0 (XYXY) or 1 (XYWH) is expected.")
    found: ProposalsByImage = {}
    for image_id, rows, values in zip(ids, boxes, scores):
        if not isinstance(image_id, (int, str, np.integer)) or str(image_id) in found:
            fault = "is there twice" if isinstance(image_id, (int, str)) else "is no id"
            raise ValueError(f"{path}: the image {shown(image_id)} {fault}.")
        found[str(image_id)] = _pair(f"{path}: image {shown(str(image_id))}", rows, values)
    info = content.get("info", {})
    found = as_probabilities(found, path)
    return found, BoxMode(mode), info if isinstance(info, dict) else {}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _pair(where: str, boxes: Any, scores: Any) -> Proposals:
    """The arrays of one image, with the types of the file; ValueError if they do not fit."""
    try:
        rows, values = np.asarray(boxes), np.asarray(scores)
    except (OverflowError, TypeError, ValueError) as error:  # lists of different lengths
        raise ValueError(f"{where} has boxes or scores that are no arrays: {error}") from error
    if rows.size != 4 * values.size or (rows.size and rows.shape[1:] != (4,)):
        raise ValueError(
            f"{where} has boxes of shape {rows.shape} and scores of shape {values.shape}; (N, 4) "
            "and (N,) are expected."
        )
    for what, array in (("boxes", rows), ("scores", values)):
        if array.size and (array.dtype.kind not in "iuf" or not np.isfinite(array).all()):
            raise ValueError(f"{where} has {what} that are not finite numbers.")
    dtype = values.dtype if values.dtype.kind == "f" else np.float32
    return Proposals(rows.reshape(-1, 4), values.reshape(-1).astype(dtype, copy=False))
