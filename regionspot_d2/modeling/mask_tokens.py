"""SAM's mask decoder over many prompts of one image, with the image's side computed once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _SharedLayer(NamedTuple):
    """The image's side of the first layer, the same for all prompts; each (1, heads, hw, channels / heads)."""

    token_to_image_key: Tensor
    token_to_image_value: Tensor
    image_to_token_query: Tensor


class MaskTokenDecoder(nn.Module):
    """Mask tokens of many prompts of one image, from the weights of a stock SAM mask decoder.

    It gives what ``mask_decoder(..., multimask_output=False)`` gives (to 1e-5), and the mask token behind it, with a
    fraction of the work: the image's side of the first layer is computed once per image, large projections are moved
    to the few tokens, and only the wanted outputs are computed. It has no weights of its own. Any class with the
    attribute names of ``segment_anything.modeling.MaskDecoder`` will do.
    """

    def __init__(self, mask_decoder: nn.Module) -> None:
        """
        Args:
            mask_decoder: a ``segment_anything.modeling.MaskDecoder`` or a class like it; referenced, not copied.
        """
        super().__init__()
        self.mask_decoder = mask_decoder

    def forward(
        self,
        image_embedding: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        *,
        with_masks: bool = True,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """
        Args:
            image_embedding: float (1, C, h, w), one image, as SAM's image encoder gives it.
            image_pe: float (1, C, h, w), from ``prompt_encoder.get_dense_pe()``.
            sparse: float (R, N, C), the embedded points and box corners of R prompts. R and N may be 0.
            dense: float (R, C, h, w), the embedded mask prompts; or (1, C, h, w) where all prompts share one. The
                expanded view that SAM's prompt encoder returns without mask prompts counts as shared.
            with_masks: False skips the up-sampling.
            chunk_size: prompts decoded at a time, which bounds the memory; None decodes all at once. The image's
                side is computed once per call either way.

        Returns:
            The mask tokens (R, C); the mask logits (R, 1, 4h, 4w), or None without masks; the predicted IoU (R,).
        """
        num_prompts, channels = len(sparse), image_embedding.shape[1]
        grid = image_embedding.shape[-2:]
        if num_prompts == 0:
            masks = image_embedding.new_empty((0, 1, 4 * grid[0], 4 * grid[1]))
            tokens = image_embedding.new_empty((0, channels))
            return tokens, masks if with_masks else None, image_embedding.new_empty(0)
        if len(dense) > 1 and dense.stride(0) == 0:
            dense = dense[:1]
        image_pe = image_pe.flatten(2).transpose(1, 2)
        dense = dense.flatten(2).transpose(1, 2)
        image = image_embedding.flatten(2).transpose(1, 2)

        shared = None
        if len(dense) == 1:
            image = image + dense
            shared = _project_image(self.mask_decoder.transformer.layers[0], image, image_pe)

        outputs = []
        chunk_size = chunk_size or num_prompts
        for start in range(0, num_prompts, chunk_size):
            chunk = slice(start, start + chunk_size)
            keys = image if shared else image + dense[chunk]
            tokens, keys = self._transform(keys, image_pe, sparse[chunk], shared)
            masks = self._masks(tokens[:, 1], keys, grid) if with_masks else None
            ious = self.mask_decoder.iou_prediction_head(tokens[:, 0])[:, 0]
            outputs.append((tokens[:, 1], masks, ious))
        tokens, masks, ious = zip(*outputs)
        return torch.cat(tokens), torch.cat(masks) if with_masks else None, torch.cat(ious)

    def _transform(
        self, keys: Tensor, key_pe: Tensor, sparse: Tensor, shared: _SharedLayer | None
    ) -> tuple[Tensor, Tensor]:
        """Runs the two-way transformer.

        Returns:
            The IoU token and the first mask token (R, 2, C), and the image as each prompt sees it (R, hw, C).
        """
        decoder = self.mask_decoder
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        query_pe = torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)
        queries = query_pe
        for layer in decoder.transformer.layers:
            if layer.skip_first_layer_pe:
                queries = layer.norm1(_attend(layer.self_attn, queries, queries, queries))
            else:
                q = queries + query_pe
                queries = layer.norm1(queries + _attend(layer.self_attn, q, q, queries))

            attention = layer.cross_attn_token_to_image
            q = queries + query_pe
            if shared:
                found = _attend_to_shared_image(attention, q, shared)
            else:
                found = _attend_to_image(attention, q, keys, key_pe)
            queries = layer.norm2(queries + found)
            queries = layer.norm3(queries + layer.mlp(queries))

            attention = layer.cross_attn_image_to_token
            q = queries + query_pe
            keys = layer.norm4(
                _add_attention_to_tokens(attention, keys, key_pe, q, queries, shared)
            )
            shared = None

        # Each token attends alone here, so those that nobody reads need not.
        queries, q = queries[:, :2], (queries + query_pe)[:, :2]
        attention = decoder.transformer.final_attn_token_to_image
        found = _attend_to_image(attention, q, keys, key_pe)
        return decoder.transformer.norm_final_attn(queries + found), keys

    def _masks(self, token: Tensor, keys: Tensor, grid: torch.Size) -> Tensor:
        """(R, C) first mask tokens and (R, hw, C) images -> (R, 1, 4h, 4w) logits of the first mask."""
        upscaled = self.mask_decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, grid))
        weights = self.mask_decoder.output_hypernetworks_mlps[0](token)
        return (weights[:, None] @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    """(B, n, channels) -> (B, heads, n, channels / heads)."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _weight_heads(linear: nn.Linear, attention: nn.Module) -> Tensor:
    """The weight of a projection into heads: (heads, channels / heads, C)."""
    return linear.weight.unflatten(0, (attention.num_heads, -1))


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM's ``Attention`` through PyTorch's fused attention."""
    q, k, v = attention.q_proj(q), attention.k_proj(k), attention.v_proj(v)
    out = F.scaled_dot_product_attention(*(_heads(x, attention) for x in (q, k, v)))
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def _project_image(layer: nn.Module, image: Tensor, pe: Tensor) -> _SharedLayer:
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    return _SharedLayer(
        token_to_image_key=_heads(to_image.k_proj(image + pe), to_image),
        token_to_image_value=_heads(to_image.v_proj(image), to_image),
        image_to_token_query=_heads(to_token.q_proj(image + pe), to_token),
    )


def _attend_to_shared_image(attention: nn.Module, q: Tensor, shared: _SharedLayer) -> Tensor:
    """Tokens (R, T, C) of all prompts attend to the one image as if they were of one prompt."""
    num_prompts, num_tokens, _ = q.shape
    q = _heads(attention.q_proj(q).flatten(0, 1)[None], attention)
    out = F.scaled_dot_product_attention(q, shared.token_to_image_key, shared.token_to_image_value)
    out = out.transpose(1, 2).flatten(2).view(num_prompts, num_tokens, -1)
    return attention.out_proj(out)


def _attend_to_image(attention: nn.Module, q: Tensor, keys: Tensor, key_pe: Tensor) -> Tensor:
    """Tokens (R, T, C) attend to the image of their own prompt (R, hw, C), which is not projected.

    A head's score q . (K x + b) equals (K^T q) . x + q . b. The last term is the same at all places, and the softmax
    ignores it. The weights a_i sum to one, so that sum a_i (V x_i + b) equals V (sum a_i x_i) + b. K and V thus meet
    heads * T vectors instead of hw, and all heads share the image as their keys and values.
    """
    q = _heads(attention.q_proj(q), attention)
    scale = q.shape[-1] ** -0.5
    q = torch.einsum("rhtd,hdc->rhtc", q, _weight_heads(attention.k_proj, attention))
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2)[:, None], (keys + key_pe)[:, None], keys[:, None], scale=scale
    ).view(q.shape)
    out = torch.einsum("rhtc,hdc->rthd", out, _weight_heads(attention.v_proj, attention))
    return attention.out_proj(out.flatten(2) + attention.v_proj.bias)


