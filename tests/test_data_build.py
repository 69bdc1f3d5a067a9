"""Loaders: what a batch holds, in which order, and what happens to images that cannot be used."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.modeling import build_model
from PIL import Image

from regionspot_d2.data.build import (
    build_test_loader,
    build_train_loader,
    cache_manifest,
    load_records,
    open_token_caches,
    start_at,
)
from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.data.images import ImageReadError
from regionspot_d2.data.mapper import (
    RegionMapper,
    SampleError,
    TooManyUnreadableError,
    UnreadableImages,
    squash,
)
from regionspot_d2.data.proposals import Proposals, write_proposals
from regionspot_d2.data.published_tokens import PublishedTokens
from regionspot_d2.data.samplers import (
    FastRepeatFactorSampler,
    GroupedSampler,
    ResumableSampler,
    repeat_factors,
)
from regionspot_d2.data.token_cache import TokenCacheError, TokenCacheWriter
from regionspot_d2.data.token_extraction import extract_tokens
from regionspot_d2.modeling.prompts import BoxPrompts

from .datasets_on_disk import SIZES, annotation, write_images
from .tiny import tiny_cfg

Register = Callable[..., Path]


@pytest.fixture
def register(tmp_path: Path, empty_cache: Path) -> Iterator[Register]:
    """Writes and registers a dataset of ``count`` images with a box each; returns its folder."""
    made = []

    def make(
        name: str, count: int, categories: tuple[str, ...] = ("cat", "dog"), boxes: Any = None
    ):
        folder = tmp_path / name
        images: list[Any] = []
        annotations: list[Any] = []
        for first in range(0, count, len(SIZES)):
            names = [f"{first + i}.png" for i in range(min(len(SIZES), count - first))]
            entries = write_images(folder / "images", names)
            images += [{**entry, "id": first + i} for i, entry in enumerate(entries)]
        for image in images:
            category = 1 + image["id"] % len(categories)
            for box in boxes or [[4, 6, 20, 30], [30, 20, 500, 9]]:
                annotations.append(annotation(len(annotations) + 1, image["id"], box, category))
        words = [{"id": i, "name": name} for i, name in enumerate(categories, start=1)]
        text = {"images": images, "annotations": annotations, "categories": words}
        (folder / "ann.json").write_text(json.dumps(text))
        register_coco_format([[name, str(folder / "ann.json"), str(folder / "images")]])
        made.append(name)
        return folder

    yield make
    for name in made:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def loader_cfg(*names: str, batch: int = 4, **keys: Any) -> CfgNode:
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN = names
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.merge_from_list([part for key in keys for part in (key.replace("__", "."), keys[key])])
    return cfg


def seen(loader: Any, batches: int) -> list[list[tuple[str, int]]]:
    taken = itertools.islice(iter(loader), batches)
    return [[(x["dataset_name"], x["image_id"]) for x in batch] for batch in taken]


def test_a_batch_of_training(register: Register) -> None:
    folder = register("one", 4)
    (x,) = next(iter(build_train_loader(loader_cfg("one", batch=1))))
    index = x["image_id"]
    image = np.asarray(Image.open(folder / "images" / f"{index}.png"))
    assert x["image"].dtype == torch.uint8 and x["dataset_name"] == "one"
    np.testing.assert_array_equal(x["image"].permute(1, 2, 0).numpy(), image)
    width, height = SIZES[index]
    boxes = [[4, 6, 24, 36], [30, 20, width, 29]]
    assert x["instances"].gt_boxes.tensor.tolist() == boxes
    assert x["instances"].gt_classes.tolist() == [index % 2] * 2
    assert x["instances"].image_size == (height, width) and "annotations" not in x


def test_image_and_boxes_are_augmented_together(register: Register) -> None:
    register("one", 1)
    cfg = loader_cfg("one", batch=1, INPUT__RANDOM_FLIP="horizontal", INPUT__MIN_SIZE_TRAIN=(96,))
    record = load_records("one")[0]
    plain = RegionMapper(True, augmentations=[])(record)["image"]
    flipped, not_flipped = 0, 0
    for _ in range(20):
        x = RegionMapper(cfg, True)(record)
        assert x["image"].shape == (3, 96, 128)
        x0, _, x1, _ = x["instances"].gt_boxes.tensor[0].tolist()
        if (x0, x1) == (8, 48):
            not_flipped += 1
        else:
            assert (x0, x1) == (80, 120)
            x["image"] = x["image"].flip(2)
            flipped += 1
        assert (x["image"][:, ::2, ::2].float() - plain.float()).abs().mean() < 45
    assert flipped and not_flipped


def test_crowds_and_boxes_without_area_are_left_out(register: Register) -> None:
    register("one", 1, boxes=[[4, 6, 20, 30], [5, 5, 0, 9], [500, 500, 9, 9]])
    record = load_records("one")[0]
    record["annotations"].append({**record["annotations"][0], "iscrowd": 1})
    x = RegionMapper(True, augmentations=[])(record)
    assert x["instances"].gt_boxes.tensor.tolist() == [[4, 6, 24, 36]]
    assert len(record["annotations"]) == 4  # the record is not touched


def test_records_keep_only_what_the_loaders_need(register: Register) -> None:
    register("one", 1)
    assert "segmentation" in DatasetCatalog.get("one")[0]["annotations"][0]
    for annotation_ in load_records("one")[0]["annotations"]:
        assert set(annotation_) == {"bbox", "bbox_mode", "category_id", "iscrowd"}


def test_tokens_of_other_regions_are_refused(register: Register, tmp_path: Path) -> None:
    register("one", 4)
    cfg = loader_cfg("one", batch=1, INPUT__TOKEN_CACHE=str(tmp_path / "tokens"))
    folder = tmp_path / "tokens" / "one"
    writer = TokenCacheWriter(folder, cache_manifest(cfg, "one"), range(4), images_per_shard=4)
    writer.write_shard(0, [torch.zeros(3, 256)] * 4)
    with pytest.raises(TokenCacheError, match="3 regions of the image .* has 2 annotated regions"):
        next(iter(build_train_loader(cfg)))


def test_images_without_annotations(register: Register) -> None:
    folder = register("one", 4)
    text = json.loads((folder / "ann.json").read_text())
    text["annotations"] = [a for a in text["annotations"] if a["image_id"] in (0, 2)]
    text["annotations"][-1]["iscrowd"] = text["annotations"][-2]["iscrowd"] = 1
    (folder / "ann.json").write_text(json.dumps(text))
    assert {i for batch in seen(build_train_loader(loader_cfg("one")), 3) for i in batch} == {
        ("one", 0)
    }
    cfg = loader_cfg("one", DATALOADER__FILTER_EMPTY_ANNOTATIONS=False)
    sizes = {x["image_id"]: len(x["instances"]) for x in next(iter(build_train_loader(cfg)))}
    assert sizes == {0: 2, 1: 0, 2: 0, 3: 0}


def test_datasets_made_by_a_function(tmp_path: Path, tiny_models: None) -> None:
    record = write_images(tmp_path, ["a.png"])[0]
    record = {**record, "file_name": str(tmp_path / "a.png"), "image_id": "a"}
    DatasetCatalog.register("made", lambda: [record])
    MetadataCatalog.get("made").thing_classes = ["cat"]
    try:
        cfg = loader_cfg("made", batch=1)
        for use in (build_train_loader, lambda cfg: extract_tokens(cfg, None, "made", tmp_path)):
            with pytest.raises(ValueError, match="'made' has no annotations"):
                use(cfg)
        record["annotations"] = [{"bbox": [1, 2, 9, 9], "bbox_mode": 0, "category_id": 0}]
        extract_tokens(cfg, build_model(cfg).localizer, "made", tmp_path)
        cfg.INPUT.TOKEN_CACHE = str(tmp_path)
        (x,) = next(iter(build_train_loader(cfg)))
        assert x["instances"].gt_boxes.tensor.tolist() == [[1, 2, 9, 9]]
        record["annotations"][0]["bbox"] = [1, 2, 9, 8]
        with pytest.raises(TokenCacheError, match="sha256 of the annotations"):
            build_train_loader(cfg)
    finally:
        DatasetCatalog.remove("made")
        MetadataCatalog.remove("made")


def test_a_class_outside_the_vocabulary_is_named(register: Register) -> None:
    register("one", 4)
    records = DatasetCatalog.get("one")
    records[2]["annotations"][0]["category_id"] = 2
    DatasetCatalog.remove("one")
    DatasetCatalog.register("one", lambda: records)
    with pytest.raises(ValueError, match="image 2 of the dataset 'one' .* class 2; its 2 classes"):
        build_train_loader(loader_cfg("one"))


def test_batches_mix_datasets_of_different_vocabularies(register: Register) -> None:
    register("one", 4)
    register("two", 12, ("fox", "owl", "elk"))
    batches = seen(build_train_loader(loader_cfg("one", "two")), 4)
    assert Counter(sum(batches, [])) == Counter(
        [("one", i) for i in range(4)] + [("two", i) for i in range(12)]
    )
    assert any(len({name for name, _ in batch}) == 2 for batch in batches)


@pytest.mark.parametrize("by_orientation", [False, True])
def test_a_batch_may_be_of_one_dataset(register: Register, by_orientation: bool) -> None:
    register("one", 8)
    register("two", 12, ("fox", "owl", "elk"))
    cfg = loader_cfg(
        "one",
        "two",
        batch=2,
        DATALOADER__ONE_DATASET_PER_BATCH=True,
        DATALOADER__ASPECT_RATIO_GROUPING=by_orientation,
    )
    batches = seen(build_train_loader(cfg), 30)
    kinds = [{(name, wide(i)) for name, i in batch} for batch in batches]
    assert all(len({name for name, _ in kind}) == 1 for kind in kinds)
    assert all(len(kind) == 1 for kind in kinds) == by_orientation
    # Each dataset still has its share, and a run that is resumed sees the same batches.
    counts = Counter(name for batch in batches for name, _ in batch)
    assert counts["two"] / counts["one"] == pytest.approx(12 / 8, rel=0.2)
    assert seen(build_train_loader(cfg, first_iteration=7), 10) == batches[7:17]


def wide(index: int) -> bool:
    width, height = SIZES[index % len(SIZES)]
    return width > height


def test_groups_keep_the_order_of_their_images_and_lose_none() -> None:
    groups = [0, 1, 0, 2, 1, 0, 1, 2, 0, 0]
    order = [*range(10)] * 6
    found = list(GroupedSampler(order, groups, size=3))
    for i in range(0, len(found), 3):
        assert len({groups[index] for index in found[i : i + 3]}) == 1
    for group in set(groups):
        own = [index for index in found if groups[index] == group]
        assert own == [index for index in order if groups[index] == group][: len(own)]
    assert len(order) - len(found) < 3 * 3


def test_images_may_be_augmented_beside_their_tokens(register: Register, tmp_path: Path) -> None:
    register("one", 4)
    cfg = loader_cfg("one", batch=1, INPUT__TOKEN_CACHE=str(tmp_path / "tokens"))
    writer = TokenCacheWriter(
        tmp_path / "tokens" / "one", cache_manifest(cfg, "one"), range(4), images_per_shard=4
    )
    tokens = [torch.randn(2, 256).half() for _ in range(4)]
    writer.write_shard(0, tokens)
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP.*INPUT.AUGMENT_CACHED: True"):
        RegionMapper(cfg, True)
    cfg.INPUT.AUGMENT_CACHED = True
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute_range"
    cfg.INPUT.CROP.SIZE, cfg.INPUT.MIN_SIZE_TRAIN = [48, 60], (96, 120)
    record, caches = load_records("one")[0], open_token_caches(cfg)
    mapper = RegionMapper(cfg, True, token_caches=caches)
    plain = RegionMapper(True, augmentations=[])(record)
    sizes = Counter()
    for _ in range(40):
        x = mapper(record)
        height, width = x["image"].shape[1:]
        assert torch.equal(x["mask_tokens"], tokens[0])
        scale = torch.tensor([width / 64, height / 48] * 2)
        # Boxes keep their place, as do the tokens.
        torch.testing.assert_close(
            x["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor * scale
        )
        assert x["instances"].image_size == (height, width)
        whole = (height, width) in ((96, 128), (120, 160))
        assert whole or (48 <= height <= 60 and 48 <= width <= 60)
        sizes[whole] += 1
    assert min(sizes[True], sizes[False]) > 8


def test_ratios(register: Register) -> None:
    register("one", 4)
    register("two", 12)
    cfg = loader_cfg("one", "two", batch=12, DATASETS__TRAIN_RATIOS=[2, 1])
    # An epoch of the rarest image: every one of "two" once, those of "one" six times.
    counts = Counter(sum(seen(build_train_loader(cfg), 3), []))
    assert counts == Counter({("one", i): 6 for i in range(4)} | {("two", i): 1 for i in range(12)})


def test_repeat_factors_by_class(register: Register) -> None:
    register("one", 8, ("cat", "dog"))
    register("two", 4, ("fox",))
    cfg = loader_cfg(
        "one",
        "two",
        DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler",
        DATALOADER__REPEAT_THRESHOLD=2.0,
    )
    parts = [load_records("one"), load_records("two")]
    # sqrt(2 / (1 / 2)) and sqrt(2 / 1), relative to the smaller.
    expected = torch.tensor([2 / 2**0.5] * 8 + [1] * 4, dtype=torch.float64)
    torch.testing.assert_close(repeat_factors(cfg, parts), expected)
    cfg.DATALOADER.REPEAT_DATASETS = ["one"]
    expected = torch.tensor([2] * 8 + [1] * 4, dtype=torch.float64)
    torch.testing.assert_close(repeat_factors(cfg, parts), expected)
    # Ratios hold whatever classes do inside.
    cfg.DATASETS.TRAIN_RATIOS = [1, 3]
    factors = repeat_factors(cfg, parts)
    assert factors[8:].sum() / factors[:8].sum() == pytest.approx(3)
    cfg.DATASETS.TRAIN_RATIOS = []
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    assert repeat_factors(cfg, parts) is None


def test_the_fast_sampler_gives_detectron2s_stream() -> None:
    factors = torch.tensor([1.0, 2.5, 1.2, 3.0])
    streams = [
        list(itertools.islice(iter(kind(factors, seed=3)), 50))
        for kind in (RepeatFactorTrainingSampler, FastRepeatFactorSampler)
    ]
    assert streams[0] == streams[1]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"DATASETS__TRAIN_RATIOS": [1]}, r"TRAIN_RATIOS is \[1\]; .* each of the 2 datasets"),
        ({"DATASETS__TRAIN_RATIOS": [1, 0]}, r"TRAIN_RATIOS is \[1, 0\]"),
        ({"DATALOADER__SAMPLER_TRAIN": "Other"}, "SAMPLER_TRAIN is 'Other'"),
        ({"DATALOADER__REPEAT_DATASETS": ["three"]}, r"REPEAT_DATASETS is \['three'\]"),
        ({"DATASETS__TRAIN": ("one", "one")}, "one or more different datasets"),
        ({"INPUT__FORMAT": "L"}, "INPUT.FORMAT is 'L'"),
    ],
)
def test_wrong_keys_are_named(register: Register, keys: dict, said: str) -> None:
    register("one", 4)
    register("two", 4)
    with pytest.raises(ValueError, match=said):
        build_train_loader(loader_cfg("one", "two", **keys))


@pytest.mark.parametrize("ratios", [[], [1, 1]])
def test_training_continues_where_it_stopped(register: Register, ratios: list) -> None:
    register("one", 5)
    register("two", 9)
    cfg = loader_cfg("one", "two", DATASETS__TRAIN_RATIOS=ratios)
    undisturbed = seen(build_train_loader(cfg), 12)
    for stop in (1, 7):
        assert seen(build_train_loader(cfg, first_iteration=stop), 12 - stop) == undisturbed[stop:]
    resumed = build_train_loader(cfg)
    start_at(resumed, 7)
    assert seen(resumed, 5) == undisturbed[7:]
    cfg.SEED = 5
    assert seen(build_train_loader(cfg), 12) != undisturbed


def test_workers_do_not_change_the_order(register: Register) -> None:
    register("one", 9)
    cfg = loader_cfg("one")
    alone = seen(build_train_loader(cfg, first_iteration=1), 6)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert seen(build_train_loader(cfg, first_iteration=1), 6) == alone


def test_processes_share_the_images_of_an_iteration(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("one", 13)
    cfg = loader_cfg("one", batch=8)
    alone = seen(build_train_loader(cfg, first_iteration=2), 5)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        shares.append(seen(build_train_loader(cfg, first_iteration=2), 5))
    for whole, first, second in zip(alone, *shares):
        assert len(first) == len(second) == 4 and sorted(first + second) == sorted(whole)


def test_the_loader_does_not_touch_the_models_random_numbers(register: Register) -> None:
    register("one", 4)
    loader = build_train_loader(loader_cfg("one"))
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())


def test_unreadable_images_are_skipped_and_counted(
    register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    folder = register("one", 8)
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "5.png").write_bytes(b"no image")
    Image.new("RGB", (7, 7)).save(folder / "images" / "6.png")
    batches = seen(build_train_loader(loader_cfg("one")), 4)
    assert all(len(batch) == 4 for batch in batches)
    assert {i for batch in batches for _, i in batch} <= {0, 1, 2, 4, 7}
    for said in (r"3\.png' does not exist", r"5\.png' is not an image", r"Mismatched .*6\.png"):
        assert any(re.search(said, text) for text in caplog.messages)
    cfg = loader_cfg("one", DATALOADER__MAX_UNREADABLE_SHARE=0.0)
    with pytest.raises(RuntimeError, match=r"1 of \d images could not .*MAX_UNREADABLE_SHARE = 0 "):
        seen(build_train_loader(cfg), 4)


def test_how_many_unreadable_images_are_too_many() -> None:
    unreadable = UnreadableImages(0.01)
    for _ in range(10):
        unreadable.add_bad(ImageReadError("bad"))
    with pytest.raises(RuntimeError, match="11 of 11 images .* The last: bad"):
        unreadable.add_bad(ImageReadError("bad"))
    unreadable = UnreadableImages(0.01)
    for _ in range(30):  # every hundredth
        unreadable.add_bad(ImageReadError("bad"))
        for _ in range(99):
            unreadable.add_good()


def test_shares_are_of_an_epoch() -> None:
    # One of twelve, for 50 epochs: as good or bad as in the first.
    unreadable = UnreadableImages(0.01, 12)
    for draw in range(600):
        if draw % 12 == 3:
            unreadable.add_bad(ImageReadError("bad"), "3.png")
        else:
            unreadable.add_good()
    # Nothing is left to train on: the loader would look for another image for ever.
    unreadable = UnreadableImages(0.01, 12)
    with pytest.raises(TooManyUnreadableError, match="7 of 7 images"):
        for draw in range(100):
            unreadable.add_bad(ImageReadError("bad"), f"{draw % 12}.png")


def test_a_dataset_without_images_does_not_hang(register: Register) -> None:
    folder = register("one", 4)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(TooManyUnreadableError, match=r"of \d images could not be used"):
        next(iter(build_train_loader(loader_cfg("one"))))


def test_errors_of_workers_are_one_line(register: Register, tmp_path: Path) -> None:
    folder = register("one", 4)
    cfg = loader_cfg("one", DATALOADER__NUM_WORKERS=1, DATALOADER__MAX_UNREADABLE_SHARE=0.0)
    Image.new("RGB", (7, 7)).save(folder / "images" / "1.png")
    with pytest.raises(SizeMismatchError, match=r"^Mismatched .*1\.png[^\n]*$"):
        list(build_test_loader(cfg, "one"))
    (folder / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(ImageReadError, match=r"^'[^\n]*1\.png' is not an image[^\n]*$"):
        list(build_test_loader(cfg, "one"))
    with pytest.raises(TooManyUnreadableError, match=r"^1 of [^\n]*1\.png' is not an[^\n]*$"):
        seen(build_train_loader(cfg), 4)
    records = DatasetCatalog.get("one")
    for record in records:
        record["file_name"] = [3]
    DatasetCatalog.remove("one")
    DatasetCatalog.register("one", lambda: records)
    with pytest.raises(SampleError, match=r"^The image 0 \(\[3\]\) or [^\n]* be used: [^\n]*$"):
        list(build_test_loader(cfg, "one"))


@pytest.mark.parametrize(
    "box",
    [
        [float("nan")] * 4,
        [4, 6, float("nan"), 9],
        [4, 6, 0, 9],
        [5000, 5000, 9, 9],
        [-50, -50, 9, 9],
    ],
)
def test_boxes_that_are_left_out_are_counted(
    register: Register, box: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    register("one", 6, boxes=[[1, 1, 9, 9], [4, 6, 5, 9]])
    # After loading: a json with a box that is no box is refused as a whole.
    records = DatasetCatalog.get("one")
    for record in records:
        record["annotations"][1]["bbox"] = box
    DatasetCatalog.remove("one")
    DatasetCatalog.register("one", lambda: records)
    (batch,) = itertools.islice(build_train_loader(loader_cfg("one", batch=6)), 1)
    assert all(x["instances"].gt_boxes.tensor.tolist() == [[1, 1, 10, 10]] for x in batch)
    (said,) = [text for text in caplog.messages if "are not numbers, outside" in text]
    assert re.match(r"6 of the 12 boxes of 'one' .* first is of the image 0, '.*/0\.png'", said)


@pytest.mark.parametrize("box", [None, "abcd", [1, 2, 3], [1, 2, 3, None], {"x": 1}])
def test_what_is_no_box_is_named(register: Register, box: Any) -> None:
    register("one", 2)
    records = DatasetCatalog.get("one")
    records[1]["annotations"][0]["bbox"] = box
    DatasetCatalog.remove("one")
    DatasetCatalog.register("one", lambda: records)
    with pytest.raises(ValueError, match="The image 1 of the dataset 'one' has the box "):
        build_train_loader(loader_cfg("one"))


def test_a_batch_that_does_not_divide(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    register("one", 2)
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 0; .* processes, 1"):
        build_train_loader(loader_cfg("one", batch=0))
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 4; .* multiple .* processes, 3"):
        build_train_loader(loader_cfg("one", batch=4))


def test_the_limit_on_pixels_is_a_config_key(register: Register) -> None:
    register("one", 2)
    cfg = loader_cfg("one", INPUT__MAX_PIXELS=100)
    with pytest.raises(ImageReadError, match=r"too large.* raise INPUT\.MAX_PIXELS"):
        list(build_test_loader(cfg, "one"))


def test_cached_and_live_give_the_same_loss(
    register: Register, tiny_models: None, tmp_path: Path
) -> None:
    register("one", 6)
    cfg = loader_cfg("one", batch=6)
    model = build_model(cfg)
    extract_tokens(cfg, model.localizer, "one", tmp_path / "tokens", images_per_batch=2)
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    with torch.no_grad():
        images, boxes = zip(*[(x["image"], BoxPrompts(x["instances"].gt_boxes)) for x in batch])
        exact = model.localizer(list(images), list(boxes), with_masks=False)[0]
    for x, token in zip(batch, exact):
        x["live_tokens"] = token

    cfg.INPUT.TOKEN_CACHE = str(tmp_path / "tokens")
    open_token_caches(cfg, model.localizer)
    losses = []
    for size in (64, 0):
        cfg.INPUT.CACHED_IMAGE_SIZE = size
        (cached,) = itertools.islice(build_train_loader(cfg), 1)
        for live, x in zip(batch, cached):
            assert x["image_id"] == live["image_id"] and x["height"] == live["height"]
            assert x["instances"].gt_classes.tolist() == live["instances"].gt_classes.tolist()
            # Half precision is all that the disk costs.
            assert torch.equal(x["mask_tokens"], live["live_tokens"].half())
            if size:
                assert torch.equal(x["image"], squash(live["image"], 64))
                scale = torch.tensor([64 / live["width"], 64 / live["height"]] * 2)
                expected = live["instances"].gt_boxes.tensor * scale
                torch.testing.assert_close(x["instances"].gt_boxes.tensor, expected)
            else:
                assert torch.equal(x["image"], live["image"])
        model.eval().training = True  # the losses without dropout
        losses.append(model(cached)["loss_cls"].item())
    for x in batch:
        x["mask_tokens"] = x["live_tokens"].half()
    losses.append(model(batch)["loss_cls"].item())
    for x in batch:
        del x["mask_tokens"]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] == pytest.approx(model(batch)["loss_cls"].item(), rel=1e-3)


def test_a_cache_of_other_weights_is_refused(
    register: Register, tiny_models: None, tmp_path: Path
) -> None:
    register("one", 4)
    cfg = loader_cfg("one", INPUT__TOKEN_CACHE=str(tmp_path / "tokens"))
    model = build_model(cfg)
    with pytest.raises(TokenCacheError, match="No token cache"):
        build_train_loader(cfg)
    extract_tokens(cfg, model.localizer, "one", tmp_path / "tokens")
    with torch.no_grad():
        next(model.localizer.parameters()).add_(1)
    with pytest.raises(TokenCacheError, match="localizer's weights"):
        open_token_caches(cfg, model.localizer)
    for key, value in (("INPUT.RANDOM_FLIP", "horizontal"), ("INPUT.CROP.ENABLED", True)):
        other = cfg.clone()
        other.merge_from_list([key, value])
        with pytest.raises(ValueError, match=f"{key} is .*TOKEN_CACHE"):
            build_train_loader(other)


def test_published_tokens_take_boxes_from_the_annotations(
    register: Register, tmp_path: Path
) -> None:
    register("one", 2)
    for image_id, classes in ((0, [1, 1]), (1, [2, 1])):
        tokens = torch.full((2, 256), float(image_id))
        torch.save({"mask_tokens": tokens, "classes": classes}, tmp_path / f"{image_id}.pth")
    caches = {"one": PublishedTokens(tmp_path, 2)}
    mapper = RegionMapper(True, augmentations=[], token_caches=caches, cached_image_size=32)
    first, second = load_records("one")
    x = mapper(first)
    torch.testing.assert_close(
        x["instances"].gt_boxes.tensor[0], torch.tensor([2.0, 4.0, 12.0, 24.0])
    )
    assert x["instances"].gt_classes.tolist() == [0, 0] and x["mask_tokens"].shape == (2, 256)
    with pytest.raises(ImageReadError, match=r"image 1 are of the classes \[1, 0\].*of \[1, 1\]"):
        mapper(second)


def test_training_from_the_authors_archive(register: Register, tmp_path: Path) -> None:
    register("openimages", 4)
    folder = tmp_path / "archive" / "openimages"
    folder.mkdir(parents=True)
    cfg = loader_cfg("openimages", INPUT__TOKEN_CACHE=str(folder.parent))
    # Their numbers: cat is 3, dog is 1. A yak, which is not annotated, comes between.
    categories = [{"id": i, "name": n} for i, n in enumerate(("dog", "yak", "cat"), start=1)]
    (folder / "categories.json").write_text(json.dumps({"categories": categories}))
    for image_id in range(4):
        number = (3, 1)[image_id % 2]
        values = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 256) + 10 * image_id
        content = {"mask_tokens": values.clone(), "classes": [number, 2, number]}
        torch.save(content, folder / f"{image_id}.pth")
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    for x in batch:
        assert x["instances"].gt_classes.tolist() == [x["image_id"] % 2] * 2
        assert x["mask_tokens"][:, 0].tolist() == [10 * x["image_id"], 10 * x["image_id"] + 2]
    for path in folder.glob("*.pth"):
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(TokenCacheError, match="None of the 4 images has a file"):
        build_train_loader(cfg)


def test_a_test_loader_gives_every_image_once(register: Register, tmp_path: Path) -> None:
    register("one", 7)
    records = DatasetCatalog.get("one")
    regions = {
        str(r["image_id"]): Proposals.create(
            [[0, 0, 9, 9 + r["image_id"]], [5, 5, 20, 20]], [0.2, 0.9]
        )
        for r in records
    }
    write_proposals(str(tmp_path / "one.pkl"), records, regions, {})
    cfg = loader_cfg(
        DATASETS__TEST=("one",),
        DATASETS__PROPOSAL_FILES_TEST=(str(tmp_path / "one.pkl"),),
        MODEL__LOAD_PROPOSALS=True,
        TEST__IMS_PER_BATCH=3,
    )
    batches = list(build_test_loader(cfg, "one"))
    assert [[x["image_id"] for x in batch] for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    for x in sum(batches, []):
        assert x["dataset_name"] == "one" and "annotations" not in x and "instances" not in x
        assert x["proposals"].proposal_boxes.tensor[1].tolist() == [0, 0, 9, 9 + x["image_id"]]
        torch.testing.assert_close(x["proposals"].objectness_logits, torch.tensor([0.9, 0.2]))
    cfg.MODEL.LOAD_PROPOSALS = False
    assert "proposals" not in next(iter(build_test_loader(cfg, "one")))[0]


def test_proposal_files_that_do_not_fit(register: Register, tmp_path: Path) -> None:
    register("one", 2)
    register("two", 4)
    records = DatasetCatalog.get("one")
    empty = {str(r["image_id"]): Proposals.create([[0, 0, 9, 9]], [1]) for r in records}
    write_proposals(str(tmp_path / "one.pkl"), records, empty, {})
    cfg = loader_cfg(
        DATASETS__TEST=("one", "two"),
        DATASETS__PROPOSAL_FILES_TEST=(str(tmp_path / "one.pkl"),),
        MODEL__LOAD_PROPOSALS=True,
    )
    with pytest.raises(ValueError, match="PROPOSAL_FILES_TEST has no file for 'two'"):
        build_test_loader(cfg, "two")
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "one.pkl"),) * 2
    with pytest.raises(ValueError, match=r"one\.pkl' has no image '2' of the dataset 'two'"):
        build_test_loader(cfg, "two")


def test_testing_stops_at_an_unreadable_image(register: Register) -> None:
    folder = register("one", 2)
    Image.new("RGB", (7, 7)).save(folder / "images" / "0.png")
    with pytest.raises(SizeMismatchError):
        next(iter(build_test_loader(loader_cfg(), "one")))
    (folder / "images" / "0.png").unlink()
    with pytest.raises(ImageReadError, match="does not exist"):
        next(iter(build_test_loader(loader_cfg(), "one")))


def test_a_sampler_begins_later() -> None:
    sampler = ResumableSampler(range(10))  # type: ignore[arg-type]
    sampler.skip = 7
    assert list(sampler) == [7, 8, 9] == list(sampler)
