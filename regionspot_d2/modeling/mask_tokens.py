"""SAM's mask decoder over many prompts of one image, without the work a token does not need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskTokenDecoder(nn.Module):
    """Mask tokens of many prompts of one image, from the weights of a stock SAM mask decoder.

    It gives what ``mask_decoder(..., multimask_output=False)`` gives, to 1e-5, and the mask token
    behind it. The image's side of the first layer is computed once for all prompts, the later
    projections of the image are moved over to the few tokens, and only the outputs asked for are
    computed. All of it is exact algebra. Any class with the attribute names of
    ``segment_anything.modeling.MaskDecoder`` will do; its weights are referenced, not copied.
    """

    mask_decoder: Any

    def __init__(self, mask_decoder: nn.Module) -> None:
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
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """
        Args:
            image_embedding: float (1, C, h, w), one image, as SAM's image encoder gives it.
            image_pe: float (1, C, h, w), from ``prompt_encoder.get_dense_pe()``.
            sparse: float (R, N, C), embedded points and box corners. R and N may be 0.
            dense: float (R, C, h, w), embedded mask prompts; or (1, C, h, w) if all prompts share
                one, as in the expanded view that SAM's prompt encoder returns without masks.
            with_masks: False skips the up-sampling.
            chunk_size: prompts decoded at a time, to bound the memory; None decodes all at once.
            multimask: True gives SAM's M masks for vague prompts instead of the first one.

        Returns:
            Mask tokens (R, C), logits of masks (R, 1, 4h, 4w) or None, and predicted IoU (R,); with
            ``multimask`` (R * M) rows of each, those of a prompt one after another.
        """
        # Sizes by shape[0], loops only if asked: an export must find neither number nor loop.
        num_prompts, grid = sparse.shape[0], image_embedding.shape[-2:]
        if num_prompts == 0:
            none = image_embedding.new_empty(0)
            masks = none.view(0, 1, 4 * grid[0], 4 * grid[1]) if with_masks else None
            return none.view(0, image_embedding.shape[1]), masks, none
        if dense.shape[0] > 1 and dense.stride(0) == 0:
            dense = dense[:1]
        image, image_pe = _channels_last(image_embedding), _channels_last(image_pe)
        shared = None
        if dense.shape[0] == 1:
            image = image + _channels_last(dense)
            # The image's side of the first layer's attentions: (1, heads, hw, d) each.
            layer = self.mask_decoder.transformer.layers[0]
            to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            shared = (
                _heads(to_image.k_proj(image + image_pe), to_image),
                _heads(to_image.v_proj(image), to_image),
                _heads(to_tokens.q_proj(image + image_pe), to_tokens),
            )

        # Of the mask tokens, which stand behind the IoU token.
        wanted = slice(1, self.mask_decoder.num_mask_tokens) if multimask else slice(0, 1)
        outputs = []
        starts = range(0, num_prompts, chunk_size) if chunk_size else (0,)
        for start in starts:
            chunk = slice(start, start + chunk_size if chunk_size else None)
            keys = image if shared else image + _channels_last(dense[chunk])
            tokens, keys = self._transform(keys, image_pe, sparse[chunk], shared, 1 + wanted.stop)
            ious = self.mask_decoder.iou_prediction_head(tokens[:, 0])[:, wanted].flatten()
            tokens = tokens[:, 1:][:, wanted]
            masks = self._masks(tokens, keys, grid, wanted) if with_masks else None
            outputs.append((tokens.flatten(0, 1), masks, ious))
        parts = list(zip(*outputs))
        masks = torch.cat(parts[1]) if with_masks else None
        return torch.cat(parts[0]), masks, torch.cat(parts[2])

    def _transform(
        self,
        keys: Tensor,
        key_pe: Tensor,
        sparse: Tensor,
        shared: tuple[Tensor, ...] | None,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """Runs the two-way transformer.

        Returns the first ``count`` tokens, that of the IoU before those of the masks (R, count, C),
        and the image as each prompt leaves it (R, hw, C).
        """
        decoder, transformer = self.mask_decoder, self.mask_decoder.transformer
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        query_pe = torch.cat([output_tokens.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        queries = query_pe
        for layer in transformer.layers:
            bare = layer.skip_first_layer_pe
            q, attention = queries if bare else queries + query_pe, layer.self_attn
            k, v = attention.k_proj(q), attention.v_proj(queries)
            found = _attend(attention, q, _heads(k, attention), _heads(v, attention))
            queries = layer.norm1(found if bare else queries + found)

            q = queries + query_pe
            if shared:
                # Tokens of all prompts attend to the one image as if they were one prompt's.
                tokens = q.flatten(0, 1)[None]
                found = _attend(layer.cross_attn_token_to_image, tokens, *shared[:2]).view(q.shape)
            else:
                keys_with_pe = keys + key_pe
                found = _attend_to_image(layer.cross_attn_token_to_image, q, keys_with_pe, keys)
            queries = layer.norm2(queries + found)
            queries = layer.norm3(queries + layer.mlp(queries))

            q = queries + query_pe
            if shared:
                scores = _score_shared_image(layer.cross_attn_image_to_token, q, shared[2])
                shared = None  # from here on each prompt has an image of its own
            else:
                scores = _score_image(layer.cross_attn_image_to_token, q, keys_with_pe)
            found = _attend_to_tokens(layer.cross_attn_image_to_token, scores, queries)
            keys = layer.norm4(keys + found)

        # Here each token attends for itself, so the tokens that nobody reads are left out.
        queries, q = queries[:, :count], (queries + query_pe)[:, :count]
        found = _attend_to_image(transformer.final_attn_token_to_image, q, keys + key_pe, keys)
        return transformer.norm_final_attn(queries + found), keys

    def _masks(self, tokens: Tensor, keys: Tensor, grid: torch.Size, wanted: slice) -> Tensor:
        """Mask tokens (R, M, C) and images (R, hw, C) -> logits (R * M, 1, 4h, 4w)."""
        # Channels stay last up to the last product: M channels are put in order instead of many.
        conv1, norm, activation1, conv2, activation2 = self.mask_decoder.output_upscaling
        x = _double(conv1, keys)
        x = activation1(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        x = activation2(_double(conv2, x))
        networks = self.mask_decoder.output_hypernetworks_mlps[wanted]
        x = x @ torch.stack([mlp(x) for mlp, x in zip(networks, tokens.unbind(1))], dim=2)
        # (row, column, 2x2 of the first doubling, 2x2 of the second, M) -> (M, rows, columns)
        x = x.view(-1, *grid, 2, 2, 2, 2, len(networks)).permute(0, 7, 1, 3, 5, 2, 4, 6)
        return x.reshape(-1, 1, 4 * grid[0], 4 * grid[1])


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, hw, C), in memory too: the layer norms would copy it otherwise."""
    return x.flatten(2).transpose(1, 2).contiguous()


