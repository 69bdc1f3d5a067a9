"""The baselines of Table 1: each equals its plain definition, on tiny towers of CLIP and SAM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor

from regionspot_d2.modeling import (
    AdapterRegionHead,
    BoxPrompts,
    CropRegionHead,
    MaskPooledRegionHead,
    OpenClip,
    PointPrompts,
    PooledRegionHead,
    RegionHead,
    RegionSpot,
    VisionLanguageModel,
)

from .tiny import tiny_cfg, tiny_model

TRAINING_FREE = [CropRegionHead, MaskPooledRegionHead, PooledRegionHead]
BOXES = torch.tensor([[3.0, 5, 40, 37], [0, 0, 90, 60], [70.4, 20.6, 88, 55], [10, 50, 14, 52]])


@pytest.fixture
def model(vocabularies: None) -> RegionSpot:
    return tiny_model(with_masks=False)


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(60, 90), (100, 45)]
    return [torch.randint(0, 256, (3, *size), generator=generator).byte() for size in sizes]


def answers(model: RegionSpot, images: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
    prompts = [BoxPrompts(Boxes(box)) for box in boxes]
    found = model.answer(model.encode(images), prompts, with_masks=False)
    return [answer.embeddings for answer in found]


def with_head(model: RegionSpot, head: Callable[..., RegionHead]) -> RegionSpot:
    model.region_head = head(vision_language=model.vision_language)
    return model


def adapter(model: RegionSpot, share: float, adapted: type = PooledRegionHead) -> AdapterRegionHead:
    torch.manual_seed(0)
    return AdapterRegionHead(
        adapted=adapted(vision_language=model.vision_language),
        text_dim=model.vision_language.text_dim,
        share=share,
        reduction=4,
    )


def grid_in_text_space(model: RegionSpot, image: Tensor) -> Tensor:
    tokens = model.vision_language([image])[:, model.vision_language.num_prefix_tokens :]
    return model.vision_language.project(tokens)[0]


def test_crops_equal_encoding_each_crop_by_hand(model, images):
    image = images[0]
    [found] = answers(with_head(model, CropRegionHead), [image], [BOXES])
    crops = [image[:, 5:37, 3:40], image, image[:, 21:55, 70:88], image[:, 50:52, 10:14]]
    by_hand = [model.vision_language.model.encode_image(squashed(model, crop)) for crop in crops]
    torch.testing.assert_close(found, F.normalize(torch.cat(by_hand), dim=1))
    class_tokens = model.vision_language.project(model.vision_language(crops)[:, :1])[:, 0]
    torch.testing.assert_close(found, F.normalize(class_tokens, dim=1))


def squashed(model: RegionSpot, crop: Tensor) -> Tensor:
    pixels = F.interpolate(crop[None].float(), (64, 64), mode="bilinear", align_corners=False)
    clip = model.vision_language
    return (pixels / 255 - clip.pixel_mean) / clip.pixel_std


def test_more_crops_than_a_batch_are_those_of_single_questions(model, images):
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(40, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 3 + torch.rand(40, 2, generator=generator) * 20], dim=1)
    model = with_head(model, CropRegionHead)
    [together] = answers(model, images[:1], [boxes])
    single = [answers(model, images[:1], [box[None]])[0] for box in boxes]
    torch.testing.assert_close(together, torch.cat(single))


def test_mask_pooling_equals_the_mean_under_the_mask(model, images):
    image = images[0]
    [found] = answers(with_head(model, MaskPooledRegionHead), [image], [BOXES])
    _, logits = model.localizer([image], [BoxPrompts(Boxes(BOXES))])
    masks = model.localizer.full_size_masks(logits[0], (60, 90), (32, 32))
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    # Each of the 4 x 4 cells repeated over its 8 x 8 pixels of the mask.
    cells = grid_in_text_space(model, image).reshape(4, 4, -1)
    pixels = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)
    expected = torch.stack([pixels[mask].mean(0) for mask in masks])
    torch.testing.assert_close(found, F.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_where_the_mask_is_empty_the_box_is_pooled(model, images):
    cells = model.vision_language(images[:1])
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.5, 0.5, 1.0, 1.0]])
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[1, :8, 8:16] = True
    tokens = [torch.zeros(2, 1)]
    head = MaskPooledRegionHead(vision_language=model.vision_language)
    [found] = head(tokens, cells, [boxes], masks=[masks])
    [of_boxes] = PooledRegionHead(vision_language=model.vision_language)(tokens, cells, [boxes])
    torch.testing.assert_close(found[0], of_boxes[0])
    second_cell = grid_in_text_space(model, images[0])[1]
    torch.testing.assert_close(found[1], F.normalize(second_cell, dim=0))


def test_masks_of_prompts_are_pooled_too_and_need_a_localizer_that_finds_some(model, images):
    model = with_head(model, MaskPooledRegionHead)
    prompts = PointPrompts(torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1, dtype=torch.int64))
    [answer] = model.answer(model.encode(images[:1]), [prompts], with_masks=True)
    torch.testing.assert_close(answer.embeddings.norm(dim=1), torch.ones(1))
    assert answer.masks(torch.tensor([0]), (60, 90)).shape == (1, 60, 90)
    decode = model.localizer.decode
    model.localizer.decode = lambda *args, **kwargs: (decode(*args, **kwargs)[0], None)
    with pytest.raises(ValueError, match="MaskPooledRegionHead reads masks; SamLocalizer"):
        answers(model, images[:1], [BOXES])


def test_tokens_from_a_cache_do_not_replace_masks(model, images):
    model = with_head(model, MaskPooledRegionHead)
    known = [torch.zeros(len(BOXES), model.localizer.token_dim)]
    prompts = [BoxPrompts(Boxes(BOXES))]
    encoded = model.encode(images[:1])
    [cached] = model.answer(encoded, prompts, with_masks=False, mask_tokens=known)
    [found] = model.answer(encoded, prompts, with_masks=False)
    torch.testing.assert_close(cached.embeddings, found.embeddings)


def test_roi_pooling_equals_the_mean_over_the_pixels_of_the_box(model, images):
    image = images[0]
    boxes = torch.tensor([[9.0, 15, 45, 60], [0, 0, 90, 60], [81, 3, 90, 6]])
    [found] = answers(with_head(model, PooledRegionHead), [image], [boxes])
    # The cells of 22.5 x 15 pixels of the image, as pixels of half its width.
    cells = grid_in_text_space(model, image).reshape(4, 4, -1)
    pixels = cells.repeat_interleave(30, 0).repeat_interleave(45, 1)  # half pixels
    expected = [
        pixels[2 * y0 : 2 * y1, 2 * x0 : 2 * x1].flatten(0, 1).mean(0)
        for x0, y0, x1, y1 in boxes.int().tolist()
    ]
    torch.testing.assert_close(found, F.normalize(torch.stack(expected), dim=1))


@pytest.mark.parametrize("head", TRAINING_FREE)
def test_order_and_batch_do_not_matter(model, images, head):
    model = with_head(model, head)
    others = BOXES[:2] / 2
    one, two = answers(model, images, [BOXES, others])
    torch.testing.assert_close(answers(model, images[1:], [others])[0], two)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(answers(model, images[:1], [BOXES[order]])[0], one[order])
    model.max_regions = 3
    torch.testing.assert_close(answers(model, images, [BOXES, others])[0], one)


@pytest.mark.parametrize("head", TRAINING_FREE)
def test_no_regions_and_boxes_that_show_nothing(model, images, head):
    model = with_head(model, head)
    none, one = answers(model, images, [torch.zeros(0, 4), BOXES[:1]])
    assert none.shape == (0, 40) and one.shape == (1, 40)
    [none] = answers(model, images[:1], [torch.zeros(0, 4)])
    assert none.shape == (0, 40)
    odd = [[30, 30, 30, 30], [90, 60, 90, 60], [-50, -40, -5, -2], [200, 10, 300, 20]]
    [found] = answers(model, images[:1], [torch.tensor(odd).float()])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


class GridOnly(OpenClip):
    """The tiny CLIP without its class token, which pools as a model that says nothing about it."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return super().forward(images)[:, 1:]

    def embed_images(self, images: list[Tensor]) -> Tensor:
        return VisionLanguageModel.embed_images(self, images)


