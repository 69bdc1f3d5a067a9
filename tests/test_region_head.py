"""Region heads: published sizes, padding, order, and the baseline's weights of cells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from regionspot_d2.modeling import PooledRegionHead, RegionSpotHead


def small_head() -> RegionSpotHead:
    torch.manual_seed(0)
    return RegionSpotHead(token_dim=12, image_dim=16, text_dim=10, depth=2, num_heads=4, ffn_dim=24)


@pytest.mark.parametrize(
    "image_dim, text_dim, parameters", [(768, 512, 24_226_304), (1024, 768, 38_853_376)]
)
def test_published_sizes(image_dim, text_dim, parameters):
    with torch.device("meta"):
        head = RegionSpotHead(token_dim=256, image_dim=image_dim, text_dim=text_dim)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == parameters


def test_layers_start_different():
    head = small_head()
    first, second = head.decoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_layers_may_start_as_copies_of_one():
    torch.manual_seed(0)
    sizes = {"token_dim": 12, "image_dim": 16, "text_dim": 10, "num_heads": 4, "ffn_dim": 24}
    first, *others = RegionSpotHead(**sizes, copied_layers=True).decoder.layers
    for other in others:
        for one, copy in zip(first.parameters(), other.parameters()):
            assert torch.equal(one, copy) and one is not copy


def test_order_of_regions_does_not_matter():
    head = small_head().eval()
    tokens, image = torch.randn(7, 12), torch.randn(1, 5, 16)
    order = torch.randperm(7)
    [straight] = head([tokens], image)
    [shuffled] = head([tokens[order]], image)
    torch.testing.assert_close(shuffled, straight[order])


def test_padded_batch_equals_one_by_one():
    head = small_head().eval()
    tokens = [torch.randn(n, 12) for n in (3, 0, 8, 1)]
    image = torch.randn(4, 5, 16)
    together = head(tokens, image)
    assert [len(t) for t in together] == [3, 0, 8, 1]
    for i, expected in enumerate(together):
        torch.testing.assert_close(head([tokens[i]], image[i : i + 1])[0], expected)


def test_rows_have_unit_length():
    [regions] = small_head()([torch.randn(4, 12)], torch.randn(1, 5, 16))
    torch.testing.assert_close(regions.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_empty_images_give_finite_gradients_for_all_parameters(counts):
    head = small_head().train()
    regions = head([torch.randn(n, 12) for n in counts], torch.randn(2, 5, 16))
    sum(r[:, 0].sum() for r in regions).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_attention_is_a_distribution_over_the_image_tokens():
    head = small_head().eval()
    tokens, image = torch.randn(3, 12), torch.randn(1, 5, 16)
    weights = head.attention(tokens, image)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert head.attention(tokens[:0], image).shape == (0, 5)
    assert weights.shape == (3, 5) and (weights > 0).all() and weights.std() > 1e-4
    # What the attention reads is what the answer is made of.
    changed = image.clone()
    changed[0, weights.mean(0).argmax()] += 1
    assert not torch.allclose(head([tokens], changed)[0], head([tokens], image)[0])


def test_attention_without_image_tokens_is_refused():
    head = RegionSpotHead(
        token_dim=12, image_dim=16, text_dim=10, num_heads=4, ffn_dim=24, with_image_tokens=False
    )
    with pytest.raises(ValueError, match="IMAGE_TOKENS"):
        head.attention(torch.randn(3, 12), torch.randn(1, 5, 16))


def pooled(grid: tuple[int, int], prefix: int = 0) -> PooledRegionHead:
    model = SimpleNamespace(grid_size=grid, num_prefix_tokens=prefix, project=lambda tokens: tokens)
    return PooledRegionHead(vision_language=model)


def test_pooling_weights_cells_by_the_area_the_box_covers():
    cells = F.one_hot(torch.arange(4)).float()[None]  # a 2 x 2 grid
    boxes = torch.tensor([[0, 0, 1, 1], [0.5, 0, 1, 0.5], [0.25, 0, 1, 0.5], [0.1, 0.6, 0.2, 0.7]])
    [regions] = pooled((2, 2))([torch.zeros(4, 1)], cells, [boxes])
    expected = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0.0]])
    torch.testing.assert_close(regions, F.normalize(expected, dim=1))


def test_pooling_answers_for_boxes_without_area_and_skips_the_class_token():
    cells = torch.cat([torch.full((1, 1, 4), 9.0), F.one_hot(torch.arange(4)).float()[None]], dim=1)
    boxes = torch.tensor([[0.75, 0.25, 0.75, 0.25], [1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0.0]])
    [regions] = pooled((2, 2), prefix=1)([torch.zeros(3, 1)], cells, [boxes])
    torch.testing.assert_close(regions, F.one_hot(torch.tensor([1, 3, 0]), 4).float())


def test_without_image_tokens_regions_see_only_each_other():
    torch.manual_seed(0)
    head = RegionSpotHead(
        token_dim=12,
        image_dim=16,
        text_dim=10,
        depth=2,
        num_heads=4,
        ffn_dim=24,
        with_image_tokens=False,
    ).eval()
    tokens = [torch.randn(n, 12) for n in (3, 0, 5)]
    found = head(tokens, torch.randn(3, 5, 16))
    for one, other in zip(found, head(tokens, torch.randn(3, 5, 16))):
        assert torch.equal(one, other)
    torch.testing.assert_close(head([tokens[0]], torch.randn(1, 5, 16))[0], found[0])
    assert not torch.allclose(head([tokens[0][:1]], torch.randn(1, 5, 16))[0], found[0][:1])
    head.train()([t.requires_grad_() for t in tokens], torch.randn(3, 5, 16))[0].sum().backward()
    assert all(p.grad is not None for p in head.parameters())
