"""RegionSpot inside and around Detectron2's own detectors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import regionspot_d2
from regionspot_d2 import add_regionspot_config
from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.modeling import RegionSpot

from . import tiny
from .detectors import CASCADE, MASK_RCNN, RETINANET, zoo_cfg
from .tiny import WORDS, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")


def fcos() -> torch.nn.Module:
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import FPN, BasicStem, ResNet
    from detectron2.modeling.backbone.fpn import LastLevelP6P7
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    bottom = ResNet(
        BasicStem(), ResNet.make_default_stages(18), out_features=["res3", "res4", "res5"]
    )
    backbone = FPN(bottom, ["res3", "res4", "res5"], 16, top_block=LastLevelP6P7(16, 16, "p5"))
    head = FCOSHead(input_shape=[ShapeSpec(channels=16)] * 5, num_classes=80, conv_dims=[16])
    return FCOS(
        backbone=backbone,
        head=head,
        num_classes=80,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
        test_score_thresh=0.0,
        max_detections_per_image=6,
    )


DETECTORS = {
    "mask_rcnn": lambda: build_model(zoo_cfg(MASK_RCNN)),
    "cascade": lambda: build_model(zoo_cfg(CASCADE)),
    "retinanet": lambda: build_model(zoo_cfg(RETINANET)),
    "fcos": fcos,
}


def inputs(size: tuple[int, int] = (64, 96)) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return [{"image": image, "height": 2 * size[0], "width": 2 * size[1]}]


@pytest.mark.parametrize("name", DETECTORS)
def test_wrapped_detectors_keep_their_boxes_and_get_new_names(name):
    torch.manual_seed(0)
    detector = DETECTORS[name]().eval()
    before = copy.deepcopy(detector.state_dict())
    regionspot = tiny_model()
    words = ["cup", "horse", "tree", "lamp"]
    model = regionspot_d2.wrap(detector, regionspot, vocabulary=words).train()
    batch = inputs()
    with torch.no_grad():
        own = detector(batch)[0]["instances"]
    found = model(batch)[0]["instances"]
    assert 0 < len(found) == len(own)
    assert found.get_fields().keys() == own.get_fields().keys()
    # The same boxes, in the order of the new scores.
    image = batch[0]["image"].flip(0)
    boxes = Boxes(own.pred_boxes.tensor / 2)
    logits = tiny.classify(regionspot, image, boxes, words)
    scores, classes = logits.softmax(1).max(1)
    order = (own.scores * scores).argsort(descending=True)
    torch.testing.assert_close(found.scores, (own.scores * scores)[order])
    assert torch.equal(found.pred_classes, classes[order])
    torch.testing.assert_close(found.pred_boxes.tensor, own.pred_boxes.tensor[order])
    if own.has("pred_masks"):
        assert torch.equal(found.pred_masks, own.pred_masks[order])
    for key, value in detector.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_wrapping_changes_the_vocabulary_and_refuses_mistakes():
    model = regionspot_d2.wrap(fcos(), tiny_model(), vocabulary=["cup"])
    model.set_vocabulary(["cat", "dog"])
    assert set(model(inputs())[0]["instances"].pred_classes.tolist()) <= {0, 1}
    with pytest.raises(ValueError, match="twice"):
        model.set_vocabulary(["cat", "cat"])
    with pytest.raises(ValueError, match="input_format"):
        regionspot_d2.wrap(fcos(), tiny_model(), vocabulary=["cup"], input_format="rgb")


def plugged_cfg(host: str, masks: bool) -> CfgNode:
    cfg = zoo_cfg(MASK_RCNN)
    add_regionspot_config(cfg)
    small = tiny.tiny_cfg()
    for key in ("LOCALIZER", "VISION_LANGUAGE", "REGION_HEAD"):
        cfg.MODEL[key] = small.MODEL[key]
    cfg.MODEL.MASK_ON = masks
    cfg.MODEL.ROI_HEADS.NAME = "RegionSpotROIHeads"
    cfg.MODEL.ROI_HEADS.HOST = host
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.DATASETS.TEST = ("regionspot_pets",)
    return cfg


def build_plugged(host: str = "", masks: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(plugged_cfg(host, masks))
    tiny.fill_golden(model.roi_heads.regionspot.region_head)
    return model


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("host", ["", "StandardROIHeads", "CascadeROIHeads"])
def test_roi_heads_name_what_the_detector_finds(host, masks):
    model = build_plugged(host, masks).eval()
    batch = inputs() + [{"image": torch.zeros(3, 40, 50)}]
    with torch.no_grad():
        results = [r["instances"] for r in model(batch)]
    assert [r.image_size for r in results] == [(128, 192), (40, 50)]
    for found in results:
        assert len(found) > 0 and found.scores.isfinite().all()
        assert set(found.pred_classes.tolist()) <= {0, 1, 2}
        assert found.has("pred_masks") == masks
        if masks:
            assert found.pred_masks.shape[1:] == found.image_size


def test_roi_heads_see_the_image_as_it_was():
    model = build_plugged().eval()
    batch = inputs()
    seen: list[torch.Tensor] = []
    encoder = model.roi_heads.regionspot.vision_language
    encoder.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[0]))
    with torch.no_grad():
        model(batch)
    [pixels] = seen
    torch.testing.assert_close(pixels, batch[0]["image"].flip(0).float(), atol=1e-3, rtol=0)


def test_roi_heads_name_as_regionspot_does():
    model = build_plugged().eval()
    batch = inputs()
    with torch.no_grad():
        images = model.preprocess_image(batch)
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor), None)
        [found], _ = model.roi_heads(images, {}, copy.deepcopy(proposals))
    regionspot: RegionSpot = model.roi_heads.regionspot
    image = batch[0]["image"].flip(0)
    order = proposals[0].objectness_logits.argsort(descending=True)[:6]
    boxes = proposals[0].proposal_boxes[order]
    logits = tiny.classify(regionspot, image, boxes, WORDS["regionspot_pets"])
    scores, classes = logits.softmax(1).max(1)
    objectness = proposals[0].objectness_logits[order].sigmoid()
    torch.testing.assert_close(found.scores, scores * objectness, atol=1e-4, rtol=1e-3)
    assert torch.equal(found.pred_classes, classes)


def test_training_falls_and_the_host_learns_too():
    model = build_plugged("StandardROIHeads").train()
    targets = Instances((64, 96))
    targets.gt_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40], [50, 10, 90, 60]]))
    targets.gt_classes = torch.tensor([0, 2])
    batch = [{**inputs()[0], "instances": targets}]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    totals = []
    with EventStorage():
        for _ in range(12):
            losses = model(batch)
            assert {"loss_regionspot", "loss_cls", "loss_box_reg", "loss_rpn_cls"} <= losses.keys()
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            totals.append(losses["loss_regionspot"].item())
    assert sum(totals[-3:]) < 0.7 * sum(totals[:3])


def test_training_without_targets_is_refused():
    model = build_plugged().train()
    with pytest.raises(ValueError, match="targets"):
        images = model.preprocess_image(inputs())
        model.roi_heads(images, {}, [], None)


def test_a_checkpoint_of_the_detector_holds_its_heads_but_no_tower():
    keys = build_plugged("StandardROIHeads").state_dict().keys()
    assert any(key.startswith("roi_heads.host.box_head.") for key in keys)
    assert any(key.startswith("roi_heads.regionspot.region_head.") for key in keys)
    assert not any("localizer" in key or "vision_language" in key for key in keys)


@pytest.fixture
def detector_file(tmp_path) -> tuple[torch.nn.Module, Path]:
    """A finished Mask R-CNN of three classes, and its checkpoint."""
    cfg = zoo_cfg(MASK_RCNN)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    torch.manual_seed(7)
    detector = build_model(cfg).eval()
    DetectionCheckpointer(detector, str(tmp_path)).save("detector")
    return detector, tmp_path / "detector.pth"


@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, RegionSpotCheckpointer])
def test_a_finished_detector_becomes_the_host(detector_file, checkpointer, caplog):
    detector, path = detector_file
    model = build_plugged("StandardROIHeads", masks=True).eval()
    head = copy.deepcopy(model.roi_heads.regionspot.region_head.state_dict())
    checkpointer(model).load(str(path))
    found = model(inputs())[0]["instances"]
    own = detector(inputs())[0]["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, own.pred_boxes.tensor)
    assert torch.equal(found.host_classes, own.pred_classes)
    assert torch.equal(found.pred_masks, own.pred_masks)
    # The head may come from a file of its own, before or after.
    for key, value in model.roi_heads.regionspot.region_head.state_dict().items():
        assert torch.equal(value, head[key])
    if checkpointer is RegionSpotCheckpointer:
        assert "detector without a region head" in caplog.text


def test_masks_of_detections_are_those_of_the_hosts_classes():
    model = build_plugged("StandardROIHeads", masks=True).eval()
    # More names than the host has classes.
    model.roi_heads.vocabulary = [f"word {i}" for i in range(50)]
    with torch.no_grad():
        [found] = model.inference(inputs(), do_postprocess=False)
        again = [Instances(found.image_size, **copy.deepcopy(found.get_fields()))]
        again[0].remove("pred_masks")
        [again] = model.inference(inputs(), detected_instances=again, do_postprocess=False)
    assert int(found.pred_classes.max()) >= 3
    assert torch.equal(again.pred_masks, found.pred_masks)
    assert torch.equal(again.pred_classes, found.pred_classes)


def test_a_missing_vocabulary_is_an_error():
    cfg = plugged_cfg("", False)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ()
    heads = build_model(cfg).roi_heads
    with pytest.raises(ValueError, match="no vocabulary"):
        assert heads.class_names
    heads.vocabulary = ["cat"]
    assert heads.class_names == ["cat"]
    assert MetadataCatalog.get("regionspot_pets").thing_classes == WORDS["regionspot_pets"]
