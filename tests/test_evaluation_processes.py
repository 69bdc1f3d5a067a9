"""The results are the same from one process and from two, and from batches of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.engine import launch
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.utils import comm

from regionspot_d2.evaluation import (
    COCOAPEvaluator,
    LVISAPEvaluator,
    RegionClassificationEvaluator,
)

from . import synthetic_lvis as data

LVIS, COCO = "synthetic_processes_lvis", "synthetic_processes_coco"
FILES = {LVIS: "lvis_instances_results.json", COCO: "coco_instances_results.json"}


def evaluate(folder: Path, output: Path, batch_size: int) -> None:
    """What one process does: a model that knows its answers by image id."""
    content = data.annotations(np.random.default_rng(0), num_images=7)
    for name, register in ((LVIS, data.register_lvis), (COCO, data.register_coco)):
        register(name, content, folder / f"process{comm.get_rank()}")
    outputs = data.random_outputs(content, np.random.default_rng(1), masks=True)
    known: dict[int, Any] = dict(enumerate(outputs, start=1))
    inputs = {x["image_id"]: x for x, _ in data.oracle_outputs(DatasetCatalog.get(LVIS), 1)}
    for found in outputs:
        # Eight results for each of the six regions.
        found.region_index = found.pred_classes.new_tensor(np.repeat(np.arange(6), 8))

    def model(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": known[x["image_id"]]} for x in batch]

    metrics = {}
    for name, evaluator_type in ((LVIS, LVISAPEvaluator), (COCO, COCOAPEvaluator)):
        options = {"fixed_ap": True, "max_dets_per_class": 15} if name == LVIS else {}
        average_precision = evaluator_type(name, output_dir=str(output / name), **options)
        loader = build_detection_test_loader(
            DatasetCatalog.get(name),
            mapper=lambda record: inputs[record["image_id"]],
            batch_size=batch_size,
        )
        evaluator = DatasetEvaluators([average_precision, RegionClassificationEvaluator(name)])
        metrics[name] = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        (output / "metrics.json").write_text(json.dumps(metrics))
    else:
        assert not any(metrics.values())
    data.forget(LVIS, COCO)


@pytest.mark.parametrize("processes, batch_size", [(1, 3), (2, 1)])
def test_results_do_not_depend_on_the_split(
    tmp_path: Path, processes: int, batch_size: int
) -> None:
    (tmp_path / "process0").mkdir()
    (tmp_path / "process1").mkdir()
    evaluate(tmp_path, tmp_path / "once", 1)
    launch(evaluate, processes, dist_url="auto", args=(tmp_path, tmp_path / "again", batch_size))
    for name, file_name in FILES.items():
        once, again = (tmp_path / run / name / file_name for run in ("once", "again"))
        assert len(json.loads(once.read_text())) > 200
        assert once.read_bytes() == again.read_bytes()
    once, again = (
        json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("once", "again")
    )
    assert repr(once) == repr(again)
    assert (
        once[LVIS]["bbox_fixed"]["AP"] > 0 and once[COCO]["region_classification"]["regions"] == 42
    )
