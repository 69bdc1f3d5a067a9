"""The web page: what is behind it, and the page itself in a browser."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.images import ImageReadError
from regionspot_d2.modeling import PooledRegionHead

from .tiny import golden, tiny_model

gr = pytest.importorskip("gradio", reason="needs the extra web")
httpx = pytest.importorskip("httpx")

from regionspot_d2.app.web.events import Page, Parts  # noqa: E402
from regionspot_d2.app.web.inputs import class_names, drawn_boxes  # noqa: E402
from regionspot_d2.app.web.main import served  # noqa: E402
from regionspot_d2.app.web.session import Session  # noqa: E402

WORDS = ["cat", "dog", "bird"]
BOXES = [[10.0, 20.0, 60.0, 80.0], [0.0, 0.0, 119.0, 89.0]]
MAX_PIXELS = 1_000_000


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "bus.png"
    Image.fromarray(golden()["image"]).save(file)
    return file


@pytest.fixture
def session(vocabularies: None, photo: Path) -> Session:
    session = Session(tiny_model(), MAX_PIXELS)
    session.set_photo(str(photo), "bus.png")
    return session


def sent(file: Path | None, *boxes: list[float], **more: Any) -> dict[str, Any] | None:
    """A photo and its boxes, the first drawn first, as the browser sends them."""
    if file is None:
        return None
    corners = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box)) for box in reversed(boxes)]
    image = {"path": str(file), "orig_name": file.name}
    return {"image": image, "boxes": corners, "orientation": 0, **more}


def test_words_and_lists_are_one_vocabulary() -> None:
    names = class_names("forklift, Person\ncat; cat", ["coco"])
    assert names[:3] == ["forklift", "Person", "cat"] and len(names) == 81
    assert class_names("COCO,forklift")[-1] == "forklift"


def test_no_word_reads_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("password\n")
    word = f"@{tmp_path}/secret.txt"
    assert class_names(word) == [word]


@pytest.mark.parametrize(("words", "told"), [(" ,\n", "no words"), ("a," * 6000, "6000 words")])
def test_a_vocabulary_of_nothing_or_of_too_much(words: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        class_names(words)


def test_boxes_are_in_pixels_of_the_photo_however_it_is_shown() -> None:
    shown = {"xmin": 5, "ymin": 10, "xmax": 30, "ymax": 40, "scaleFactor": 0.5}
    boxes = [{"xmin": 0, "ymin": 0, "xmax": 119, "ymax": 89}, shown]  # the newest first
    assert drawn_boxes({"boxes": boxes}) == BOXES


@pytest.mark.parametrize("box", [{}, {"xmin": 1, "ymin": "x", "xmax": 2, "ymax": 2}])
def test_a_box_without_numbers(box: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="xmin, ymin, xmax and ymax"):
        drawn_boxes({"boxes": [box]})


def test_other_words_do_not_encode_the_photo_again(session: Session) -> None:
    runs: list[str] = []
    for name in ("vision_language", "localizer"):
        part = getattr(session.predictor.model, name)
        encode = "encode_images" if name == "localizer" else "forward"
        run = getattr(part, encode)
        setattr(part, encode, lambda *a, run=run, name=name: (runs.append(name), run(*a))[1])
    session.draw(BOXES)
    for words in (WORDS, ["bus", "car"], WORDS):
        session.ask(words, 0)
    assert runs == []
    session.ask(WORDS, 2)  # views around the boxes
    assert runs == ["vision_language"]


def test_the_answer_is_that_of_the_predictor(session: Session, photo: Path) -> None:
    session.draw(BOXES)
    session.click(30, 40)
    session.ask(WORDS, 0)
    predictor = RegionSpotPredictor(tiny_model())
    predictor.set_image(photo)
    found = predictor.predict(boxes=BOXES, points=[[30, 40]], vocabulary=WORDS, topk=3, zoom=0)
    best = found[::3]
    answer = session.answer
    assert answer is not None
    assert [row[0] for row in answer.rows()] == [0, 1, 2]
    assert [row[1] for row in answer.rows()] == [WORDS[i] for i in best.pred_classes]
    np.testing.assert_allclose([row[2] for row in answer.rows()], best.scores, atol=6e-4)
    assert sum(answer.tops[2].values()) == pytest.approx(1)
    coco = answer.coco()
    assert coco["images"][0]["file_name"] == "bus.png" and len(coco["annotations"]) == 3
    assert [category["name"] for category in coco["categories"]] == WORDS


def test_regions_are_selected_in_the_picture(session: Session) -> None:
    session.draw(BOXES)
    session.ask(WORDS, 0)
    assert session.region_at(30, 50) == 0  # of two the smaller
    assert session.region_at(100, 10) == 1
    session.draw(BOXES[:1])
    session.ask(WORDS, 0)
    assert session.region_at(100, 10) is None
    assert session.picture().shape == (90, 120, 3)
    panels = session.attention(0)
    assert panels.ndim == 3 and panels.shape[1] > 240  # the region, and the map beside it


def test_a_large_photo_is_drawn_small_but_named_in_its_own_pixels(
    session: Session, tmp_path: Path
) -> None:
    Image.fromarray(golden()["image"]).resize((3200, 300)).save(tmp_path / "wide.png")
    assert session.set_photo(str(tmp_path / "wide.png"), "wide.png")
    session.draw([[1600, 0, 3200, 300]])
    session.click(400, 75)
    assert session.points == [(800, 150)]
    session.ask(WORDS, 0)
    assert session.answer is not None
    assert session.answer.rows()[0][3] == "1600, 0, 3200, 300"
    assert session.answer.annotations[0]["segmentation"]["size"] == [300, 3200]
    assert session.picture().shape == (150, 1600, 3)
    assert session.region_at(1200, 75) == 0


def test_a_turned_photo(session: Session, photo: Path) -> None:
    session.draw(BOXES)
    assert session.set_photo(str(photo), "bus.png", 1) and session.size == (120, 90)
    expected = np.asarray(Image.open(photo).convert("RGB").rotate(-90, expand=True))
    np.testing.assert_array_equal(session.photo, expected)
    assert session.boxes == []  # of the photo as it was


def test_another_vocabulary_repeats_the_search(session: Session) -> None:
    session.ask_everything(WORDS, 0)
    assert session.found_everything and session.answer is not None
    session.ask_again(["bus", "car"], 0)
    assert session.found_everything and set(session.answer.names.values()) == {"bus", "car"}
    session.draw(BOXES)
    session.ask_again(WORDS, 0)
    assert len(session.answer.rows()) == 2


def test_the_path_on_the_server_is_not_told(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("not a picture")
    with pytest.raises(ImageReadError, match="'notes.png' is not an image") as error:
        session.set_photo(str(file), "notes.png")
    assert str(tmp_path) not in str(error.value)
    assert session.photo is None


@pytest.fixture
def page(vocabularies: None) -> Page:
    return Page(tiny_model(), MAX_PIXELS)


def status_of(parts: Parts) -> str:
    assert isinstance(parts.status, str)
    return parts.status


def test_what_an_answer_changes(page: Page, photo: Path) -> None:
    parts = page.named(None, sent(photo, *BOXES), "cat, dog", [], 0)
    assert "2 regions named with 2 words" in status_of(parts) and "error" not in parts.status
    assert [row[0] for row in parts.table] == [0, 1]
    assert parts.picture.shape == parts.points.shape == (90, 120, 3)
    assert "Region 1" in parts.top.label  # that was drawn last
    assert json.loads(Path(parts.download.value["path"]).read_text())["annotations"]
    again = page.again(parts.session, sent(photo, *BOXES), "bird, bus", [], 0)
    assert {row[1] for row in again.table} <= {"bird", "bus"}


def test_a_head_without_attention_shows_none(page: Page, photo: Path) -> None:
    shown = page.named(None, sent(photo, *BOXES), "cat", [], 0).attention
    assert shown.visible and shown.value is not None
    page.model.region_head = PooledRegionHead(vision_language=page.model.vision_language)
    assert not page.named(None, sent(photo, *BOXES), "cat", [], 0).attention.visible


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no photo", "There is no photo"),
        ("no words", "There are no words"),
        ("no region", "There is no region"),
        ("no area", r"Box 0 is \(10, 20, 10, 80\); it has no area"),
        ("outside", "outside the image of 120 x 90 pixels"),
        ("huge", "is too large: 1001 x 1000 pixels"),
        ("text", "'letter.txt' is not an image"),
        ("gone", "'gone.png' does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_the_page(
    page: Page, photo: Path, tmp_path: Path, kind: str, told: str
) -> None:
    Image.new("L", (1001, 1000)).save(tmp_path / "huge.png")
    (tmp_path / "letter.txt").write_text("<b>Dear\nSir")
    shown = {
        "no photo": sent(None),
        "no region": sent(photo),
        "no area": sent(photo, [10, 20, 10, 80]),
        "outside": sent(photo, [500, 20, 600, 80]),
        "huge": sent(tmp_path / "huge.png", *BOXES),
        "text": sent(tmp_path / "letter.txt", *BOXES),
        "gone": sent(tmp_path / "gone.png", *BOXES),
    }.get(kind, sent(photo, *BOXES))
    parts = page.named(None, shown, "" if kind == "no words" else "cat, dog", [], 0)
    assert re.search(told, status_of(parts).replace("&#x27;", "'"))
    assert 'class="status error"' in parts.status and "\n" not in parts.status


def test_after_a_mistake_the_page_goes_on(page: Page, photo: Path) -> None:
    before = page.named(None, sent(photo, *BOXES), "cat, dog", [], 0)
    wrong = page.named(before.session, sent(photo.parent / "gone.png"), "cat, dog", [], 0)
    assert wrong.table == [] and wrong.session.photo is None
    after = page.named(wrong.session, sent(photo, *BOXES), "cat, dog", [], 0)
    assert after.table == before.table


def test_before_anyone_asked_what_is_missing_is_no_error(page: Page, photo: Path) -> None:
    session = None
    for shown, told in [
        (sent(None), "Upload a photo"),
        (sent(photo), "120 x 90 pixels. Draw a box"),
        (sent(photo, *BOXES), "Type words"),
    ]:
        parts = page.changed(session, shown, "", [], 0)
        session = parts.session
        assert told in status_of(parts) and "error" not in parts.status
    # A box that is being drawn has no area yet; the browser tells of it all the same.
    parts = page.changed(session, sent(photo, *BOXES, [5, 5, 5, 5]), "cat", [], 0)
    assert parts.status == gr.skip()


def test_two_visitors_do_not_mix(page: Page, photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.effect_noise((64, 48), 50).convert("RGB").save(other)
    first = page.changed(None, sent(photo, *BOXES), "cat, dog", [], 0)
    second = page.changed(None, sent(other, [1, 2, 30, 40]), "bird, bus", [], 0)
    again = page.again(first.session, sent(photo, *BOXES), "cat, dog", [], 0)
    assert again.table == first.table and again.picture.shape == (90, 120, 3)
    assert second.picture.shape == (48, 64, 3) and len(second.table) == 1


@pytest.fixture(scope="module")
def address(mini_predictor: RegionSpotPredictor) -> Iterator[str]:
    """The page with the mini model."""
    with served(mini_predictor.model, max_pixels=MAX_PIXELS, max_megabytes=1) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def example(name: str) -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-image, which has the photos, is not installed")
    return Path(spec.origin).parent / "data" / name


@pytest.mark.parametrize("place", ["a file of the server", "an address of it"])
def test_nothing_is_read_but_what_was_uploaded(address: str, photo: Path, place: str) -> None:
    reachable = f"{address}gradio_api/file={example('chelsea.png')}"
    assert httpx.get(reachable).status_code == 200
    path = reachable if place == "an address of it" else str(photo)
    file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    boxes = [{"xmin": 1, "ymin": 2, "xmax": 30, "ymax": 40}]
    shown = [None, {"image": file, "boxes": boxes}, "cat", [], 0]
    config = httpx.get(f"{address}config").json()
    number = next(each["id"] for each in config["dependencies"] if each["api_name"] == "name")
    question = {"data": shown, "fn_index": number, "session_hash": "stranger"}
    httpx.post(f"{address}gradio_api/queue/join", json=question).raise_for_status()
    told = httpx.get(f"{address}gradio_api/queue/data", params={"session_hash": "stranger"}).text
    [done] = [line for line in told.splitlines() if "process_completed" in line]
    assert '"success":false' in done and "named with" not in done


def test_an_upload_has_a_limit(address: str) -> None:
    statuses = [
        httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", bytes(size))})
        for size in (1000, 2**20 + 1000)
    ]
    assert [answer.status_code for answer in statuses] == [200, 413]


def test_only_this_machine_is_served(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")


class Visitor:
    """Someone who uses the page, in a browser session of their own."""

    def __init__(self, browser: Any, address: str) -> None:
        self.tab = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        self.foreign: list[str] = []
        self.tab.on("request", lambda request: self._note(request.url, address))
        self.tab.set_default_timeout(20_000)
        self.tab.goto(address)

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    def upload(self, photo: Path) -> None:
        self.tab.set_input_files("#photo input[type=file]", photo)
        width, height = Image.open(photo).size
        self.read("status", f"{width} x {height} pixels")
        self.size = width, height

    def draw(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draws a box, given in pixels of the photo."""
        place = self.tab.locator("#photo canvas").bounding_box()
        width, height = self.size
        scale = min(place["width"] / width, place["height"] / height)
        left = place["x"] + (place["width"] - width * scale) / 2
        top = place["y"] + (place["height"] - height * scale) / 2
        mouse = self.tab.mouse
        mouse.move(left + x0 * scale, top + y0 * scale)
        mouse.down()
        mouse.move(left + x1 * scale, top + y1 * scale, steps=5)
        mouse.up()

    def type(self, words: str) -> None:
        box = self.tab.locator("#words textarea, #words input")
        box.fill(words)
        box.press("Enter")

    def read(self, part: str, expected: str) -> None:
        """Waits until a part of the page shows a text."""
        places = {
            "status": self.tab.locator(".status"),
            "error": self.tab.locator(".status.error"),
            "table": self.tab.get_by_role("gridcell"),
            "top": self.tab.locator("#top"),
        }
        places[part].filter(has_text=expected).first.wait_for()


