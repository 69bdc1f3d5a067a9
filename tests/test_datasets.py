"""Registered datasets: names, loaders, corrections on the way in, and the tools for them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.lvis import load_lvis_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image

from regionspot_d2.data import ODINW_13, ODINW_35, class_names, register_coco_format
from regionspot_d2.data.datasets import (
    lvis,
    minival,
    register_all_lvis,
    register_all_objects365,
    register_all_odinw,
    source_file,
)
from regionspot_d2.data.datasets.annotations import read_categories
from regionspot_d2.engine.config import ConfigError, check_datasets

from .datasets_on_disk import SIZES, TINYCOCO, annotation, write_coco, write_images
from .tools import ROOT, load_tool


@pytest.fixture
def catalogs(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """Catalogs without our datasets, to register them elsewhere; afterwards all is as before."""
    ours = ("odinw_", "objects365_", "lvis_v1_minival", "lvis_v1_train_base")
    for catalog in (DatasetCatalog, MetadataCatalog):
        kept = {name: entry for name, entry in catalog.data.items() if not name.startswith(ours)}
        monkeypatch.setattr(catalog, "data", kept)


# Registration


def test_the_fields_datasets_are_registered_with_split_and_evaluator() -> None:
    expected = {
        "lvis_v1_val": ("lvis", "val"),
        "lvis_v1_minival": ("lvis", "minival"),
        "coco_2017_val": ("coco", "val"),
        "odinw_Aquarium_test": ("coco", "test"),
        "odinw_EgoHands_generic_minival": ("coco", "minival"),
        "objects365_v1_train": ("coco", "train"),
        "objects365_v2_val": ("coco", "val"),
        "openimages_v6_train": ("coco", "train"),
        "v3det_val": ("coco", "val"),
    }
    for name, (evaluator_type, split) in expected.items():
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        assert (metadata.evaluator_type, metadata.split) == (evaluator_type, split), name
    # Detectron2's loader appends the split folder without a slash of its own.
    assert MetadataCatalog.get("lvis_v1_minival").image_root.endswith("/")


def test_odinw_13_and_35_name_registered_datasets_on_glips_splits() -> None:
    assert (len(ODINW_13), len(ODINW_35)) == (13, 35)
    assert set(ODINW_13) <= set(ODINW_35) <= set(DatasetCatalog.list())
    minivals = [name for name in ODINW_13 if name.endswith("_minival")]
    assert minivals == ["odinw_EgoHands_generic_minival", "odinw_VehiclesOpenImages_minival"]
    assert all(name.endswith(("_val", "_minival")) for name in ODINW_35)
    # The archives hold two layouts.
    metadata = MetadataCatalog.get("odinw_OxfordPets_by_breed_minival")
    assert metadata.image_root.endswith("odinw/OxfordPets/by-breed/mini_val")
    assert source_file(MetadataCatalog.get("odinw_pistols_val").json_file).endswith(
        "odinw/pistols/export/val_annotations_without_background.json"
    )


# ODinW: what is wrong in its files


def write_mushrooms(root: Path) -> Path:
    """As exported: annotation id 0, a background class 0, no area, no iscrowd."""
    folder = root / "odinw/NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco/valid"
    images = write_images(folder, ["a.jpg", "b.jpg"])
    bare = [
        {"id": 0, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]},
        {"id": 1, "image_id": 2, "category_id": 2, "bbox": [10, 10, 30, 40]},
    ]
    categories = [
        {"id": 0, "name": "mushrooms", "supercategory": "none"},
        {"id": 1, "name": "CoW", "supercategory": "mushrooms"},
        {"id": 2, "name": "chanterelle", "supercategory": "mushrooms"},
    ]
    json_file = folder / "annotations_without_background.json"
    json_file.write_text(
        json.dumps({"images": images, "annotations": bare, "categories": categories})
    )
    return json_file


def coco_ap(name: str, records: list[dict], output: Path) -> float:
    """AP of a detector that finds every annotated box, with score 1."""
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=str(output))
    evaluator.reset()
    for record in records:
        found = Instances((record["height"], record["width"]))
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        found.pred_boxes = Boxes(boxes)
        found.scores = found.pred_boxes.tensor.new_ones(len(boxes))
        found.pred_classes = found.scores.new_tensor(
            [a["category_id"] for a in record["annotations"]]
        ).long()
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


def test_odinw_is_loaded_and_evaluated_without_background_and_annotation_zero(
    tmp_path: Path, catalogs: None
) -> None:
    write_mushrooms(tmp_path)
    register_all_odinw(str(tmp_path))
    name = "odinw_NorthAmericaMushrooms_val"

    records = DatasetCatalog.get(name)

    assert class_names(name) == ["flat mushroom", "yellow mushroom"]
    assert [a["category_id"] for r in records for a in r["annotations"]] == [0, 1]
    assert all(Path(record["file_name"]).is_file() for record in records)
    assert coco_ap(name, records, tmp_path) == pytest.approx(100)


def test_the_evaluation_loses_annotation_zero_without_the_correction(
    tmp_path: Path, catalogs: None
) -> None:
    """If this fails, COCO's evaluation counts annotation 0 and the renumbering can go."""
    json_file, images = write_coco(tmp_path)
    content = json.loads(Path(json_file).read_text())
    content["annotations"] = [annotation(0, 1, [5, 5, 20, 20]), annotation(1, 2, [5, 5, 20, 20])]
    Path(json_file).write_text(json.dumps(content))
    register_coco_format([["numbered", json_file, images]])
    MetadataCatalog.get("raw").set(
        json_file=json_file, thing_dataset_id_to_contiguous_id={1: 0, 3: 1}
    )
    records = DatasetCatalog.get("numbered")

    assert coco_ap("raw", records, tmp_path) < 60
    assert coco_ap("numbered", records, tmp_path) == pytest.approx(100)


