"""Automatic masks: segment-anything's own for SAM, and the same grid and filters for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from torch import Tensor

from regionspot_d2.data.proposals import read_proposals
from regionspot_d2.modeling import Localizer, PointPrompts, SamLocalizer
from regionspot_d2.modeling.automatic_masks import automatic_boxes

from . import tiny
from .datasets_on_disk import write_coco
from .tiny_transformers import tiny_transformers_sam
from .tools import load_tool

# What random masks pass.
LOOSE = {
    "points_per_side": 3,
    "pred_iou_thresh": -10.0,
    "stability_score_thresh": 0.0,
    "stability_score_offset": 0.05,
}


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1)


def sam_localizer() -> SamLocalizer:
    with tiny.registered_tiny_models():
        return SamLocalizer(tiny.tiny_cfg())


def transformers_localizer(name: str = "Sam2Model") -> Localizer:
    pytest.importorskip("transformers")
    from regionspot_d2.modeling import TransformersSam

    return TransformersSam(model=tiny_transformers_sam(name))


def rings(image: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Three rings around each point, whose sizes and ratings the image decides: (P, 3, H, W)."""
    height, width = image.shape[-2:]
    values = image[:, points[:, 1].long(), points[:, 0].long()].T / 255
    ys, xs = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    x, y = points.T[:, :, None, None, None]
    distances = ((xs - x) ** 2 + (ys - y) ** 2).sqrt().expand(-1, 3, -1, -1)
    radii = (values * 12 + torch.tensor([4.0, 8.0, 14.0]))[..., None, None]
    return torch.minimum(radii - distances, distances - 2.5), values.flip(1)


class Rings(Localizer):
    """What they are the masks of."""

    token_dim = 1

    def encode_images(self, images):
        return [image.float() for image in images]

    def decode(self, embedding, image_size, prompts, *, with_masks):
        raise AssertionError("only points are decoded")

    def decode_points(self, embedding, image_size, points, *, multimask=False):
        assert multimask and image_size == embedding.shape[-2:]
        logits, ious = rings(embedding, points)
        return points.repeat_interleave(3, 0), logits.flatten(0, 1)[:, None], ious.flatten()

    def full_size_masks(self, mask_logits, image_size, output_size=None):
        return mask_logits[:, 0] > 0


