"""SamLocalizer gives stock SAM's tokens.

The result does not depend on their order, the chunks, or the kinds of the other prompts.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from regionspot_d2.modeling import BoxPrompts, MaskPrompts, PointPrompts, SamLocalizer

from . import tiny
from .tools import needs_gpu


def build(**options) -> SamLocalizer:
    parts = dict(zip(("image_encoder", "prompt_encoder", "mask_decoder"), tiny.tiny_sam()))
    mean, std = list(tiny.SAM_PIXEL_MEAN), list(tiny.SAM_PIXEL_STD)
    return SamLocalizer(**parts, pixel_mean=mean, pixel_std=std, **options)


@pytest.fixture(scope="module")
def localizer() -> SamLocalizer:
    return build()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1)


@pytest.fixture(scope="module")
def boxes() -> torch.Tensor:
    return torch.from_numpy(tiny.golden()["boxes"])


def decode(localizer, image, prompts):
    [embedding] = localizer.encode_images([image])
    return localizer.decode(embedding, image.shape[-2:], prompts, with_masks=True)


def box_prompts(values: torch.Tensor) -> BoxPrompts:
    return BoxPrompts(Boxes(values))


def stock_points(image, points, labels):
    """Stock SAM's token and low-resolution mask for one point prompt."""
    sam = tiny.build_tiny_sam()
    kept = []
    sam.mask_decoder.transformer.register_forward_hook(lambda *args: kept.append(args[2][0][:, 1]))
    predictor = SamPredictor(sam)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    _, _, low = predictor.predict(
        points.numpy(), labels.numpy(), multimask_output=False, return_logits=True
    )
    return kept[0], torch.from_numpy(low)


def test_chunks_do_not_matter(image, boxes, localizer):
    tokens, masks = decode(localizer, image, box_prompts(boxes))
    for size in (0, 1, 2, 5, 100):
        found, found_masks = decode(build(chunk_size=size), image, box_prompts(boxes))
        torch.testing.assert_close(found, tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(found_masks, masks, atol=1e-4, rtol=0)


def test_a_negative_chunk_is_refused():
    with pytest.raises(ValueError, match="CHUNK_SIZE is -1; it must be a number of prompts, or 0"):
        build(chunk_size=-1)


def test_order_does_not_matter(image, boxes, localizer):
    order = torch.randperm(len(boxes))
    tokens, _ = decode(localizer, image, box_prompts(boxes))
    shuffled, _ = decode(localizer, image, box_prompts(boxes[order]))
    torch.testing.assert_close(shuffled, tokens[order], atol=1e-5, rtol=0)


def test_images_of_a_batch_do_not_matter_to_each_other(image, boxes, localizer):
    other = torch.randint(0, 256, (3, 50, 33), dtype=torch.uint8)
    box = torch.tensor([[3.0, 4.0, 20.0, 40.0]])
    tokens, masks = localizer([image, other], [box_prompts(boxes), box_prompts(box)])
    for i, (alone, prompt) in enumerate([(image, boxes), (other, box)]):
        expected, expected_masks = decode(localizer, alone, box_prompts(prompt))
        torch.testing.assert_close(tokens[i], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(masks[i], expected_masks, atol=1e-4, rtol=0)


def test_points_equal_stock_sam_whatever_the_other_prompts(image, localizer):
    points = torch.tensor([[[60.0, 60.0], [0, 0], [0, 0]], [[80, 30], [20, 50], [100, 80]]])
    labels = torch.tensor([[1, -1, -1], [1, 0, 0]])
    tokens, masks = decode(localizer, image, PointPrompts(points, labels))
    for i, count in enumerate([1, 3]):
        expected, low = stock_points(image, points[i, :count], labels[i, :count])
        torch.testing.assert_close(tokens[i : i + 1], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(masks[i], low, atol=1e-4, rtol=0)


def test_padding_points_may_be_anywhere(image, localizer):
    points = torch.tensor([[[60.0, 60.0], [20, 50]]])
    first = PointPrompts(torch.cat([torch.zeros(1, 1, 2), points], 1), torch.tensor([[-1, 1, 0]]))
    expected, _ = decode(localizer, image, PointPrompts(points, torch.tensor([[1, 0]])))
    torch.testing.assert_close(decode(localizer, image, first)[0], expected)


def test_a_region_without_points_is_refused(image, localizer):
    prompts = PointPrompts(torch.zeros(2, 1, 2), torch.tensor([[1], [-1]]))
    with pytest.raises(ValueError, match="Point prompt 1"):
        decode(localizer, image, prompts)


def test_masks_are_prompts_of_their_own(image, boxes, localizer):
    masks = torch.zeros(3, 90, 120, dtype=torch.bool)
    masks[0, 52:69, 54:82] = masks[1, 8:31, 58:67] = True
    masks[2, 52:69, 54:70] = masks[2, 60:69, 54:82] = True  # the box of mask 0, another shape
    tokens, logits = decode(localizer, image, MaskPrompts(masks))
    assert logits.shape == (3, 1, 32, 32)
    assert (tokens[0] - tokens[2]).abs().max() > 1e-3
    by_box, _ = decode(localizer, image, BoxPrompts(MaskPrompts(masks).boxes((90, 120))))
    assert (tokens - by_box).abs().max() > 1e-3
    small, _ = decode(build(chunk_size=1), image, MaskPrompts(masks))
    torch.testing.assert_close(small, tokens, atol=1e-5, rtol=0)


def test_no_prompts(image, localizer):
    empty = [
        box_prompts(torch.zeros(0, 4)),
        PointPrompts(torch.zeros(0, 1, 2), torch.zeros(0, 1)),
        MaskPrompts(torch.zeros(0, 90, 120)),
    ]
    for prompts in empty:
        tokens, masks = decode(localizer, image, prompts)
        assert tokens.shape == (0, 32) and masks.shape == (0, 1, 32, 32)
    assert localizer.full_size_masks(masks, (90, 120)).shape == (0, 90, 120)
    assert localizer([], []) == ([], [])


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2000, 3)])
def test_tiny_and_thin_images(size, localizer):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    tokens, masks = decode(
        localizer, image, box_prompts(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
    )
    assert tokens.isfinite().all()
    assert localizer.full_size_masks(masks, size).shape == (1, *size)


def test_kinds_of_tokens(image, boxes):
    mask, _ = decode(build(tokens="mask"), image, box_prompts(boxes))
    prompt, _ = decode(build(tokens="prompt"), image, box_prompts(boxes))
    both_model = build(tokens="both")
    both, _ = decode(both_model, image, box_prompts(boxes))
    assert both_model.token_dim == both.shape[1] == 64
    torch.testing.assert_close(both, torch.cat([prompt, mask], 1))
    # A prompt token depends only on the place, a mask token also on the image.
    dark = torch.zeros_like(image)
    torch.testing.assert_close(decode(build(tokens="prompt"), dark, box_prompts(boxes))[0], prompt)
    assert (decode(build(), dark, box_prompts(boxes))[0] - mask).abs().max() > 1e-3


EDGE_SIZES = [(1, 1), (1, 128), (128, 1), (2, 1000), (1000, 3), (128, 128), (127, 129), (64, 48)]


def images_to_resize(count: int) -> list[torch.Tensor]:
    """Noise, stripes, gradients and two-valued images, of sides from 1 to 1500 in any ratio."""
    generator = np.random.default_rng(0)
    sizes = EDGE_SIZES + [
        tuple(np.exp(generator.uniform(0, 7.3, 2)).astype(int)) for _ in range(count)
    ]
    images = []
    for number, (height, width) in enumerate(sizes):
        rows, columns = np.mgrid[:height, :width][..., None]
        pixels = [
            generator.integers(0, 256, (height, width, 3)),
            255 * ((rows + columns * [1, 2, 3]) % 2),
            (rows * [1, 2, 3] + columns) * 255 // (3 * height + width),
            generator.choice([0, 255], (height, width, 3)),
        ][number % 4]
        images.append(torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1))
    return images


