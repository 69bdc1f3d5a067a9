"""The demo on what nobody means well: names, files, options, fonts, interruptions."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app import main as app
from regionspot_d2.app.drawing import draw_regions, side_by_side
from regionspot_d2.app.inputs import find_inputs, read_vocabulary
from regionspot_d2.app.names import OutputFolder, file_name, one_line, printable

from .damaged_files import write_damaged
from .tiny import tiny_model
from .tools import load_tool

pytestmark = pytest.mark.usefixtures("vocabularies")
BOX = ["--boxes", "2,2,20,20"]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the demo on tiny towers; returns its exit status."""
    monkeypatch.setattr(
        app,
        "RegionSpotPredictor",
        lambda cfg, vocabulary: RegionSpotPredictor(tiny_model(), vocabulary=vocabulary),
    )

    def run(*arguments: object) -> int:
        words = [] if "--vocabulary" in arguments else ["--vocabulary", "cat,dog"]
        return app.main([*map(str, arguments), *words])

    return run


def photo(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (48, 32), (shade,) * 3).save(path, "PNG")
    return path


def test_a_folder_of_damaged_files(demo, tmp_path, capsys):
    write_damaged(tmp_path / "files", 60)
    assert demo("--input", tmp_path / "files", "--output", tmp_path / "out", *BOX) == 1
    out, err = capsys.readouterr()
    counts = re.search(r"(\d+) named, (\d+) without regions, (\d+) failed \((.*)\)\.", out)
    assert counts and sum(map(int, counts.groups()[:3])) == 62
    assert sum(int(n) for n in re.findall(r"(\d+) [a-z]", counts[4])) == int(counts[3])
    assert "Traceback" not in out + err and "\x1b[31m" not in out + err
    assert "1 of 63 entries of the folder are left out (1 .txt)" in err
    pictures = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".png", ".jpg")]
    assert len(pictures) == int(counts[1]) and not list((tmp_path / "out").glob("*.partial"))


def test_a_folder_among_the_inputs_is_one_of_them_that_fails(demo, tmp_path, capsys):
    (tmp_path / "x.jpg").mkdir()
    image = photo(tmp_path / "a.jpg")
    assert demo("--input", image, tmp_path / "x.jpg", "--output", tmp_path / "out", *BOX) == 1
    said = capsys.readouterr()
    assert "1 named, 0 without regions, 1 failed (1 unreadable images)." in said.out
    assert "x.jpg' is a folder; a regular file is expected." in said.err


def test_pictures_never_have_the_name_of_an_input(demo, tmp_path):
    folder = tmp_path / "both"
    inputs = [photo(folder / name, i) for i, name in enumerate(["x", "x.png", "x.png.png"])]
    inputs.append(photo(tmp_path / "elsewhere" / "X.png", 9))
    (tmp_path / "link.png").symlink_to(folder / "x.png.png")
    os.link(inputs[0], folder / "X.png-2.png")
    before = {path: path.read_bytes() for path in inputs}
    given = [*inputs[:2], tmp_path / "link.png", inputs[3]]
    assert demo("--input", *given, "--output", folder, *BOX) == 0
    assert {path: path.read_bytes() for path in inputs} == before
    assert (folder / "X.png-2.png").read_bytes() == before[inputs[0]]
    results = json.loads((folder / "results.json").read_text())
    assert len(results["images"]) == 4 and len(list(folder.glob("*.png"))) == 3 + 4


def test_names_that_collide_on_some_disks(tmp_path):
    folder = OutputFolder(tmp_path, [])
    names = ["x.jpg", "x.JPG", "x.jpg-2", "x.jpg", "e\u0301", "\u00e9", "../x.jpg", "a/b", "a_b"]
    paths = [folder.claim(name, ".png")[0] for name in names]
    assert len({path.name.casefold() for path in paths}) == len(names)
    assert {path.parent for path in paths} == {tmp_path}


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "..", "", "a\nb", "x" * 400, "猫" * 100, "\udcff", "a\\b", "\0"],
)
def test_any_text_becomes_a_file_name(tmp_path, name):
    safe = file_name(name)
    assert Path(safe).name == safe and safe.isprintable() and len(safe.encode()) <= 200
    (tmp_path / safe).touch()
    assert [path.name for path in tmp_path.iterdir()] == [safe]


