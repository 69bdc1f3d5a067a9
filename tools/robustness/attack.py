"""Names of regions, and the image that a little change makes worst for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from robustness.conditions import Regions, seed_of
from torch import Tensor

from regionspot_d2.modeling import BoxPrompts, RegionSpot

# Of a step, in budgets, times the number of steps: Madry et al. go 2.5 times as far as is allowed,
# so that any place within the budget can be reached.
_REACH = 2.5


class Named(NamedTuple):
    """What a model says of the regions of an image.

    Attributes:
        scores: (R,), of the best name.
        right: (R,), bool, whether it is the true one.
        loss: cross-entropy of the true names, a scalar.
    """

    scores: Tensor
    right: Tensor
    loss: Tensor

    @property
    def rank(self) -> tuple[int, float]:
        """Lower is worse: first by the number of right names, then by the loss."""
        return int(self.right.sum()), -float(self.loss.detach())


def name_regions(
    model: RegionSpot,
    regions: Regions,
    class_names: Sequence[str],
    image: Tensor | None = None,
) -> Named:
    """Names regions; with ``image`` in place of their own, gradients lead to it."""
    differentiable = image is not None
    pixels = regions.image.to(model.device) if image is None else image
    with torch.set_grad_enabled(differentiable):
        encoded = model.encode([pixels], differentiable=differentiable)
        prompts = BoxPrompts(Boxes(regions.boxes))
        [answer] = model.answer(encoded, [prompts], with_masks=False)
        labels = regions.labels.to(model.device)
        loss = F.cross_entropy(model.score(answer.embeddings, class_names), labels)
        found = model.name(answer, class_names, topk=1)
    return Named(found.scores.detach().cpu(), (found.pred_classes == labels).cpu(), loss)


def attack(
    model: RegionSpot,
    regions: Regions,
    class_names: Sequence[str],
    budgets: Sequence[float],
    *,
    steps: int,
    seed: int = 0,
) -> Iterator[Named]:
    """Projected gradient descent (Madry et al., ICLR 2018) against all regions of an image at once.

    Gradients go through the vision-language model and the head; the mask tokens follow the image,
    but no gradient goes through the localizer. Of all images that were tried, 8 bits each, the one
    with the fewest right names counts, then the one with the highest loss. A budget starts from the
    one found within the budget before it, so that a larger one never does worse.

    Args:
        budgets: the largest change of a value, of 255, in ascending order; 0 leaves the image.
        steps: gradients for each budget.

    Yields:
        The worst answer within each budget.
    """
    clean = regions.image.float().to(model.device)
    worst, best = name_regions(model, regions, class_names), clean
    before = 0.0
    generator = torch.Generator().manual_seed(seed_of(seed, regions.key))
    for budget in budgets:
        low, high = (clean - budget).clamp(min=0), (clean + budget).clamp(max=255)
        start = 2 * torch.rand(clean.shape, generator=generator).to(clean) - 1
        pixels = (best + (budget - before) * start).clamp(low, high)
        for step in range(steps + 1 if budget > 0 else 0):
            pixels.requires_grad_()
            whole = pixels + (pixels.round() - pixels).detach()
            found = name_regions(model, regions, class_names, whole)
            if found.rank < worst.rank:
                worst, best = found._replace(loss=found.loss.detach()), whole.detach()
            if step < steps:
                [gradient] = torch.autograd.grad(found.loss, pixels)
                moved = pixels.detach() + _REACH * budget / steps * gradient.sign()
                pixels = moved.clamp(low, high)
        before = budget
        yield worst
