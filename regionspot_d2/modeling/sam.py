"""Segment Anything as a localizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder
from torch import Tensor, nn

from ..files import explained_weights, local_weights
from .interfaces import LOCALIZER_REGISTRY
from .mask_tokens import MaskTokenDecoder
from .precision import running_in
from .sam_attention import FusedImageEncoder
from .square import SquareLocalizer


@LOCALIZER_REGISTRY.register()
class SamLocalizer(SquareLocalizer):
    """SAM, or any model of its parts. A token is the first mask's after the two-way transformer.

    ``MODEL.LOCALIZER.ARCH`` is a name in ``segment_anything.sam_model_registry``, to which any
    model of SAM's parts may be added, or "vit_t" for MobileSAM.
    """

    @configurable
    def __init__(
        self,
        *,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: list[float],
        pixel_std: list[float],
        tokens: str = "mask",
        chunk_size: int = 0,
        arch: str = "",
    ) -> None:
        """
        Args:
            image_encoder: (B, 3, S, S) -> (B, C, h, w), S of ``prompt_encoder.input_image_size``.
            prompt_encoder, mask_decoder: ``segment_anything.modeling``'s, or their twins.
            pixel_mean, pixel_std, tokens, chunk_size, arch: as for :class:`SquareLocalizer`.
        """
        super().__init__(
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            tokens=tokens,
            chunk_size=chunk_size,
            arch=arch,
        )
        if isinstance(image_encoder, ImageEncoderViT):
            image_encoder = FusedImageEncoder(image_encoder)
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.token_decoder = MaskTokenDecoder(mask_decoder)
        self.side = prompt_encoder.input_image_size[0]
        self.mask_prompt_size = prompt_encoder.mask_input_size
        self.freeze()

    @property
    def token_dim(self) -> int:  # type: ignore[override]
        return self.prompt_encoder.embed_dim * (2 if self.tokens == "both" else 1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arch = cfg.MODEL.LOCALIZER.ARCH
        build = _builder(arch)
        weights = local_weights(cfg.MODEL.LOCALIZER.WEIGHTS, "MODEL.LOCALIZER.WEIGHTS")
        sam = build()
        if weights is not None:
            with explained_weights(weights, f"the weights of SAM {arch} (MODEL.LOCALIZER)"):
                sam.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return {
            "image_encoder": sam.image_encoder,
            "prompt_encoder": sam.prompt_encoder,
            "mask_decoder": sam.mask_decoder,
            "pixel_mean": sam.pixel_mean.flatten().tolist(),
            "pixel_std": sam.pixel_std.flatten().tolist(),
            "tokens": cfg.MODEL.LOCALIZER.TOKENS,
            "chunk_size": cfg.MODEL.LOCALIZER.CHUNK_SIZE,
            "arch": arch,
        }

    def layers_to_compile(self) -> list[nn.Module]:
        encoder = self.image_encoder
        return list(encoder.blocks) if isinstance(encoder, FusedImageEncoder) else []

    @torch.no_grad()
    def encode_images(self, images: list[Tensor]) -> list[Tensor]:
        if not images:
            return []
        batch = torch.stack([self.preprocess(image) for image in images])
        return list(self.image_encoder(batch).to(self.pixel_mean.dtype).split(1))

    def embed_prompts(
        self,
        *,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        # A place in bfloat16 would be off by up to two of 1024 pixels. It costs next to nothing.
        with running_in(self.pixel_mean.dtype, self.pixel_mean.device):
            sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=masks)
        return sparse, None if masks is None else dense

    def decode_embedded(
        self,
        embedding: Tensor,
        sparse: Tensor,
        dense: Tensor | None,
        *,
        with_masks: bool,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with running_in(self.pixel_mean.dtype, embedding.device):
            image_pe = self.prompt_encoder.get_dense_pe()
        if dense is None:
            # All prompts share one "no mask" embedding; an expanded view says so to the decoder.
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(embedding)
        return self.token_decoder(
            embedding,
            image_pe,
            sparse,
            dense,
            with_masks=with_masks,
            chunk_size=self.chunk_size,
            multimask=multimask,
        )


def _builder(arch: str) -> Callable[[], Any]:
    """What builds the SAM of that name, without weights."""
    if arch in sam_model_registry:
        return sam_model_registry[arch]
    if arch != "vit_t":
        raise ValueError(
            f"MODEL.LOCALIZER.ARCH is '{arch}'; segment_anything has "
            f"{', '.join(sam_model_registry)}, and mobile_sam has vit_t."
        )
    try:
        import mobile_sam
    except ImportError as error:
        raise ImportError(
            "MODEL.LOCALIZER.ARCH 'vit_t' is MobileSAM, which needs the package mobile_sam: "
            "pip install git+https://github.com/ChaoningZhang/MobileSAM.git"
        ) from error
    return mobile_sam.sam_model_registry[arch]
