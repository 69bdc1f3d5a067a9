"""MODEL.PRECISION: frozen models in half precision, results in float32, in any context."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling import BoxPrompts
from regionspot_d2.modeling.precision import precision_on

from . import tiny

pytestmark = pytest.mark.usefixtures("vocabularies")
NAMES = tiny.WORDS["regionspot_pets"]


def asked(model, context=nullcontext, later=nullcontext, **question) -> Instances:
    """The answer to the golden boxes, and each name's score."""
    predictor = RegionSpotPredictor(model)
    with context():
        predictor.set_image(torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1))
    with later():
        question = question or {"boxes": tiny.golden()["boxes"]}
        return predictor.predict(vocabulary=NAMES, topk=len(NAMES), **question)


def in_order(found: Instances) -> torch.Tensor:
    """Scores (regions, names)."""
    scores = found.scores.new_zeros(int(found.region_index.max()) + 1, len(NAMES))
    scores[found.region_index, found.pred_classes] = found.scores
    return scores


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def questions() -> dict[str, dict]:
    boxes = tiny.golden()["boxes"]
    masks = torch.zeros(1, 90, 120, dtype=torch.bool)
    masks[:, 20:60, 30:80] = True
    points = boxes[:, :2] + 3
    return {
        "boxes": {"boxes": boxes},
        "all kinds": {"boxes": boxes, "points": points, "masks": masks},
        "zoom": {"boxes": boxes, "zoom": 2.0},
    }


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "auto"])
@pytest.mark.parametrize("given", questions().values(), ids=questions())
def test_half_precision_is_close_and_returns_float32(precision, given):
    exact = in_order(asked(tiny.tiny_model(), **given))
    found = asked(tiny.tiny_model(precision=precision), **given)
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    torch.testing.assert_close(in_order(found), exact, atol=0.01, rtol=0)


def test_the_frozen_models_run_in_it():
    model = tiny.tiny_model(precision="bfloat16")
    seen = set()
    for part in (
        model.localizer.image_encoder.blocks[0].mlp.lin1,
        model.localizer.mask_decoder.transformer.layers[0].self_attn.q_proj,
        model.vision_language.model.visual.transformer.resblocks[0].mlp.c_fc,
        model.region_head.projector,
    ):
        part.register_forward_hook(lambda part, _, output: seen.add((part, output.dtype)))
    asked(model)
    dtypes = [dtype for part, dtype in seen if part is not model.region_head.projector]
    assert dtypes == [torch.bfloat16] * 3
    assert (model.region_head.projector, torch.float32) in seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("zoom", [0.0, 2.0])
def test_the_context_does_not_matter(precision, zoom):
    model = tiny.tiny_model(precision=precision, zoom=zoom)
    outside = asked(model)
    for contexts in ((autocast, nullcontext), (nullcontext, autocast), (autocast, autocast)):
        found = asked(model, *contexts)
        assert torch.equal(found.scores, outside.scores)
        assert torch.equal(found.pred_masks, outside.pred_masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", questions().values(), ids=questions())
def test_a_model_that_was_cast_runs_in_its_own_dtype(dtype, given):
    exact = in_order(asked(tiny.tiny_model(), **given))
    found = asked(tiny.tiny_model().to(dtype), **given)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(in_order(found), exact, atol=0.05, rtol=0)


def test_everything_in_half_precision():
    predictor = RegionSpotPredictor(tiny.tiny_model(precision="bfloat16"))
    with autocast():
        predictor.set_image(torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1))
    found = predictor.everything(vocabulary=NAMES)
    assert found.scores.dtype == torch.float32


def trained_part(model) -> torch.Tensor:
    """The gradient of the head after a step, and that its loss is float32."""
    model.train()
    instances = Instances((90, 120))
    instances.gt_boxes = Boxes(torch.from_numpy(tiny.golden()["boxes"]))
    instances.gt_classes = torch.zeros(len(instances), dtype=torch.int64)
    image = torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1)
    x = {"image": image, "dataset_name": "regionspot_pets", "instances": instances}
    loss = model([x])["loss_cls"]
    loss.backward()
    assert loss.dtype == torch.float32
    return torch.cat([p.grad.flatten() for p in model.region_head.parameters()])


def test_training_beside_half_precision():
    torch.manual_seed(0)
    exact = trained_part(tiny.tiny_model())
    torch.manual_seed(0)
    found = trained_part(tiny.tiny_model(precision="bfloat16"))
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_places_stay_exact():
    # In bfloat16 these two boxes would be one, and so would their tokens.
    model = tiny.tiny_model(precision="bfloat16")
    boxes = Boxes(torch.tensor([[100.0, 70.0, 115.0, 88.0], [100.1, 70.1, 115.1, 88.1]]))
    encoded = model.encode([torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1)])
    tokens, _ = encoded.localize(0, BoxPrompts(boxes), with_masks=False)
    assert tokens.dtype == torch.float32
    assert (tokens[0] - tokens[1]).abs().max() > 0


def test_a_config_chooses(tiny_models):
    cfg = tiny.tiny_cfg()
    assert cfg.MODEL.PRECISION == "float32"
    cfg.MODEL.PRECISION = "bfloat16"
    assert build_model(cfg).precision == "bfloat16"
    cfg.MODEL.PRECISION = "half"
    with pytest.raises(ValueError, match="MODEL.PRECISION is 'half'; it must be one of float32"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),  # other architectures
    ],
)
def test_auto_asks_the_cpu(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert precision_on("auto", torch.device("cpu")) == dtype
