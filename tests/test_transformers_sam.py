"""TransformersSam gives the tokens and masks of transformers' own forward pass.

The result does not depend on their order, the chunks, or the other images of a batch.
"""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes
from torch import Tensor

from regionspot_d2.files import WeightsNotFoundError, module_fingerprint
from regionspot_d2.modeling import (
    LOCALIZER_REGISTRY,
    BoxPrompts,
    MaskPrompts,
    PointPrompts,
    TransformersSam,
)
from regionspot_d2.modeling.everything import Search, regions_of_points

from . import tiny
from .datasets_on_disk import write_coco
from .tiny_transformers import SIDE, VISION, tiny_transformers_sam
from .tools import load_tool

pytest.importorskip("transformers")

SIZE = (90, 120)
PADDED = ("SamModel", "SamHQModel")


def build(name: str, **options: Any) -> TransformersSam:
    return TransformersSam(model=tiny_transformers_sam(name), **options)


@pytest.fixture(scope="module", params=list(VISION))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def localizer(name: str) -> TransformersSam:
    return build(name)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1)


@pytest.fixture(scope="module")
def boxes() -> BoxPrompts:
    return BoxPrompts(Boxes(torch.from_numpy(tiny.golden()["boxes"])))


def points() -> PointPrompts:
    places = [[[60.0, 60.0], [0, 0], [0, 0]], [[80, 30], [20, 50], [100, 80]]]
    return PointPrompts(torch.tensor(places), torch.tensor([[1, -1, -1], [1, 0, 0]]))


def masks() -> MaskPrompts:
    values = torch.zeros(3, *SIZE, dtype=torch.bool)
    values[0, 52:69, 54:82] = values[1, 8:31, 58:67] = values[2, 52:69, 54:70] = True
    values[2, 60:69, 54:82] = True  # the box of mask 0, another shape
    return MaskPrompts(values)


def decode(localizer: TransformersSam, image: Tensor, prompts: Any, with_masks: bool = True) -> Any:
    [embedding] = localizer.encode_images([image])
    return localizer.decode(embedding, image.shape[-2:], prompts, with_masks=with_masks)


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=0)


def in_square(localizer: TransformersSam, values: Tensor) -> Tensor:
    """(..., 2) XY of the image in pixels of the square."""
    height, width = localizer.input_size(SIZE)
    return values * values.new_tensor([width / SIZE[1], height / SIZE[0]])


@torch.no_grad()
def stock(localizer: TransformersSam, image: Tensor, **prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R, C) and masks (R, 1, h, w) of transformers' own forward pass."""
    model, heard = localizer.model, []
    hook = model.mask_decoder.transformer.register_forward_hook(lambda *args: heard.append(args[2]))
    try:
        found = model(localizer.preprocess(image)[None], multimask_output=False, **prompts)
    finally:
        hook.remove()
    first = 1 if type(model).__name__ in PADDED else 2
    return heard[0][0][0, :, first], found.pred_masks[0]


def test_boxes_equal_the_stock_forward_pass(localizer, image, boxes):
    corners = in_square(localizer, boxes.values.tensor.reshape(-1, 2, 2)).reshape(1, -1, 4)
    expected, expected_masks = stock(localizer, image, input_boxes=corners)
    tokens, found_masks = decode(localizer, image, boxes)
    close(tokens, expected)
    close(found_masks, expected_masks, 1e-4)
    without, none = decode(localizer, image, boxes, with_masks=False)
    assert none is None
    close(without, expected)
    assert tokens.shape == (len(boxes), localizer.token_dim) and tokens.std(0).max() > 1e-2


def test_the_token_is_what_the_decoder_returns(name, localizer, image, boxes):
    if name in PADDED:
        pytest.skip("the decoders of SAM and SAM-HQ return no tokens")
    returned: list[Tensor] = []
    decoder = localizer.model.mask_decoder
    hook = decoder.register_forward_hook(lambda *args: returned.append(args[2][2]))
    corners = in_square(localizer, boxes.values.tensor.reshape(-1, 2, 2)).reshape(1, -1, 4)
    stock(localizer, image, input_boxes=corners)
    hook.remove()
    close(decode(localizer, image, boxes)[0], returned[0][0, :, 0])


def test_points_equal_the_stock_forward_pass_whatever_the_other_prompts(localizer, image):
    prompts = points()
    tokens, found_masks = decode(localizer, image, prompts)
    for i, count in enumerate([1, 3]):
        places = in_square(localizer, prompts.points[i, :count])
        expected, expected_mask = stock(
            localizer,
            image,
            input_points=places[None, None],
            input_labels=prompts.labels[None, i : i + 1, :count],
        )
        close(tokens[i : i + 1], expected)
        close(found_masks[i : i + 1], expected_mask, 1e-4)