def test_category_zero_stays_where_it_is_a_class(tmp_path: Path, catalogs: None) -> None:
    json_file = write_mushrooms(tmp_path)
    content = json.loads(json_file.read_text())
    content["annotations"][0]["category_id"] = 0
    json_file.write_text(json.dumps(content))
    register_all_odinw(str(tmp_path))

    assert len(class_names("odinw_NorthAmericaMushrooms_val")) == 3


def test_a_missing_odinw_set_is_named_with_its_path(tmp_path: Path, catalogs: None) -> None:
    register_all_odinw(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="odinw_pothole_val.*odinw/pothole/valid/annot"):
        DatasetCatalog.get("odinw_pothole_val")


# Corrected annotations


def test_a_file_without_faults_is_used_as_it_is(tmp_path: Path, catalogs: None) -> None:
    json_file, images = write_coco(tmp_path)
    register_coco_format([["fine", json_file, images]])
    path = MetadataCatalog.get("fine").json_file

    assert Path(PathManager.get_local_path(path)).resolve() == Path(json_file)
    assert source_file(path) == json_file
    with pytest.raises(ValueError, match="write to that file instead"):
        PathManager.open(path, "w")


def test_a_changed_file_is_corrected_anew(tmp_path: Path, catalogs: None) -> None:
    json_file = write_mushrooms(tmp_path)
    register_all_odinw(str(tmp_path))
    path = MetadataCatalog.get("odinw_NorthAmericaMushrooms_val").json_file
    with PathManager.open(path) as file:
        assert len(json.load(file)["annotations"]) == 2
    content = json.loads(json_file.read_text())
    content["annotations"].pop()
    json_file.write_text(json.dumps(content))

    with PathManager.open(path) as file:
        assert [(a["id"], a["area"]) for a in json.load(file)["annotations"]] == [(1, 400)]


def test_a_file_of_another_format_is_refused(tmp_path: Path, catalogs: None) -> None:
    json_file = tmp_path / "results.json"
    json_file.write_text("[]")
    register_coco_format([["results", str(json_file), str(tmp_path)]])
    with pytest.raises(ValueError, match="results.json .*not in COCO format"):
        DatasetCatalog.get("results")


