"""Labeling tools and Ray Data: what they get, by the rules of their own SDKs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from regionspot_d2 import RegionSpotPredictor

from .tiny import golden, tiny_cfg, tiny_model
from .tools import load_script

WORDS = ["cat", "dog", "bird"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo of 100 x 60 pixels, with eight things in it."""
    colors = np.random.default_rng(0).integers(0, 256, (2, 4, 3), dtype=np.uint8)
    Image.fromarray(colors).resize((100, 60), Image.Resampling.NEAREST).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def predictor(vocabularies: None) -> RegionSpotPredictor:
    model = tiny_model(with_masks=False)
    model.localizer.masks_are_fine = False  # finds regions by tokens; random masks are no regions
    return RegionSpotPredictor(model)


# CVAT ---------------------------------------------------------------------------------------------


@pytest.fixture
def cvat() -> ModuleType:
    pytest.importorskip("cvat_sdk", reason="the integration with CVAT needs its SDK")
    return load_script("integrations/cvat.py")


class Task:
    """What ``cvat_sdk`` asks a server for when it annotates a task, and what it sends back."""

    def __init__(self, labels: list[str], image: Image.Image) -> None:
        from cvat_sdk import models

        self.labels = [
            models.Label(name=name, id=70 + i, type="rectangle", attributes=[], sublabels=[])
            for i, name in enumerate(labels)
        ]
        media = SimpleNamespace(load_image=lambda: image)
        self.samples = [SimpleNamespace(frame_name="a.png", frame_index=5, media=media)]
        self.sent: list[Any] = []
        api = SimpleNamespace(
            partial_update_annotations=lambda action, task, patched_labeled_data_request: (
                self.sent.extend(patched_labeled_data_request.shapes)
            )
        )
        self.client = SimpleNamespace(
            logger=logging.getLogger("cvat"), tasks=SimpleNamespace(api=api)
        )

    def annotate(self, function: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        from cvat_sdk import auto_annotation
        from cvat_sdk.auto_annotation import driver

        monkeypatch.setattr(driver, "TaskDataset", lambda *_, **__: self)
        auto_annotation.annotate_task(self.client, 42, function, **options)


def test_cvat_gets_rectangles_with_the_labels_of_the_task(cvat, predictor, photo, monkeypatch):
    function = cvat.RegionSpotFunction(predictor, WORDS, max_regions=7)
    task = Task(["bird", "dog", "cat", "bus"], Image.open(photo))
    task.annotate(function, monkeypatch)

    predictor.set_image(str(photo))
    found = predictor.everything(vocabulary=WORDS, max_regions=7)
    assert 1 < len(found) <= 7
    ids = {label.name: label.id for label in task.labels}
    assert [shape.label_id for shape in task.sent] == [ids[WORDS[i]] for i in found.pred_classes]
    np.testing.assert_allclose([s.points for s in task.sent], found.pred_boxes.tensor.numpy())
    np.testing.assert_allclose([shape.score for shape in task.sent], found.scores.numpy())
    assert {shape.frame for shape in task.sent} == {5}


def test_cvat_gets_no_box_with_less_than_the_threshold(cvat, predictor, photo, monkeypatch):
    predictor.set_image(str(photo))
    scores = predictor.everything(vocabulary=WORDS).scores
    middle = float(scores.median())
    for own, callers in ((0.0, middle), (middle, None), (1.0, middle)):
        task = Task(WORDS, Image.open(photo))
        function = cvat.RegionSpotFunction(predictor, WORDS, threshold=own)
        task.annotate(function, monkeypatch, conf_threshold=callers)
        assert 0 < len(task.sent) == int((scores >= middle).sum()) < len(scores)


def test_cvat_creates_the_function_from_words_or_a_dataset(cvat, predictor, monkeypatch):
    monkeypatch.setattr(RegionSpotPredictor, "from_pretrained", lambda model: predictor)
    labels = cvat.create(vocabulary="traffic cone, dog").spec.labels
    assert [(label.name, label.id) for label in labels] == [("traffic cone", 0), ("dog", 1)]
    # Short, for embedding 80 names takes seconds.
    monkeypatch.setattr(cvat, "known_vocabulary", lambda name: [f"a name of {name}"])
    [label] = cvat.create().spec.labels
    assert label.name == "a name of coco"


# Label Studio -------------------------------------------------------------------------------------

INTERFACE = """<View>
  <Image name="image" value="$photo"/>
  <Choices name="light" toName="image"><Choice value="day"/><Choice value="night"/></Choices>
  <RectangleLabels name="what" toName="image" smart="true">
    <Label value="dog"/><Label value="bird"/>
  </RectangleLabels>
</View>"""


class Studio:
    """Label Studio's side: requests to the server that the SDK makes of the backend."""

    def __init__(self, script: ModuleType) -> None:
        from label_studio_ml.api import init_app

        self.client = init_app(script.RegionSpotBackend).test_client()

    def post(self, place: str, **content: Any) -> Any:
        return self.client.post(place, json={"project": "1.2", **content})

    def predict(self, interface: str = INTERFACE, **params: Any) -> Any:
        assert self.post("/setup", schema=interface, hostname="").status_code == 200
        tasks = [{"id": 3, "data": {"photo": "/data/local-files/?d=photo.png"}}]
        return self.post("/predict", tasks=tasks, label_config=interface, params=params)


@pytest.fixture
def studio(predictor, photo, monkeypatch) -> Iterator[Studio]:
    model = pytest.importorskip(
        "label_studio_ml.model", reason="the integration with Label Studio needs its SDK"
    )
    from label_studio_tools.core.utils import io

    monkeypatch.setattr(io, "LOCAL_FILES_DOCUMENT_ROOT", str(photo.parent))
    monkeypatch.setattr(RegionSpotPredictor, "from_pretrained", lambda model: predictor)
    yield Studio(load_script("integrations/label_studio.py"))
    model.LabelStudioMLManager._current_model = {}


def drawn(**value: float) -> dict[str, Any]:
    """A box as it was drawn, in percent, with another label."""
    value = {"rotation": 0, "rectanglelabels": ["dog"], **value}
    return {"id": "x1", "from_name": "what", "to_name": "image", "origin": "manual", "value": value}


def test_a_box_drawn_in_label_studio_gets_its_name(studio, predictor, photo):
    regions = [
        drawn(x=10, y=20, width=50, height=40),
        # A quarter turn around the corner of the top left: it ends left of it.
        drawn(x=50, y=10, width=30, height=20, rotation=90),
    ]
    answer = studio.predict(context={"result": regions}).get_json()
    [prediction] = answer["results"]

    predictor.set_image(str(photo))
    boxes = [[10, 12, 60, 36], [50 - 0.2 * 60, 6, 50, 6 + 0.3 * 100]]
    found = predictor.predict(boxes=boxes, vocabulary=["dog", "bird"])
    for i, (result, region) in enumerate(zip(prediction["result"], regions)):
        name = ["dog", "bird"][int(found.pred_classes[i])]
        assert result["value"] == {**region["value"], "rectanglelabels": [name]}
        assert result["score"] == pytest.approx(float(found.scores[i]), abs=1e-5)
        assert (result["id"], result["from_name"], result["to_name"]) == ("x1", "what", "image")
        assert (result["type"], result["original_width"]) == ("rectanglelabels", 100)
    assert len(prediction["result"]) == 2


def test_a_preannotated_task_of_label_studio_gets_all_that_is_found(studio, predictor, photo):
    [prediction] = studio.predict().get_json()["results"]
    predictor.set_image(str(photo))
    found = predictor.everything(vocabulary=["dog", "bird"])
    values = [result["value"] for result in prediction["result"]]
    corners = [
        [v["x"], 0.6 * v["y"], v["x"] + v["width"], 0.6 * (v["y"] + v["height"])] for v in values
    ]
    np.testing.assert_allclose(corners, found.pred_boxes.tensor.numpy(), atol=1e-4)
    assert prediction["score"] == pytest.approx(float(found.scores.mean()), abs=1e-5)


def test_label_studio_is_told_what_is_missing(studio):
    interface = '<View><Image name="image" value="$photo"/></View>'
    answer = studio.predict(interface)
    assert answer.status_code >= 400 and "no RectangleLabels" in answer.get_data(as_text=True)


# Ray Data -----------------------------------------------------------------------------------------


@pytest.fixture
def ray_data() -> ModuleType:
    pytest.importorskip("pyarrow", reason="the integration with Ray Data writes Parquet")
    return load_script("integrations/ray_data.py")


@pytest.fixture
def name_regions(ray_data, tiny_models, empty_cache, tmp_path) -> Any:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(tiny_cfg()))))
    found = ray_data.NameRegions(str(config), WORDS, topk=2, device="cpu")
    found.predictor.model.localizer.masks_are_fine = False
    return found