def test_masks_equal_the_stock_forward_pass(localizer, image):
    prompts = masks()
    tokens, found_masks = decode(localizer, image, prompts)
    height, width = localizer.mask_prompt_size
    for i, mask in enumerate(prompts.masks):
        held = torch.zeros(1, 1, height, width)
        inner = [round(n * height / SIDE) for n in localizer.input_size(SIZE)]
        held[..., : inner[0], : inner[1]] = torch.nn.functional.interpolate(
            mask[None, None].float(), inner, mode="bilinear"
        )
        corners = prompts.boxes(SIZE).tensor[i].reshape(2, 2)
        expected, expected_mask = stock(
            localizer,
            image,
            input_boxes=in_square(localizer, corners).reshape(1, 1, 4),
            input_masks=held * 20 - 10,
        )
        close(tokens[i : i + 1], expected)
        close(found_masks[i : i + 1], expected_mask, 1e-4)
    assert (tokens[0] - tokens[2]).abs().max() > 1e-3


def processor(name: str) -> Any:
    """transformers' own preprocessing, at the tiny models' size."""
    import transformers

    if name in PADDED:
        square = {"height": SIDE, "width": SIDE}
        images = transformers.SamImageProcessor(size={"longest_edge": SIDE}, pad_size=square)
        kind = transformers.SamProcessor if name == "SamModel" else transformers.SamHQProcessor
        return kind(images)
    kinds = (transformers.Sam2ImageProcessor, transformers.Sam2Processor)
    if name == "Sam3TrackerModel":
        kinds = (transformers.Sam3ImageProcessor, transformers.Sam3TrackerProcessor)
    images = kinds[0](size={"height": SIDE, "width": SIDE})
    return kinds[1](images, target_size=SIDE)


def test_frames_and_pixels_are_those_of_the_stock_processor(name, localizer, image, boxes):
    corners = boxes.values.tensor
    inputs = processor(name)(
        images=image.permute(1, 2, 0).numpy(),
        input_boxes=[corners.tolist()],
        return_tensors="pt",
    )
    ours = in_square(localizer, corners.reshape(-1, 2, 2)).reshape(1, -1, 4)
    close(inputs["input_boxes"].float(), ours, 1e-3)
    # The two resize with one level of difference here and there; a level is at most 0.018.
    pixels = localizer.preprocess(image)
    assert pixels.shape == inputs["pixel_values"].shape[1:]
    assert (pixels - inputs["pixel_values"][0]).abs().mean() < 0.01


def test_full_size_masks_cover_the_image(name, localizer):
    # A mask of the left half of the image, in the frame of the decoder.
    height, width = localizer.input_size(SIZE)
    logits = torch.full((1, 1, 32, 32), -5.0)
    logits[..., : width * 32 // SIDE // 2] = 5.0
    full = localizer.full_size_masks(logits, SIZE)
    assert full.shape == (1, *SIZE)
    assert full[0, :, : SIZE[1] // 2 - 3].all() and not full[0, :, SIZE[1] // 2 + 3 :].any()
    assert localizer.full_size_masks(logits, SIZE, (45, 60)).shape == (1, 45, 60)


def test_chunks_and_order_do_not_matter(name, localizer, image, boxes):
    order = torch.arange(len(boxes)).flip(0)
    for prompts in (boxes, masks()):
        tokens, found_masks = decode(localizer, image, prompts)
        small, small_masks = decode(build(name, chunk_size=1), image, prompts)
        close(small, tokens)
        close(small_masks, found_masks, 1e-4)
    shuffled, _ = decode(localizer, image, BoxPrompts(boxes.values[order]))
    close(shuffled, decode(localizer, image, boxes)[0][order])


def test_images_of_a_batch_do_not_matter_to_each_other(localizer, image, boxes):
    other = torch.randint(0, 256, (3, 50, 33), generator=torch.Generator().manual_seed(0)).byte()
    box = BoxPrompts(Boxes(torch.tensor([[3.0, 4.0, 20.0, 40.0]])))
    tokens, found_masks = localizer([image, other], [boxes, box])
    for i, (alone, prompt) in enumerate([(image, boxes), (other, box)]):
        expected, expected_masks = decode(localizer, alone, prompt)
        close(tokens[i], expected)
        close(found_masks[i], expected_masks, 1e-4)


def test_no_prompts_and_no_images(localizer, image):
    empty = [
        BoxPrompts(Boxes(torch.zeros(0, 4))),
        PointPrompts(torch.zeros(0, 1, 2), torch.zeros(0, 1)),
        MaskPrompts(torch.zeros(0, *SIZE)),
    ]
    for prompts in empty:
        tokens, found_masks = decode(localizer, image, prompts)
        assert tokens.shape == (0, 32) and found_masks.shape == (0, 1, 32, 32)
    assert localizer([], []) == ([], [])


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1)])
def test_tiny_and_thin_images(size, localizer):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    box = BoxPrompts(Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]])))
    tokens, found_masks = decode(localizer, image, box)
    assert tokens.isfinite().all()
    assert localizer.full_size_masks(found_masks, size).shape == (1, *size)


