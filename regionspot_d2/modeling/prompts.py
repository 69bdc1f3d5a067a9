"""Prompts: the regions of one image that a question is about, as boxes, points or masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import BitMasks, Boxes
from torch import Tensor

# Without a mask, the least side of the box of points, as a share of the image's longer side: less
# names more of tinycoco's small objects by their centers, more names large objects.
_CLICK_SHARE = 0.2


class Prompts(ABC):
    """R regions of one image, in pixels of that image.

    Attributes:
        parts: the same regions in groups of one kind, in order.
        boxes_need_masks: whether :meth:`boxes` reads the masks that a localizer found, if they are
            better than none.
    """

    boxes_need_masks: bool = False

    @property
    def parts(self) -> Sequence[Prompts]:
        return (self,)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def to(self, device: torch.device | str) -> Prompts: ...

    @abstractmethod
    def __getitem__(self, regions: Tensor) -> Prompts:
        """Some of the regions, by their places (K,), which ascend."""

    @abstractmethod
    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        """The boxes of the regions: R boxes, XYXY, pixels of the image.

        Args:
            image_size: (H, W) of the image.
            masks: (R, h, w) bool, what the localizer found, at any size that covers the image;
                read only where ``boxes_need_masks``.
        """


@dataclass(frozen=True)
class BoxPrompts(Prompts):
    """Regions given as R boxes, XYXY, pixels of the image."""

    values: Boxes

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> BoxPrompts:
        return BoxPrompts(self.values.to(device))

    def __getitem__(self, regions: Tensor) -> BoxPrompts:
        return BoxPrompts(self.values[regions])

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        return self.values


@dataclass(frozen=True)
class PointPrompts(Prompts):
    """Regions given by points on and beside them, at least one on each.

    Attributes:
        points: (R, P, 2) XY, pixels of the image.
        labels: (R, P), 1 on the region, 0 beside it, -1 where a row has fewer than P points.
    """

    points: Tensor
    labels: Tensor
    boxes_need_masks = True

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device | str) -> PointPrompts:
        return PointPrompts(self.points.to(device), self.labels.to(device))

    def __getitem__(self, regions: Tensor) -> PointPrompts:
        return PointPrompts(self.points[regions], self.labels[regions])

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        """The boxes of the masks, widened to hold the points on their regions.

        A poor mask leaves such points out. Where a mask is empty, the points are all that is known.
        Without masks, it is the box of the points, widened to a share of the image.
        """
        height, width = image_size
        if masks is None:
            on_region = (self.labels == 1)[..., None]
            first = self.points.masked_fill(~on_region, torch.inf).amin(1)
            last = self.points.masked_fill(~on_region, -torch.inf).amax(1)
            least = (_CLICK_SHARE * max(image_size) - (last - first)).clamp(min=0) / 2
            boxes = Boxes(torch.cat([first - least, last + least], dim=1))
            boxes.clip(image_size)
            return boxes
        found = BitMasks(masks).get_bounding_boxes().to(masks.device)
        found.scale(width / masks.shape[2], height / masks.shape[1])
        has_mask = masks.flatten(1).any(1)[:, None]
        on_region = (self.labels == 1)[..., None]
        # A point on the far edge of the image means its last pixel.
        last_pixel = self.points.new_tensor([width - 1, height - 1])
        pixels = self.points.floor().minimum(last_pixel)
        first = pixels.masked_fill(~on_region, torch.inf).amin(1)
        last = pixels.masked_fill(~on_region, -torch.inf).amax(1) + 1
        start = torch.where(has_mask, torch.minimum(found.tensor[:, :2], first), first)
        end = torch.where(has_mask, torch.maximum(found.tensor[:, 2:], last), last)
        boxes = Boxes(torch.cat([start, end], dim=1))
        boxes.clip(image_size)
        return boxes


@dataclass(frozen=True)
class MaskPrompts(Prompts):
    """Regions given as masks: (R, H, W), bool, at the size of the image."""

    masks: Tensor

    def __len__(self) -> int:
        return len(self.masks)

    def to(self, device: torch.device | str) -> MaskPrompts:
        return MaskPrompts(self.masks.to(device))

    def __getitem__(self, regions: Tensor) -> MaskPrompts:
        return MaskPrompts(self.masks[regions])

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        return BitMasks(self.masks).get_bounding_boxes().to(self.masks.device)


class MixedPrompts(Prompts):
    """Regions of several kinds that are asked for together, numbered part after part."""

    parts: Sequence[Prompts] = ()

    def __init__(self, parts: Sequence[Prompts]) -> None:
        self.parts = parts
        self.boxes_need_masks = any(part.boxes_need_masks for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def to(self, device: torch.device | str) -> MixedPrompts:
        return MixedPrompts([part.to(device) for part in self.parts])

    def __getitem__(self, regions: Tensor) -> MixedPrompts:
        parts, first = [], 0
        for part in self.parts:
            here = (regions >= first) & (regions < first + len(part))
            parts.append(part[regions[here] - first])
            first += len(part)
        return MixedPrompts(parts)

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        counts = [len(part) for part in self.parts]
        of_parts = [None] * len(counts) if masks is None else masks.split(counts)
        return Boxes.cat([part.boxes(image_size, m) for part, m in zip(self.parts, of_parts)])
