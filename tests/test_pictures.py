"""Pictures and videos that the demo makes: where labels are, what can be read, who plays it."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from regionspot_d2.app.drawing import MAX_SIDE, draw_attention, draw_regions
from regionspot_d2.app.labels import Label, draw_labels, readable_on
from regionspot_d2.app.placement import place_labels
from regionspot_d2.app.video import video_writer

NAMES = dict(enumerate("fire hydrant,traffic light,cup,teddy bear,person".split(","), start=1))


def crowd(count: int, size: tuple[int, int], topk: int = 3) -> list[dict]:
    """Annotations of boxes all over a picture (H, W), each with some names."""
    generator = np.random.default_rng(count)
    annotations = []
    for region in range(count):
        corner = generator.uniform(0, 0.9, 2)
        wh = np.minimum(generator.uniform(0.03, 0.3, 2), 1 - corner)
        box = np.concatenate([corner, wh]) * ([size[1], size[0]] * 2)
        for category in generator.permutation(5)[:topk] + 1:
            annotation = {"bbox": box.tolist(), "category_id": int(category), "score": 0.3}
            annotations.append({**annotation, "region": region})
    return annotations


@pytest.mark.parametrize("count, size", [(51, (480, 640)), (4, (480, 640)), (300, (120, 160))])
def test_labels_neither_cover_each_other_nor_leave_the_picture(count, size):
    height, width = size
    generator = np.random.default_rng(0)
    corners = generator.uniform(-0.05, 0.95, (count, 2)) * [width, height]
    boxes = np.concatenate([corners, corners + generator.uniform(1, 200, (count, 2))], axis=1)
    places = place_labels(boxes, [[(108, 42), (14, 14)]] * count, size, [(50, 50, 60, 60)])
    owner = np.full(size, -1)
    owner[50:60, 50:60] = count
    for i, place in enumerate(places):
        if place is not None:
            assert 0 <= place.x0 < place.x1 <= width and 0 <= place.y0 < place.y1 <= height
            assert (place.x1 - place.x0, place.y1 - place.y0) == [(108, 42), (14, 14)][place.form]
            assert (owner[place.y0 : place.y1, place.x0 : place.x1] == -1).all()
            owner[place.y0 : place.y1, place.x0 : place.x1] = i
    if count <= 51:
        assert None not in places
    if count == 4:
        assert [place.form for place in places if place] == [0] * 4


def test_a_label_is_above_its_box_where_there_is_room():
    [place] = place_labels(np.array([[100.0, 80, 200, 160]]), [[(60, 12), (9, 12)]], (240, 320))
    assert (place.x0, place.y0, place.x1, place.y1) == (100, 68, 160, 80)


def test_the_legend_has_the_names_that_do_not_fit():
    image = np.full((480, 640, 3), 90, np.uint8)
    crowded, few = crowd(51, (480, 640)), crowd(3, (480, 640))
    assert draw_regions(image, few, NAMES).shape == image.shape
    assert draw_regions(image, crowded, NAMES, legend=False).shape == image.shape
    drawn = draw_regions(image, crowded, NAMES)
    assert drawn.shape[0] > 480 and drawn.shape[1] == 640
    # Names in another order take the same room: they change the picture, or else the legend.
    shown = [_shown_above(image, crowded, drawn, region) for region in range(0, 51, 4)]
    assert 2 <= sum(shown) <= len(shown) - 2


def _shown_above(image, annotations, drawn, region) -> bool:
    """Whether a region's names are in the picture; otherwise they are in the legend."""
    own = [a["category_id"] for a in annotations if a["region"] == region]
    swapped = dict(zip(own, own[::-1]))
    changed = [
        {**a, "category_id": swapped[a["category_id"]]} if a["region"] == region else a
        for a in annotations
    ]
    other = draw_regions(image, changed, NAMES)
    above, below = (other[:480] != drawn[:480]).any(), (other[480:] != drawn[480:]).any()
    assert above != below
    return bool(above)