def _double(conv: Any, x: Tensor) -> Tensor:
    """(R, n, channels) -> (R, n * 2 * 2, channels)."""
    # With kernel 2 and stride 2, each place has 2x2 places of its own: this is a linear layer.
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(x, weight, conv.bias.repeat(4)).reshape(x.shape[0], -1, conv.out_channels)


def _heads(x: Tensor, attention: Any) -> Tensor:
    """(B, n, heads * d) -> (B, heads, n, d)."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _through_weight(x: Tensor, projection: nn.Linear) -> Tensor:
    """Moves a projection to the other side of a product: (R, heads, T, d) -> (R, heads * T, C)."""
    weight = projection.weight.unflatten(0, (x.shape[1], -1))
    return torch.einsum("rhtd,hdc->rhtc", x, weight).flatten(1, 2)


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM's ``Attention`` through PyTorch's own; k and v come projected and split into heads."""
    out = F.scaled_dot_product_attention(_heads(attention.q_proj(q), attention), k, v)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def _attend_to_image(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens (R, T, C) attend to the image of their own prompt (R, hw, C), left unprojected.

    A head's score q . (K x + b) is (K^T q) . x + q . b, whose last term a softmax over the places
    ignores. Its weights a_i sum to one, so that sum a_i (V x_i + b) is V (sum a_i x_i) + b. K and
    V thus meet heads * T vectors instead of hw, and all heads read the same keys and values.
    """
    q = _heads(attention.q_proj(q), attention)
    k, v, scale = k[:, None], v[:, None], q.shape[-1] ** -0.5
    q_without_heads = _through_weight(q, attention.k_proj)[:, None]
    out = F.scaled_dot_product_attention(q_without_heads, k, v, scale=scale)
    out = out[:, 0].unflatten(1, q.shape[1:3])
    weight = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
    out = torch.einsum("rhtc,hdc->rthd", out, weight).flatten(2)
    return attention.out_proj(out + attention.v_proj.bias)


def _score_shared_image(attention: Any, k: Tensor, q: Tensor) -> Tensor:
    """Scores of the one image (1, heads, hw, d) at all tokens (R, T, C): (R, heads, T, hw)."""
    num_prompts, num_tokens, _ = k.shape
    k = _heads(attention.k_proj(k).flatten(0, 1)[None], attention)
    scores = (k * k.shape[-1] ** -0.5) @ q.transpose(2, 3)
    return scores[0].unflatten(1, (num_prompts, num_tokens)).transpose(0, 1)


def _score_image(attention: Any, k: Tensor, q: Tensor) -> Tensor:
    """Scores of each prompt's image (R, hw, C) at its tokens (R, T, C): (R, heads, T, hw).

    As above, but the softmax will be over the tokens, so the bias of q's projection stays.
    """
    k = _heads(attention.k_proj(k), attention)
    k = k * k.shape[-1] ** -0.5
    bias = k @ attention.q_proj.bias.view(attention.num_heads, -1, 1)
    k_without_heads = _through_weight(k, attention.q_proj)
    scores = torch.baddbmm(bias.flatten(1, 2), k_without_heads, q.transpose(1, 2))
    return scores.unflatten(1, k.shape[1:3])


def _attend_to_tokens(attention: Any, scores: Tensor, v: Tensor) -> Tensor:
    """What each place finds at the tokens (R, T, C): (R, hw, C).

    The output projection moves to the tokens; each head's weights sum to one, so each head brings
    its share of the bias. The softmax stands here on its own because it is over so few tokens:
    with the places last in memory it runs at full speed, with the tokens last it does not.
    """
    weights = scores.softmax(dim=2).flatten(1, 2)
    v = _heads(attention.v_proj(v), attention)
    weight = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))
    v = torch.einsum("rhtd,chd->rhtc", v, weight) + attention.out_proj.bias / attention.num_heads
    return weights.transpose(1, 2) @ v.flatten(1, 2)
