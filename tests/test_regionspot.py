"""The meta-architecture: Detectron2's contract, invariances, scores, losses, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

from regionspot_d2.modeling import BoxPrompts

from . import tiny
from .tiny import WORDS, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")


def random_input(seed: int, size: tuple[int, int], regions: int, name: str = "regionspot_pets"):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    corners = torch.rand(regions, 2, 2, generator=generator).sort(dim=1).values
    boxes = (corners * torch.tensor([size[1], size[0]])).reshape(-1, 4)
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(boxes)
    proposals.objectness_logits = torch.rand(regions, generator=generator)
    targets = Instances(size)
    targets.gt_boxes = Boxes(boxes.clone())
    count = len(WORDS[name])
    targets.gt_classes = torch.randint(0, count, (regions,), generator=generator)
    return {
        "image": image,
        "height": size[0],
        "width": size[1],
        "dataset_name": name,
        "proposals": proposals,
        "instances": targets,
    }


def assert_same(found: Instances, expected: Instances) -> None:
    assert found.image_size == expected.image_size
    assert len(found) == len(expected)
    order = [i.region_index * 1000 + i.pred_classes for i in (found, expected)]
    found, expected = found[order[0].argsort()], expected[order[1].argsort()]
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, expected.pred_masks)


def test_batch_of_different_sizes_datasets_and_counts_equals_one_by_one():
    model = tiny_model()
    inputs = [
        random_input(0, (60, 90), 4),
        random_input(1, (120, 50), 0),
        random_input(2, (33, 200), 7, "regionspot_food"),
    ]
    together = model(inputs)
    for x, result in zip(inputs, together):
        assert_same(result["instances"], model([x])[0]["instances"])
    assert [len(r["instances"]) for r in together] == [12, 0, 14]


def test_order_of_regions_does_not_matter():
    model = tiny_model()
    x = random_input(3, (60, 90), 6)
    [straight] = model([x])
    order = torch.randperm(6)
    shuffled = {**x, "proposals": x["proposals"][order]}
    [found] = model([shuffled])
    found = found["instances"]
    found.region_index = order[found.region_index]
    assert_same(found, straight["instances"])


def test_scores_are_softmax_times_proposal_score():
    model = tiny_model()
    x = random_input(4, (60, 90), 5)
    [result] = model([x])
    found = result["instances"]
    logits = tiny.classify(
        model, x["image"], x["proposals"].proposal_boxes, WORDS["regionspot_pets"]
    )
    expected = logits.softmax(1) * x["proposals"].objectness_logits[:, None]
    torch.testing.assert_close(found.scores, expected[found.region_index, found.pred_classes])
    assert (found.scores.diff() <= 0).all()
    assert len({*zip(found.region_index.tolist(), found.pred_classes.tolist())}) == 15


def test_published_order_keeps_pairs_by_softmax_first():
    x = random_input(4, (60, 90), 5)
    x["proposals"].objectness_logits = torch.tensor([0.9, 1e-3, 0.5, 1e-3, 0.7])
    everything = tiny_model()([x])[0]["instances"]
    found = tiny_model(keep_before_proposal_score=4)([x])[0]["instances"]
    softmax = everything.scores / x["proposals"].objectness_logits[everything.region_index]
    kept = softmax.topk(4).indices.sort().values
    assert torch.equal(found.region_index, everything.region_index[kept])
    torch.testing.assert_close(found.scores, everything.scores[kept])


def test_threshold_and_cap():
    x = random_input(5, (60, 90), 6)
    everything = tiny_model()([x])[0]["instances"]
    capped = tiny_model(max_detections=4)([x])[0]["instances"]
    torch.testing.assert_close(capped.scores, everything.scores[:4])
    thresh = float(everything.scores[7])
    above = tiny_model(score_thresh=thresh)([x])[0]["instances"]
    torch.testing.assert_close(above.scores, everything.scores[everything.scores > thresh])


def test_results_have_the_requested_size():
    model = tiny_model()
    x = random_input(6, (60, 90), 3)
    small = model([x])[0]["instances"]
    big = model([{**x, "height": 120, "width": 180}])[0]["instances"]
    assert big.image_size == (120, 180) and big.pred_masks.shape[1:] == (120, 180)
    torch.testing.assert_close(big.pred_boxes.tensor, small.pred_boxes.tensor * 2)
    raw = model.inference([{**x, "height": 120, "width": 180}], do_postprocess=False)[0]
    assert_same(raw, small)


def test_detected_instances_are_regions_too():
    model = tiny_model()
    x = random_input(7, (60, 90), 5)
    detected = Instances((60, 90), pred_boxes=x["proposals"].proposal_boxes)
    detected.scores = x["proposals"].objectness_logits
    without = {key: value for key, value in x.items() if key != "proposals"}
    assert_same(model.inference([without], [detected])[0]["instances"], model([x])[0]["instances"])


def test_masks_off():
    x = random_input(8, (60, 90), 3)
    found = tiny_model(with_masks=False)([x])[0]["instances"]
    assert not found.has("pred_masks")
    torch.testing.assert_close(found.scores, tiny_model()([x])[0]["instances"].scores)


def test_bgr_inputs():
    x = random_input(9, (60, 90), 3)
    found = tiny_model(input_format="BGR")([{**x, "image": x["image"].flip(0)}])
    assert_same(found[0]["instances"], tiny_model()([x])[0]["instances"])


def test_loss_is_summed_over_names_and_averaged_over_regions():
    model = tiny_model().train()
    model.region_head.eval()  # without dropout
    inputs = [random_input(10, (60, 90), 3), random_input(11, (50, 50), 4, "regionspot_food")]
    with EventStorage() as storage:
        loss = model(inputs)["loss_cls"]
        accuracy = storage.history("[metric]accuracy").latest()
    total, right = 0.0, 0
    for x in inputs:
        words = WORDS[x["dataset_name"]]
        logits = tiny.classify(model, x["image"], x["instances"].gt_boxes, words)
        for logit, label in zip(logits, x["instances"].gt_classes):
            target = torch.zeros(len(words))
            target[label] = 1
            total += sigmoid_focal_loss(logit, target, alpha=0.25, gamma=2.0).sum()
            right += int(logit.argmax() == label)
    torch.testing.assert_close(loss, total / 7)
    assert accuracy == pytest.approx(right / 7)


def test_only_the_head_learns_and_cached_tokens_give_the_same_loss():
    model = tiny_model().train()
    model.region_head.eval()
    inputs = [random_input(12, (60, 90), 3), random_input(13, (50, 50), 0)]
    live = model(inputs)["loss_cls"]
    live.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("region_head.")
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    tokens, _ = model.localizer(
        [x["image"] for x in inputs],
        [BoxPrompts(x["instances"].gt_boxes) for x in inputs],
        with_masks=False,
    )
    model.localizer.encode_images = None  # must not run
    cached = [{**x, "mask_tokens": token} for x, token in zip(inputs, tokens)]
    torch.testing.assert_close(model(cached)["loss_cls"], live)


def test_a_batch_without_regions_trains_on():
    model = tiny_model().train()
    loss = model([random_input(14, (60, 90), 0)])["loss_cls"]
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.region_head.parameters())


def test_checkpoint_holds_only_the_head_and_loads(tmp_path):
    model = tiny_model()
    DetectionCheckpointer(model, str(tmp_path)).save("head")
    saved = torch.load(tmp_path / "head.pth", weights_only=True)["model"]
    assert saved.keys() == {f"region_head.{name}" for name in model.region_head.state_dict()}
    other = tiny_model()
    for parameter in other.region_head.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(saved, strict=True)
    x = random_input(15, (60, 90), 3)
    assert_same(other([x])[0]["instances"], model([x])[0]["instances"])


def test_frozen_parts_stay_frozen():
    model = tiny_model().train()
    assert model.region_head.training
    assert not any(m.training for m in model.localizer.modules())
    assert not any(m.training for m in model.vision_language.modules())
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_an_input_without_regions_says_where_they_come_from():
    x = random_input(16, (60, 90), 3)
    del x["proposals"]
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS"):
        tiny_model()([x])


def test_boxes_that_are_not_numbers_are_named():
    x = random_input(17, (60, 90), 3)
    x["proposals"].proposal_boxes.tensor[1, 2] = float("nan")
    with pytest.raises(ValueError, match="Box 1 of input 0"):
        tiny_model()([{**x, "file_name": "a.jpg"}])


def test_a_missing_vocabulary_is_named():
    x = random_input(18, (60, 90), 3)
    x["dataset_name"] = "regionspot_no_words"
    with pytest.raises(ValueError, match="regionspot_no_words.*thing_classes"):
        tiny_model()([x])
    MetadataCatalog.remove("regionspot_no_words")


def test_boxes_outside_or_without_area_get_an_answer():
    x = random_input(19, (60, 90), 4)
    x["proposals"].proposal_boxes = Boxes(
        torch.tensor(
            [[-20.0, -5, 30, 40], [80, 50, 300, 400], [10, 10, 10, 30], [200, 200, 300, 300]]
        )
    )
    x["proposals"].objectness_logits = torch.ones(4)
    found = tiny_model()([x])[0]["instances"]
    assert found.scores.isfinite().all()
    # Detectron2 drops boxes without area from results, as for any detector.
    assert found.region_index.unique().tolist() == [0, 1]


def test_a_missing_weights_file_is_reported_before_anything_is_built(monkeypatch):
    cfg = tiny.tiny_cfg()
    cfg.MODEL.VISION_LANGUAGE.WEIGHTS = "no/such/file.pt"
    cfg.MODEL.LOCALIZER.ARCH = "would fail if it were built"
    with pytest.raises(FileNotFoundError, match="MODEL.VISION_LANGUAGE.WEIGHTS"):
        build_model(cfg)


def test_config_keys_reach_the_model(tiny_models):
    cfg = tiny.tiny_cfg()
    cfg.DATASETS.TRAIN = ("regionspot_food",)
    cfg.MODEL.MASK_ON = False
    cfg.TEST.DETECTIONS_PER_IMAGE = 17
    cfg.TEST.KEEP_BEFORE_PROPOSAL_SCORE = 900
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.25
    cfg.INPUT.FORMAT = "BGR"
    cfg.MODEL.LOCALIZER.CHUNK_SIZE = 5
    cfg.MODEL.REGION_HEAD.DEPTH = 2
    model = build_model(cfg)
    assert not model.with_masks and model.max_detections == 17 and model.score_thresh == 0.25
    assert model.keep_before_proposal_score == 900 and model.input_format == "BGR"
    assert model.default_dataset == "regionspot_food"
    assert model.localizer.chunk_size == 5 and len(model.region_head.decoder.layers) == 2


def test_thousand_boxes():
    x = random_input(20, (60, 90), 1000)
    found = tiny_model(with_masks=False)([x])[0]["instances"]
    assert len(found) == 3000