def test_text_contrasts_with_its_background():
    def luminance(pixels: np.ndarray) -> np.ndarray:
        linear = pixels / 255
        linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    grays = [(v, v, v) for v in range(0, 256, 15)]
    for color in [(0, 0, 128), (255, 255, 0), (0, 114, 189), (128, 128, 128), *grays]:
        picture = np.zeros((100, 200, 3), np.uint8)
        label = Label((0, 20, 199, 99), ["MILK", "HHH"], "7", color)
        drawn = draw_labels(picture, [label])[:30]
        background = luminance(np.array(color, float))
        ink = luminance(np.array(readable_on(color), float))
        # The cores of letters have the full color, whatever their soft edges have.
        assert (drawn == readable_on(color)).all(2).sum() >= 15
        bright, dark = max(background, ink), min(background, ink)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, color


def test_clicks_are_drawn_and_not_covered():
    image = np.zeros((200, 300, 3), np.uint8)
    annotation = {"bbox": [100, 60, 100, 100], "category_id": 1, "score": 0.5, "region": 0}
    plain = draw_regions(image, [annotation], NAMES)
    annotation["points"] = [[110, 50, 1], [150, 120, 0]]  # one where the label would be
    drawn = draw_regions(image, [annotation], NAMES)
    color = plain[60, 150]
    for x, y in ((110, 50), (150, 120)):
        assert (plain[y, x] != color).any() or (x, y) == (110, 50)
        assert (drawn[y, x] == color).all()
    assert (drawn[46:54, 106:114] == color).all(2).mean() > 0.5


def test_large_images_are_drawn_at_a_bounded_size():
    image = np.zeros((3000, 4000, 3), np.uint8)
    box = {"bbox": [2000, 1500, 1000, 600], "category_id": 1, "score": 1, "region": 0}
    drawn = draw_regions(image, [box], NAMES)
    assert drawn.shape == (MAX_SIDE * 3 // 4, MAX_SIDE, 3)
    lit = np.argwhere(drawn.any(2)).max(0) / drawn.shape[:2]
    np.testing.assert_allclose(lit, [2100 / 3000, 3000 / 4000], atol=0.003)
    panels = draw_attention(image, np.ones((1, 4, 4), np.float32), [box], NAMES)
    assert max(panels.shape) < 1.2 * MAX_SIDE


def test_videos_are_what_browsers_play(tmp_path):
    av = pytest.importorskip("av")
    frames = [np.full((41, 63, 3), shade, np.uint8) for shade in (40, 120, 200)]
    with video_writer(tmp_path / "a.mp4", 12.5) as write:
        for frame in frames:
            write(frame)
    with av.open(str(tmp_path / "a.mp4")) as video:
        [stream] = video.streams.video
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert (stream.width, stream.height, float(stream.average_rate)) == (64, 42, 12.5)
        shades = [frame.to_ndarray(format="rgb24").mean() for frame in video.decode(video=0)]
    np.testing.assert_allclose(shades, [40, 120, 200], atol=4)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("missing", [True, False])
def test_videos_without_an_encoder_for_h264(tmp_path, monkeypatch, capsys, missing):
    av = pytest.importorskip("av")

    def unknown(name: str, mode: str) -> None:
        raise av.codec.codec.UnknownCodecError(name)

    if missing:
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr(av.codec, "Codec", unknown)
    for name in ("a.mp4", "b.mp4"):
        with video_writer(tmp_path / name, 10) as write:
            write(np.zeros((32, 48, 3), np.uint8))
    assert cv2.VideoCapture(str(tmp_path / "b.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 1
    [*lines] = capsys.readouterr().err.splitlines()
    assert len(lines) <= 1 and all("which players show and browsers do not" in x for x in lines)
    assert Path(tmp_path / "a.mp4").stat().st_size > 0