def test_a_box_on_the_cat_is_called_cat(browser: Any, address: str) -> None:
    visitor = Visitor(browser, address)
    visitor.upload(example("chelsea.png"))
    visitor.draw(15, 5, 440, 295)
    visitor.type("cat, dog, sofa")
    visitor.read("table", "cat")
    visitor.read("top", "dog")
    visitor.tab.locator("#picture img").wait_for()
    visitor.type("cat, flurbl, sofa")
    visitor.read("error", "'flurbl'")
    visitor.type("dog, sofa")  # the box is still there
    visitor.read("table", "dog")
    with visitor.tab.expect_download() as download:
        visitor.tab.click("#download")
    assert download.value.suggested_filename == "chelsea.coco.json"
    results = json.loads(Path(download.value.path()).read_text())
    assert [category["name"] for category in results["categories"]] == ["dog", "sofa"]
    np.testing.assert_allclose(results["annotations"][0]["bbox"], [15, 5, 425, 290], atol=2)
    assert visitor.foreign == []


def test_two_browsers_have_their_own_photos(browser: Any, address: str) -> None:
    first, second = (Visitor(browser, address) for _ in range(2))
    first.upload(example("chelsea.png"))
    second.upload(example("coffee.png"))
    first.draw(15, 5, 440, 295)
    second.draw(170, 12, 418, 292)
    for visitor in (first, second):
        visitor.type("cat, cup")
    first.read("table", "cat")
    second.read("table", "cup")
    second.type("cup, spoon")
    second.read("top", "spoon")
    first.type("dog, cat")
    first.read("top", "dog")
    first.read("table", "cat")


def test_browsers_are_told_to_load_nothing_from_elsewhere(browser: Any, address: str) -> None:
    tab = browser.new_page()
    answer = tab.goto(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    blocked = tab.evaluate("""() => new Promise(done => {
            document.addEventListener('securitypolicyviolation', event => done(event.blockedURI));
            fetch('http://example.invalid/fonts').catch(() => {});
        })""")
    assert blocked == "http://example.invalid/fonts"
