"""Indexes of regions: what a search finds, what a file may be, and the two commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

import regionspot_cli
from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app import main as app
from regionspot_d2.region_index import RegionIndex
from regionspot_d2.vector_files import VectorFileError, model_fingerprint

from .tiny import golden, tiny_model


def random_index(count: int, width: int = 32) -> RegionIndex:
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(count, width, generator=generator), dim=1)
    found = [("a.jpg", torch.rand(count, 4), rows), ("sub/b.jpg", torch.rand(0, 4), rows[:0])]
    return RegionIndex.of_images(found, folder="photos", model="model", made_with="mini")


@pytest.mark.parametrize("topk", [1, 10, 5000])
def test_an_exact_search_finds_what_all_cosines_say(topk: int) -> None:
    index = random_index(3000)
    queries = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)) * 7
    found = index.search(queries, topk)
    cosines = normalize(queries, dim=1) @ index.embeddings.float().T
    expected = cosines.topk(min(topk, 3000), dim=1)
    torch.testing.assert_close(found.scores, expected.values)
    assert (found.places == expected.indices).float().mean() > 0.999


def test_regions_that_many_others_equal_are_found() -> None:
    """More are as near as the last one than are looked at first."""
    row = normalize(torch.ones(1, 32), dim=1)
    index = RegionIndex.of_images(
        [("a.jpg", torch.rand(3000, 4), row.expand(3000, -1))], folder="photos", model=""
    )
    assert index.search(row, 5).places.tolist() == [[0, 1, 2, 3, 4]]


def test_faiss_finds_most_and_scores_exactly() -> None:
    pytest.importorskip("faiss")
    index = random_index(5000)
    queries = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    near, exact = (index.search(queries, 10, method=method) for method in ("faiss", "exact"))
    same = [len(set(a) & set(b)) for a, b in zip(near.places.tolist(), exact.places.tolist())]
    assert sum(same) >= 0.95 * 80
    torch.testing.assert_close(near.scores[:, 0], exact.scores[:, 0])


def test_without_faiss_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install regionspot_d2\[search\]"):
        random_index(20).search(torch.ones(32), method="faiss")


def test_a_file_has_what_was_saved_and_is_refused_by_another_model(tmp_path: Path) -> None:
    random_index(50).save(tmp_path / "index")
    index = RegionIndex.open(tmp_path / "index", "model")
    assert torch.equal(index.embeddings, random_index(50).embeddings)
    assert index.images == ["a.jpg", "sub/b.jpg"] and index.image_of(3) == Path("photos/a.jpg")
    again = RegionIndex.of_images(index.by_image(), folder="photos", model="model")
    assert torch.equal(again.boxes, index.boxes) and again.images == index.images
    with pytest.raises(VectorFileError, match=r"another model \(mini\)"):
        RegionIndex.open(tmp_path / "index", "other")


@pytest.mark.parametrize("fault", ["cut", "changed", "junk", "empty"])
def test_a_damaged_file_is_one_line(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "index"
    random_index(50).save(path)
    content = path.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    damaged = {"cut": content[:-9], "changed": flipped, "junk": b"[" * 10000, "empty": b""}
    path.write_bytes(damaged[fault])
    with pytest.raises(VectorFileError) as caught:
        RegionIndex.open(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("image", ["/etc/passwd", "../secret.jpg", "http://host/a.jpg", "", 3])
def test_a_path_out_of_the_folder_is_refused(image: object) -> None:
    boxes, rows = torch.rand(1, 4), normalize(torch.ones(1, 8), dim=1)
    with pytest.raises(ValueError, match="not a path inside of a folder"):
        RegionIndex.of_images([(image, boxes, rows)], folder="photos", model="")


def test_a_file_that_is_safetensors_but_no_index_is_refused(tmp_path: Path) -> None:
    save_file({"embeddings": torch.rand(2, 3)}, tmp_path / "head.safetensors")
    with pytest.raises(VectorFileError, match="is no index of regions"):
        RegionIndex.open(tmp_path / "head.safetensors")


@pytest.mark.usefixtures("vocabularies")
def test_the_fingerprint_follows_the_head() -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model()) == before
    with torch.no_grad():
        next(model.region_head.parameters()).add_(1)
    assert model_fingerprint(model) != before


@pytest.mark.usefixtures("vocabularies")
def test_the_commands_find_a_region_by_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        app,
        "RegionSpotPredictor",
        lambda cfg, vocabulary: RegionSpotPredictor(tiny_model(), vocabulary=vocabulary),
    )
    image = golden()["image"].astype(np.uint8)
    Path("photos/sub").mkdir(parents=True)
    Image.fromarray(image).save("photos/sub/a.png")
    Path("photos/bad.jpg").write_bytes(b"junk")
    boxes = golden()["boxes"].tolist()
    Path("boxes.json").write_text(json.dumps({"sub/a.png": {"boxes": boxes}}))
    words = ["index", "--input", "photos", "--output", "index", "--proposals", "boxes.json"]
    words += ["--vocabulary", "cat,dog"]
    assert regionspot_cli.main(words) == 1  # a photo is damaged
    Path("photos/bad.jpg").unlink()
    assert regionspot_cli.main([*words, "--resume"]) == 0
    assert f"{len(boxes)} regions of 1 photos" in capsys.readouterr().out

    assert regionspot_cli.main(["search", "cat", "a dog", "--index", "index", "--topk", "2"]) == 0
    first, second = json.loads(Path("output/search/results.json").read_text())
    assert (first["query"], second["query"]) == ("cat", "a dog")
    predictor = RegionSpotPredictor(tiny_model())
    predictor.set_image(image)
    vectors = predictor.region_embeddings(boxes=boxes)
    cosines = vectors @ predictor.model.text_embedder(["cat"])[0]
    scores = [region["score"] for region in first["regions"]]
    np.testing.assert_allclose(scores, cosines.topk(2).values, atol=2e-3)
    sheet = Image.open("output/search/cat.jpg")
    assert sheet.width > 2 * 256

    other = tiny_model()
    with torch.no_grad():
        next(other.region_head.parameters()).add_(1)
    monkeypatch.setattr(app, "RegionSpotPredictor", lambda cfg, vocabulary: predictor)
    predictor.model = other
    with pytest.raises(SystemExit, match="error: index was made with another model"):
        regionspot_cli.main(["search", "cat", "--index", "index"])
