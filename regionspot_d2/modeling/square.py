"""Localizers whose images fill a square, and which read prompts as SAM does."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .interfaces import Embedding, Localizer, image_size_of
from .prompts import BoxPrompts, MaskPrompts, PointPrompts, Prompts

# A mask given as a prompt enters SAM as logits; its training fed back its own, which lie in this
# range.
_MASK_PROMPT_LOGIT = 10.0


class SquareLocalizer(Localizer):
    """Images and prompts in the frame of a square, and tokens put together from what SAM gives.

    A subclass embeds prompts in that frame, and decodes embedded prompts.

    Attributes:
        side: of the square, in pixels.
        mask_prompt_size: (h, w) of the masks that the prompt encoder takes.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    side: int
    mask_prompt_size: tuple[int, int]

    def __init__(
        self,
        *,
        pixel_mean: list[float],
        pixel_std: list[float],
        tokens: str = "mask",
        chunk_size: int = 0,
        squashed: bool = False,
        arch: str = "",
    ) -> None:
        """
        Args:
            pixel_mean, pixel_std: of RGB images in 0..255.
            tokens: "mask" for the mask token, "prompt" for the mean of the prompt's own embeddings
                (SAM's prompt encoder knows only the place), "both" for the two side by side.
            chunk_size: prompts decoded at a time; bounds the memory, not the result. 0 takes what
                is fast on the device.
            squashed: True makes images square, as SAM 2 does; False pads them, as SAM does.
            arch: which model of the class this is, for ``identity``.

        Raises:
            ValueError: ``tokens`` is none of the three, or ``chunk_size`` is negative.
        """
        super().__init__()
        if tokens not in ("mask", "prompt", "both"):
            raise ValueError(
                f"MODEL.LOCALIZER.TOKENS is '{tokens}'; it must be 'mask', 'prompt' or 'both'."
            )
        if chunk_size < 0:
            raise ValueError(
                f"MODEL.LOCALIZER.CHUNK_SIZE is {chunk_size}; it must be a number of prompts, or 0 "
                "for what is fast on the device."
            )
        self.tokens = tokens
        self._chunk_size = chunk_size
        self.squashed = squashed
        kind = "" if tokens == "mask" else f"with tokens '{tokens}'"
        self.identity = " ".join(filter(None, [type(self).__name__, arch, kind]))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def chunk_size(self) -> int:
        """Prompts decoded at a time."""
        # Each prompt has an image of 4 MB of its own. Two of them stay in the cache of a CPU, which
        # takes a bit more than half the time of sixteen then; a GPU wants more to do at once.
        return self._chunk_size or (2 if self.pixel_mean.device.type == "cpu" else 16)

    @abstractmethod
    def embed_prompts(
        self,
        *,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeds R prompts in pixels of the square.

        Args:
            points: (R, P, 2), XY, and their labels (R, P), 1 or 0.
            boxes: (R, 4), XYXY.
            masks: logits (R, 1, *mask_prompt_size), beside ``boxes``.

        Returns:
            (R, N, C) for points and corners, and (R, C, h, w) for masks or None without them.
        """

    @abstractmethod
    def decode_embedded(
        self,
        embedding: Embedding,
        sparse: Tensor,
        dense: Tensor | None,
        *,
        with_masks: bool,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decodes what :meth:`embed_prompts` gave; ``multimask`` is as in :meth:`decode_points`.

        Returns:
            Mask tokens (R, C), mask logits (R, 1, h, w) or None, and the predicted IoU (R,) of the
            masks, or None where the masks were not asked for.
        """

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The (h, w) of an image inside the square, whose side its long side gets."""
        if self.squashed:
            return self.side, self.side
        scale = self.side / max(image_size)
        height, width = (max(1, int(length * scale + 0.5)) for length in image_size)
        return height, width

    def resize(self, image: Tensor) -> Tensor:
        """Resizes an image to its size in the square, as SAM does, that is, with PIL.

        On a CPU the result is PIL's, value for value. Other devices have no such kernel; there
        the values are within one level of PIL's.

        Args:
            image: (3, H, W), RGB, 0..255, of any dtype. PIL has 8 bits per value, so fractions
                are rounded first: an image gives the same result as uint8 and as float.

        Returns:
            (3, h, w) with whole values in 0..255; uint8 on a CPU, else float32.
        """
        size = self.input_size(image_size_of(image))
        if image.dtype != torch.uint8:
            image = image.float().round().clamp(0, 255)
        if image.device.type == "cpu":
            # Not F.interpolate: its uint8 kernel is off by up to two levels (torch 2.14, AVX-512),
            # and its float kernel is wrong where the result is one pixel wide.
            pixels = Image.fromarray(image.byte().permute(1, 2, 0).contiguous().numpy())
            resized = np.array(pixels.resize(size[::-1], Image.Resampling.BILINEAR))
            return torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        # One rounding instead of PIL's two, after each direction; each moves a value by at most a
        # half, so the two results are at most one level apart.
        smooth = F.interpolate(
            image[None].float(), size, mode="bilinear", align_corners=False, antialias=True
        )
        return smooth[0].round().clamp(0, 255)

    def preprocess(self, image: Tensor) -> Tensor:
        """An image (3, H, W), RGB, 0..255, as the image encoder takes it: (3, side, side)."""
        resized = (self.resize(image) - self.pixel_mean) / self.pixel_std
        height, width = resized.shape[-2:]
        return F.pad(resized, (0, self.side - width, 0, self.side - height))

    @torch.no_grad()
    def decode(
        self,
        embedding: Embedding,
        image_size: tuple[int, int],
        prompts: Prompts,
        *,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(prompts, BoxPrompts):
            boxes = self._to_input_frame(prompts.values.tensor.reshape(-1, 2, 2), image_size)
            return self._decode(embedding, with_masks, boxes=boxes.reshape(-1, 4))
        if isinstance(prompts, PointPrompts):
            return self._decode_points(embedding, image_size, prompts, with_masks)
        if isinstance(prompts, MaskPrompts):
            return self._decode_masks(embedding, image_size, prompts, with_masks)
        raise TypeError(
            f"{type(self).__name__} knows boxes, points and masks, not {type(prompts).__name__}."
        )

    @torch.no_grad()
    def decode_points(
        self,
        embedding: Embedding,
        image_size: tuple[int, int],
        points: Tensor,
        *,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        places = self._to_input_frame(points[:, None], image_size)
        labels = torch.ones(len(points), 1, dtype=torch.int64, device=points.device)
        return self._decode_rated(embedding, True, multimask, points=(places, labels))

    def _decode_points(
        self,
        embedding: Embedding,
        image_size: tuple[int, int],
        prompts: PointPrompts,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        points = self._to_input_frame(prompts.points, image_size)
        labels = prompts.labels
        # SAM attends to padding points too, so rows of different lengths are decoded apart: an
        # answer must not depend on the longest row beside it.
        lengths = (labels >= 0).sum(1)
        if len(lengths) == 0:
            return self._decode(embedding, with_masks, boxes=points.new_zeros(0, 4))
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(
                f"Point prompt {row} has no point; every region needs at least one point of label "
                "1 or 0."
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
        embedding: Embedding,
        image_size: tuple[int, int],
        prompts: MaskPrompts,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # SAM was trained on masks that refine another prompt: the mask's own box stands beside it.
        corners = prompts.boxes(image_size).tensor.to(self.pixel_mean.device).reshape(-1, 2, 2)
        boxes = self._to_input_frame(corners, image_size).reshape(-1, 4)
        height, width = self.mask_prompt_size
        inner = [max(1, round(n * height / self.side)) for n in self.input_size(image_size)]
        found = []
        # Each mask has a dense embedding of its own, so prompts are encoded by chunks too.
        for start in range(0, max(1, len(boxes)), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            masks = boxes.new_zeros(len(boxes[rows]), 1, height, width)
            for held, mask in zip(masks, prompts.masks[rows]):
                # One mask at a time is float at full size.
                whole = mask.to(boxes).expand(1, 1, -1, -1)
                small = F.interpolate(whole, inner, mode="bilinear", align_corners=False)
                held[:, : inner[0], : inner[1]] = small[0]
            logits = (masks * 2 - 1) * _MASK_PROMPT_LOGIT
            found.append(self._decode(embedding, with_masks, boxes=boxes[rows], masks=logits))
        tokens = torch.cat([token for token, _ in found])
        return tokens, torch.cat([m for _, m in found if m is not None]) if with_masks else None

    def _decode(
        self, embedding: Embedding, with_masks: bool, **prompts: Any
    ) -> tuple[Tensor, Tensor | None]:
        return self._decode_rated(embedding, with_masks, **prompts)[:2]

    def _decode_rated(
        self, embedding: Embedding, with_masks: bool, multimask: bool = False, **prompts: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens, mask logits and the predicted IoU of the masks (None if nothing was decoded)."""
        sparse, dense = self.embed_prompts(**prompts)
        prompt_tokens = sparse.mean(1)
        if self.tokens == "prompt" and not with_masks:
            return prompt_tokens, None, None
        mask_tokens, mask_logits, ious = self.decode_embedded(
            embedding, sparse, dense, with_masks=with_masks, multimask=multimask
        )
        if multimask and len(sparse):
            prompt_tokens = prompt_tokens.repeat_interleave(len(mask_tokens) // len(sparse), 0)
        if self.tokens == "prompt":
            return prompt_tokens, mask_logits, ious
        if self.tokens == "both":
            return torch.cat([prompt_tokens, mask_tokens], dim=1), mask_logits, ious
        return mask_tokens, mask_logits, ious

    def _to_input_frame(self, points: Tensor, image_size: tuple[int, int]) -> Tensor:
        """(R, P, 2) XY, pixels of the image -> pixels of the square."""
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
            inner = logits[None]
            if not self.squashed:
                square = F.interpolate(
                    inner, (self.side, self.side), mode="bilinear", align_corners=False
                )
                inner = square[..., :height, :width]
            full = F.interpolate(inner, output_size, mode="bilinear", align_corners=False)
            torch.gt(full[0, 0], 0, out=mask)
        return masks
