"""The published model's arrays, from the same tiny random weights (tests/golden/README.md)."""

from __future__ import annotations

import clip
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes

from regionspot_d2.modeling import BoxPrompts, RegionSpot, RegionSpotHead, SamLocalizer
from regionspot_d2.modeling.clip import OpenAIClip, OpenClip
from regionspot_d2.modeling.vocabulary import TextEmbedder

from . import tiny


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return tiny.golden()


@pytest.fixture(scope="module")
def localizer() -> SamLocalizer:
    return SamLocalizer(
        **dict(zip(("image_encoder", "prompt_encoder", "mask_decoder"), tiny.tiny_sam())),
        pixel_mean=list(tiny.SAM_PIXEL_MEAN),
        pixel_std=list(tiny.SAM_PIXEL_STD),
        chunk_size=3,
    )


@pytest.fixture(scope="module", params=["open_clip", "clip"])
def model(request: pytest.FixtureRequest, localizer: SamLocalizer) -> RegionSpot:
    if request.param == "open_clip":
        vision_language = OpenClip(
            model=tiny.tiny_open_clip(),
            tokenizer=open_clip.get_tokenizer("ViT-B-32"),
            image_size=64,
        )
    else:
        vision_language = OpenAIClip(
            model=tiny.tiny_openai_clip(), tokenizer=clip.tokenize, image_size=64
        )
    assert isinstance(vision_language, OpenClip if request.param == "open_clip" else OpenAIClip)
    head = RegionSpotHead(token_dim=32, image_dim=64, text_dim=40, ffn_dim=96)
    tiny.fill_golden(head)
    return RegionSpot(
        localizer=localizer,
        vision_language=vision_language,
        region_head=head,
        text_embedder=TextEmbedder(vision_language),
    ).eval()


def image_and_boxes(golden: dict[str, np.ndarray]) -> tuple[torch.Tensor, Boxes]:
    image = torch.from_numpy(golden["image"]).permute(2, 0, 1)
    return image, Boxes(torch.from_numpy(golden["boxes"]))


def assert_close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(
        found, torch.from_numpy(expected).to(found.dtype), atol=tolerance, rtol=0
    )


def test_sam_input(golden, localizer):
    image, _ = image_and_boxes(golden)
    np.testing.assert_array_equal(localizer.resize(image).numpy(), golden["sam_input"])


def test_mask_tokens_and_masks(golden, localizer):
    image, boxes = image_and_boxes(golden)
    [tokens], [logits] = localizer([image], [BoxPrompts(boxes)])
    assert_close(tokens, golden["mask_tokens"], 1e-5)
    assert_close(logits[:, 0], golden["low_res_logits"], 1e-4)
    np.testing.assert_array_equal(
        localizer.full_size_masks(logits, (90, 120)).numpy(), golden["masks"]
    )


def test_tokens_do_not_need_masks(golden, localizer):
    image, boxes = image_and_boxes(golden)
    [tokens], logits = localizer([image], [BoxPrompts(boxes)], with_masks=False)
    assert logits is None
    assert_close(tokens, golden["mask_tokens"], 1e-5)


def test_image_tokens(golden, model):
    image, _ = image_and_boxes(golden)
    assert_close(model.vision_language([image])[0], golden["clip_tokens"], 1e-4)


def test_text_embeddings(golden, model):
    assert_close(model.text_embedder(list(golden["class_names"])), golden["text_embeddings"], 1e-5)


def test_regions_logits_and_scores(golden, model):
    image, boxes = image_and_boxes(golden)
    expected = F.normalize(torch.from_numpy(golden["region_embeddings"]), dim=1)
    with torch.no_grad():
        [answer] = model.answer(model.encode([image]), [BoxPrompts(boxes)], with_masks=False)
        logits = model.score(answer.embeddings, list(golden["class_names"]))
    assert_close(answer.embeddings, expected.numpy(), 1e-4)
    assert_close(logits, golden["logits"], 1e-4)
    assert_close(logits.softmax(1), golden["probs"], 1e-4)


def test_region_embeddings_before_scaling(golden, model):
    kept = []
    hook = model.region_head.projector.register_forward_hook(lambda *args: kept.append(args[2]))
    image, boxes = image_and_boxes(golden)
    with torch.no_grad():
        model.answer(model.encode([image]), [BoxPrompts(boxes)], with_masks=False)
    hook.remove()
    assert_close(kept[0][0], golden["region_embeddings"], 1e-4)


def test_focal_loss(golden, model):
    labels = torch.from_numpy(golden["labels"])
    loss = model.losses([torch.from_numpy(golden["logits"])], [labels])["loss_cls"]
    assert loss.item() == pytest.approx(float(golden["focal_loss"]), abs=1e-5)
