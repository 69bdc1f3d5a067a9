"""The mask-token decoder against the stock decoder whose weights it uses."""

from __future__ import annotations

import copy

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from regionspot_d2.modeling.mask_tokens import MaskTokenDecoder

from .tools import needs_gpu

CHANNELS, GRID, INPUT = 32, (6, 10), (96, 160)  # not square: rows and columns must not be mixed up
NUM_PROMPTS = 5


def build_decoder(depth: int = 2) -> MaskDecoder:
    transformer = TwoWayTransformer(depth, CHANNELS, num_heads=4, mlp_dim=48)
    decoder = MaskDecoder(
        transformer_dim=CHANNELS, transformer=transformer, iou_head_hidden_dim=24
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():  # fresh norms are ones and zeros, and hide mistakes
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return decoder


@pytest.fixture(scope="module")
def decoder() -> MaskDecoder:
    return build_decoder()


@pytest.fixture(scope="module")
def prompt_encoder() -> PromptEncoder:
    torch.manual_seed(2)
    return PromptEncoder(CHANNELS, GRID, INPUT, mask_in_chans=8).requires_grad_(False)


@pytest.fixture(scope="module")
def image(prompt_encoder: PromptEncoder) -> tuple[Tensor, Tensor]:
    """Embedding and positional encoding."""
    torch.manual_seed(3)
    return torch.randn(1, CHANNELS, *GRID), prompt_encoder.get_dense_pe()


def prompts(encoder: PromptEncoder, kind: str, num: int = NUM_PROMPTS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    points = torch.rand(num, 3, 2) * 90, torch.tensor([[1, 0, -1]]).repeat(num, 1)
    boxes = torch.rand(num, 4) * 90
    masks = torch.randn(num, 1, 4 * GRID[0], 4 * GRID[1])
    return encoder(
        points if "points" in kind else None,
        boxes if "boxes" in kind else None,
        masks if "masks" in kind else None,
    )


def stock(
    decoder: nn.Module, image: tuple[Tensor, Tensor], sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The stock decoder's first mask token, read behind its transformer; its mask and its IoU."""
    tokens = []
    hook = decoder.transformer.register_forward_hook(
        lambda module, inputs, outputs: tokens.append(outputs[0][:, 1])
    )
    masks, ious = decoder(*image, sparse, dense, multimask_output=False)
    hook.remove()
    return tokens[0], masks, ious[:, 0]


def assert_close(actual: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    for name, a, e in zip(("tokens", "masks", "ious"), actual, expected):
        assert a.shape == e.shape, name
        torch.testing.assert_close(a, e, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("kind", ["boxes", "points", "masks", "boxes+masks", "points+boxes"])
def test_equals_the_stock_decoder(decoder, prompt_encoder, image, kind, chunk_size):
    sparse, dense = prompts(prompt_encoder, kind)
    actual = MaskTokenDecoder(decoder)(*image, sparse, dense, chunk_size=chunk_size)
    assert_close(actual, stock(decoder, image, sparse, dense))
    # The prompts differ enough for a mixed-up order to show.
    assert torch.pdist(actual[0]).min() > 1e-2


@pytest.mark.parametrize("depth", [1, 3])
def test_any_depth(prompt_encoder, image, depth):
    decoder = build_decoder(depth)
    for kind in ("boxes", "masks"):
        sparse, dense = prompts(prompt_encoder, kind)
        actual = MaskTokenDecoder(decoder)(*image, sparse, dense)
        assert_close(actual, stock(decoder, image, sparse, dense))


def test_one_dense_embedding_serves_all_prompts(decoder, prompt_encoder, image):
    sparse, dense = prompts(prompt_encoder, "boxes")
    decode = MaskTokenDecoder(decoder)
    # One row, the encoder's expanded view, and a real copy for each prompt.
    for same in (dense[:1], dense, dense.contiguous()):
        assert_close(decode(*image, sparse, same), stock(decoder, image, sparse, dense))


@pytest.mark.parametrize("kind", ["boxes", "boxes+masks"])
def test_one_prompt(decoder, prompt_encoder, image, kind):
    sparse, dense = prompts(prompt_encoder, kind, num=1)
    actual = MaskTokenDecoder(decoder)(*image, sparse, dense)
    assert_close(actual, stock(decoder, image, sparse, dense))


@pytest.mark.parametrize("kind", ["boxes", "boxes+masks"])
def test_no_prompts(decoder, prompt_encoder, image, kind):
    sparse, dense = (x[:0] for x in prompts(prompt_encoder, kind))
    tokens, masks, ious = MaskTokenDecoder(decoder)(*image, sparse, dense, chunk_size=2)
    assert tokens.shape == (0, CHANNELS)
    assert masks.shape == (0, 1, 4 * GRID[0], 4 * GRID[1])
    assert ious.shape == (0,)
    assert MaskTokenDecoder(decoder)(*image, sparse, dense, with_masks=False)[1] is None


@pytest.mark.parametrize("kind", ["boxes", "boxes+masks"])
def test_without_masks_the_tokens_are_the_same(decoder, prompt_encoder, image, kind):
    sparse, dense = prompts(prompt_encoder, kind)
    decode = MaskTokenDecoder(decoder)
    with_masks = decode(*image, sparse, dense)
    tokens, masks, ious = decode(*image, sparse, dense, with_masks=False)
    assert masks is None
    assert torch.equal(tokens, with_masks[0]) and torch.equal(ious, with_masks[2])


def test_without_masks_nothing_is_upsampled(prompt_encoder, image):
    decoder = build_decoder()
    decoder.output_upscaling = decoder.output_hypernetworks_mlps = None
    sparse, dense = prompts(prompt_encoder, "boxes")
    tokens, _, _ = MaskTokenDecoder(decoder)(*image, sparse, dense, with_masks=False)
    assert tokens.isfinite().all()


def test_the_image_is_projected_once_for_all_chunks(prompt_encoder, image):
    decoder = build_decoder()
    sizes = []
    layer = decoder.transformer.layers[0]
    for projection in (
        layer.cross_attn_token_to_image.k_proj,
        layer.cross_attn_token_to_image.v_proj,
        layer.cross_attn_image_to_token.q_proj,
    ):
        projection.register_forward_hook(
            lambda module, inputs, output: sizes.append(tuple(output.shape[:2]))
        )
    MaskTokenDecoder(decoder)(*image, *prompts(prompt_encoder, "boxes"), chunk_size=1)
    assert sizes == [(1, GRID[0] * GRID[1])] * 3


def test_uses_the_weights_of_the_decoder_itself(prompt_encoder, image):
    decoder = build_decoder()
    decode = MaskTokenDecoder(decoder)
    assert {id(p) for p in decode.parameters()} == {id(p) for p in decoder.parameters()}
    sparse, dense = prompts(prompt_encoder, "boxes")
    before = decode(*image, sparse, dense)
    for parameter in decoder.parameters():
        parameter *= 1.1
    after = decode(*image, sparse, dense)
    assert_close(after, stock(decoder, image, sparse, dense))
    assert not torch.allclose(before[0], after[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["boxes", "boxes+masks"])
def test_mixed_precision_is_as_near_as_the_stock_decoder(decoder, prompt_encoder, image, kind):
    sparse, dense = prompts(prompt_encoder, kind)
    exact = stock(decoder, image, sparse, dense)
    with torch.autocast("cpu", torch.bfloat16):
        ours = MaskTokenDecoder(decoder)(*image, sparse, dense)
        theirs = stock(decoder, image, sparse, dense)
    for name, a, b, e in zip(("tokens", "masks"), ours, theirs, exact):
        assert (a - e).square().mean() < 3 * (b - e).square().mean(), name


def test_gradients_reach_the_image_and_the_prompts(decoder, prompt_encoder, image):
    sparse, dense = (x.clone() for x in prompts(prompt_encoder, "boxes+masks"))
    gradients = []
    for run in (MaskTokenDecoder(decoder), lambda *inputs: stock(decoder, inputs[:2], *inputs[2:])):
        leaves = [x.detach().clone().requires_grad_() for x in (*image, sparse, dense)]
        tokens, masks, ious = run(*leaves)
        (tokens.sum() + masks.mean() + ious.sum()).backward()
        gradients.append([x.grad for x in leaves])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@needs_gpu
@pytest.mark.parametrize("kind", ["boxes", "boxes+masks"])
def test_on_a_gpu(decoder, prompt_encoder, image, kind):
    sparse, dense = prompts(prompt_encoder, kind)
    expected = stock(decoder, image, sparse, dense)
    decode = MaskTokenDecoder(copy.deepcopy(decoder)).cuda()
    inputs = [x.cuda() for x in (*image, sparse, dense)]
    assert_close([x.cpu() for x in decode(*inputs, chunk_size=2)], expected, tolerance=2e-3)
    with torch.autocast("cuda", torch.float16):
        assert_close([x.float().cpu() for x in decode(*inputs)], expected, tolerance=0.1)
