"""Files of regions for --proposals: what each kind says of an image, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regionspot_d2.app.region_files import RegionFile


def write(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def dataset(*annotations: dict) -> dict:
    images = [{"id": 1, "file_name": "a/x.jpg"}, {"id": "two", "file_name": "y.jpg"}]
    return {"images": images, "annotations": list(annotations)}


BOX = {"image_id": 1, "bbox": [1, 2, 3, 4]}
RESULT = {"image_id": 6818, "bbox": [1, 2, 3, 4], "score": 0.5}


def test_an_image_is_found_by_its_name_and_by_the_end_of_its_path(tmp_path: Path) -> None:
    names = ["x.jpg", "a/x.jpg", "b/y.jpg", "/gone/z.jpg", "C:\\gone\\w.jpg"]
    boxes = {name: {"boxes": [[i, 0, 9, 9]]} for i, name in enumerate(names)}
    file = RegionFile(write(tmp_path / "boxes.json", boxes))

    def first(path: str) -> float:
        return file.of(path).boxes[0][0]

    assert [first(f"photos/{name}") for name in ("x.jpg", "c/x.jpg", "a/x.jpg")] == [0, 0, 1]
    assert [first(path) for path in ("/p/b/y.jpg", "z.jpg", "w.jpg")] == [2, 3, 4]
    for path in ("c/y.jpg", "y.jpg"):
        with pytest.raises(ValueError, match="boxes.json has no boxes for 'y.jpg'; it has 'b/y"):
            file.of(path)


def test_coco_datasets_and_results(tmp_path: Path) -> None:
    named_twice = [{**BOX, "region": 3}, {**BOX, "region": 3}]
    crowd = {"image_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1}
    content = dataset(*named_twice, crowd, {**BOX, "bbox": [5, 5, 2, 2.5]})
    file = RegionFile(write(tmp_path / "instances.json", content))
    assert file.of("photos/a/x.jpg").boxes == [[1, 2, 4, 6], [5, 5, 7, 7.5]]
    assert (file.of("y.jpg").boxes, file.of("y.jpg").scores) == ([], None)

    rows = [RESULT, {**RESULT, "image_id": "street", "score": 0.25}]
    file = RegionFile(write(tmp_path / "results.json", rows))
    assert file.of("val2017/000000006818.jpg").scores == [0.5]
    assert file.of("COCO_val2014_000000006818.jpg").scores == [0.5]
    assert file.of("street.png").scores == [0.25]
    with pytest.raises(ValueError, match="no boxes for '17.jpg'"):
        file.of("17.jpg")


@pytest.mark.parametrize(
    "lines",
    [
        "file_name,x0,y0,x1,y1,score\na.jpg,1,2,4,6,0.5\n",
        "\ufeffX_MIN;Y_MIN;X_MAX;Y_MAX;confidence;image\n1;2;4;6;.5;a.jpg\n",
        "path\tx\ty\tw\th\tscore\na.jpg\t1\t2\t3\t4\t.5\n",
    ],
)
def test_csv_with_usual_columns(tmp_path: Path, lines: str) -> None:
    found = RegionFile(write(tmp_path / "boxes.csv", lines)).of("in/a.jpg")
    assert (found.boxes, found.scores) == ([[1, 2, 4, 6]], [0.5])


def test_yolo_labels(tmp_path: Path) -> None:
    labels = tmp_path / "set" / "labels"
    write(labels / "train" / "x.txt", "0 0.5 0.5 0.2 0.4\n\n3 .25 .25 .5 .5\n")
    write(labels / "street.avi#10.txt", "0 0.5 0.5 1 1 0.75\n")
    write(labels / "classes.txt", "cat\n")
    file = RegionFile(str(tmp_path / "set"))
    pixels = file.of("set/images/train/x.jpg").in_pixels(100, 50)
    assert pixels == [pytest.approx([40, 15, 60, 35]), pytest.approx([0, 0, 50, 25])]
    assert file.of("street.avi#10").scores == [0.75]
    assert file.of("nothing.jpg").boxes == []  # as YOLO says that there is nothing
    with pytest.raises(ValueError, match="no boxes for 'x.jpg'; it has 'train/x'"):
        file.of("val/x.jpg")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", 5, "a dict from file names to boxes is expected, or COCO's json"),
        ("a.json", [7], r"result 0 \(counted from 0\) is 7"),
        ("a.json", [RESULT, {"bbox": [1, 2, 3, 4]}], "result 1 .* no image_id and no file_name"),
        ("a.json", [{**RESULT, "bbox": [1, 2]}], r"result 0 .* \[1, 2\]; four numbers x, y, width"),
        ("a.json", [RESULT, {**RESULT, "score": None}], "result 1 .*'6818' have a score, and some"),
        ("a.json", [{**RESULT, "score": "high"}], "result 0 .* has the score 'high'"),
        ("a.json", [{**RESULT, "bbox": [0.1, 0.1, 0.2, 0.2]}], "result 0 .*fractions of the image"),
        ("a.json", dataset({"image_id": 9, "bbox": [1, 2, 3, 4]}), "annotation 0 .* no image_id"),
        ("a.json", {**dataset(), "images": [{"id": 1}]}, "image 0 .* no id or no file_name"),
        ("a.csv", "", "its first line has the columns none; file_name, x0, y0"),
        ("a.csv", "name,x0,y0\n", "the columns name, x0, y0; file_name, x0, y0"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,3\n", r"line 2 has the box \[1.0, 2.0, 3.0, None\]"),
        ("a.csv", "file,x0,y0,x1,y1\n,1,2,3,4\n", "line 2 has no file"),
        ("labels.txt", "", "their folder is expected"),
        ("labels/x.txt", "0 50 50 20 20\n", "x.txt, line 1: '0 50 50 20 20'; a class number"),
        ("labels/x.txt", "0 .5 .5 .2 .2\n0 .5 .5 .2\n", "x.txt, line 2: "),
        ("labels/x.txt", "0 .5 .5 .2 .2\n0 .5 .5 .2 .2 .9\n", "x.txt: some lines have a score"),
        ("labels/x.dat", "", "the folder has no .txt file"),
    ],
)
def test_what_is_wrong_is_told_with_its_entry(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        RegionFile(str(tmp_path / name.split("/")[0]))