def test_a_batch_gets_a_row_for_each_name_of_a_region(name_regions, photo):
    Image.fromarray(golden()["image"]).save(photo.parent / "other.png")
    paths = [str(photo), str(photo.parent / "other.png"), str(photo)]
    boxes = [[[1.0, 2, 40, 50], [5, 5, 20, 20]], [], [[0, 0, 99, 59]]]
    table = name_regions({"path": np.array(paths), "boxes": boxes})
    rows = table.to_pylist()

    expected = name_regions.predictor.predict_batch(
        paths, [np.array(b).reshape(-1, 4) for b in boxes], topk=2
    )
    assert [(row["path"], row["region"]) for row in rows] == [
        (paths[0], 0),
        (paths[0], 0),
        (paths[0], 1),
        (paths[0], 1),
        (paths[2], 0),
        (paths[2], 0),
    ]
    assert [row["score"] for row in rows] == [s for found in expected for s in found.scores]
    names = [WORDS[i] for found in expected for i in found.pred_classes]
    assert [row["name"] for row in rows] == names
    assert [[row[side] for side in ("x0", "y0", "x1", "y1")] for row in rows[::2]] == [
        *boxes[0],
        *boxes[2],
    ]


def test_images_may_come_as_bytes_and_without_boxes(name_regions, photo):
    batch = {"path": np.array(["s3://bucket/photo.png"]), "bytes": [photo.read_bytes()]}
    rows = name_regions(batch).to_pylist()
    by_path = name_regions({"path": np.array([str(photo)])}).to_pylist()
    assert len(rows) > 2 and {row.pop("path") for row in rows} == {"s3://bucket/photo.png"}
    assert rows == [{k: v for k, v in row.items() if k != "path"} for row in by_path]


