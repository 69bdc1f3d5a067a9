"""Regions from every source, through the proposal file, into Detectron2's loader."""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from regionspot_d2.data import register_coco_format
from regionspot_d2.data.build import load_records
from regionspot_d2.data.proposal_sources import from_glip_json, from_instances, from_results_json
from regionspot_d2.data.proposals import (
    Proposals,
    attach_proposals,
    box_recall,
    fit_to_dataset,
    from_ground_truth,
    proposals_exist,
    read_proposals,
    select,
    write_proposals,
)
from regionspot_d2.modeling.automatic_masks import automatic_boxes
from regionspot_d2.modeling.interfaces import LOCALIZER_REGISTRY

from . import tiny
from .datasets_on_disk import TINYCOCO, write_coco
from .detectors import MASK_RCNN
from .tools import load_tool

TRUTH = {
    "1": [[4.25, 6.5, 24.25, 37.25], [30.0, 10.0, 63.5, 30.0]],
    "2": [[0.0, 0.0, 50.0, 70.0]],
    "3": [],
    "4": [[71.3, 52.6, 79.7, 59.7]],
}


@pytest.fixture
def dataset(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[dict]]:
    """The records of a registered dataset "mine" of four images; see ``TRUTH``."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    register_coco_format([["mine", *write_coco(tmp_path)]])
    yield DatasetCatalog.get("mine")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    module = load_tool("prepare_proposals")
    # It would write to pytest's streams after they are closed, and hide messages from caplog.
    module.setup_logger = lambda *args, **kwargs: None
    return module


def run(tool: ModuleType, source: str, output: Path, *arguments: object) -> None:
    tool.invoke_main(
        ["--dataset", "mine", "--source", source, "--output", str(output), *map(str, arguments)]
    )


def assert_loads(proposal_file: Path, expected: dict[str, tuple]) -> None:
    """The file gives these boxes and scores, best first, within 1e-3 pixels and 1e-6.

    Detectron2's loader, which we do not use, reads the same from it.
    """
    loaded = load_records("mine", proposal_file=str(proposal_file))
    stock = get_detection_dataset_dicts(
        "mine", filter_empty=False, proposal_files=[str(proposal_file)]
    )
    assert_same_proposals(loaded, stock)
    assert [str(record["image_id"]) for record in loaded] == list(TRUTH)
    for record in loaded:
        boxes, scores = (np.asarray(v) for v in expected.get(str(record["image_id"]), ([], [])))
        found = record["proposal_boxes"]
        found_scores = record["proposal_objectness_logits"]
        assert found.shape == (len(scores), 4)
        order = np.argsort(scores)[::-1]
        np.testing.assert_allclose(found_scores, scores[order], atol=1e-6, rtol=0)
        # Equal scores come in any order.
        rows = np.lexsort([*found.T, -found_scores])
        wanted = boxes.reshape(-1, 4)
        wanted = wanted[np.lexsort([*wanted.T, -scores])]
        np.testing.assert_allclose(found[rows], wanted, atol=1e-3, rtol=0)


def assert_same_proposals(ours: list[dict], theirs: list[dict]) -> None:
    assert [record["image_id"] for record in ours] == [record["image_id"] for record in theirs]
    for record, other in zip(ours, theirs):
        assert record["proposal_bbox_mode"] == other["proposal_bbox_mode"]
        for key in ("proposal_boxes", "proposal_objectness_logits"):
            assert record[key].dtype == other[key].dtype
            np.testing.assert_array_equal(record[key], other[key])


# Sources, from their file or model to the loader


def test_ground_truth(
    dataset: list[dict], tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "new folder" / "gt.pkl"
    run(tool, "gt", output)

    assert_loads(output, {key: (boxes, np.ones(len(boxes))) for key, boxes in TRUTH.items()})
    printed = capsys.readouterr().out
    assert "4 boxes of mine from gt" in printed and "images: 4, without boxes: 1" in printed
    assert "recall of 4 annotated boxes: 100.0 % at IoU 0.5, 100.0 % at IoU 0.5:0.95" in printed
    _, info = read_proposals(str(output))
    assert info["source"] == "gt" and info["dataset"] == "mine"
    assert info["recall"] == {"objects": 4, "recall_50": 1.0, "recall_50_95": 1.0}


def test_glip_json(dataset: list[dict], tool: ModuleType, tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    boxes = np.sort(rng.uniform(0, 40, (20, 2, 2)), axis=1).reshape(20, 4)
    content = {
        "1": {"boxes": boxes.tolist(), "scores": rng.uniform(size=20).tolist(), "labels": [1] * 20},
        "2": {"boxes": [], "scores": [], "labels": []},
        "4": {"boxes": [[1 / 3, 2 / 3, 79.99, 59.001]], "scores": [0.123456789]},
    }
    json_file = tmp_path / "glip.json"
    json_file.write_text(json.dumps(content))
    run(tool, "glip", tmp_path / "glip.pkl", "--boxes", json_file)

    assert_loads(
        tmp_path / "glip.pkl", {key: (c["boxes"], c["scores"]) for key, c in content.items()}
    )


def test_results_json(dataset: list[dict], tool: ModuleType, tmp_path: Path) -> None:
    content = [
        {"image_id": 4, "category_id": 7, "bbox": [70.123, 50.456, 9.5, 8.25], "score": 0.25},
        {"image_id": 1, "category_id": 1, "bbox": [4.25, 6.5, 20.0, 30.75], "score": 0.9},
        {"image_id": 4, "category_id": 8, "bbox": [0, 0, 80, 60], "score": 0.75},
    ]
    json_file = tmp_path / "coco_instances_results.json"
    json_file.write_text(json.dumps(content))
    run(tool, "results", tmp_path / "results.pkl", "--boxes", json_file)

    expected = {
        "1": ([[4.25, 6.5, 24.25, 37.25]], [0.9]),
        "4": ([[70.123, 50.456, 79.623, 58.706], [0, 0, 80, 60]], [0.25, 0.75]),
    }
    assert_loads(tmp_path / "results.pkl", expected)


def test_another_proposal_file_with_the_names_of_detectron_1(
    dataset: list[dict], tool: ModuleType, tmp_path: Path
) -> None:
    old = {
        "indexes": [4, 1],
        "boxes": [np.array([[1, 2, 30, 40.0], [5, 5, 20, 20]]), np.zeros((0, 4))],
        "scores": [np.array([0.5, 0.75]), np.zeros(0)],
    }
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(old))
    run(tool, "proposals", tmp_path / "new.pkl", "--boxes", tmp_path / "old.pkl", "--topk", 1)

    assert_loads(tmp_path / "new.pkl", {"4": ([[5, 5, 20, 20]], [0.75])})


SAM_OPTIONS = {
    "points_per_side": 2,
    "pred_iou_thresh": -10.0,
    "stability_score_thresh": 0.0,
    "stability_score_offset": 0.05,
    "box_nms_thresh": 1.0,
}


@pytest.fixture
def tiny_localizer(tiny_models: None) -> torch.nn.Module:
    cfg = tiny.tiny_cfg()
    return LOCALIZER_REGISTRY.get(cfg.MODEL.LOCALIZER.NAME)(cfg)


def test_sam_masks(
    dataset: list[dict], tool: ModuleType, tmp_path: Path, tiny_localizer: torch.nn.Module
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny.tiny_cfg().dump())
    options = [("--" + k.replace("_", "-"), v) for k, v in SAM_OPTIONS.items()]
    run(
        tool,
        "sam",
        tmp_path / "sam.pkl",
        "--config-file",
        config,
        *[f"{key}={value}" for key, value in options],
    )

    expected = {}
    for record in dataset:
        image = torch.tensor(read_image(record["file_name"], format="RGB")).permute(2, 0, 1)
        regions = automatic_boxes(tiny_localizer, image, **SAM_OPTIONS)
        expected[str(record["image_id"])] = (regions.pred_boxes.tensor.numpy(), regions.scores)
    assert sum(len(scores) for _, scores in expected.values()) > 4
    assert_loads(tmp_path / "sam.pkl", expected)
    assert not Path(f"{tmp_path}/sam.pkl.parts").exists()
    assert read_proposals(str(tmp_path / "sam.pkl"))[1]["settings"]["points_per_side"] == 2


@pytest.mark.parametrize("kind", ["16-bit gray", "transparent"])
def test_sam_sees_the_image_as_the_model_does(
    dataset: list[dict],
    tool: ModuleType,
    tmp_path: Path,
    tiny_models: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    record = {"file_name": str(tmp_path / "a.png"), "width": 2, "height": 1, "image_id": 1}
    if kind == "16-bit gray":
        Image.fromarray(np.array([[0, 25700]], np.uint16)).save(record["file_name"])
    else:
        colors = np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
        Image.fromarray(colors).save(record["file_name"])
    seen = []
    monkeypatch.setattr(tool, "automatic_boxes", lambda _, image, **settings: seen.append(image))
    args = ["--dataset", "mine", "--source", "sam", "--output", "a.pkl"]

    tool.sam_regions(tool.argument_parser().parse_args(args), tiny.tiny_cfg())(record)

    expected = [[0, 0, 0], [100] * 3] if kind == "16-bit gray" else [[255, 0, 0], [255] * 3]
    assert seen[0].permute(1, 2, 0).tolist() == [expected]


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """The config of a tiny RetinaNet with weights, all else Detectron2's defaults (BGR images)."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 50
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    torch.manual_seed(0)
    model = build_model(cfg)
    # Fresh weights give every box the same score.
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    config = tmp_path / "detector.yaml"
    config.write_text(cfg.dump())
    return config