# Own data


def test_own_data_is_registered_once_and_for_all(tmp_path: Path, catalogs: None) -> None:
    json_file, images = write_coco(tmp_path)
    register_coco_format([["mine", json_file, images]])
    register_coco_format([["mine", json_file, images]])

    records = DatasetCatalog.get("mine")

    assert [len(record["annotations"]) for record in records] == [2, 2, 0, 1]
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    other = tmp_path / "other.json"
    other.write_text(Path(json_file).read_text())
    with pytest.raises(ValueError, match="'mine' belongs to another dataset.*instances.json"):
        register_coco_format([["mine", str(other), images]])
    with pytest.raises(ValueError, match="'coco_2017_val' belongs to another dataset"):
        register_coco_format([["coco_2017_val", json_file, images]])


def test_tinycoco_has_a_name_and_says_how_it_is_made(
    tmp_path: Path, catalogs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = "tinycoco.instances.json'?. python tools/prepare_tinycoco.py makes"
    with pytest.raises(FileNotFoundError, match=told):
        class_names("tinycoco")
    with pytest.raises(ConfigError, match=told):
        check_datasets("DATASETS.TEST", ["tinycoco"])
    json_file, images = write_coco(tmp_path)
    register_coco_format([["tinycoco", json_file, images]])  # where somebody has it
    assert class_names("tinycoco") == ["cat", "dog"]
    with pytest.raises(ValueError, match="'tinycoco' belongs to another dataset"):
        register_coco_format([["tinycoco", json_file, str(tmp_path)]])


def test_missing_own_data_is_named_with_its_key(tmp_path: Path, catalogs: None) -> None:
    json_file, images = write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"COCO_FORMAT\[1\] \('b'\).*'/no/file.json'"):
        register_coco_format([["a", json_file, images], ["b", "/no/file.json", images]])
    with pytest.raises(FileNotFoundError, match="image folder '/no/images'"):
        register_coco_format([["c", json_file, "/no/images"]])
    with pytest.raises(ValueError, match=r"must be \[name, COCO-format json, image folder\]"):
        register_coco_format(["abc"])


# Class names


