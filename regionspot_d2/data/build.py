"""Train and test loaders, whose batches are lists of :class:`~.mapper.RegionMapper`'s dicts."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader, Sampler

from ..files import module_fingerprint, sha256_of_file
from ..stopping import leave_interrupts
from .datasets import checked_annotations, class_names
from .mapper import RegionMapper
from .proposals import attach_proposals
from .published_tokens import PublishedTokens, TokenSource, open_token_cache
from .samplers import (
    FastRepeatFactorSampler,
    GroupedSampler,
    Record,
    ResumableSampler,
    batch_groups,
    repeat_factors,
)
from .token_cache import CacheManifest

logger = logging.getLogger(__name__)

# Every worker holds the records. Polygons and the like, which nobody needs, would fill its memory.
_ANNOTATION_KEYS = ("bbox", "bbox_mode", "category_id", "iscrowd")


def load_records(
    dataset_name: str,
    *,
    with_annotations: bool = False,
    filter_empty: bool = False,
    proposal_file: str | None = None,
) -> list[Record]:
    """Loads Detectron2's records of a dataset, with ``dataset_name``, without masks and keypoints.

    Args:
        with_annotations: whether the dataset must have annotations.
        filter_empty: whether to leave out images without annotations, or with crowds only.
        proposal_file: a proposal file, or ``ground_truth://<dataset>``.

    Raises:
        ValueError: annotations are missing, or have an unknown class, or an image has no proposals.
    """
    if MetadataCatalog.get(dataset_name).get("json_file") is not None:
        checked_annotations(dataset_name)
    # One at a time: Detectron2 refuses to load datasets of different classes together.
    records = get_detection_dataset_dicts(
        [dataset_name], filter_empty=filter_empty, check_consistency=False
    )
    if proposal_file is not None:
        records = attach_proposals(records, proposal_file, dataset_name)
    if with_annotations and "annotations" not in records[0]:
        raise ValueError(f"'{dataset_name}' has no annotations, but its boxes are needed.")
    num_classes = len(class_names(dataset_name))
    records = [{**record, "dataset_name": dataset_name} for record in records]
    for record in records:
        for annotation in record.get("annotations", ()):
            if not 0 <= (found := annotation["category_id"]) < num_classes:
                raise ValueError(
                    f"The image {record['image_id']!r} of the dataset '{dataset_name}' has class "
                    f"{found}; its {num_classes} classes are 0 to {num_classes - 1}."
                )
        if "annotations" in record:
            record["annotations"] = [
                {key: a[key] for key in _ANNOTATION_KEYS if key in a} for a in record["annotations"]
            ]
    return records


def build_train_loader(cfg: CfgNode, *, first_iteration: int = 0) -> DataLoader:
    """Builds an endless loader over all of ``DATASETS.TRAIN``; a batch may mix them.

    An iteration sees the same images whatever the number of processes, and however often training
    was stopped and resumed before it. (Random augmentations and skipped images do not repeat.) With
    ``DATALOADER.ONE_DATASET_PER_BATCH`` the number of processes matters, for each fills batches of
    its own, and an image that stands in for a skipped one may be of another dataset.

    Raises:
        ValueError: a config key is wrong, or a dataset cannot be trained on.
        TokenCacheError: see :func:`open_token_caches`.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"DATASETS.TRAIN is {names}; one or more different datasets are expected.")
    caches = open_token_caches(cfg) if cfg.INPUT.TOKEN_CACHE else {}
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    parts = [load_records(name, with_annotations=True, filter_empty=filter_empty) for name in names]
    for name, part in zip(names, parts):
        logger.info(f"'{name}': {len(part)} images, {len(class_names(name))} classes.")
        _warn_of_unusable_boxes(name, part)
        if isinstance(cache := caches.get(name), PublishedTokens):
            cache.check_images(record["image_id"] for record in part)
    _check_batch_size(cfg.SOLVER.IMS_PER_BATCH)
    factors, records = repeat_factors(cfg, parts), list(itertools.chain.from_iterable(parts))
    # Fixed where the config has no seed, so that a resumed run finds the same order.
    seed = max(cfg.SEED, 0)
    sampler: Sampler = TrainingSampler(len(records), seed=seed)
    if factors is not None:
        sampler = FastRepeatFactorSampler(factors, seed=seed)
    if cfg.DATALOADER.ONE_DATASET_PER_BATCH:
        groups = batch_groups(parts, by_orientation=cfg.DATALOADER.ASPECT_RATIO_GROUPING)
        size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        sampler = GroupedSampler(sampler, groups, size)
    loader = build_detection_train_loader(
        records,
        mapper=RegionMapper(cfg, True, token_caches=caches, num_images=len(records)),
        sampler=ResumableSampler(sampler),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        # All images end as the same square, so batches need not be of one orientation. Where they
        # should be, the sampler sees to it, which can start anywhere.
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        # For the workers; it leaves the model's random numbers alone.
        seed=seed + comm.get_rank(),
    )
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    loader.pin_memory = copies_to_gpu(cfg)
    start_at(loader, first_iteration)
    return loader


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    leave_interrupts(worker)
    if start is not None:
        start(worker)


def _check_batch_size(images: int) -> None:
    processes = comm.get_world_size()
    if images < 1 or images % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}; it must be a positive multiple of the number of "
            f"processes, {processes}."
        )