@pytest.mark.parametrize("option", ["--compare", "--input", "--proposals"])
def test_results_do_not_replace_what_is_read(demo, tmp_path, option):
    image = photo(tmp_path / "a.png")
    file = tmp_path / "out" / "results.json"
    file.parent.mkdir()
    file.write_text("{}")
    regions = [] if option == "--proposals" else BOX
    inputs = ["--input", image] if option != "--input" else []
    with pytest.raises(SystemExit, match="its results.json is an input of this command"):
        demo(*inputs, option, file, "--output", tmp_path / "out", *regions)
    assert file.read_text() == "{}"


def test_a_run_that_starts_over_keeps_the_record(demo, tmp_path, caplog):
    arguments = ["--input", photo(tmp_path / "a.png"), "--output", tmp_path / "out", *BOX]
    for _ in range(3):
        assert demo(*arguments) == 0
    kept = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl*"))
    assert kept == ["results.jsonl", "results.jsonl.old", "results.jsonl.old2"]
    record = tmp_path / "out" / "results.jsonl"
    for foreign in ("my notes\n", '{"mine": 1}\n'):
        record.write_text(foreign)
        assert demo(*arguments) == 0
        assert foreign in [path.read_text() for path in record.parent.glob("*.old*")]
    record.write_text("my notes")
    with pytest.raises(SystemExit, match="--resume: .*line 1 is not what a run writes"):
        demo(*arguments, "--resume")
    assert record.read_text() == "my notes"