def test_class_names_need_no_annotations(
    tmp_path: Path, catalogs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The categories come last, unsorted, and annotations have a key of the same name."""
    json_file, images = write_coco(tmp_path)
    content = json.loads(Path(json_file).read_text())
    content["categories"] = [{"id": 9, "name": "bär"}, {"id": 2, "name": 'a "b" [c]'}]
    for entry in content["annotations"]:
        entry.update(category_id=9, categories=[9, {"id": 1}])
    Path(json_file).write_text(json.dumps(content, ensure_ascii=False))
    register_coco_format([["words", json_file, images]])
    loader = DatasetCatalog.data["words"]
    monkeypatch.setitem(DatasetCatalog.data, "words", lambda: pytest.fail("loaded annotations"))

    assert class_names("words") == ['a "b" [c]', "bär"]
    assert loader()[0]["annotations"][0]["category_id"] == 1  # the loader agrees on the order


def test_many_categories_are_read_whole(tmp_path: Path) -> None:
    categories = [{"id": n, "name": f"name {n}", "info": "long " * 20} for n in range(2000)]
    json_file = tmp_path / "many.json"
    json_file.write_text(json.dumps({"categories": categories, "annotations": []}))
    assert read_categories(str(json_file)) == categories


def test_class_names_of_vocabularies_builtin_and_unknown_datasets(catalogs: None) -> None:
    MetadataCatalog.get("my words").set(thing_classes=["zebra", "apple"])
    assert class_names("my words") == ["zebra", "apple"]
    assert len(class_names("lvis_v1_val")) == 1203
    assert class_names("coco_2017_val")[0] == "person"
    with pytest.raises(KeyError, match="'nonsense' is not registered"):
        class_names("nonsense")
    assert "nonsense" not in MetadataCatalog
    MetadataCatalog.get("wordless").set(evaluator_type="coco")
    with pytest.raises(ValueError, match="'wordless' has no class names"):
        class_names("wordless")


# LVIS


def write_lvis(root: Path) -> Path:
    """Three images, the second in val2017, with a rare, a common and two frequent objects."""
    urls = [
        f"http://images.cocodataset.org/{name}"
        for name in ("train2017/a.jpg", "val2017/b.jpg", "train2017/c.jpg")
    ]
    images = write_images(root / "coco", ["train2017/a.jpg", "val2017/b.jpg", "train2017/c.jpg"])
    for image, url in zip(images, urls):
        del image["file_name"]
        image.update(coco_url=url, neg_category_ids=[1], not_exhaustive_category_ids=[])
    frequency = {c["frequency"]: c["id"] for c in reversed(lvis.LVIS_CATEGORIES)}
    objects = [
        annotation(1, 1, [5, 5, 20, 20], category=frequency["r"]),
        annotation(2, 1, [5, 5, 10, 20], category=frequency["f"]),
        annotation(3, 2, [5, 5, 10, 20], category=frequency["c"]),
        annotation(4, 3, [5, 5, 10, 20], category=frequency["f"]),
    ]
    json_file = root / "lvis" / "lvis_v1_val.json"
    json_file.parent.mkdir(parents=True)
    content = {"images": images, "annotations": objects, "categories": [], "info": {"year": 2020}}
    json_file.write_text(json.dumps(content))
    (root / "lvis" / "lvis_v1_train.json").write_text(json.dumps(content))
    return json_file


def test_lvis_loads_whatever_is_imported_as_lvis(
    tmp_path: Path, catalogs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hotcoco serves the evaluation as ``lvis``, without what Detectron2's loader reads."""
    replaced = ModuleType("lvis")
    monkeypatch.setitem(sys.modules, "lvis", replaced)
    # Detectron2's own name, with other paths.
    MetadataCatalog.data["lvis_v1_val"] = Metadata(
        name="lvis_v1_val",
        json_file=str(write_lvis(tmp_path)),
        image_root=f"{tmp_path}/coco/",
    )
    register_all_lvis(str(tmp_path))

    records = DatasetCatalog.get("lvis_v1_val")

    assert [Path(r["file_name"]).relative_to(tmp_path).as_posix() for r in records] == [
        "coco/train2017/a.jpg",
        "coco/val2017/b.jpg",
        "coco/train2017/c.jpg",
    ]
    assert [len(r["annotations"]) for r in records] == [2, 1, 1]
    assert records[0]["neg_category_ids"] == [1]
    assert sys.modules["lvis"] is replaced


def test_lvis_records_are_those_of_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Index:
        """What ``load_lvis_json`` reads of the package ``lvis``, which fails on current NumPy."""

        def __init__(self, path: str) -> None:
            content = json.loads(Path(path).read_text())
            self.imgs = {image["id"]: image for image in content["images"]}
            self.img_ann_map: dict[int, list[dict]] = {number: [] for number in self.imgs}
            for entry in content["annotations"]:
                self.img_ann_map[entry["image_id"]].append(entry)

        def load_imgs(self, ids: list[int]) -> list[dict]:
            return [self.imgs[number] for number in ids]

    json_file = write_lvis(tmp_path)
    content = json.loads(json_file.read_text())
    content["images"].reverse()
    del content["images"][0]["neg_category_ids"]
    content["annotations"][3]["image_id"] = 1  # image 3 has none
    json_file.write_text(json.dumps(content))
    package = ModuleType("lvis")
    package.LVIS = Index  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lvis", package)

    wanted = load_lvis_json(str(json_file), f"{tmp_path}/coco/", "lvis_v1_val")

    assert lvis.load_lvis(str(json_file), f"{tmp_path}/coco/") == wanted
    assert [len(record["annotations"]) for record in wanted] == [3, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 2}, "several annotations have the same 'id'"),
        ({"segmentation": []}, "annotation 1 has no valid polygons"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 1 has no valid polygons"),
    ],
)
def test_lvis_annotations_that_detectron2_refuses(
    tmp_path: Path, change: dict, message: str
) -> None:
    json_file = write_lvis(tmp_path)
    content = json.loads(json_file.read_text())
    content["annotations"][0].update(change)
    json_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lvis_v1_val.json: {message}"):
        lvis.load_lvis(str(json_file), f"{tmp_path}/coco/")