@pytest.mark.parametrize("side", [128, 512, 1024])
def test_images_are_resized_as_stock_sam_does(side):
    localizer = build()
    localizer.side = side
    stock = ResizeLongestSide(side)
    compared = 0
    for image in images_to_resize(24):
        resized = localizer.resize(image)
        assert resized.dtype == torch.uint8 and max(resized.shape) == side
        # The same picture as floats, and between the levels.
        assert torch.equal(localizer.resize(image.float()), resized)
        assert torch.equal(localizer.resize(image.double() + 0.3), resized)
        if 0 in stock.get_preprocess_shape(*image.shape[-2:], side):
            assert min(resized.shape[-2:]) == 1  # stock SAM fails
            continue
        expected = stock.apply_image(image.permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(resized.permute(1, 2, 0).numpy(), expected)
        compared += 1
    assert compared > 20


@needs_gpu
def test_a_gpu_resizes_to_within_one_level(localizer):
    for image in images_to_resize(24):
        expected, resized = localizer.resize(image).float(), localizer.resize(image.cuda()).cpu()
        assert torch.equal(resized, resized.round())
        assert (resized - expected).abs().max() <= 1


def test_unknown_kind_of_token():
    with pytest.raises(ValueError, match="MODEL.LOCALIZER.TOKENS"):
        build(tokens="masks")


def test_unknown_arch_lists_the_known(tiny_models):
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOCALIZER.ARCH = "vit_x"
    with pytest.raises(ValueError, match="vit_x.*vit_b"):
        SamLocalizer(cfg)


def test_mobile_sam_comes_from_its_package(tiny_models, monkeypatch):
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOCALIZER.ARCH = "vit_t"
    monkeypatch.setitem(sys.modules, "mobile_sam", None)
    with pytest.raises(ImportError, match="'vit_t' is MobileSAM.*pip install"):
        SamLocalizer(cfg)
    package = types.ModuleType("mobile_sam")
    package.sam_model_registry = {"vit_t": tiny.build_tiny_sam}
    monkeypatch.setitem(sys.modules, "mobile_sam", package)
    localizer = SamLocalizer(cfg)
    assert localizer.identity == "SamLocalizer vit_t" and localizer.token_dim == 32


def test_damaged_and_foreign_weights_are_named(tmp_path, tiny_models):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOCALIZER.WEIGHTS = str(path)
    with pytest.raises(ValueError, match=r"weights.pth.*SAM tiny .MODEL.LOCALIZER.*damaged"):
        SamLocalizer(cfg)
    torch.save({"weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="does not hold the weights of SAM"):
        SamLocalizer(cfg)


def test_config_loads_the_weights_it_names(tmp_path, tiny_models):
    sam = tiny.build_tiny_sam()
    sam.mask_decoder.mask_tokens.weight.data.fill_(0.25)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOCALIZER.WEIGHTS = str(tmp_path / "sam.pth")
    localizer = SamLocalizer(cfg)
    assert (localizer.mask_decoder.mask_tokens.weight == 0.25).all()
    assert not any(p.requires_grad for p in localizer.parameters())