def test_an_unreadable_image_is_a_row_with_its_error(name_regions, photo):
    bad = photo.parent / "bad.jpg"
    bad.write_bytes(b"not an image")
    batch = {"path": np.array([str(bad), str(photo), "s3://b/bad.jpg"])}
    batch |= {"bytes": [None, None, b"no"], "boxes": [[[0, 0, 9, 9]]] * 3}
    rows = name_regions(batch).to_pylist()
    errors = {row["path"]: row["error"] for row in rows}
    assert [row["name"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert errors[str(photo)] is None
    assert str(bad) in errors[str(bad)] and "s3://b/bad.jpg" in errors["s3://b/bad.jpg"]


@pytest.mark.slow
def test_two_processes_name_as_one_and_a_killed_one_loses_nothing(tmp_path: Path) -> None:
    """200 images over two actors, which share a GPU that Ray only believes in; one is killed."""
    pytest.importorskip("ray.data", reason="the integration with Ray Data needs ray[data]")
    from .ray_actors import named_by_actors, named_by_one

    rng = np.random.default_rng(0)
    rows = []
    for i in range(200):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
        rows.append({"path": str(path), "boxes": [[1.0, 2.0, 30.0, 30.0], [9.0, 9.0, 50.0, 39.0]]})
    (tmp_path / "0.png").write_bytes(b"damaged")

    expected = named_by_one(rows)
    assert len(expected) == 2 * 199 + 1
    found, killed, actors = named_by_actors(rows, tmp_path / "named", tmp_path / "killed")
    assert killed and actors >= 3  # two, and the one in place of the killed
    assert found == expected