class RingsPredictor:
    """The same for segment-anything, in place of its ``SamPredictor``."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model, self.transform = model, self

    def apply_coords(self, points, size):
        return points

    def set_image(self, pixels):
        self.pixels = torch.from_numpy(pixels).permute(2, 0, 1).float()

    def reset_image(self):
        del self.pixels

    def predict_torch(self, points, labels, *, multimask_output, return_logits):
        return *rings(self.pixels, points[:, 0].float()), None


@pytest.mark.parametrize(
    "settings",
    [
        {"box_nms_thresh": 0.5},
        {"stability_score_thresh": 0.8, "points_per_batch": 2},
        {"pred_iou_thresh": 0.4, "stability_score_offset": 2.0},
        {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.4},
        {"min_mask_region_area": 30},
        {"crop_n_layers": 1, "min_mask_region_area": 30, "box_nms_thresh": 0.9},
    ],
    ids="-".join,
)
def test_they_are_those_of_segment_anything(image: Tensor, settings: dict[str, Any]) -> None:
    settings = {**LOOSE, "points_per_side": 6, **settings}
    stock = SamAutomaticMaskGenerator(tiny.build_tiny_sam(), **settings)
    stock.predictor = RingsPredictor(stock.predictor.model)
    expected = stock.generate(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))

    found = automatic_boxes(Rings(), image, with_masks=True, **settings)

    scores = {
        m["segmentation"].tobytes(): m["predicted_iou"] * m["stability_score"] for m in expected
    }
    assert 5 < len(expected) < (6 * 6 + 4 * 6 * 6) * 3
    assert len(found) == len(expected)
    assert {mask.numpy().tobytes() for mask in found.pred_masks} == scores.keys()
    wanted = [scores[mask.numpy().tobytes()] for mask in found.pred_masks]
    assert found.scores.tolist() == pytest.approx(wanted, abs=1e-6)
    assert (found.scores.diff() <= 0).all()
    without = automatic_boxes(Rings(), image, **settings)
    assert torch.equal(without.pred_boxes.tensor, found.pred_boxes.tensor)


@pytest.mark.parametrize("name", ["SamModel", "SamHQModel", "Sam2Model", "EdgeTamModel"])
def test_a_localizer_of_transformers(image: Tensor, name: str) -> None:
    localizer = transformers_localizer(name)
    found = automatic_boxes(localizer, image, with_masks=True, **LOOSE, box_nms_thresh=1.0)

    [embedding] = localizer.encode_images([image])
    steps = (torch.arange(3) + 0.5) / 3
    points = torch.cartesian_prod(steps * 90, steps * 120).flip(1)
    tokens, logits, ious = localizer.decode_points(embedding, (90, 120), points, multimask=True)
    # transformers sorts the masks of SAM-HQ, so the localizer stays with the one whose token it is.
    assert len(tokens) == len(logits) == len(ious) == (9 if name == "SamHQModel" else 27)
    masks = localizer.full_size_masks(logits, (90, 120))
    assert 2 < len(found) == masks.flatten(1).any(1).sum()
    areas = sorted(found.pred_masks.flatten(1).sum(1).tolist())
    assert areas == sorted(area for area in masks.flatten(1).sum(1).tolist() if area)
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.tolist()):
        ys, xs = mask.nonzero().unbind(1)
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("name", ["SamModel", "Sam2Model", "EdgeTamModel", "Sam3TrackerModel"])
@torch.no_grad()
def test_the_masks_of_a_point_are_transformers_own(image: Tensor, name: str) -> None:
    localizer = transformers_localizer(name)
    model, point = localizer.model, torch.tensor([[30.0, 50.0]])
    heard: list[Tensor] = []
    hook = model.mask_decoder.transformer.register_forward_hook(lambda *a: heard.append(a[2][0]))
    height, width = localizer.input_size((90, 120))
    expected = model(
        localizer.preprocess(image)[None],
        input_points=(point * point.new_tensor([width / 120, height / 90]))[None, None],
        input_labels=torch.ones(1, 1, 1, dtype=torch.int64),
        multimask_output=True,
    )
    hook.remove()
    [embedding] = localizer.encode_images([image])
    tokens, logits, ious = localizer.decode_points(embedding, (90, 120), point, multimask=True)
    torch.testing.assert_close(logits[:, 0], expected.pred_masks[0, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ious, expected.iou_scores[0, 0], atol=1e-5, rtol=0)
    first = 2 if name == "SamModel" else 3
    torch.testing.assert_close(tokens, heard[0][0, 0, first : first + 3], atol=1e-5, rtol=0)


def test_kinds_of_tokens_go_with_several_masks(image: Tensor) -> None:
    localizer = transformers_localizer()
    [embedding] = localizer.encode_images([image])
    points = torch.tensor([[30.0, 50.0], [80.0, 20.0]])
    tokens = {}
    for localizer.tokens in ("prompt", "mask", "both"):
        tokens[localizer.tokens] = localizer.decode_points(
            embedding, (90, 120), points, multimask=True
        )[0]
    both = torch.cat([tokens["prompt"], tokens["mask"]], dim=1)
    torch.testing.assert_close(tokens["both"], both)
    assert torch.equal(tokens["prompt"][0], tokens["prompt"][2])
    assert not torch.equal(tokens["prompt"][2], tokens["prompt"][3])


@pytest.mark.parametrize("layers, encoded", [(0, 1), (1, 5)])
def test_an_image_and_each_crop_is_encoded_once(image, monkeypatch, layers, encoded) -> None:
    localizer = sam_localizer()
    sizes = []
    encode = localizer.encode_images
    monkeypatch.setattr(
        localizer, "encode_images", lambda x: [sizes.extend(map(np.shape, x)), encode(x)][1]
    )
    automatic_boxes(localizer, image, **LOOSE, crop_n_layers=layers, points_per_batch=1)
    assert len(sizes) == encoded and tuple(sizes[0]) == (3, 90, 120)


def test_a_localizer_without_masks_is_told(image: Tensor) -> None:
    class NoMasks(Localizer):
        token_dim = 2

        def encode_images(self, images):
            return [None] * len(images)

        def decode(self, embedding, image_size, prompts, *, with_masks):
            assert isinstance(prompts, PointPrompts)
            return torch.zeros(len(prompts), 2), None

        def full_size_masks(self, mask_logits, image_size, output_size=None):
            raise AssertionError

    with pytest.raises(ValueError, match="MODEL.LOCALIZER.NAME: NoMasks finds no masks"):
        automatic_boxes(NoMasks(), image)


def test_proposals_of_a_localizer_of_transformers(tmp_path: Path) -> None:
    """tools/prepare_proposals.py --source sam asks the localizer of the config."""
    pytest.importorskip("transformers")
    tiny_transformers_sam("Sam2Model").save_pretrained(tmp_path / "model")
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOCALIZER.NAME, cfg.MODEL.LOCALIZER.ARCH = "TransformersSam", str(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    annotations, images = write_coco(tmp_path)
    tool = load_tool("prepare_proposals")
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in LOOSE.items()]
    command = ["--dataset", "sam2_shapes", "--source", "sam", "--output", str(tmp_path / "p.pkl")]
    command += ["--config-file", str(tmp_path / "config.yaml"), *settings]
    tool.invoke_main(
        [*command, "DATASETS.COCO_FORMAT", f"[['sam2_shapes', '{annotations}', '{images}']]"]
    )
    proposals, info = read_proposals(str(tmp_path / "p.pkl"))
    assert (
        len(proposals) == 4 and info["boxes"] == sum(len(x.scores) for x in proposals.values()) > 0
    )
