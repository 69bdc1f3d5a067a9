"""Images for any questions: what the frozen encoders know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .interfaces import Embedding, Localizer, VisionLanguageModel, image_size_of
from .precision import running_in
from .prompts import Prompts
from .views import View, crop

# Views that go through the vision-language model, and through the head, together.
VIEW_BATCH = 8


@dataclass(frozen=True)
class EncodedImages:
    """What the frozen encoders know of images, found out when it is first needed.

    Attributes:
        images: RGB, 0..255, each (3, H, W) of its own size, on the device of the encoders.
        precision: what the frozen models run in, whatever the context; None leaves that to the
            context. What they find is float32.
        head_precision: the same for the region head.
        differentiable: whether gradients go through the vision-language model to the images. The
            localizer's mask tokens are constants all the same.
    """

    images: tuple[Tensor, ...]
    vision_language: VisionLanguageModel = field(repr=False)
    localizer: Localizer = field(repr=False)
    precision: torch.dtype | None = torch.float32
    head_precision: torch.dtype | None = torch.float32
    differentiable: bool = False
    # Per image the tokens of views that were asked for; each question puts a new dict here, for
    # other threads may be reading the old one.
    _views: dict[int, dict[View, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.vision_language.logit_scale.device

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each image."""
        return [image_size_of(image) for image in self.images]

    @cached_property
    def image_tokens(self) -> Tensor:
        """(B, L, W), what the vision-language model knows of the whole images."""
        return self._see(self.images)

    @cached_property
    def embeddings(self) -> list[Embedding]:
        """What the localizer knows of each image.

        Training from cached tokens never needs it, nor does a head that reads no mask tokens until
        masks are asked for.
        """
        with self.frozen_context():
            return self.localizer.encode_images(list(self.images))

    def frozen_context(self) -> torch.autocast:
        """The precision of the frozen models."""
        return running_in(self.precision, self.device)

    def head_context(self) -> torch.autocast:
        """The precision of the region head."""
        return running_in(self.head_precision, self.device)

    def localize(
        self, i: int, prompts: Prompts, *, with_masks: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Mask tokens (R, T) of regions of image ``i``, and mask logits (R, 1, h, w) or None."""
        with self.frozen_context():
            tokens, logits = self.localizer.localize(
                self.embeddings[i], self.image_sizes[i], prompts, with_masks=with_masks
            )
        return tokens.float(), None if logits is None else logits.float()

    def _see(self, images: Sequence[Tensor]) -> Tensor:
        """Runs the vision-language model: (B, L, W)."""
        with_gradients = self.differentiable and torch.is_grad_enabled()
        with torch.set_grad_enabled(with_gradients), self.frozen_context():
            return self.vision_language(list(images)).float()

    def view_tokens(self, i: int, views: Sequence[View]) -> list[Tensor]:
        """What the vision-language model knows of views of image ``i``: (L, W) each.

        The tokens of the last question's views are kept, so that another vocabulary is a lookup.
        """
        known = self._views.get(i, {})
        new = [view for view in views if view not in known]
        found = {view: known[view] for view in views if view in known}
        for start in range(0, len(new), VIEW_BATCH):
            batch = new[start : start + VIEW_BATCH]
            crops = [crop(self.images[i], view) for view in batch]
            found.update(zip(batch, self._see(crops)))
        self._views[i] = found
        return [found[view] for view in views]
