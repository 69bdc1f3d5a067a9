"""The proposal file: regions from any source, checked against a dataset, as Detectron2 loads them.

The file is Detectron2's own: a pickled dict of ``ids``, ``boxes``, ``objectness_logits`` and ``bbox_mode``, named by
``DATASETS.PROPOSAL_FILES_TEST`` (or ``_TRAIN``) and switched on by ``MODEL.LOAD_PROPOSALS``. What Detectron2 calls
"objectness logits" is here the score of the region as its source gave it, 1 for ground truth. A further entry,
``info``, which Detectron2 ignores, says where the boxes come from and how many objects they cover.

``MODEL.LOAD_PROPOSALS`` is one switch for training and testing: a config that trains on its annotations and tests on a
proposal file sets it only for the test.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager
from torchvision.ops import nms

logger = logging.getLogger(__name__)

DatasetDict = dict[str, Any]


class Proposals(NamedTuple):
    """The regions of one image.

    Attributes:
        boxes: float32 (N, 4), XYXY, pixels of the original image.
        scores: float32 (N,).
    """

    boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def create(cls, boxes: Any, scores: Any) -> Proposals:
        """Takes anything NumPy can read; no boxes at all have shape (0, 4)."""
        return cls(
            np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
            np.asarray(scores, dtype=np.float32).reshape(-1),
        )


# By str(image_id), as Detectron2 compares them: a json's keys are strings, a dataset's ids often numbers.
ProposalsByImage = dict[str, Proposals]


def fit_to_dataset(
    proposals: Mapping[str, Proposals], records: Sequence[DatasetDict], source: str
) -> ProposalsByImage:
    """Checks regions against the images they are for, and brings them into the dataset's order.

    Args:
        proposals: the regions.
        records: Detectron2's dataset dicts, with ``image_id``, ``height`` and ``width``.
        source: the file or model the regions come from, for the messages.

    Returns:
        An entry for each image of the dataset, without boxes where the source has none. Boxes of no area are left
        out, as Detectron2's loader would do.

    Raises:
        ValueError: if a score or a coordinate is not a number, if no image is of the dataset, or if most boxes do not
            lie in their images. The first offender is named.
    """
    ids = [str(record["image_id"]) for record in records]
    known = set(ids)
    unknown = [image_id for image_id in proposals if image_id not in known]
    if unknown:
        message = (
            f"{source}: {len(unknown)} of {len(proposals)} image ids are not in the dataset, the first is "
            f"'{unknown[0]}' (the dataset's first is '{ids[0]}')"
        )
        if len(unknown) == len(proposals):
            raise ValueError(f"{message}. Are these boxes of another dataset?")
        logger.warning(f"{message}; they are left out.")
    none = Proposals.create([], [])
    found = {image_id: proposals.get(image_id, none) for image_id in ids}
    _check_numbers(found, source)
    return _check_frames(found, records, source)


def _check_numbers(proposals: Mapping[str, Proposals], source: str) -> None:
    for image_id, (boxes, scores) in proposals.items():
        for what, finite in (
            ("score", np.isfinite(scores)),
            ("box", np.isfinite(boxes).all(axis=1)),
        ):
            if not finite.all():
                index = int(np.argmin(finite))
                value = scores[index] if what == "score" else boxes[index].tolist()
                raise ValueError(
                    f"{source}: image '{image_id}', region {index}: the {what} is {value}, not a number."
                )


def _check_frames(
    proposals: Mapping[str, Proposals], records: Sequence[DatasetDict], source: str
) -> ProposalsByImage:
    kept = {}
    total = misplaced = empty = 0
    first_misplaced = first_empty = ""
    for record in records:
        image_id = str(record["image_id"])
        boxes, scores = proposals[image_id]
        sizes = boxes[:, 2:] - boxes[:, :2]
        limits = np.array([record["width"], record["height"]], dtype=np.float32)
        inside = np.clip(boxes[:, 2:], 0, limits) - np.clip(boxes[:, :2], 0, limits)
        has_area = (sizes > 0).all(axis=1)
        share = inside.prod(axis=1) / np.where(has_area, sizes.prod(axis=1), 1)
        # A box inside the first pixel is rare, one in fractions of the image a common mistake.
        fractions = (boxes >= 0).all(axis=1) & (boxes <= 1).all(axis=1)
        wrong = (sizes < 0).any(axis=1) | (has_area & ((share < 0.5) | fractions))
        if wrong.any() and not misplaced:
            index = int(np.argmax(wrong))
            first_misplaced = (
                f"image '{image_id}' ({record['width']} x {record['height']}), region {index}: "
                f"{boxes[index].tolist()}"
            )
        if not has_area.all() and not empty:
            first_empty = f"image '{image_id}', region {int(np.argmin(has_area))}"
        total += len(boxes)
        misplaced += int(wrong.sum())
        empty += int((~has_area).sum())
        kept[image_id] = Proposals(boxes[has_area], scores[has_area])
    if misplaced:
        message = (
            f"{source}: {misplaced} of {total} boxes do not lie in their image, the first is "
            f"{first_misplaced}"
        )
        if misplaced > total / 2:
            raise ValueError(
                f"{message}. Boxes must be XYXY (in a results json XYWH), pixels of the original image; are these of "
                "a resized image, or fractions of its size?"
            )
        logger.warning(f"{message}.")
    if empty:
        logger.warning(
            f"{source}: {empty} of {total} boxes have no area and are left out, the first is {first_empty}."
        )
    return kept


def select(
    proposals: Proposals,
    *,
    topk: int | None = None,
    min_score: float | None = None,
    nms_threshold: float | None = None,
) -> Proposals:
    """Chooses among the regions of one image: by score, then by overlap, then by number.

    Args:
        proposals: the regions.
        topk: keep this many with the highest scores.
        min_score: leave out regions with a lower score.
        nms_threshold: leave out regions that overlap a better one by more than this IoU, whatever their classes.

    Returns:
        The chosen regions, best first; equal scores stay in their order.
    """
    boxes, scores = proposals
    if min_score is not None:
        boxes, scores = boxes[scores >= min_score], scores[scores >= min_score]
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    if nms_threshold is not None:
        kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), nms_threshold).sort().values
        boxes, scores = boxes[kept.numpy()], scores[kept.numpy()]
    return Proposals(boxes[:topk], scores[:topk])


def box_recall(
    proposals: Mapping[str, Proposals], records: Sequence[DatasetDict]
) -> dict[str, float] | None:
    """The share of annotated boxes that some region covers. Crowds do not count.

    Args:
        proposals: the regions, by ``str(image_id)``.
        records: Detectron2's dataset dicts.

    Returns:
        ``objects`` (their number), ``recall_50`` (covered at IoU 0.5) and ``recall_50_95`` (the mean over IoU 0.5,
        0.55, ..., 0.95), both in 0..1; None if the dataset has no annotated boxes.
    """
    thresholds = torch.linspace(0.5, 0.95, 10)
    covered = torch.zeros(len(thresholds))
    objects = 0
    for record in records:
        truth = ground_truth_boxes(record)
        objects += len(truth)
        boxes = proposals[str(record["image_id"])].boxes
        if len(truth) and len(boxes):
            iou = pairwise_iou(Boxes(truth), Boxes(boxes))
            covered += (iou.max(dim=1).values[:, None] >= thresholds).sum(dim=0)
    if not objects:
        return None
    recall = covered / objects
    return {
        "objects": objects,
        "recall_50": recall[0].item(),
        "recall_50_95": recall.mean().item(),
    }


def write_proposals(
    output: str,
    records: Sequence[DatasetDict],
    proposals: Mapping[str, Proposals],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes a proposal file with an entry for every image of a dataset, and says what is in it.

    Args:
        output: the file to write; it appears when it is complete.
        records: Detectron2's dataset dicts.
        proposals: the regions, by ``str(image_id)``; what :func:`fit_to_dataset` gave, chosen among or not.
        info: what to remember of the source, plain values only.

    Returns:
        ``info`` with ``images``, ``images_without_boxes``, ``boxes`` and ``recall`` (of :func:`box_recall`), as it is
        in the file.
    """
    chosen = [proposals[str(record["image_id"])] for record in records]
    counts = [len(boxes) for boxes, _ in chosen]
    complete = {
        **info,
        "images": len(records),
        "images_without_boxes": counts.count(0),
        "boxes": sum(counts),
        "recall": box_recall(proposals, records),
    }
    content = {
        "ids": [record["image_id"] for record in records],
        "boxes": [boxes for boxes, _ in chosen],
        "objectness_logits": [scores for _, scores in chosen],
        "bbox_mode": int(BoxMode.XYXY_ABS),
        "info": complete,
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{output}.{os.getpid()}"
    with PathManager.open(partial, "wb") as file:
        pickle.dump(content, file)
    os.replace(partial, output)
    return complete


def read_proposals(proposal_file: str) -> tuple[ProposalsByImage, dict[str, Any]]:
    """Reads a proposal file of Detectron2 (or Detectron 1). It is a pickle: open only files you trust.

    Args:
        proposal_file: what :func:`write_proposals` wrote, or a file of the same format.

    Returns:
        The regions, and ``info`` (empty in files that we did not write).

    Raises:
        ValueError: if the file is not of this format.
    """
    with PathManager.open(proposal_file, "rb") as file:
        content = pickle.load(file, encoding="latin1")
    names = {"ids": "indexes", "objectness_logits": "scores"}  # as Detectron 1 calls them
    if not isinstance(content, dict):
        content = {}
    ids, scores = (content.get(new, content.get(old)) for new, old in names.items())
    if ids is None or scores is None or "boxes" not in content:
        raise ValueError(
            f"{proposal_file} is not a proposal file: it must hold 'ids', 'boxes' and 'objectness_logits', and holds "
            f"{sorted(content)}."
        )
    mode = BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    found = {}
    for image_id, boxes, score in zip(ids, content["boxes"], scores):
        xyxy = BoxMode.convert(np.asarray(boxes).reshape(-1, 4), mode, BoxMode.XYXY_ABS)
        found[str(image_id)] = Proposals.create(xyxy, score)
    return found, content.get("info", {})


def ground_truth_boxes(record: DatasetDict) -> np.ndarray:
    """The annotated boxes of an image without its crowds: float32 (N, 4), XYXY, pixels of the original image."""
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record.get("annotations", [])
        if not annotation.get("iscrowd", 0)
    ]
    return np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
