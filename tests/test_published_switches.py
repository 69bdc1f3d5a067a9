"""Each switch between the published protocol and ours changes what it says, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from regionspot_d2.data import register_coco_format
from regionspot_d2.data.build import build_test_loader, build_train_loader
from regionspot_d2.data.datasets.vocabularies import head_training_names
from regionspot_d2.data.token_extraction import extract_tokens
from regionspot_d2.engine import RegionSpotTrainer, build_optimizer
from regionspot_d2.engine.trainer import TrainStep
from regionspot_d2.modeling import RegionSpotHead
from regionspot_d2.modeling.region_head import FocalLoss

from . import tiny
from .datasets_on_disk import write_coco
from .published_steps import our_loss, published_loss
from .test_configs import differences

SETS = ("switches_one", "switches_two")
NAMES = [f"{kind}_{thing}" for kind in "abcdefgh" for thing in ("can", "box", "cup", "hat", "pin")]
REGIONS = 25


def small_head() -> RegionSpotHead:
    torch.manual_seed(0)
    return RegionSpotHead(token_dim=12, image_dim=16, text_dim=10, depth=2, num_heads=4, ffn_dim=24)


@pytest.mark.parametrize(
    "reduction, formula",
    [("images", published_loss), ("regions", our_loss)],
    ids=["images", "regions"],
)
@pytest.mark.parametrize("seed", range(6))
def test_the_loss_is_that_of_its_formula(reduction, formula, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(0, 13, (1 + seed,), generator=generator).tolist()
    counts[-1] = seed  # none, in the first
    head = small_head().double().eval()
    regions = head([random(n, 12) for n in counts], random(len(counts), 5, 16))
    words = [F.normalize(random(4 + i, 10), dim=1) for i in range(len(counts))]
    logits = [20 * region @ word.T for region, word in zip(regions, words)]
    classes = [torch.randint(0, len(w), (n,), generator=generator) for w, n in zip(words, counts)]

    # The loss itself is in float32, its formula in float64.
    found, expected = FocalLoss(reduction=reduction)(logits, classes), formula(logits, classes)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = gradient_of(found, head)
    if not any(counts):
        assert found == 0 and gradient.isfinite().all()
        return
    other = gradient_of(expected, head)
    assert F.cosine_similarity(gradient, other, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert gradient.norm().item() == pytest.approx(other.norm().item(), rel=1e-5)


def gradient_of(loss: torch.Tensor, head: RegionSpotHead) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="LOSS_REDUCTION is 'mean'.*'regions' or 'images'"):
        FocalLoss(reduction="mean")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CfgNode, dict[str, Any]]]:
    """Our defaults, on two datasets with cached tokens, and what is observed with them."""
    tmp_path = tmp_path_factory.mktemp("switches")
    data = [[name, *write_coco(tmp_path / name)] for name in SETS]
    register_coco_format(data)
    cfg = tiny.tiny_cfg()
    cfg.DATASETS.TRAIN = SETS
    cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST = SETS[:1], (f"ground_truth://{SETS[0]}",)
    cfg.MODEL.LOAD_PROPOSALS = cfg.MODEL.MASK_ON = cfg.SOLVER.AMP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RANDOM_FLIP = 0, "none"
    cfg.INPUT.TOKEN_CACHE, cfg.INPUT.CACHED_IMAGE_SIZE = str(tmp_path / "tokens"), 64
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    cfg.SOLVER.WEIGHT_DECAY, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.SEED = 1e-4, -1, 3
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    MetadataCatalog.get("switches_words").thing_classes = NAMES
    with tiny.registered_tiny_models(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(tmp_path / "cache"))
        for name in SETS:
            extract_tokens(cfg, build_model(cfg).localizer, name, cfg.INPUT.TOKEN_CACHE)
        yield cfg, observe(cfg)
    for name in SETS:
        DatasetCatalog.remove(name)
    for name in (*SETS, "switches_words"):
        MetadataCatalog.remove(name)


def question() -> dict[str, Any]:
    """An input of inference whose results have another size than its image."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(REGIONS, 2, 2, generator=generator).sort(dim=1).values
    regions = Instances((60, 90))
    regions.proposal_boxes = Boxes((corners * torch.tensor([90.0, 60.0])).reshape(-1, 4))
    regions.objectness_logits = torch.rand(REGIONS, generator=generator)
    image = torch.randint(0, 256, (3, 60, 90), generator=generator, dtype=torch.uint8)
    x = {"image": image, "height": 77, "width": 101, "dataset_name": "switches_words"}
    return {**x, "proposals": regions}