def _warn_of_unusable_boxes(dataset: str, records: Sequence[Record]) -> None:
    """Warns of boxes that training leaves out: not numbers, outside the image, or without area."""
    counts = [len(record["annotations"]) for record in records]
    sizes = [(record.get("width", np.inf), record.get("height", np.inf)) for record in records]
    limits = np.repeat(np.array(sizes, np.float64).reshape(-1, 2), counts, axis=0)
    corners = _corners(dataset, records)
    # The loaders put corners in order. NaN compares as False.
    low = np.minimum(corners[:, :2], corners[:, 2:])
    high = np.maximum(corners[:, :2], corners[:, 2:])
    usable = (np.minimum(high, limits) > np.maximum(low, 0)).all(axis=1)
    if not usable.all():
        first = records[int(np.repeat(np.arange(len(records)), counts)[usable.argmin()])]
        logger.warning(
            f"{np.sum(~usable)} of the {len(usable)} boxes of '{dataset}' are not numbers, outside "
            "their image or without area; training leaves them out. The first is of the image "
            f"{first['image_id']!r}, {first['file_name']!r}."
        )


def _corners(dataset: str, records: Sequence[Record]) -> np.ndarray:
    """The boxes of all annotations, in their order, (N, 4), float64, XYXY."""
    found = [annotation for record in records for annotation in record["annotations"]]
    try:
        boxes, modes = [a["bbox"] for a in found], [a["bbox_mode"] for a in found]
        if set(map(len, boxes)) <= {4} and set(modes) <= {BoxMode.XYWH_ABS, BoxMode.XYXY_ABS}:
            # NumPy would take None for NaN.
            values = map(float, itertools.chain.from_iterable(boxes))
            corners = np.fromiter(values, np.float64, 4 * len(boxes)).reshape(-1, 4)
            relative = np.array(modes, np.int64) == BoxMode.XYWH_ABS
            with np.errstate(invalid="ignore", over="ignore"):
                corners[relative, 2:] += corners[relative, :2]
            return corners
    except (KeyError, TypeError, ValueError, OverflowError):
        pass  # told below
    record, box = next(
        (record, annotation.get("bbox"))
        for record in records
        for annotation in record["annotations"]
        if not _is_box(annotation)
    )
    raise ValueError(
        f"The image {record['image_id']!r} of the dataset '{dataset}' has the box {box!r:.80}; "
        "four numbers with the bbox_mode XYWH_ABS or XYXY_ABS are expected."
    )


def _is_box(annotation: Record) -> bool:
    try:
        box, mode = annotation["bbox"], BoxMode(annotation["bbox_mode"])
        known = mode in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        return known and len(box) == 4 and len([*map(float, box)]) == 4
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Builds a loader that gives every image of a dataset once, spread over the processes.

    With ``MODEL.LOAD_PROPOSALS``, ``DATASETS.PROPOSAL_FILES_TEST`` names a file for each of
    ``DATASETS.TEST``; ValueError if the file is not named or lacks an image.
    """
    proposal_file = None
    if cfg.MODEL.LOAD_PROPOSALS:
        files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST))
        if dataset_name not in files:
            raise ValueError(
                f"DATASETS.PROPOSAL_FILES_TEST has no file for '{dataset_name}'; name one for each "
                f"of DATASETS.TEST, {list(cfg.DATASETS.TEST)}, or turn MODEL.LOAD_PROPOSALS off."
            )
        proposal_file = files[dataset_name]
    records = load_records(dataset_name, proposal_file=proposal_file)
    loader = build_detection_test_loader(
        [{k: v for k, v in record.items() if k != "annotations"} for record in records],
        mapper=RegionMapper(cfg, False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = leave_interrupts
    loader.pin_memory = copies_to_gpu(cfg)
    return loader


def copies_to_gpu(cfg: CfgNode) -> bool:
    """Whether batches go to an NVIDIA GPU, which copies from pinned memory while it computes."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()


def start_at(loader: DataLoader, iteration: int) -> None:
    """Lets a train loader, before its first batch is taken, begin at a later iteration."""
    train: Any = loader  # Detectron2's stream of samples is not in torch's types
    train.dataset.sampler.skip = iteration * train.batch_size


def open_token_caches(cfg: CfgNode, localizer: nn.Module | None = None) -> dict[str, TokenSource]:
    """Opens the tokens of each of ``DATASETS.TRAIN``, in the folder ``INPUT.TOKEN_CACHE``.

    Raises:
        TokenCacheError: missing, unfinished, or made by another localizer or by other weights.
    """
    weights = None if localizer is None else module_fingerprint(localizer)
    return {
        name: open_token_cache(cfg.INPUT.TOKEN_CACHE, cache_manifest(cfg, name, weights))
        for name in cfg.DATASETS.TRAIN
    }


def cache_manifest(cfg: CfgNode, dataset: str, weights_sha256: str | None = None) -> CacheManifest:
    """What the cache of a registered dataset must be made from to fit ``MODEL.LOCALIZER``."""
    if json_file := MetadataCatalog.get(dataset).get("json_file"):
        sha256 = sha256_of_file(json_file)
    else:  # the user registered a function that makes the records
        digest = hashlib.sha256()
        for record in DatasetCatalog.get(dataset):
            annotations = record.get("annotations", ())
            regions = [(a["category_id"], *map(float, a["bbox"])) for a in annotations]
            digest.update(repr((record["image_id"], regions)).encode())
        sha256 = digest.hexdigest()
    names, part = class_names(dataset), cfg.MODEL.LOCALIZER
    return CacheManifest(dataset, sha256, names, part.NAME, part.ARCH, part.TOKENS, weights_sha256)