def detections(config: Path, records: list[dict]) -> dict[str, tuple]:
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    predictor = DefaultPredictor(cfg)
    found = {}
    for record in records:
        instances = predictor(read_image(record["file_name"], format="BGR"))["instances"]
        found[str(record["image_id"])] = (instances.pred_boxes.tensor.numpy(), instances.scores)
    return found


def test_any_detectron2_model(
    dataset: list[dict], tool: ModuleType, tmp_path: Path, detector: Path
) -> None:
    run(tool, "detector", tmp_path / "detector.pkl", "--config-file", detector)

    expected = detections(detector, dataset)
    assert sum(len(scores) for _, scores in expected.values()) > 4
    assert_loads(tmp_path / "detector.pkl", expected)


def test_a_model_that_only_proposes() -> None:
    instances = Instances((48, 64))
    instances.proposal_boxes = Boxes([[1, 2, 3, 4], [5, 6, 7, 8]])
    instances.objectness_logits = torch.tensor([0.0, -2.0])
    boxes, scores = from_instances(instances)
    np.testing.assert_array_equal(boxes, [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_allclose(scores, [0.5, 0.1192029], atol=1e-6)


@pytest.mark.skipif(not TINYCOCO.is_dir(), reason="the COCO photos of the developers are not here")
def test_coco_photos_with_crowds_and_empty_images(
    tool: ModuleType, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    register_coco_format([["mine", str(TINYCOCO / "instances.json"), str(TINYCOCO / "images")]])
    run(tool, "gt", tmp_path / "gt.pkl")
    _, info = read_proposals(str(tmp_path / "gt.pkl"))
    assert (info["images"], info["images_without_boxes"], info["boxes"]) == (32, 2, 284)
    assert info["recall"]["recall_50_95"] == 1


# Interrupted and divided runs


def test_an_interrupted_run_continues_where_it_stopped(
    dataset: list[dict],
    tool: ModuleType,
    tmp_path: Path,
    detector: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "boxes.pkl"
    seen: list[int] = []
    original = tool.detector_regions

    def interrupted(limit: int):
        def build(args: Namespace, cfg: object):
            find = original(args, cfg)

            def find_some(record: dict) -> Instances:
                if len(seen) == limit:
                    raise KeyboardInterrupt
                seen.append(record["image_id"])
                return find(record)

            return find_some

        return build

    monkeypatch.setattr(tool, "detector_regions", interrupted(2))
    with pytest.raises(SystemExit, match="130"):
        run(tool, "detector", output, "--config-file", detector)
    assert not output.exists()
    # As if the power failed while image 2 was being written.
    part = tmp_path / "boxes.pkl.parts" / "finished.jsonl"
    part.write_text(part.read_text()[:-20])

    monkeypatch.setattr(tool, "detector_regions", interrupted(100))
    with pytest.raises(SystemExit, match=r"holds a run with another opts \(.*'0.5'"):
        run(
            tool,
            "detector",
            output,
            "--config-file",
            detector,
            "MODEL.RETINANET.NMS_THRESH_TEST",
            "0.5",
        )
    run(tool, "detector", output, "--config-file", detector)

    assert seen == [1, 2, 2, 3, 4]
    assert_loads(output, detections(detector, dataset))


def test_two_processes_share_the_images(
    dataset: list[dict],
    tool: ModuleType,
    tmp_path: Path,
    detector: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads play the two processes, which would take long to start."""
    arguments = ["--dataset", "mine", "--source", "detector", "--config-file", str(detector)]
    process = threading.local()
    barrier = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(tool.comm, "get_rank", lambda: process.rank)
    monkeypatch.setattr(tool.comm, "is_main_process", lambda: process.rank == 0)
    monkeypatch.setattr(tool.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(tool.comm, "synchronize", barrier.wait)
    monkeypatch.setattr(tool.comm, "all_gather", lambda own: [own])

    def work(rank: int) -> dict[str, Proposals]:
        process.rank = rank
        args = tool.argument_parser().parse_args([*arguments, "--output", "unused"])
        return tool.run_model(args, tool.setup(args), dataset, str(tmp_path / "parts"))

    with ThreadPoolExecutor(2) as pool:
        found, nothing = pool.map(work, [0, 1])

    assert nothing == {}
    done = [
        [json.loads(line)["key"] for line in (tmp_path / "parts" / name).open() if "key" in line]
        for name in ("finished.jsonl", "finished.1.jsonl")
    ]
    assert done == [["1", "3"], ["2", "4"]]
    process.rank = 0
    for image_id, (boxes, scores) in detections(detector, dataset).items():
        np.testing.assert_allclose(found[image_id].boxes, boxes, atol=1e-3)
        np.testing.assert_allclose(found[image_id].scores, scores, atol=1e-6)


# Files of another format


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (from_glip_json, [{"image_id": 1}], "not a GLIP json.*--source results"),
        (from_glip_json, {"images": [], "annotations": []}, "annotation file.*--source gt"),
        (
            from_glip_json,
            {"7": {"boxes": []}},
            r"image '7' must have 'boxes' and 'scores'.*\['boxes'\]",
        ),
        (
            from_glip_json,
            {"7": {"boxes": [[1, 2, 3, 4]], "scores": []}},
            "'7'.* 1 boxes and 0 scores",
        ),
        (
            from_glip_json,
            {"7": {"boxes": [[1, 2, 3]], "scores": [1]}},
            r"'7', region 0.*\[1, 2, 3\]",
        ),
        (
            from_glip_json,
            {"7": {"boxes": [[1, 2, 3, 4]] * 2, "scores": [0.5, float("nan")]}},
            "'7', region 1: the score is nan",
        ),
        (
            from_glip_json,
            {"7": {"boxes": [[1, 2, 3, 4], [1, None, 3, 4]], "scores": [1, 1]}},
            r"'7', region 1: the box is \[1, None, 3, 4\]",
        ),
        (
            from_results_json,
            {"1": {"boxes": [], "scores": []}},
            "not a results json.*--source glip",
        ),
        (from_results_json, {"info": 1}, r"not a results json.*has the keys \['info'\]"),
        (
            from_results_json,
            [{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}, {"image_id": 1, "score": 1}],
            r"entry 1 must have 'image_id', 'bbox' and 'score'.*\['image_id', 'score'\]",
        ),
        (
            from_results_json,
            [{"image_id": 5, "bbox": [1, 2, 3, 4], "score": "high"}],
            "image '5', region 0: the score is 'high'",
        ),
    ],
)
def test_wrong_files_name_the_first_offender(
    tmp_path: Path, read, content: object, message: str
) -> None:
    json_file = tmp_path / "boxes.json"
    json_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read(str(json_file))
    assert str(json_file) in str(error.value)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("boxes")
    with pytest.raises(ValueError, match="text.json is not a json file"):
        from_glip_json(str(tmp_path / "text.json"))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"boxes": []}))
    with pytest.raises(ValueError, match=r"other.pkl is not a proposal file.*\['boxes'\]"):
        read_proposals(str(tmp_path / "other.pkl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [1, 2, 3]}, "has 3 image ids, boxes of 4 images"),
        ({"boxes": [np.zeros((1, 4))]}, "has 4 image ids, boxes of 1 images"),
        ({"objectness_logits": []}, "has 4 image ids, boxes of 4 images, scores of 0 images"),
        ({"boxes": [np.zeros((2, 4))] * 4}, r"image '1' has boxes of shape \(2, 4\) and scores"),
        ({"boxes": [np.zeros((4, 1))] * 4}, r"image '1' has boxes of shape \(4, 1\) and scores"),
        ({"boxes": [np.zeros(4)] * 4}, r"image '1' has boxes of shape \(4,\) and scores"),
        ({"bbox_mode": 2}, "bbox_mode is 2"),
    ],
)
def test_files_whose_parts_do_not_fit(
    dataset: list[dict], tmp_path: Path, changes: dict, message: str
) -> None:
    content = {
        "ids": [1, 2, 3, 4],
        "boxes": [np.zeros((1, 4))] * 4,
        "objectness_logits": [np.zeros(1)] * 4,
        "bbox_mode": 0,
    }
    path = str(tmp_path / "boxes.pkl")
    for written, ok in ((content, True), ({**content, **changes}, False)):
        Path(path).write_bytes(pickle.dumps(written))
        if ok:
            assert len(read_proposals(path)[0]) == 4
    with pytest.raises(ValueError, match=f"boxes.pkl.*{message}"):
        read_proposals(path)
    with pytest.raises(ValueError, match=f"boxes.pkl.*{message}"):
        attach_proposals(dataset, path, "mine")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("where", ["whole file", "info", "boxes"])
def test_code_in_a_proposal_file_does_not_run(
    dataset: list[dict], tool: ModuleType, tmp_path: Path, where: str
) -> None:
    trace = tmp_path / "trace"
    hostile = Hostile(trace)
    content = {
        "ids": [1, 2, 3, 4],
        "boxes": [np.zeros((0, 4))] * 4,
        "objectness_logits": [np.zeros(0)] * 4,
        "info": {},
    }
    if where == "info":
        content["info"] = {"source": [hostile]}
    if where == "boxes":
        content["boxes"][2] = hostile
    path = tmp_path / "boxes.pkl"
    path.write_bytes(pickle.dumps(hostile if where == "whole file" else content))

    for read in (
        lambda: read_proposals(str(path)),
        lambda: load_records("mine", proposal_file=str(path)),
    ):
        with pytest.raises(ValueError, match="boxes.pkl' is not safe to open: it asks for .*open"):
            read()
    with pytest.raises(SystemExit, match="prepare_proposals.py: .*boxes.pkl' is not safe to open"):
        run(tool, "proposals", tmp_path / "new.pkl", "--boxes", path)
    assert not trace.exists()


# What Detectron2's loader makes of a file, and ours


@pytest.mark.parametrize(
    ("names", "dtype", "mode", "protocol"),
    [
        (("ids", "objectness_logits"), np.float32, 0, 5),
        (("indexes", "scores"), np.float64, None, 2),
        (("ids", "objectness_logits"), np.float64, 1, 0),
    ],
)
def test_records_are_those_of_detectron2s_loader(
    dataset: list[dict],
    tmp_path: Path,
    names: tuple[str, str],
    dtype: type,
    mode: int | None,
    protocol: int,
) -> None:
    """Names of Detectron 1, other box modes, types and pickle protocols, and equal scores."""
    rng = np.random.RandomState(0)
    counts = (30, 0, 1, 17, 2)
    content = {
        names[0]: ["4", "1", "3", "2", "of another dataset"],
        "boxes": [rng.uniform(0, 50, (n, 4)).astype(dtype) for n in counts],
        names[1]: [rng.randint(0, 5, n).astype(dtype) / 8 for n in counts],
        **({} if mode is None else {"bbox_mode": mode}),
    }
    path = str(tmp_path / "boxes.pkl")
    Path(path).write_bytes(pickle.dumps(content, protocol=protocol))

    stock = get_detection_dataset_dicts("mine", filter_empty=False, proposal_files=[path])
    before = [dict(record) for record in dataset]
    assert_same_proposals(attach_proposals(dataset, path, "mine"), stock)
    assert_same_proposals(load_records("mine", proposal_file=path), stock)
    assert dataset == before


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike, as Python 2 did."""

    def save_string(self, value: str | bytes) -> None:
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def test_files_of_python_2(dataset: list[dict], tmp_path: Path) -> None:
    boxes = np.array([[0.1, 2, 30, 25.5], [1 / 3, 0, 9, 200]])
    content = {
        "indexes": ["1", "2", "3", "4"],
        "boxes": [boxes] * 4,
        "scores": [np.array([0.25, 0.5])] * 4,
    }
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    path = tmp_path / "old.pkl"
    path.write_bytes(stream.getvalue().replace(b"numpy._core", b"numpy.core"))

    stock = get_detection_dataset_dicts("mine", filter_empty=False, proposal_files=[str(path)])
    assert stock[0]["proposal_boxes"].tolist() == boxes[::-1].tolist()
    assert_same_proposals(attach_proposals(dataset, str(path), "mine"), stock)


# Ground truth without a file


def test_ground_truth_instead_of_a_file(dataset: list[dict], tool: ModuleType, tmp_path: Path):
    run(tool, "gt", tmp_path / "gt.pkl")
    written, written_info = read_proposals(str(tmp_path / "gt.pkl"))

    found, info = read_proposals("ground_truth://mine")

    assert {key: written_info[key] for key in info} == info
    assert list(found) == list(written) == list(TRUTH)
    for image_id in TRUTH:
        np.testing.assert_array_equal(found[image_id].boxes, written[image_id].boxes)
        np.testing.assert_array_equal(found[image_id].scores, written[image_id].scores)
    assert_same_proposals(
        load_records("mine", proposal_file="ground_truth://mine"),
        load_records("mine", proposal_file=str(tmp_path / "gt.pkl")),
    )
    run(tool, "proposals", tmp_path / "one.pkl", "--boxes", "ground_truth://mine", "--topk", 1)
    assert read_proposals(str(tmp_path / "one.pkl"))[1]["boxes"] == 3


def test_which_proposals_exist(dataset: list[dict], tmp_path: Path) -> None:
    assert proposals_exist("ground_truth://mine") and proposals_exist(__file__)
    assert not proposals_exist("ground_truth://yours")
    assert not proposals_exist(str(tmp_path / "no.pkl"))


def test_ground_truth_of_a_test_set() -> None:
    with pytest.raises(ValueError, match="no annotations"):
        from_ground_truth([{"image_id": 1, "width": 5, "height": 5}])


# Boxes that are not of these images


def proposals_of(boxes: list[list[float]], image_id: str = "1") -> dict[str, Proposals]:
    return {image_id: Proposals.create(boxes, np.linspace(1, 0.5, len(boxes)))}


def test_ids_of_another_dataset(dataset: list[dict], caplog: pytest.LogCaptureFixture) -> None:
    some = {**proposals_of([[1, 1, 9, 9]]), **proposals_of([[1, 1, 9, 9]], "999")}
    with caplog.at_level(logging.WARNING):
        found = fit_to_dataset(some, dataset, "x.json")
    assert list(found) == ["1", "2", "3", "4"]
    assert [len(p.boxes) for p in found.values()] == [1, 0, 0, 0]
    assert "x.json: 1 of 2 image ids are not in the dataset, the first is '999'" in caplog.text
    with pytest.raises(ValueError, match="the first is '999'.*another dataset"):
        fit_to_dataset(proposals_of([[1, 1, 9, 9]], "999"), dataset, "x.json")


@pytest.mark.parametrize(
    "wrong",
    [
        [[40.0, 20, 10, 15], [30, 30, 20, 10]],  # XYWH taken for XYXY
        [[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]],  # shares of the image
        [[60.0, 40, 120, 90], [70, 10, 100, 40]],  # of a larger image
    ],
)
def test_boxes_in_the_wrong_frame(
    dataset: list[dict], wrong: list[list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"x: 2 of 2 boxes.*image '1' \(64 x 48\), region 0"):
        fit_to_dataset(proposals_of(wrong), dataset, "x")
    good = [[1.0, 1, 30, 30], [0, 0, 66, 50], [-3, -3, 20, 20]]
    with caplog.at_level(logging.WARNING):
        fit_to_dataset(proposals_of(good + wrong), dataset, "x")
    assert "2 of 5 boxes do not lie in their image, the first is image '1' (64 x 48), region 3" in (
        caplog.text
    )


def test_good_boxes_raise_no_warning(dataset: list[dict], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit_to_dataset(from_ground_truth(dataset), dataset, "x")
    assert caplog.text == ""


def test_boxes_without_area_are_left_out(
    dataset: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = fit_to_dataset(proposals_of([[1, 1, 9, 9], [5, 5, 5, 20]]), dataset, "x")
    np.testing.assert_array_equal(found["1"].boxes, [[1, 1, 9, 9]])
    assert "1 of 2 boxes have no area" in caplog.text and "image '1', region 1" in caplog.text


def test_numbers_that_are_not_finite(dataset: list[dict]) -> None:
    broken = {"2": Proposals.create([[1, 1, 9, 9]] * 3, [1, 0.5, np.nan])}
    with pytest.raises(ValueError, match="x: image '2', region 2: the score is nan"):
        fit_to_dataset(broken, dataset, "x")
    broken = {"2": Proposals.create([[1, 1, 9, 9], [1, 1, np.inf, 9]], [1, 1])}
    with pytest.raises(ValueError, match="image '2', region 1: the box is .*inf"):
        fit_to_dataset(broken, dataset, "x")


# Choosing


def test_select_by_score_overlap_and_number() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [20, 20, 30, 31], [50, 50, 60, 60]]
    proposals = Proposals.create(boxes, [0.5, 0.9, 0.2, 0.7, 0.1])

    def chosen(**options: float) -> list[int]:
        return [boxes.index(box) for box in select(proposals, **options).boxes.tolist()]

    assert chosen() == [1, 3, 0, 2, 4]
    assert chosen(topk=2) == [1, 3]
    assert chosen(min_score=0.5) == [1, 3, 0]
    assert chosen(nms_threshold=0.8) == [1, 3, 4]
    assert chosen(nms_threshold=0.95) == [1, 3, 0, 2, 4]  # IoU 0.90 and 0.91
    assert chosen(min_score=0.2, nms_threshold=0.8, topk=1) == [1]
    assert select(Proposals.create([], []), nms_threshold=0.5, topk=3).boxes.shape == (0, 4)


# Recall


def test_recall_is_the_share_of_objects_that_are_covered(dataset: list[dict]) -> None:
    """IoU 0.72 and 0 in image 1, exactly 1 twice in image 2, 0 in image 4."""
    shifted = [4.25, 6.5, 24.25, 37.25 - 0.28 * 30.75]
    boxes = {"1": [shifted, [0, 0, 3, 3]], "2": [[0, 0, 50, 70]] * 2, "3": [[0, 0, 9, 9]], "4": []}
    proposals = {key: Proposals.create(b, np.ones(len(b))) for key, b in boxes.items()}
    recall = box_recall(proposals, dataset)
    assert recall is not None
    assert recall["objects"] == 4
    assert recall["recall_50"] == pytest.approx(2 / 4)
    # 0.72 passes 0.5, 0.55, 0.6, 0.65 and 0.7.
    assert recall["recall_50_95"] == pytest.approx((5 * 2 + 5 * 1) / 10 / 4)


def test_no_recall_without_annotations(tmp_path: Path) -> None:
    records = [{"image_id": 1, "width": 5, "height": 5}]
    info = write_proposals(
        str(tmp_path / "p.pkl"), records, proposals_of([[0, 0, 2, 2]]), {"source": "x"}
    )
    assert info["recall"] is None and info["boxes"] == 1


# SAM's automatic masks


def test_automatic_boxes_are_those_of_sams_generator(tiny_localizer: torch.nn.Module) -> None:
    from segment_anything import SamAutomaticMaskGenerator

    image = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0))
    generator = SamAutomaticMaskGenerator(tiny.build_tiny_sam(), **SAM_OPTIONS)
    stock = generator.generate(image.permute(1, 2, 0).numpy().astype(np.uint8))

    regions = automatic_boxes(tiny_localizer, image, with_masks=True, **SAM_OPTIONS)

    wanted = sorted(min(max(m["predicted_iou"], 0), 1) * m["stability_score"] for m in stock)
    assert len(wanted) == 12
    assert regions.scores.tolist() == pytest.approx(wanted[::-1], abs=1e-6)
    for mask, box in zip(regions.pred_masks, regions.pred_boxes.tensor.tolist()):
        ys, xs = mask.nonzero().unbind(1)
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    areas = sorted(m["area"] for m in stock)
    assert sorted(regions.pred_masks.flatten(1).sum(1).tolist()) == areas


def test_automatic_boxes_may_find_nothing(tiny_localizer: torch.nn.Module) -> None:
    image = torch.zeros(3, 30, 20, dtype=torch.uint8)
    regions = automatic_boxes(
        tiny_localizer,
        image,
        points_per_side=2,
        pred_iou_thresh=100.0,
        crop_n_layers=1,
        with_masks=True,
    )
    assert len(regions) == 0
    assert regions.pred_masks.shape == (0, 30, 20)


def test_automatic_boxes_refuse_what_they_do_not_know(tiny_localizer: torch.nn.Module) -> None:
    image = torch.zeros(3, 30, 20)
    with pytest.raises(TypeError, match="points_per_row"):
        automatic_boxes(tiny_localizer, image, points_per_row=2)
    with pytest.raises(TypeError, match="MODEL.LOCALIZER.NAME: Linear"):
        automatic_boxes(torch.nn.Linear(1, 1), image)


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "glip"], "--source glip needs --boxes"),
        (["--source", "glip", "--boxes", "no.json"], "--boxes no.json: there is no such file"),
        (["--source", "sam"], "--source sam needs --config-file"),
        (["--source", "gt", "--num-gpus", "2"], "runs in one process"),
    ],
)
def test_incomplete_commands(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tool.invoke_main(["--dataset", "mine", "--output", "x.pkl", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "gt", "--dataset", "mien"], "--dataset: there is no dataset 'mien'.*mine"),
        (["--source", "gt", "DATASETS.COCO_FORMT", "[]"], "no config key DATASETS.COCO_FORMT"),
        (
            ["--source", "gt", "DATASETS.COCO_FORMAT", "[['m', 'no.json', '.']]"],
            "no annotation file 'no.json'",
        ),
        (["--source", "glip", "--boxes", __file__], "not a json file"),
        (["--source", "sam", "--config-file", "no.yaml"], "no.yaml"),
        (["--source", "detector", "--config-file", "no.yaml"], "no.yaml: no such file"),
        (
            ["--source", "detector", "--config-file", MASK_RCNN, "MODEL.WIGHTS", "a"],
            "no config key MODEL.WIGHTS",
        ),
    ],
)
def test_mistakes_give_one_line(
    dataset: list[dict], tool: ModuleType, tmp_path: Path, arguments: list[str], message: str
) -> None:
    common = ["--dataset", "mine", "--output", str(tmp_path / "x.pkl")]
    with pytest.raises(SystemExit, match=f"prepare_proposals.py: .*{message}"):
        tool.invoke_main([*common, *arguments])


def test_the_files_a_config_names_need_not_be_there_before_they_are_written(
    dataset: list[dict], tool: ModuleType, tmp_path: Path
) -> None:
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.TEST = ("mine",)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "gt.pkl"),)
    config = tmp_path / "tiny.yaml"
    config.write_text(cfg.dump())
    run(tool, "gt", tmp_path / "gt.pkl", "--config-file", config)
    assert (tmp_path / "gt.pkl").exists()