def test_kinds_of_tokens(name, image, boxes):
    mask, prompt, both = (
        decode(build(name, tokens=kind), image, boxes)[0] for kind in ("mask", "prompt", "both")
    )
    assert build(name, tokens="both").token_dim == both.shape[1] == 64
    torch.testing.assert_close(both, torch.cat([prompt, mask], 1))


def test_threads_share_a_localizer(localizer, image, boxes):
    """Each gets its own tokens, with and without masks, and no module keeps a hook."""
    [embedding] = localizer.encode_images([image])
    prompts = [boxes, BoxPrompts(Boxes(boxes.values.tensor.flip(0) + 3))]
    wanted = [localizer.decode(embedding, SIZE, each, with_masks=False)[0] for each in prompts]
    barrier = threading.Barrier(2)

    def same(place: int) -> bool:
        barrier.wait()
        for turn in range(10):
            tokens, _ = localizer.decode(embedding, SIZE, prompts[place], with_masks=turn % 2 == 0)
            if (tokens - wanted[place]).abs().max() > 1e-5:
                return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(same, range(2))) == [True, True]
    decoder = localizer.model.mask_decoder
    assert not any(module._forward_hooks for module in decoder.modules())


def test_every_region_of_an_image(localizer, image):
    [embedding] = localizer.encode_images([image])
    search = Search(points_per_side=2, pred_iou_thresh=-100.0, stability_thresh=-1.0)
    found = regions_of_points(localizer, embedding, SIZE, torch.device("cpu"), search)
    assert 0 < len(found.scores) <= 4
    assert found.tokens.shape == (len(found.scores), localizer.token_dim)


def test_a_copy_is_as_good(localizer, image, boxes):
    close(decode(copy.deepcopy(localizer), image, boxes)[0], decode(localizer, image, boxes)[0])


# ---- from the config


def config(arch: Path | str) -> Any:
    cfg = tiny.tiny_cfg()
    cfg.MODEL.LOCALIZER.NAME = "TransformersSam"
    cfg.MODEL.LOCALIZER.ARCH = str(arch)
    return cfg


def test_a_folder(name, tmp_path, image, boxes):
    model = tiny_transformers_sam(name)
    model.half().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    localizer = LOCALIZER_REGISTRY.get("TransformersSam")(config(tmp_path))
    assert {parameter.dtype for parameter in localizer.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in localizer.parameters())
    assert localizer.state_dict() == {}
    expected = TransformersSam(model=loaded)
    assert module_fingerprint(localizer) == module_fingerprint(expected)
    close(decode(localizer, image, boxes)[0], decode(expected, image, boxes)[0])


def test_extraction_and_its_continuation(tmp_path, image, boxes):
    """tools/extract_tokens.py runs the localizer of a config, and goes on where it stopped."""
    tiny_transformers_sam("Sam2Model").save_pretrained(tmp_path / "model")
    cfg = config(tmp_path / "model")
    annotations, images = write_coco(tmp_path)
    cfg.DATASETS.COCO_FORMAT = [["transformers_shapes", annotations, images]]
    cfg.DATASETS.TRAIN = ("transformers_shapes",)
    cfg.INPUT.TOKEN_CACHE = str(tmp_path / "tokens")
    cfg.DATALOADER.NUM_WORKERS = 0
    tool = load_tool("extract_tokens")
    args = tool.argument_parser().parse_args(["--images-per-shard", "1"])
    try:
        tool.main(args, cfg)
        shards = sorted((tmp_path / "tokens").glob("transformers_shapes/shard-*"))
        before = [shard.read_bytes() for shard in shards]
        assert len(shards) > 1
        shards[0].unlink()
        tool.main(args, cfg)
        assert [shard.read_bytes() for shard in shards] == before
    finally:
        DatasetCatalog.remove("transformers_shapes")
        MetadataCatalog.remove("transformers_shapes")


def test_weights_beside_the_folder_are_refused(tmp_path):
    cfg = config(tmp_path)
    cfg.MODEL.LOCALIZER.WEIGHTS = "sam.pth"
    with pytest.raises(ValueError, match="WEIGHTS is 'sam.pth', .* set it to ''"):
        TransformersSam(cfg)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="MODEL.LOCALIZER.ARCH.*'bert'; one of sam, sam_hq"):
        TransformersSam(config(tmp_path))


def test_a_missing_folder(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="MODEL.LOCALIZER.ARCH.*no model") as caught:
        TransformersSam(config(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_of_another_class():
    with pytest.raises(ValueError, match="class Linear.*Sam2Model"):
        TransformersSam(model=torch.nn.Linear(1, 1))


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="TransformersSam needs .* pip install transformers"):
        TransformersSam(config(tmp_path))