def test_a_model_without_a_class_token_answers_with_the_mean_of_its_grid(model, images):
    clip = model.vision_language
    class_tokens = VisionLanguageModel.embed_images(clip, images)
    torch.testing.assert_close(class_tokens, clip.embed_images(images))
    expected = torch.stack([grid_in_text_space(model, image).mean(0) for image in images])
    grid = GridOnly(model=clip.model, tokenizer=clip.tokenizer, image_size=64)
    grid.num_prefix_tokens = 0
    torch.testing.assert_close(grid.embed_images(images), expected)


@pytest.mark.parametrize("adapted", TRAINING_FREE)
def test_an_adapter_of_share_0_is_the_plain_head_and_of_share_1_its_two_layers(
    model, images, adapted
):
    [plain] = answers(with_head(model, adapted), images[:1], [BOXES])
    model.region_head = adapter(model, 0.0, adapted)
    torch.testing.assert_close(answers(model, images[:1], [BOXES])[0], plain)
    model.region_head = head = adapter(model, 1.0, adapted)
    down, up = (p.detach() for p in head.parameters())
    assert down.shape == (10, 40) and up.shape == (40, 10)
    changed = (plain @ down.T).clamp(min=0) @ up.T
    [found] = answers(model, images[:1], [BOXES])
    torch.testing.assert_close(found, F.normalize(changed, dim=1))
    model.region_head.share = 0.3
    [found] = answers(model, images[:1], [BOXES])
    torch.testing.assert_close(found, F.normalize(0.3 * changed + 0.7 * plain, dim=1))


def test_only_the_adapter_trains_and_no_regions_give_gradients(model, images):
    model.region_head = adapter(model, 0.5, CropRegionHead)
    assert set(model.state_dict()) == {
        "region_head.adapter.0.weight",
        "region_head.adapter.2.weight",
    }
    [found] = answers(model, images[:1], [torch.zeros(0, 4)])
    found.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.region_head.parameters())


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("ADAPTER_SHARE", 1.5, "ADAPTER_SHARE is 1.5; expected 0 to 1"),
        ("ADAPTER_REDUCTION", 0, "ADAPTER_REDUCTION is 0; expected 1 to 40"),
        ("ADAPTED", "AdapterRegionHead", "ADAPTED is AdapterRegionHead, the adapter itself"),
    ],
)
def test_impossible_adapters_are_refused(tiny_models, empty_cache, key, value, message):
    cfg = tiny_cfg()
    cfg.MODEL.REGION_HEAD.NAME = "AdapterRegionHead"
    cfg.MODEL.REGION_HEAD[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