@pytest.mark.parametrize("entry", ["5", '{"annotations": [{"bbox": 1}]}', "[" * 500 + "]" * 500])
def test_a_record_with_other_entries_is_done_again(demo, tmp_path, entry):
    image = photo(tmp_path / "a.png")
    arguments = ["--input", image, "--output", tmp_path / "out", *BOX, "--resume"]
    assert demo(*arguments) == 0
    expected = (tmp_path / "out" / "results.json").read_text()
    record = tmp_path / "out" / "results.jsonl"
    first = record.read_text().splitlines()[0]
    record.write_text(f'{first}\n{{"key": "{image}", "entry": {entry}}}\n')
    assert demo(*arguments) == 0
    assert (tmp_path / "out" / "results.json").read_text() == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (["--confidence-threshold", "50"], "50: scores are in 0..1"),
        (["--confidence-threshold", "nan"], "nan: scores are in 0..1"),
        (["--confidence-threshold", "high"], "high: scores are in 0..1"),
        (["--topk", "0"], "--topk 0: 1 or more"),
        (["--topk", "1.5"], "invalid int value"),
        (["--every", "0"], "--every 0: 1 or more"),
        (["--output", ""], "--output is empty"),
    ],
)
def test_options_out_of_range(demo, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        demo("--input", photo(tmp_path / "a.png"), "--output", tmp_path / "out", *BOX, *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "regions, message",
    [
        (["--boxes", "0.1,0.2,0.5,0.6"], "fractions of the image"),
        (["--boxes", "0,0,1,1"], "fractions of the image"),
        (["--boxes", "0,0,nan,9"], "four numbers"),
        (["--boxes", "0,0,inf,9"], "four numbers"),
        (["--points", "0.5,0.5"], "fractions of the image"),
    ],
)
def test_regions_that_are_not_pixels(demo, tmp_path, regions, message):
    with pytest.raises(SystemExit, match=message):
        demo("--input", photo(tmp_path / "a.png"), "--output", tmp_path / "out", *regions)


def test_vocabularies_that_may_be_misunderstood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").write_text("tiger\nlion\n")
    (tmp_path / "dog").mkdir()
    for names, words, told in [
        ("cat", ["tiger", "lion"], "read as the file of that name"),
        ("dog", ["dog"], "understood as words, not as what is called 'dog'"),
        ("cat,bird", ["cat", "bird"], "understood as words, not as what is called 'cat'"),
        ("bird", ["bird"], "a single name, 'bird': the score of every region is 1.0"),
        ("T-shirt,t shirt", ["T-shirt", "t shirt"], "are spellings of one name"),
        ("ﬁsh,fish", ["ﬁsh", "fish"], "are spellings of one name"),
    ]:
        assert read_vocabulary(names) == words
        assert told in capsys.readouterr().err
    assert read_vocabulary("bird,bus") and read_vocabulary("./cat") and not capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_vocabulary("~/cat") == ["tiger", "lion"]


def test_vocabularies_are_combined(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("Forklift\nwine_glass\n")
    coco = read_vocabulary("coco")
    assert read_vocabulary("COCO") == read_vocabulary(" Coco".strip()) == coco
    assert not capsys.readouterr().err
    # A name that is there in another spelling is not repeated.
    assert read_vocabulary("Coco, forklift,Wine-Glass") == [*coco, "forklift"]
    assert "81 class names, with those of Coco" in capsys.readouterr().err
    assert read_vocabulary("@words.txt") == ["Forklift", "wine_glass"]
    combined = read_vocabulary("pallet,@words.txt,coco")
    assert combined[:3] == ["pallet", "Forklift", "wine_glass"] and len(combined) == 82
    # Words by hand stay as they are: the predictor refuses one that is given twice.
    assert read_vocabulary("cat,cat") == ["cat", "cat"]


@pytest.mark.parametrize(
    "names, content, message",
    [
        ("@words", None, "@words: there is no such file"),
        ("cat,@words.txt", None, "there is no such file 'words.txt'"),
        ("coco,@.", None, "a folder; a file is expected"),
        ("words.txt", None, "words.txt: there is no such file"),
        ("./words", None, "./words: there is no such file"),
        ("~/words", None, "~/words: there is no such file"),
        ("words.json", '["cat"]', "as json does"),
        ("words.txt", "cat\n\x1b[31m\n", "line 2 has control characters"),
        ("words.txt", "\n \n", "the file is empty"),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, monkeypatch, names, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(names).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_vocabulary(names)


def test_inputs_are_found_as_they_are_spelled(tmp_path, monkeypatch, capsys):
    path = photo(tmp_path / "photos" / "a [1].png")
    (path.parent / "b.avif").touch()
    (path.parent / "c.heic").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in ("photos", "./photos/", "~/photos", "photos/*", "photos/a [1].png"):
        assert any(each.samefile(path) for each in find_inputs([pattern]))
    assert "2 of 3 entries of the folder are left out (1 .avif, 1 .heic)" in capsys.readouterr().err
    for pattern in ("", "x" * 5000, "nowhere\n"):
        with pytest.raises(SystemExit, match="error: --input"):
            find_inputs([pattern])


def test_names_that_a_terminal_cannot_show(demo, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    for name in ("猫.png", "a\x1b[31m\n.png", os.fsdecode(b"\xff.png")):
        photo(folder / name)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert demo("--input", folder, "--output", tmp_path / "out", *BOX, "--vocabulary", "猫,犬") == 0
    for stream in streams:
        stream.flush()
    shown = b"".join(stream.buffer.getvalue() for stream in streams)
    assert b"\\u732b.png" in shown and b"\x1b[31m" not in shown and b"\\udcff.png" in shown
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_messages_are_one_printable_line():
    assert one_line("two\n  lines \x1b[0m") == "two lines \\x1b[0m"
    assert printable("tab\there\u202e") == "tab\\there\\u202e"


REGION = [{"bbox": [20, 40, 150, 60], "category_id": 1, "score": 0.5, "region": 0}]


@pytest.mark.parametrize(
    "name", ["$5 and $10 notes", "$", "$x_{", r"\$ $", "$$", "a\nb\0", "猫 🐈"]
)
def test_any_name_is_drawn(name):
    image = np.full((120, 400, 3), 120, np.uint8)
    both = [*REGION, {**REGION[0], "category_id": 2}]
    plain = draw_regions(image, REGION, {1: name.replace("$", "S")})
    drawn = draw_regions(image, both, {1: name, 2: name})
    assert drawn.shape == plain.shape and (drawn != image).any()
    assert side_by_side([(name, image)]).shape[2] == 3


def test_letters_are_drawn_by_a_font_that_is_installed(tmp_path, capsys):
    # A letter that no font has; then a font that has it, as a black square.
    image = np.full((120, 400, 3), 120, np.uint8)
    draw_regions(image, REGION, {1: "\ue123"})
    builder = pytest.importorskip("fontTools.fontBuilder")
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen(None)
    for move, point in zip(
        (pen.moveTo, *[pen.lineTo] * 3), [(0, 0), (0, 900), (900, 900), (900, 0)]
    ):
        move(point)
    pen.closePath()
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord("\u9f98"): "square"})
    empty = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen(None).glyph()
    font.setupGlyf({".notdef": empty, "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "squares.ttf")
    from regionspot_d2.app import fonts

    known = list(matplotlib.font_manager.fontManager.ttflist)
    matplotlib.font_manager.fontManager.addfont(str(tmp_path / "squares.ttf"))
    try:
        assert fonts.font_of("\u9f98\u9f98") == str(tmp_path / "squares.ttf")
        assert (draw_regions(image, REGION, {1: "\u9f98"}) != image).any()
    finally:
        matplotlib.font_manager.fontManager.ttflist[:] = known


def test_a_missing_font_is_told_once(capsys):
    image = np.full((60, 80, 3), 120, np.uint8)
    for _ in range(2):
        draw_regions(image, [{**REGION[0], "bbox": [2, 2, 30, 30]}], {1: "\U0010fffd name"})
        draw_regions(image, [{**REGION[0], "bbox": [2, 2, 30, 30]}], {1: "\u0378"})
    assert capsys.readouterr().err.count("Install a font") <= 2


def test_a_picture_that_cannot_be_drawn_loses_no_result(demo, tmp_path, monkeypatch, capsys):
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such glyph")

    monkeypatch.setattr("regionspot_d2.app.run.draw_regions", broken)
    image = photo(tmp_path / "a.png")
    assert demo("--input", image, "--output", tmp_path / "out", *BOX) == 1
    assert "a.png: RuntimeError: no such glyph" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["annotations"]) == 1


def test_ctrl_c_while_the_model_is_built(demo, tmp_path, monkeypatch, capsys):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "load_config", stop)
    assert demo("--input", photo(tmp_path / "a.png"), "--output", tmp_path / "out", *BOX) == 130
    assert "Stopped before the first image" in capsys.readouterr().err


def test_pictures_of_an_evaluation_stay_in_their_folder(tmp_path):
    tool = load_tool("visualize_results")
    folder = tmp_path / "a" / "b"
    image = photo(folder / "1.jpg")
    before = image.read_bytes()
    ids = ["../../x", "/x", "1", "a/b", "a_b", ".."]
    records = [
        {"image_id": i, "file_name": str(image), "height": 32, "width": 48, "annotations": []}
        for i in ids
    ]
    DatasetCatalog.register("hostile_ids", lambda: records)
    MetadataCatalog.get("hostile_ids").thing_classes = ["cat"]
    try:
        tool.draw_images("hostile_ids", {"run": []}, folder, ids, 0.5)
    finally:
        DatasetCatalog.remove("hostile_ids")
        MetadataCatalog.remove("hostile_ids")
    assert len(list(folder.iterdir())) == len(ids) + 1 and image.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