def test_minival_is_the_part_on_val2017(
    tmp_path: Path, catalogs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_lvis(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prepare_lvis_minival.py"])

    load_tool("prepare_lvis_minival").main()

    assert "1 of 3 images, 1 of 4 annotations" in capsys.readouterr().out
    register_all_lvis(str(tmp_path))
    records = DatasetCatalog.get("lvis_v1_minival")
    assert [record["image_id"] for record in records] == [2]
    assert records[0]["annotations"][0]["segmentation"]
    assert Path(records[0]["file_name"]).is_file()


def test_minival_keeps_everything_but_images_and_annotations() -> None:
    image = {"id": 1, "coco_url": "http://x/val2017/1.jpg"}
    content = {"images": [image], "annotations": [], "categories": [1, 2], "info": "i"}
    assert minival(content) == content
    assert content["images"] == [image]


def test_lvis_without_masks_says_how_to_make_minival(tmp_path: Path) -> None:
    json_file = write_lvis(tmp_path)
    content = json.loads(json_file.read_text())
    del content["annotations"][2]["segmentation"]
    json_file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="annotation 3 has no 'segmentation'.*prepare_lvis_minival"
    ):
        lvis.load_lvis(str(json_file), f"{tmp_path}/coco/")


def test_train_base_has_no_rare_class(tmp_path: Path, catalogs: None) -> None:
    write_lvis(tmp_path)
    register_all_lvis(str(tmp_path))
    names = class_names("lvis_v1_train_base")
    by_name = {c["synonyms"][0]: c for c in lvis.LVIS_CATEGORIES}

    records = DatasetCatalog.get("lvis_v1_train_base")

    assert len(names) == 866
    found = [by_name[names[a["category_id"]]] for r in records for a in r["annotations"]]
    assert [category["frequency"] for category in found] == ["f", "c", "f"]
    wanted = json.loads((tmp_path / "lvis/lvis_v1_train.json").read_text())["annotations"][1:]
    assert [category["id"] for category in found] == [a["category_id"] for a in wanted]


# Objects365


def test_objects365_v2_images_lie_in_their_patch(tmp_path: Path, catalogs: None) -> None:
    root = tmp_path / "objects365"
    images = write_images(
        root / "val", ["patch8/objects365_v1_1.jpg", "patch19/objects365_v2_2.jpg"]
    )
    for image, prefix in zip(images, ("images/v1/", "images/v2/")):
        image["file_name"] = prefix + image["file_name"]
    content = {
        "images": images,
        "annotations": [annotation(1, 1, [1, 1, 9, 9])],
        "categories": [{"id": 1, "name": "Person"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "zhiyuan_objv2_val.json").write_text(json.dumps(content))
    register_all_objects365(str(tmp_path))

    records = DatasetCatalog.get("objects365_v2_val")

    assert [Path(record["file_name"]).is_file() for record in records] == [True, True]
    assert MetadataCatalog.get("objects365_v2_val").thing_classes == ["Person"]


# tools/check_datasets.py


def test_check_datasets_names_what_is_wrong(tmp_path: Path, catalogs: None) -> None:
    json_file, images = write_coco(tmp_path)
    Path(images, "b.png").unlink()
    Path(images, "c.png").write_bytes(b"not an image")
    Image.new("RGB", SIZES[3][::-1]).save(Path(images, "d.png"))
    register_coco_format([["damaged", json_file, images]])
    register_all_odinw(str(tmp_path))
    check = load_tool("check_datasets")

    report = check.check_dataset("damaged", sample=4)
    missing = check.check_dataset("odinw_pothole_val", sample=4)

    assert (report.images, report.boxes, report.classes) == (4, 5, 2)
    assert [problem.split(":")[0] for problem in report.problems] == [
        f"image '{n}'" for n in (2, 3, 4)
    ]
    assert "does not exist" in report.problems[0] and "is not an image" in report.problems[1]
    assert "is 60 x 80, the annotations say 80 x 60" in report.problems[2]
    assert check.check_dataset("damaged", sample=1).problems == []
    text = check.table([report, missing])
    assert f"missing: {tmp_path}/odinw/pothole/valid/annotations_without_background.json" in text


def test_check_datasets_continues_after_an_image_that_pil_fails_on(
    tmp_path: Path, catalogs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL's errors are of many kinds, among them SyntaxError and its guard against large images."""
    json_file, images = write_coco(tmp_path)
    content = Path(images, "b.png").read_bytes()
    Path(images, "b.png").write_bytes(content[:8] + b"\0\0\0\0" + content[12:])
    Image.new("RGB", (300, 300)).save(Path(images, "c.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    register_coco_format([["damaged", json_file, images]])

    problems = load_tool("check_datasets").check_dataset("damaged", sample=4).problems

    assert [problem.split(":")[0] for problem in problems] == ["image '2'", "image '3'"]
    assert "b.png" in problems[0] and "too large" in problems[1]


def test_check_datasets_counts_turned_photos_as_detectron2_reads_them(
    tmp_path: Path, catalogs: None
) -> None:
    json_file, images = write_coco(tmp_path)
    content = json.loads(Path(json_file).read_text())
    content["images"] = content["images"][:1]
    content["images"][0]["file_name"] = "turned.jpg"
    Path(json_file).write_text(json.dumps(content))
    photo = Image.new("RGB", SIZES[0][::-1])
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(Path(images, "turned.jpg"), exif=exif)
    register_coco_format([["turned", json_file, images]])

    assert load_tool("check_datasets").check_dataset("turned", sample=1).problems == []


def test_check_datasets_exits_with_1_on_a_missing_dataset(
    catalogs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    register_all_odinw(str(tmp_path))
    check = load_tool("check_datasets")
    monkeypatch.setattr(sys, "argv", ["check_datasets.py", "--dataset", "odinw_pothole_val"])
    with pytest.raises(SystemExit, match="1"):
        check.main()
    assert "odinw_pothole_val" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DATASETS.COCO_FORMAT", "[['mine', 'no.json', '.']]"], "no annotation file 'no.json'"),
        (["DATASETS.COCO_FORMT", "[]"], "no config key DATASETS.COCO_FORMT.*COCO_FORMAT"),
    ],
)
def test_check_datasets_reports_mistakes_in_one_line(
    monkeypatch: pytest.MonkeyPatch, opts: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_datasets.py", *opts])
    with pytest.raises(SystemExit, match=f"check_datasets.py: .*{message}"):
        load_tool("check_datasets").main()


def test_check_datasets_reports_what_a_config_needs_and_lacks(
    catalogs: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    register_all_odinw(str(tmp_path))
    config = str(ROOT / "configs" / "eval_odinw13.yaml")
    arguments = ["--config-file", config, "--dataset", "odinw_pothole_val"]
    monkeypatch.setattr(sys, "argv", ["check_datasets.py", *arguments])
    with pytest.raises(SystemExit, match="1"):
        load_tool("check_datasets").main()
    assert "odinw_pothole_val: missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem
)
def test_examples_name_registered_datasets(script: Path) -> None:
    # Names without an underscore are a user's own data, or plain text.
    named = re.findall(r"--dataset ([a-z0-9]+_\w+)", script.read_text(encoding="utf-8"))
    assert set(named) <= set(DatasetCatalog.list())


@pytest.mark.skipif(not TINYCOCO.is_dir(), reason="the COCO photos of the developers are not here")
def test_coco_photos_are_whole(catalogs: None) -> None:
    entry = ["tinycoco", str(TINYCOCO / "instances.json"), str(TINYCOCO / "images")]
    register_coco_format([entry])
    report = load_tool("check_datasets").check_dataset("tinycoco", sample=32)
    assert report[2:] == (32, 288, 80, [])
