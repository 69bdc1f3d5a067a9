"""Annotation files of other tools, and broken ones: the right numbers, or one line."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regionspot_d2.data.build import load_records
from regionspot_d2.data.datasets import (
    AnnotationsError,
    checked_annotations,
    class_names,
    register_coco_format,
)
from regionspot_d2.data.datasets.annotations import read_categories
from regionspot_d2.data.datasets.validation import check_annotations
from regionspot_d2.engine import ConfigError, RegionSpotTrainer, load_config
from regionspot_d2.evaluation import (
    COCOAPEvaluator,
    LVISAPEvaluator,
    build_evaluator,
    check_evaluation,
)
from regionspot_d2.safe_loading import read_json

from . import synthetic_lvis as lvis
from .datasets_on_disk import write_coco
from .shapes import shapes_cfg
from .tools import load_tool

Content = dict[str, Any]
NAME = "hostile"
BACKENDS = ("hotcoco", "reference")


@pytest.fixture(autouse=True)
def forgotten(empty_cache: Path) -> Iterator[None]:
    """A cache of its own for each test, and no dataset that stays."""
    before = set(DatasetCatalog.list()) | set(MetadataCatalog.list())
    yield
    lvis.forget(*(set(DatasetCatalog.list()) | set(MetadataCatalog.list())) - before)


def register(folder: Path, change: Callable[[Content], Any] = lambda content: None) -> Path:
    """Writes a COCO file with a change, and registers it as NAME."""
    json_file, images = write_coco(folder)
    content = json.loads(Path(json_file).read_text())
    change(content)
    Path(json_file).write_text(json.dumps(content))
    register_coco_format([[NAME, json_file, images]])
    return Path(json_file)


def perfect(record: dict[str, Any]) -> Instances:
    """Results that are the annotations; the masks are the filled boxes."""
    found = Instances((record["height"], record["width"]))
    annotations = record.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    found.scores = torch.ones(len(annotations))
    return found


def scores(name: str, backend: str = "hotcoco", **options: Any) -> dict[str, float]:
    """The AP of each task of perfect results."""
    records = DatasetCatalog.get(name)
    evaluator = COCOAPEvaluator(name, distributed=False, backend=backend, **options)
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": perfect(record)}])
    return {task: values["AP"] for task, values in evaluator.evaluate().items()}


def each(part: str, change: Callable[[Content], Any]) -> Callable[[Content], None]:
    def changed(content: Content) -> None:
        for entry in content[part]:
            change(entry)

    return changed


def new_ids(part: str, key: str, make: Callable[[int], Any]) -> Callable[[Content], None]:
    """Changes the ids of images, or of categories, everywhere."""

    def changed(content: Content) -> None:
        for entry in content[part]:
            entry["id"] = make(entry["id"])
        for entry in content["annotations"]:
            entry[key] = make(entry[key])

    return changed


TOOLS = {
    "Roboflow": lambda c: c.update(info={"year": "2020", "version": 2}),
    "CVAT": lambda c: (
        c.update(info={"year": ""}, licenses=[{"id": 0, "name": "", "url": ""}]),
        each("images", lambda image: image.update(date_captured=0, license=0, flickr_url=""))(c),
    ),
    "no licenses": lambda c: c.update(licenses=None, info=None),
    "odd headers": lambda c: c.update(info=[], licenses="none", type=3, videos={"a": None}),
    "odd image keys": each("images", lambda x: x.update(license="x", coco_url=1, flickr_url=[])),
    "odd category keys": each("categories", lambda x: x.update(supercategory=7, skeleton="x")),
    "odd annotation keys": each("annotations", lambda x: x.update(num_keypoints="2", score=None)),
    "numbers with a point": each("images", lambda x: x.update(width=float(x["width"]), id=x["id"])),
    "crowds as bool": each("annotations", lambda x: x.update(iscrowd=bool(x["iscrowd"]))),
    "flags of null": each("annotations", lambda x: x.update(iscrowd=x["iscrowd"] or None)),
    "areas missing": each("annotations", lambda x: x.pop("area")),
    "annotation ids from 0": each("annotations", lambda x: x.update(id=x["id"] - 1)),
    "annotation ids text": each("annotations", lambda x: x.update(id=f"a{x['id']}")),
    "annotation ids negative": each("annotations", lambda x: x.update(id=-x["id"])),
    "annotation ids huge": each("annotations", lambda x: x.update(id=x["id"] + (1 << 70))),
    "annotation ids all one": each("annotations", lambda x: x.update(id=1)),
    "annotation ids null": each("annotations", lambda x: x.update(id=None)),
    "annotation ids lists": each("annotations", lambda x: x.update(id=[])),
    "annotation ids gone": each("annotations", lambda x: x.pop("id")),
    "image ids text": new_ids("images", "image_id", lambda n: f"{n:012x}abcd"),
    "image ids digits": new_ids("images", "image_id", str),
    "image ids negative": new_ids("images", "image_id", lambda n: n - 3),
    "image ids huge": new_ids("images", "image_id", lambda n: n + (1 << 63)),
    "image ids of both signs": new_ids("images", "image_id", lambda n: (-1) ** n * (1 << 63) + n),
    "image ids with a point": new_ids("images", "image_id", float),
    "category ids text": new_ids("categories", "category_id", lambda n: f"c{n}"),
    "category ids negative": new_ids("categories", "category_id", lambda n: n - 2),
    "category ids huge": new_ids("categories", "category_id", lambda n: n + (1 << 90)),
    "NaN where nobody reads": each("annotations", lambda x: x.update(attributes={"a": math.nan})),
    "digits where nobody reads": each("images", lambda x: x.update(hash=10**400)),
    "strays": lambda c: c["annotations"].append({**c["annotations"][0], "id": 9, "image_id": 99}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tool", TOOLS)
def test_perfect_results_score_100_whatever_tool_wrote_the_file(
    tool: str, backend: str, tmp_path: Path
) -> None:
    register(tmp_path, TOOLS[tool])
    assert scores(NAME, backend, output_dir=str(tmp_path))["bbox"] == pytest.approx(100)
    # Results are written with the ids of the file.
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    content = read_json(str(tmp_path / "instances.json"))
    for part, key in (("images", "image_id"), ("categories", "category_id")):
        assert {r[key] for r in results} <= {entry["id"] for entry in content[part]}


@pytest.mark.parametrize("tool", ["Roboflow", "image ids text", "category ids negative"])
def test_plain_coco_files_are_normalized_too(tool: str, tmp_path: Path) -> None:
    json_file = register(tmp_path, TOOLS[tool])
    register_coco_instances("plain", {}, str(json_file), str(tmp_path / "images"))
    assert [scores("plain", b)["bbox"] for b in BACKENDS] == pytest.approx([100, 100])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_of_json_are_read(encoding: str, tmp_path: Path) -> None:
    json_file = register(tmp_path, lambda c: c["categories"][0].update(name="кот"))
    json_file.write_bytes(json.dumps(read_json(str(json_file))).encode(encoding))
    assert scores(NAME)["bbox"] == pytest.approx(100)
    assert class_names(NAME) == ["кот", "dog"]


def test_open_images_counts_annotation_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    json_file = register(tmp_path, TOOLS["image ids text"])
    content = json.loads(json_file.read_text())
    TOOLS["annotation ids from 0"](content)
    json_file.write_text(json.dumps(content))
    metadata = MetadataCatalog.get("openimages_v6_val")
    monkeypatch.setitem(vars(metadata), "json_file", str(json_file))
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        monkeypatch.delitem(vars(metadata), key, raising=False)
    assert [scores("openimages_v6_val", b)["bbox"] for b in BACKENDS] == pytest.approx([100, 100])
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        vars(metadata).pop(key, None)


# Faults


def first(part: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[part][0].update(values)


def without(part: str, key: str) -> Callable[[Content], Any]:
    return lambda content: content[part][0].pop(key)


def box(*numbers: Any) -> Callable[[Content], None]:
    return first("annotations", bbox=list(numbers))


def mask(value: Any) -> Callable[[Content], None]:
    return first("annotations", segmentation=value)


RECTANGLE = [1, 1, 9, 1, 9, 9]
FAULTS = {
    "a list": (None, "not in COCO format.*found"),
    "no images": (lambda c: c.pop("images"), "not in COCO format"),
    "images null": (lambda c: c.update(images=None), "'images' must be a list, but is None"),
    "an image of text": (lambda c: c["images"].insert(1, "x"), r"images\[1\] must be a dict"),
    "no height": (without("images", "height"), r"images\[0\] \(id 1\) 'height' is missing"),
    "width 0": (first("images", width=0), "'width' is 0; it must be a positive integer"),
    "width text": (first("images", width="64"), "'width' is '64'"),
    "width NaN": (first("images", width=math.nan), "'width' is nan"),
    "width 400 digits": (first("images", width=10**400), "integer of more than 38 digits"),
    "file_name null": (first("images", file_name=None), "'file_name' is None; it must be text"),
    "file_name half": (first("images", file_name="a\ud800"), "half a character"),
    "no image id": (without("images", "id"), r"images\[0\] 'id' is missing"),
    "an image id twice": (first("images", id=2), r"images\[1\].*has the id of entry 0"),
    "image ids of two kinds": (first("images", id="1"), "text where others are numbers"),
    "image id unhashable": (first("images", id=[1]), r"'id' is \[1\]"),
    "image id 400 digits": (first("images", id=10**400), "'id' is an integer of more than 38"),
    "image id 1.5": (first("images", id=1.5), "'id' is 1.5"),
    "image id true": (first("images", id=True), "'id' is True"),
    "no category name": (without("categories", "name"), r"categories\[0\] \(id 1\) 'name'"),
    "a category name of 7": (first("categories", name=7), "'name' is 7; it must be text"),
    "a category id twice": (first("categories", id=3), r"categories\[1\].*has the id"),
    "category unknown": (
        first("annotations", category_id=77),
        r"annotations\[0\] \(id 1\) 'category_id' is 77; it must be an id in 'categories'",
    ),
    "category unhashable": (first("annotations", category_id={}), "'category_id' is {}"),
    "category null": (first("annotations", category_id=None), "'category_id' is None"),
    "image of text": (first("annotations", image_id="1"), "'image_id' is '1'"),
    "no image_id": (without("annotations", "image_id"), "'image_id' is missing"),
    "all strays": (each("annotations", lambda a: a.update(image_id=99)), "images that are not in"),
    "no bbox": (without("annotations", "bbox"), "'bbox' is missing; it must be four numbers"),
    "bbox null": (first("annotations", bbox=None), "'bbox' is None"),
    "three numbers": (box(1, 2, 3), r"'bbox' is \[1, 2, 3\]"),
    "five numbers": (box(1, 2, 3, 4, 5), "'bbox' is"),
    "text": (box("1", 2, 3, 4), "'bbox' is"),
    "null": (box(1, None, 3, 4), "'bbox' is"),
    "NaN": (box(1, 2, math.nan, 4), "'bbox' is"),
    "infinity": (box(1, 2, math.inf, 4), "'bbox' is"),
    "true": (box(1, 2, True, 4), "'bbox' is"),
    "400 digits": (box(1, 2, 10**400, 4), "'bbox' is"),
    "negative width": (box(10, 10, -5, 4), "must not be negative"),
    "area text": (first("annotations", area="9"), "'area' is '9'"),
    "area NaN": (first("annotations", area=math.nan), "'area' is nan"),
    "crowd text": (first("annotations", iscrowd="0"), "'iscrowd' is '0'; it must be 0 or 1"),
    "keypoints": (first("annotations", keypoints=["x"]), "'keypoints' is"),
    "an odd polygon": (mask([[*RECTANGLE, 1]]), "a polygon of 7 numbers"),
    "a flat polygon": (mask(RECTANGLE), "must be a list of polygons"),
    "text in a polygon": (mask([[*RECTANGLE, "1", 2]]), "has '1' in a polygon"),
    "NaN in a polygon": (mask([[*RECTANGLE, 1, math.nan]]), "has nan in a polygon"),
    "a long way around": (mask([[-9e4, 0, 9e4, 5] * 100]), "polygons of .* pixels around"),
    "a long way inside": (mask([[0, 0, 63, 47] * 40_000]), "polygons of .* pixels around"),
    "many long ways": (mask([[-9e4, 0, 9e4, 0, 9e4, 5]] * 12), "polygons of .* pixels around"),
    "far away": (mask([[*RECTANGLE, 1, 1e8]]), "in a polygon; the image is 64 x 48"),
    "huge in a polygon": (mask([[*RECTANGLE, 1, 10**400]]), "in a polygon"),
    "a mask of text": (mask("abc"), "'segmentation' is 'abc'"),
    "RLE of another size": (mask({"size": [9, 9], "counts": [81]}), "RLE of size"),
    "garbage RLE": (mask({"size": [48, 64], "counts": "garbage\x00"}), "cannot be read"),
    "cut RLE": (mask({"size": [48, 64], "counts": "Zo"}), "cannot be read"),
    "negative RLE": (mask({"size": [48, 64], "counts": [-1, 3073]}), "cannot be read"),
    "short RLE": (mask({"size": [48, 64], "counts": [5, 5]}), "do not add up"),
    "RLE without counts": (mask({"size": [48, 64]}), "cannot be read"),
}


def one_line(error: pytest.ExceptionInfo[ValueError], json_file: Path) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400 and str(json_file) in message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_file_and_entry_wherever_it_is_met(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    json_file = register(tmp_path, change or (lambda content: None))
    if change is None:
        json_file.write_text("[1]")
    register_coco_instances("plain", {}, str(json_file), str(tmp_path / "images"))
    for meet in (
        lambda: DatasetCatalog.get(NAME),
        lambda: load_records(NAME, proposal_file=f"ground_truth://{NAME}"),
        lambda: load_records("plain"),
        lambda: COCOAPEvaluator("plain", distributed=False),
        lambda: COCOAPEvaluator(NAME, distributed=False, backend="reference"),
    ):
        with pytest.raises(AnnotationsError, match=message) as error:
            meet()
        one_line(error, json_file)
    problems = load_tool("check_datasets").check_dataset("plain", sample=1).problems
    assert problems == [str(error.value)]


def test_many_small_polygons_far_from_the_diagonal_are_a_mask() -> None:
    # A flock: 4,000 polygons of 12 pixels around, where x and y are 9,000 apart.
    flock = [[9000 + i, 9, 9003 + i, 9, 9003 + i, 12, 9000 + i, 12] for i in range(4000)]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20_000, "height": 20_000}],
        "categories": [{"id": 1, "name": "bird"}],
        "annotations": [{**annotation, "segmentation": flock}],
    }
    check_annotations(content, "x.json")
    flock[0] = [0, 0, 20_000, 0, 0, 1] * 100
    with pytest.raises(AnnotationsError, match=r"polygons of 4\.05e\+06 pixels around"):
        check_annotations(content, "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not a json file"),
        (b"{", "is not a json file"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"images": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"images": [' + b"9" * 5000 + b"]}", "is not a json file"),
        ('{"images": "ä"}'.encode("latin-1"), "is not utf-8; save it as UTF-8"),
        (b"\x00\xff" * 50, "is not a json file"),
        (b"null", "not in COCO format"),
    ],
)
def test_files_that_hold_no_annotations(text: bytes, message: str, tmp_path: Path) -> None:
    json_file = register(tmp_path)
    json_file.write_bytes(text)
    with pytest.raises(AnnotationsError, match=message) as error:
        DatasetCatalog.get(NAME)
    one_line(error, json_file)
    with pytest.raises(ValueError, match="categories"):
        read_categories(str(json_file))
    with pytest.raises(ConfigError, match=message):
        load_config("", ["DATASETS.TEST", f"('{NAME}',)"], training=False, testing=True)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([10**400, -1, 1 << 64, "1", [], {}, [[]], [1, 2, 3], {"a": [1]}, "\ud800"])
)
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner)
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_value_anywhere_is_refused_in_a_line_or_gives_the_same_numbers(
    data: st.DataObject, tmp_path: Path
) -> None:
    json_file, images = write_coco(tmp_path)
    content = json.loads(Path(json_file).read_text())
    original = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, key = data.draw(st.sampled_from(list(places(content))))
        holder = content
        for step in path:
            holder = holder[step]
        holder[key] = copy.deepcopy(data.draw(JSON))
    Path(json_file).write_text(json.dumps(content))
    try:
        register_coco_format([[NAME, json_file, images]])
        found = [scores(NAME, backend) for backend in BACKENDS]
    except AnnotationsError as error:
        assert "\n" not in str(error) and json_file in str(error)
    else:
        assert found[0] == pytest.approx(found[1], nan_ok=True), content
    finally:
        lvis.forget(NAME)
        Path(json_file).write_text(json.dumps(original))


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(content=JSON | st.fixed_dictionaries({"images": JSON, "categories": JSON}))
def test_any_json_is_refused_in_a_line(content: Any) -> None:
    try:
        check_annotations(content, "x.json")
    except AnnotationsError as error:
        assert "\n" not in str(error) and str(error).startswith("x.json")


# LVIS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_lvis_without_its_federated_lists_is_refused(
    key: str, backend: str, tmp_path: Path
) -> None:
    content = lvis.annotations(np.random.default_rng(0))
    content["images"][4].pop(key)
    lvis.register_lvis(NAME, content, tmp_path)
    with pytest.raises(AnnotationsError, match=f"{NAME}.json: image 5 .*'{key}'.*AP"):
        LVISAPEvaluator(NAME, distributed=False, backend=backend)
    assert "image 5" in load_tool("check_datasets").check_dataset(NAME, sample=0).problems[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tool", ["Roboflow", "image ids negative", "annotation ids text"])
def test_lvis_files_of_other_tools_give_the_same_numbers(
    tool: str, backend: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    content = lvis.annotations(random)
    outputs = lvis.random_outputs(content, random)
    found = []
    for name in ("plain", NAME):
        lvis.register_lvis(name, content, tmp_path)
        evaluator = LVISAPEvaluator(name, distributed=False, backend=backend)
        found.append(lvis.run(evaluator, content, outputs)["bbox"])
        TOOLS[tool](content)
    assert found[0] == pytest.approx(found[1], nan_ok=True)


def test_categories_of_one_name_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    register(tmp_path, first("categories", name="dog"))
    assert scores(NAME)["bbox"] == pytest.approx(100)
    assert "several categories are named 'dog'" in caplog.text


def test_numbers_with_a_point_are_integers_in_the_records(tmp_path: Path) -> None:
    register(tmp_path, each("images", lambda x: x.update(id=float(x["id"]), width=64.0)))
    assert str(DatasetCatalog.get(NAME)[0]["image_id"]) == "1"
    assert isinstance(DatasetCatalog.get(NAME)[0]["width"], int)


# Masks


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_annotations_decide_about_mask_ap(
    place: int, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(tmp_path, lambda c: c["annotations"][place].pop("segmentation"))
    records = DatasetCatalog.get(NAME)
    evaluator = COCOAPEvaluator(NAME, distributed=False, backend=backend)
    assert f"1 of 5 annotations have no mask, the first with id {place + 1}" in caplog.text
    evaluator.reset()
    for record in records:
        found = perfect(record)
        found.pred_masks = torch.ones(len(found), *found.image_size, dtype=torch.bool)
        evaluator.process([record], [{"instances": found}])
    assert list(evaluator.evaluate()) == ["bbox"]


# Datasets of a function


@pytest.mark.parametrize("metadata", [{}, {"evaluator_type": "coco"}])
def test_a_dataset_of_a_function_trains_and_evaluates(
    metadata: dict[str, str], tmp_path: Path, tiny_models: None
) -> None:
    cfg = shapes_cfg(tmp_path)
    _, json_file, images = cfg.DATASETS.COCO_FORMAT[0]
    records = load_coco_json(json_file, images)
    each(
        "records",
        lambda record: each("annotations", lambda a: a.update(category_id=a["category_id"] - 1))(
            record
        ),
    )({"records": records})
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=["red", "green", "blue"], **metadata)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (NAME,)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (f"ground_truth://{NAME}",)
    cfg.TEST.REGION_CLASSIFICATION, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = True, str(tmp_path), 1

    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()

    assert set(trainer.test(cfg, trainer.model)) == {"bbox", "region_classification"}
    assert isinstance(build_evaluator(cfg, NAME), DatasetEvaluators)
    assert [scores(NAME, b)["bbox"] for b in BACKENDS] == pytest.approx([100, 100])
    assert MetadataCatalog.get(NAME).get("json_file") is None
    # The function may give other records the next time.
    records[:] = records[:2]
    assert scores(NAME, output_dir=str(tmp_path))["bbox"] == pytest.approx(100)


# Early, and anew


def test_a_training_is_refused_before_it_starts(tmp_path: Path, tiny_models: None) -> None:
    cfg = shapes_cfg(tmp_path)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    register(tmp_path / "test", box(1, 2))
    cfg.DATASETS.TEST = (NAME,)
    with pytest.raises(AnnotationsError, match=r"annotations\[0\]"):
        RegionSpotTrainer(cfg)
    with pytest.raises(AnnotationsError, match=r"annotations\[0\]"):
        check_evaluation(cfg, NAME)


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    json_file = register(tmp_path)
    assert DatasetCatalog.get(NAME) and class_names(NAME) == ["cat", "dog"]
    text = json_file.read_text()
    json_file.write_text(text.replace('"cat"', '"cow"'))
    register_coco_format([[NAME, str(json_file), str(tmp_path / "images")]])
    assert class_names(NAME) == ["cow", "dog"]
    assert DatasetCatalog.get(NAME) and class_names(NAME) == ["cow", "dog"]
    json_file.write_text(text.replace('"cat"', '"yak"'))
    assert DatasetCatalog.get(NAME) and class_names(NAME) == ["yak", "dog"]


def test_spellings_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    register_coco_format([["here", "instances.json", "images"]])
    register_coco_format([["here", "./instances.json", "images/"]])
    register_coco_format([["home", "~/instances.json", "~/images/"]])
    assert len(DatasetCatalog.get("here")) == len(DatasetCatalog.get("home")) == 4


def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    register(tmp_path, TOOLS["annotation ids from 0"])
    copied = Path(checked_annotations(NAME).path)
    copied.write_text(copied.read_text().replace("20.0", "21.0"))
    assert scores(NAME)["bbox"] == pytest.approx(100)
    assert "21.0" not in copied.read_text()