def _add_attention_to_tokens(
    attention: nn.Module,
    keys: Tensor,
    key_pe: Tensor,
    k: Tensor,
    v: Tensor,
    shared: _SharedLayer | None,
) -> Tensor:
    """The image (R or 1, hw, C) plus what it finds at the tokens (R, T, C): (R, hw, C), before the norm."""
    num_heads = attention.num_heads
    k = _heads(attention.k_proj(k), attention)
    k = k * k.shape[-1] ** -0.5
    if shared:
        scores = k @ shared.image_to_token_query.transpose(2, 3)
    else:
        # As above, q's projection moves to the few tokens. Its bias differs from token to token and stays.
        bias = torch.einsum("rhtd,hd->rht", k, attention.q_proj.bias.view(num_heads, -1))
        k = torch.einsum("rhtd,hdc->rhtc", k, _weight_heads(attention.q_proj, attention))
        scores = k @ (keys + key_pe)[:, None].transpose(2, 3) + bias[..., None]
    weights = scores.softmax(dim=2).flatten(1, 2)
    # The output projection moves to the tokens too; each head's weights sum to one, so each may bring a share of the bias.
    v = _heads(attention.v_proj(v), attention)
    v = torch.einsum("rhtd,chd->rhtc", v, attention.out_proj.weight.unflatten(1, (num_heads, -1)))
    v = (v + attention.out_proj.bias / num_heads).flatten(1, 2)
    return keys + weights.transpose(1, 2) @ v
