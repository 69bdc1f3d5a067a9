"""The choice of the library that computes AP, and the evaluator of COCO-format datasets.

hotcoco gives the same AP as the reference libraries, pycocotools and lvis, many times faster.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pycocotools.coco
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.cocoeval import COCOeval

from ..data.datasets import checked_annotations
from ..data.datasets.corrections import CheckedFile
from ..data.datasets.validation import number_ids
from ..safe_loading import read_json

logger = logging.getLogger(__name__)

BACKENDS = ("hotcoco", "reference")


def uses_hotcoco(backend: str) -> bool:
    """Whether ``TEST.EVALUATION_BACKEND`` is "hotcoco"; ValueError if there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"TEST.EVALUATION_BACKEND is '{backend}'; it must be one of {BACKENDS}.")
    return backend == "hotcoco"


@contextlib.contextmanager
def lvis_library(backend: str) -> Iterator[ModuleType]:
    """Yields the module whose ``LVIS``, ``LVISResults`` and ``LVISEval`` compute LVIS AP."""
    if uses_hotcoco(backend):
        yield hotcoco
        return
    try:
        library = importlib.import_module("lvis")
    except ImportError as error:
        raise ImportError(
            "TEST.EVALUATION_BACKEND: reference needs the package lvis, which is not installed: "
            "pip install --no-deps lvis==0.5.3. The default, hotcoco, gives the same numbers."
        ) from error
    # lvis 0.5.3, its last release, still uses np.float, which NumPy 1.24 removed.
    removed = "float" not in vars(np)
    if removed:
        np.float = float  # type: ignore[attr-defined]
    try:
        yield library
    finally:
        if removed:
            del np.float  # type: ignore[attr-defined]


class Truth(NamedTuple):
    """Annotations in the library that computes AP; ids that not every library takes are replaced.

    ``images`` and ``categories`` give the ids in the library by those of the file, and are empty
    if those are the same.
    """

    annotations: Any
    images: dict[Any, int]
    categories: dict[Any, int]

    def renumber(self, results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results with the ids in the library, which may change these dicts."""
        if not self.images:
            return list(results)
        ids = (("image_id", self.images), ("category_id", self.categories))
        return [{**result, **{key: new[result[key]] for key, new in ids}} for result in results]


def load_truth(library: Any, path: str, *, lvis: bool = False) -> Truth:
    """Opens a checked annotation file with ``COCO`` or ``LVIS`` of a library.

    hotcoco refuses headers that evaluation never reads, and ids that are text, negative or huge;
    pycocotools mixes up some of those ids. It then gets the annotations without the former and with
    other ids.
    """
    open_file = library.LVIS if lvis else library.COCO
    with contextlib.suppress(ValueError), contextlib.redirect_stdout(io.StringIO()):
        found = open_file(path)
        numbers = (
            [*found.get_img_ids(), *found.get_cat_ids()]
            if lvis or library is hotcoco
            else [*found.getImgIds(), *found.getCatIds()]
        )
        if all(isinstance(number, int) and 0 <= number < 1 << 53 for number in numbers):
            return Truth(found, {}, {})
    content, images, categories = number_ids(read_json(path, unique_keys=False))
    if library is hotcoco:
        return Truth(open_file(content), images, categories)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        with contextlib.redirect_stdout(io.StringIO()):
            return Truth(open_file(file.name), images, categories)


@contextlib.contextmanager
def annotation_file(dataset_name: str) -> Iterator[bool]:
    """Gives a dataset of a function an annotation file meanwhile; yields whether it has its own.

    Detectron2 would keep the file, and evaluate on it when the function has long changed.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file") is not None:
        yield True
        return
    with tempfile.TemporaryDirectory() as scratch:
        metadata.json_file = os.path.join(scratch, "annotations.json")
        try:
            convert_to_coco_json(dataset_name, metadata.json_file, allow_cached=False)
            yield False
        finally:
            del metadata.json_file


def has_masks(checked: CheckedFile) -> bool:
    """Whether mask AP can be computed: all annotations have masks. Warns if only some have."""
    if 0 < checked.masks < checked.annotations:
        logger.warning(
            f"{checked.file}: {checked.annotations - checked.masks} of {checked.annotations} "
            f"annotations have no mask, the first with id {checked.maskless}: mask AP is left out."
        )
    return 0 < checked.masks == checked.annotations


class COCOAPEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator with a choice of library, also for ODinW and your own data.

    Boxes are always evaluated, masks only if both predictions and annotations have them. The
    ``backend`` is "hotcoco", or "reference" for pycocotools; the other arguments are Detectron2's.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "hotcoco",
    ) -> None:
        self._library = hotcoco if uses_hotcoco(backend) else pycocotools.coco
        self._evaluation = hotcoco.COCOeval if uses_hotcoco(backend) else COCOeval
        with annotation_file(dataset_name) as kept:
            checked = checked_annotations(dataset_name, keep=kept)
            self._truth = load_truth(self._library, checked.path)
            with self._replaced(COCO=lambda _: self._truth.annotations):
                super().__init__(dataset_name, tasks, distributed, output_dir, use_fast_impl=False)
        self._do_evaluation = checked.annotations > 0
        self._has_masks = has_masks(checked)

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        tasks = super()._tasks_from_predictions(predictions)
        return tasks if self._has_masks else [task for task in tasks if task != "segm"]

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        compute = vars(coco_evaluation)["_evaluate_predictions_on_coco"]

        def renumbered(
            truth: Any, results: list[dict[str, Any]], *args: Any, **options: Any
        ) -> Any:
            return compute(truth, self._truth.renumber(results), *args, **options)

        with self._replaced(COCOeval=self._evaluation, _evaluate_predictions_on_coco=renumbered):
            super()._eval_predictions(predictions, img_ids)

    @contextlib.contextmanager
    def _replaced(self, **names: Any) -> Iterator[None]:
        # COCOEvaluator takes these from its module's names and has no parameter for them.
        originals = {name: vars(coco_evaluation)[name] for name in names}
        vars(coco_evaluation).update(names)
        try:
            yield
        finally:
            vars(coco_evaluation).update(originals)
