"""Names by example: what examples are, in a file too, and symbols that no text describes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.exemplars import Exemplars
from regionspot_d2.vector_files import VectorFileError, write_vectors

from .tiny import golden, tiny_model


@pytest.fixture
def predictor(vocabularies: None) -> RegionSpotPredictor:
    return RegionSpotPredictor(tiny_model())


def test_an_example_of_one_image_is_its_embedding(predictor: RegionSpotPredictor) -> None:
    image, boxes = golden()["image"], golden()["boxes"][:2]
    examples = Exemplars(predictor)
    for name, box in zip("ab", boxes):
        examples.add(name, image, boxes=box)
    expected = torch.cat([predictor.region_embeddings(boxes=box) for box in boxes])
    torch.testing.assert_close(torch.stack([m.vector for m in examples.members()]), expected)
    torch.testing.assert_close(examples.similarities(expected).diagonal(), torch.ones(2))


def test_more_examples_are_averaged_or_the_nearest_decide(predictor: RegionSpotPredictor) -> None:
    examples = Exemplars(predictor)
    examples.add("a", golden()["image"], boxes=golden()["boxes"][:2])
    examples.add("a", golden()["image"], points=[[20, 20]])
    rows = examples.vectors["a"]
    assert len(examples) == 1 and len(rows) == 3
    torch.testing.assert_close(examples.similarities(rows, nearest=1), torch.ones(3, 1))
    assert (examples.similarities(rows, nearest=9) < 1).all()


def test_examples_are_saved_and_refused_by_another_model(
    predictor: RegionSpotPredictor, tmp_path: Path
) -> None:
    examples = Exemplars(predictor)
    for name in ("first", "a/b: \u732b"):
        examples.add(name, golden()["image"], boxes=golden()["boxes"])
    examples.save(tmp_path / "examples")
    again = Exemplars.load(tmp_path / "examples", predictor)
    assert list(again.vectors) == list(examples.vectors)
    assert all(torch.equal(again.vectors[n], examples.vectors[n]) for n in again.vectors)

    with torch.no_grad():
        next(predictor.model.region_head.parameters()).add_(1)
    with pytest.raises(VectorFileError, match="another model"):
        Exemplars.load(tmp_path / "examples", predictor)


@pytest.mark.parametrize(
    ("arrays", "names"),
    [
        ({"0": torch.ones(1, 40)}, ["a"]),
        ({"0": torch.full((1, 40), torch.nan)}, ["a"]),
        ({"0": torch.eye(3)}, ["a"]),
        ({"0": torch.eye(40)}, ["a", "b"]),
        ({"0": torch.eye(40)}, [["a"]]),
        ({"1": torch.eye(40)}, ["a"]),
    ],
)
def test_a_file_of_something_else_is_one_line(
    arrays: dict, names: list, predictor: RegionSpotPredictor, tmp_path: Path
) -> None:
    about = {"names": names, "model": Exemplars(predictor).model}
    write_vectors(tmp_path / "examples", "file of examples", arrays, about)
    with pytest.raises(VectorFileError) as caught:
        Exemplars.load(tmp_path / "examples", predictor)
    assert "\n" not in str(caught.value)


def test_what_is_no_example_is_refused(predictor: RegionSpotPredictor) -> None:
    examples = Exemplars(predictor)
    with pytest.raises(ValueError, match="give non-empty text"):
        examples.add(" ", golden()["image"], boxes=golden()["boxes"])
    with pytest.raises(ValueError, match="There is no region"):
        examples.add("a", golden()["image"], boxes=[])
    with pytest.raises(ValueError, match="no examples to save"):
        examples.save("nowhere")


def draw(draw: ImageDraw.ImageDraw, symbol: str, x: int, y: int, color: str) -> list[int]:
    """Draws a symbol of 80 pixels; returns its box."""
    box = [x, y, x + 80, y + 80]
    draw.rectangle(box, fill="white", outline=color, width=3)
    if symbol == "zigzag":
        draw.line([x, y + 20, x + 80, y + 30, x, y + 45, x + 80, y + 60], fill=color, width=8)
    elif symbol == "dots":
        for i in range(9):
            left, top = x + 10 + 24 * (i % 3), y + 10 + 24 * (i // 3)
            draw.ellipse([left, top, left + 14, top + 14], fill=color)
    else:
        for side in (10, 22, 34):
            draw.ellipse([x + side, y + side, x + 80 - side, y + 80 - side], outline=color, width=5)
    return box


SYMBOLS = ("zigzag", "dots", "rings")


def photo(seed: int) -> tuple[Image.Image, list[list[int]]]:
    """A noisy picture with one of each symbol, in other places and colors each time."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(120, 40, (20, 30, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise).resize((420, 300), Image.Resampling.BICUBIC)
    colors = generator.permutation(["black", "darkred", "darkblue"])
    boxes = []
    for i, (symbol, color) in enumerate(zip(SYMBOLS, colors)):
        x, y = 140 * i + generator.integers(10, 50), generator.integers(10, 200)
        boxes.append(draw(ImageDraw.Draw(image), symbol, int(x), int(y), str(color)))
    return image, boxes


def test_symbols_that_no_text_describes_are_named_by_two_examples_each(mini_predictor) -> None:
    mini = mini_predictor
    examples = Exemplars(mini)
    for seed in (0, 1):
        image, boxes = photo(seed)
        for name, box in zip(("form A", "form B", "form C"), boxes):
            examples.add(name, image, boxes=box)
    right = 0
    for seed in (2, 3, 4):
        image, boxes = photo(seed)
        mini.set_image(image)
        found = examples.similarities(mini.region_embeddings(boxes=boxes))
        right += int((found.argmax(1) == torch.arange(3)).sum())
    assert right >= 8  # of 9; by chance 3
