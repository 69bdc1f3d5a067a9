"""What each of transformers' classes of SAM does in its own way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class EncodedBySam(NamedTuple):
    """What a model knows of an image: (1, C, h, w), and the finer maps that only masks need."""

    image: Tensor
    details: tuple[Tensor, ...] = ()


class SamKind:
    """What ``SamModel`` does in its own way. Nothing is copied, so threads may share it."""

    squashed = False
    statistics = _IMAGENET
    first_mask_token = 1
    # Whether vague prompts may get several masks, in the order of their tokens.
    has_multimask = True

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def side(self) -> int:
        return self.model.prompt_encoder.input_image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.prompt_encoder.image_embedding_size

    def encode(self, pixels: Tensor) -> list[EncodedBySam]:
        """Encodes preprocessed images (B, 3, side, side)."""
        return [EncodedBySam(image) for image in self.model.get_image_embeddings(pixels).split(1)]

    def layers(self) -> list[nn.Module]:
        """The layers of the image encoder, if they are alike."""
        return list(self.model.vision_encoder.layers)

    def output_tokens(self) -> Tensor:
        """The decoder's own tokens, which stand before those of the prompts: (N, C)."""
        decoder = self.model.mask_decoder
        return torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])

    def decoder_options(self, encoded: EncodedBySam, batch: int) -> dict[str, Any]:
        """Further arguments of the decoder, for a batch of copies of one image."""
        return {}


class SamHQKind(SamKind):
    """``SamHQModel``: one more token, and masks that look at the first global block's output."""

    has_multimask = False  # they are sorted, away from their tokens

    def encode(self, pixels: Tensor) -> list[EncodedBySam]:
        images, blocks = self.model.get_image_embeddings(pixels)
        return [EncodedBySam(*each) for each in zip(images.split(1), zip(blocks[0].split(1)))]

    def output_tokens(self) -> Tensor:
        return torch.cat([super().output_tokens(), self.model.mask_decoder.hq_token.weight])

    def decoder_options(self, encoded: EncodedBySam, batch: int) -> dict[str, Any]:
        return {"hq_token_only": False, "intermediate_embeddings": list(encoded.details)}


class Sam2Kind(SamKind):
    """``Sam2Model`` and its kin: squashed images, a token for whether there is an object."""

    squashed = True
    first_mask_token = 2

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # It may put one of the three masks for vague prompts in place of the one whose token this
        # is. A region's token would then depend on a threshold.
        model.mask_decoder.dynamic_multimask_via_stability = False

    def encode(self, pixels: Tensor) -> list[EncodedBySam]:
        *details, images = (x.split(1) for x in self.model.get_image_embeddings(pixels))
        return [EncodedBySam(image, tuple(fine)) for image, *fine in zip(images, *details)]

    def layers(self) -> list[nn.Module]:
        return []  # those of Hiera differ in width and in windows: more graphs than torch keeps

    def output_tokens(self) -> Tensor:
        return torch.cat([self.model.mask_decoder.obj_score_token.weight, super().output_tokens()])

    def decoder_options(self, encoded: EncodedBySam, batch: int) -> dict[str, Any]:
        details = [each.expand(batch, -1, -1, -1) for each in encoded.details]
        return {"high_resolution_features": details}


class Sam3Kind(Sam2Kind):
    """``Sam3TrackerModel``, the part of SAM 3 that boxes and points prompt."""

    statistics = _HALVES

    def layers(self) -> list[nn.Module]:
        return list(self.model.vision_encoder.backbone.layers)


# transformers' class of each type of model, and what reads it. Files of trackers hold the model of
# single images too.
KINDS: dict[str, tuple[str, type[SamKind]]] = {
    "sam": ("SamModel", SamKind),
    "sam_hq": ("SamHQModel", SamHQKind),
    "sam2": ("Sam2Model", Sam2Kind),
    "sam2_video": ("Sam2Model", Sam2Kind),
    "edgetam": ("EdgeTamModel", Sam2Kind),
    "edgetam_video": ("EdgeTamModel", Sam2Kind),
    "sam3_tracker": ("Sam3TrackerModel", Sam3Kind),
    "sam3_tracker_video": ("Sam3TrackerModel", Sam3Kind),
    "sam3_video": ("Sam3TrackerModel", Sam3Kind),
}