def observe(cfg: CfgNode) -> dict[str, Any]:
    """All that a switch may change, each by itself."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = build_model(cfg).eval()
    weights = {name: p.clone() for name, p in model.region_head.state_dict().items()}
    seen: dict[str, Any] = {"first weights": weights}
    names = {p: n for n, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    groups = [(group["weight_decay"], group["params"]) for group in optimizer.param_groups]
    seen["weight decay"] = {names[p]: decay for decay, group in groups for p in group}

    batches = list(itertools.islice(iter(build_train_loader(cfg)), 12))
    seen["batches"] = [[(x["dataset_name"], x["image_id"]) for x in batch] for batch in batches]
    images = {(x["dataset_name"], x["image_id"]): x for batch in batches for x in batch}
    own = images[SETS[0], 1]
    seen["training image"], seen["training tokens"] = own["image"], own["mask_tokens"]
    seen["training boxes"] = own["instances"].gt_boxes.tensor
    seen["scaler"] = TrainStep(cfg, model, [], optimizer).grad_scaler.is_enabled()
    seen["test image"] = next(iter(build_test_loader(cfg, SETS[0])))[0]["image"]

    tiny.fill_golden(model.region_head)
    generator = torch.Generator().manual_seed(2)
    logits = [torch.randn(n, 7, generator=generator) for n in (1, 60)]
    classes = [torch.randint(0, 7, (len(x),), generator=generator) for x in logits]
    seen["loss"] = model.losses(logits, classes)["loss_cls"]
    seen["text"] = model.text_embedder(NAMES)
    x = question()
    found = model.eval()([x])[0]["instances"]
    seen["pairs"] = sorted(zip(found.region_index.tolist(), found.pred_classes.tolist()))
    scores = torch.full((REGIONS, len(NAMES)), torch.nan)
    scores[found.region_index, found.pred_classes] = found.scores
    seen["scores"] = scores
    seen["boxes"] = {int(i): box for i, box in zip(found.region_index, found.pred_boxes)}
    seen["masks"] = {int(i): mask for i, mask in zip(found.region_index, found.pred_masks)}
    training = head_training_names(cfg)
    seen["seen names"] = training and (training.known, training.unknown)
    return seen


def equal(one: Any, other: Any) -> bool:
    """Whether two observations agree; scores where both have them."""
    if isinstance(one, dict):
        return all(equal(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape:
            return False
        both = ~(one.isnan() | other.isnan())
        return torch.equal(one[both], other[both])
    return bool(one == other)


AUGMENT: dict[str, Any] = {
    "INPUT.AUGMENT_CACHED": True,
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MIN_SIZE_TRAIN": (480, 512),
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute_range",
    "INPUT.CROP.SIZE": [384, 600],
}
SWITCHES: list[tuple[dict[str, Any], set[str]]] = [
    ({"MODEL.VISION_LANGUAGE.RAW_NAMES": True}, {"text", "scores"}),
    ({"MODEL.VISION_LANGUAGE.TEMPLATES": ["{}"]}, {"text", "scores"}),
    ({"MODEL.REGION_HEAD.COPIED_LAYERS": True}, {"first weights"}),
    ({"MODEL.REGION_HEAD.LOSS_REDUCTION": "images"}, {"loss"}),
    ({"DATASETS.HEAD_TRAINED_ON": ["objects365_v1_train"]}, {"seen names"}),
    ({"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}, {"batches"}),
    ({"DATALOADER.ONE_DATASET_PER_BATCH": True}, {"batches"}),
    # By itself it changes nothing: grouping by orientation is within the batches of one dataset.
    ({"DATALOADER.ASPECT_RATIO_GROUPING": False}, set()),
    (AUGMENT, {"training image"}),
    ({"INPUT.MIN_SIZE_TEST": 800, "INPUT.MAX_SIZE_TEST": 1333}, {"test image"}),
    ({"SOLVER.WEIGHT_DECAY_NORM": 1e-4}, {"weight decay"}),
    ({"SOLVER.AMP.GRAD_SCALER": False}, {"scaler"}),
    ({"TEST.KEEP_BEFORE_PROPOSAL_SCORE": 900}, {"pairs"}),
    ({"TEST.NEAREST_MASKS": True}, {"masks"}),
]


@pytest.mark.parametrize("keys, changed", SWITCHES, ids=lambda value: min(value, default="nothing"))
def test_a_switch_changes_what_it_says_and_nothing_else(ours, keys, changed):
    cfg, before = ours[0].clone(), ours[1]
    cfg.merge_from_list([part for item in keys.items() for part in item])
    after = observe(cfg)
    assert {key for key in before if not equal(before[key], after[key])} == changed


def test_every_published_switch_is_among_them():
    tried = {key for keys, _ in SWITCHES for key in keys}
    assert differences("Base-RegionSpot.yaml", "published.yaml") <= tried


def test_published_training_reaches_every_parameter(ours):
    cfg = ours[0].clone()
    for keys, _ in SWITCHES:
        cfg.merge_from_list([part for item in keys.items() for part in item])
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST = (), ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 6, (), 3
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = RegionSpotTrainer(cfg)
    start = {n: p.clone() for n, p in trainer.model.region_head.named_parameters()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    moved = {
        n: not torch.equal(p, start[n]) for n, p in trainer.model.region_head.named_parameters()
    }
    assert all(moved.values()) and trainer.iter == 6
