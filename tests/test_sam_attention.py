"""The fused image encoder against segment_anything's, whose weights it uses."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from regionspot_d2.files import module_fingerprint
from regionspot_d2.modeling import SamLocalizer
from regionspot_d2.modeling.sam_attention import FusedImageEncoder

from . import tiny


def stock_encoder(**options) -> ImageEncoderViT:
    """6x6 places; windows of 4 (padded to 8x8), then the whole image. All weights are random."""
    given = dict(img_size=48, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0)
    given |= dict(out_chans=16, use_rel_pos=True, window_size=4, global_attn_indexes=(1,))
    encoder = ImageEncoderViT(**{**given, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():  # stock ones hide mistakes: positions start as zeros
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return encoder.requires_grad_(False)


def images(number: int = 2, size: tuple[int, int] = (48, 48)) -> Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 3},  # no padding
        {"window_size": 0},  # the whole image in all blocks
        {"global_attn_indexes": ()},
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"qkv_bias": False},
    ],
    ids=str,
)
def test_equals_the_stock_encoder(options):
    stock = stock_encoder(**options)
    torch.testing.assert_close(
        FusedImageEncoder(stock)(images()), stock(images()), atol=1e-5, rtol=1e-5
    )


def test_rows_and_columns_are_told_apart():
    # Not square, so that windows are padded differently down and across.
    stock = stock_encoder(use_abs_pos=False)
    pixels = images(size=(40, 72))
    # Positions of the whole image are interpolated to the other size.
    torch.testing.assert_close(
        FusedImageEncoder(stock)(pixels), stock(pixels), atol=1e-5, rtol=1e-5
    )


def test_positions_count():
    stock = stock_encoder()
    before = FusedImageEncoder(stock)(images())
    for name, parameter in stock.named_parameters():
        if "rel_pos_w" in name:
            parameter.zero_()
    assert (FusedImageEncoder(stock)(images()) - before).abs().max() > 1e-2


def test_mixed_precision_is_as_near_as_the_stock_encoder():
    stock = stock_encoder()
    exact = stock(images())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = FusedImageEncoder(stock)(images()), stock(images())
    assert (ours - exact).square().mean() < 2 * (theirs - exact).square().mean()


def test_no_matrix_of_all_pairs_is_held():
    # 24x24 places: a matrix of all pairs, of two heads, has 663,552 values.
    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for each in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(each, Tensor):
                    self.numel = max(self.numel, each.numel())
            return found

    stock = stock_encoder(img_size=192)
    pixels, held = images(1, (192, 192)), []
    for encoder in (FusedImageEncoder(stock), stock):
        with LargestTensor() as largest:
            encoder(pixels)
        held.append(largest.numel)
    assert held[1] == 2 * 576**2 and held[0] < held[1] / 4


def sam_localizer(parts: tuple[nn.Module, nn.Module, nn.Module]) -> SamLocalizer:
    names = ("image_encoder", "prompt_encoder", "mask_decoder")
    mean, std = list(tiny.SAM_PIXEL_MEAN), list(tiny.SAM_PIXEL_STD)
    return SamLocalizer(**dict(zip(names, parts)), pixel_mean=mean, pixel_std=std)


def test_the_localizer_takes_it_and_keeps_all_names_and_weights():
    stock = tiny.build_tiny_sam()
    names = [name for name, _ in stock.image_encoder.named_parameters()]
    localizer = sam_localizer((stock.image_encoder, stock.prompt_encoder, stock.mask_decoder))
    assert isinstance(localizer.image_encoder, FusedImageEncoder)
    assert [name for name, _ in localizer.image_encoder.named_parameters()] == names
    assert localizer.image_encoder.neck[0].weight is stock.image_encoder.neck[0].weight
    # The key of token caches on disk.
    expected = "dbe318dcf2a5a260"
    assert module_fingerprint(localizer).startswith(expected)


def test_other_encoders_are_left_alone():
    _, *others = tiny.tiny_sam()
    encoder = nn.Conv2d(3, 32, 16, 16)
    assert sam_localizer((encoder, *others)).image_encoder is encoder
