"""Localizers: frozen models that turn prompts on an image into one mask token per region."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import BitMasks, Boxes
from detectron2.utils.registry import Registry
from segment_anything import sam_model_registry
from torch import Tensor, nn

from ..files import local_weights
from .frozen import FrozenModule
from .mask_tokens import MaskTokenDecoder

LOCALIZER_REGISTRY = Registry("LOCALIZER")
LOCALIZER_REGISTRY.__doc__ = "Localizers, built as ``LOCALIZER_REGISTRY.get(name)(cfg)``."

# A mask given as a prompt enters SAM as logits; its training fed back its own, which lie in this range.
_MASK_PROMPT_LOGIT = 10.0


class PointPrompts(NamedTuple):
    """Points that mark R regions of one image.

    Attributes:
        points: (R, P, 2) XY, pixels of the given image.
        labels: (R, P), 1 on the region, 0 on the background, -1 where a row has fewer than P points.
    """

    points: Tensor
    labels: Tensor


Prompts: TypeAlias = Boxes | PointPrompts | BitMasks


class Localizer(FrozenModule):
    """Interface of a localizer: images and prompts in, mask tokens and masks out.

    Attributes:
        token_dim: width of a mask token.
        masks_are_fine: whether its masks tell more than the box they came from, so that drawing them helps.
    """

    token_dim: int
    masks_are_fine: bool = True

    def encode_image(self, images: list[Tensor]) -> list[Tensor]:
        """Encodes images once, for any number of prompts.

        Args:
            images: RGB, 0..255, each (3, H, W) of its own size.

        Returns:
            One embedding (1, C, h, w) per image.
        """
        raise NotImplementedError

    def decode(
        self,
        embedding: Tensor,
        image_size: tuple[int, int],
        prompts: Prompts,
        *,
        with_masks: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Finds the regions that prompts ask for on one encoded image.

        Args:
            embedding: what :meth:`encode_image` gave for the image.
            image_size: (H, W) of the image that was encoded.
            prompts: boxes (XYXY), points or masks of R regions, pixels of that image. R may be 0.
            with_masks: False skips the up-sampling that only masks need.

        Returns:
            Mask tokens (R, token_dim), and mask logits (R, 1, h, w) or None.
        """
        raise NotImplementedError

    def full_size_masks(
        self,
        mask_logits: Tensor,
        image_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Brings mask logits to the size of an image.

        Args:
            mask_logits: (R, 1, h, w) from :meth:`decode`.
            image_size: (H, W) of the image that was encoded.
            output_size: (H', W') to deliver; by default ``image_size``.

        Returns:
            A bool tensor (R, H', W').
        """
        raise NotImplementedError

    def forward(
        self, images: list[Tensor], prompts: list[Prompts], *, with_masks: bool = True
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Encodes images and decodes the prompts of each.

        Args:
            images: RGB, 0..255, each (3, H, W) of its own size.
            prompts: the prompts of each image, pixels of that image.
            with_masks: False skips the up-sampling that only masks need.

        Returns:
            Per image the mask tokens (R, token_dim), and per image the mask logits (R, 1, h, w) or None.
        """
        decoded = [
            self.decode(
                embedding, (image.shape[-2], image.shape[-1]), prompt, with_masks=with_masks
            )
            for image, embedding, prompt in zip(images, self.encode_image(images), prompts)
        ]
        tokens = [token for token, _ in decoded]
        masks = [mask for _, mask in decoded if mask is not None]
        return tokens, masks if with_masks else None


@LOCALIZER_REGISTRY.register()
class SamLocalizer(Localizer):
    """Segment Anything as a localizer: the mask token is the first mask's, after the two-way transformer."""

    @configurable
    def __init__(
        self,
        *,
        image_encoder: nn.Module,
        prompt_encoder: nn.Module,
        mask_decoder: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
        tokens: str = "mask",
        chunk_size: int = 16,
    ) -> None:
        """
        Args:
            image_encoder: (B, 3, S, S) -> (B, C, h, w), S being ``prompt_encoder.input_image_size``.
            prompt_encoder: a ``segment_anything.modeling.PromptEncoder`` or its twin.
            mask_decoder: a ``segment_anything.modeling.MaskDecoder`` or its twin.
            pixel_mean: RGB mean of images in 0..255.
            pixel_std: RGB standard deviation of images in 0..255.
            tokens: "mask" for the mask token, "prompt" for the mean of the prompt's own embeddings (what SAM's
                prompt encoder knows: the place alone), "both" for the two side by side.
            chunk_size: prompts decoded at a time; bounds the memory, not the result.

        Raises:
            ValueError: if ``tokens`` is none of the three.
        """
        super().__init__()
        if tokens not in ("mask", "prompt", "both"):
            raise ValueError(
                f"MODEL.LOCALIZER.TOKENS is '{tokens}'; it must be 'mask', 'prompt' or 'both'."
            )
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.token_decoder = MaskTokenDecoder(mask_decoder)
        self.tokens = tokens
        self.chunk_size = chunk_size
        self.side: int = prompt_encoder.input_image_size[0]
        self.token_dim = prompt_encoder.embed_dim * (2 if tokens == "both" else 1)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arch = cfg.MODEL.LOCALIZER.ARCH
        if arch not in sam_model_registry:
            raise ValueError(
                f"MODEL.LOCALIZER.ARCH is '{arch}'; segment_anything has {', '.join(sam_model_registry)}."
            )
        weights = local_weights(cfg.MODEL.LOCALIZER.WEIGHTS, "MODEL.LOCALIZER.WEIGHTS")
        sam = sam_model_registry[arch]()
        if weights is not None:
            load_frozen_weights(sam, weights, "MODEL.LOCALIZER.WEIGHTS", f"SAM {arch}")
        return {
            "image_encoder": sam.image_encoder,
            "prompt_encoder": sam.prompt_encoder,
            "mask_decoder": sam.mask_decoder,
            "pixel_mean": sam.pixel_mean.flatten().tolist(),
            "pixel_std": sam.pixel_std.flatten().tolist(),
            "tokens": cfg.MODEL.LOCALIZER.TOKENS,
            "chunk_size": cfg.MODEL.LOCALIZER.CHUNK_SIZE,
        }

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The (h, w) an image of ``image_size`` has inside the padded square: its long side is the square's."""
        scale = self.side / max(image_size)
        height, width = (max(1, int(length * scale + 0.5)) for length in image_size)
        return height, width

    def resize(self, image: Tensor) -> Tensor:
        """Resizes an image as SAM's ``ResizeLongestSide`` does through PIL.

        Args:
            image: (3, H, W) RGB, 0..255.

        Returns:
            (3, h, w) with whole values in 0..255.
        """
        # On the CPU the uint8 kernel is bit-exact with PIL; CUDA has none, rounding comes within one step of it.
        if image.is_cuda or image.dtype != torch.uint8:
            image = image.float()
        resized = F.interpolate(
            image[None],
            self.input_size((image.shape[-2], image.shape[-1])),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )[0]
        return resized.round().clamp(0, 255) if resized.is_floating_point() else resized

    @torch.no_grad()
    def encode_image(self, images: list[Tensor]) -> list[Tensor]:
        if not images:
            return []
        batch = torch.stack([self._preprocess(image) for image in images])
        return list(self.image_encoder(batch).split(1))

    def _preprocess(self, image: Tensor) -> Tensor:
        resized = (self.resize(image) - self.pixel_mean) / self.pixel_std
        height, width = resized.shape[-2:]
        return F.pad(resized, (0, self.side - width, 0, self.side - height))

    @torch.no_grad()
    def decode(
        self,
        embedding: Tensor,
        image_size: tuple[int, int],
        prompts: Prompts,
        *,
        with_masks: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(prompts, Boxes):
            boxes = self._to_input_frame(prompts.tensor.reshape(-1, 2, 2), image_size)
            return self._decode(embedding, with_masks, boxes=boxes.reshape(-1, 4))
        if isinstance(prompts, BitMasks):
            return self._decode_masks(embedding, image_size, prompts, with_masks)
        return self._decode_points(embedding, image_size, prompts, with_masks)

    def _decode_points(
        self,
        embedding: Tensor,
        image_size: tuple[int, int],
        prompts: PointPrompts,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        points = self._to_input_frame(prompts.points, image_size)
        labels = prompts.labels
        # SAM attends to padding points too, so rows of different lengths are decoded apart: an answer
        # must not depend on the longest row beside it.
        lengths = (labels >= 0).sum(1)
        if len(lengths) == 0:
            return self._decode(embedding, with_masks, boxes=points.new_zeros(0, 4))
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(
                f"Point prompt {row} has no point; every region needs at least one point of label 1 or 0."
            )
        order = (labels < 0).sort(dim=1, stable=True).indices
        points = points.gather(1, order[..., None].expand(-1, -1, 2))
        labels = labels.gather(1, order)
        tokens = points.new_zeros(len(points), self.token_dim)
        masks = None
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            found, found_masks = self._decode(
                embedding, with_masks, points=(points[rows, :length], labels[rows, :length])
            )
            tokens[rows] = found.to(tokens.dtype)
            if found_masks is not None:
                if masks is None:
                    masks = found_masks.new_zeros(len(points), *found_masks.shape[1:])
                masks[rows] = found_masks
        return tokens, masks

    def _decode_masks(
        self,
        embedding: Tensor,
        image_size: tuple[int, int],
        prompts: BitMasks,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # SAM was trained on masks that refine another prompt: the mask's own box stands beside it.
        corners = prompts.get_bounding_boxes().tensor.to(embedding.device).reshape(-1, 2, 2)
        boxes = self._to_input_frame(corners, image_size).reshape(-1, 4)
        height, width = self.prompt_encoder.mask_input_size
        inner = [max(1, round(n * height / self.side)) for n in self.input_size(image_size)]
        found = []
        # Each mask has a dense embedding of its own, so prompts are encoded by chunks too.
        for start in range(0, max(1, len(boxes)), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            masks = prompts.tensor[rows].to(embedding.device, torch.float32)[:, None]
            masks = F.interpolate(masks, inner, mode="bilinear", align_corners=False)
            masks = F.pad(masks, (0, width - inner[1], 0, height - inner[0]))
            logits = (masks * 2 - 1) * _MASK_PROMPT_LOGIT
            found.append(self._decode(embedding, with_masks, boxes=boxes[rows], masks=logits))
        tokens = torch.cat([token for token, _ in found])
        return tokens, torch.cat([m for _, m in found if m is not None]) if with_masks else None

    def _decode(
        self,
        embedding: Tensor,
        with_masks: bool,
        *,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=masks)
        if masks is None:
            # The same "no mask" embedding for all prompts.
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(embedding)
        prompt_tokens = sparse.mean(1)
        if self.tokens == "prompt" and not with_masks:
            return prompt_tokens, None
        mask_tokens, mask_logits, _ = self.token_decoder(
            embedding,
            self.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            with_masks=with_masks,
            chunk_size=self.chunk_size,
        )
        if self.tokens == "prompt":
            return prompt_tokens, mask_logits
        if self.tokens == "both":
            return torch.cat([prompt_tokens, mask_tokens], dim=1), mask_logits
        return mask_tokens, mask_logits

    def _to_input_frame(self, points: Tensor, image_size: tuple[int, int]) -> Tensor:
        """(R, P, 2) XY, pixels of the image -> pixels of the localizer's square."""
        height, width = self.input_size(image_size)
        scale = points.new_tensor([width / image_size[1], height / image_size[0]])
        return points.float() * scale

    def full_size_masks(
        self,
        mask_logits: Tensor,
        image_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        height, width = self.input_size(image_size)
        output_size = output_size or image_size
        masks = torch.zeros(
            (len(mask_logits), *output_size), dtype=torch.bool, device=mask_logits.device
        )
        # One mask at a time is float at full size; Sam.postprocess_masks holds all of them.
        for mask, logits in zip(masks, mask_logits.float()):
            square = F.interpolate(
                logits[None], (self.side, self.side), mode="bilinear", align_corners=False
            )
            inner = square[..., :height, :width]
            full = F.interpolate(inner, output_size, mode="bilinear", align_corners=False)
            torch.gt(full[0, 0], 0, out=mask)
        return masks


def load_frozen_weights(model: nn.Module, path: Any, config_key: str, name: str) -> None:
    """Loads a state dict into a pretrained model, all keys or none.

    Args:
        model: the module to fill.
        path: a file that ``torch.load(weights_only=True)`` reads.
        config_key: the key that named the file, for the error.
        name: what the file should hold, for the error.

    Raises:
        ValueError: if the file is damaged or holds another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{config_key}: '{path}' does not hold the weights of {name} ({reason}). "
            "Is the download complete, and does the architecture beside the key match?"
        ) from error
