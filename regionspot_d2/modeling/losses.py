"""The loss that region heads are trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor


def focal_loss(
    logits: list[Tensor], gt_classes: list[Tensor], *, alpha: float, gamma: float
) -> Tensor:
    """Sigmoid focal loss, summed over class names, averaged over the regions of all images.

    Args:
        logits: per image (R, C); C may differ.
        gt_classes: per image (R,), in 0..C-1.
        alpha: weight of the true names against the others.
        gamma: how much less a name counts that is clear already.

    Returns:
        A scalar. Averaged over the processes, its gradients are those of one process with the
        images of all.
    """
    count = sum(len(classes) for classes in gt_classes)
    losses = [
        sigmoid_focal_loss(
            logit,
            F.one_hot(classes, logit.shape[1]).to(logit.dtype),
            alpha=alpha,
            gamma=gamma,
            reduction="sum",
        )
        for logit, classes in zip(logits, gt_classes)
    ]
    if has_event_storage():
        correct = sum(int((x.argmax(1) == y).sum()) for x, y in zip(logits, gt_classes))
        get_event_storage().put_scalar("[metric]accuracy", correct / max(count, 1))
    return torch.stack(losses).sum() / _regions_per_process(count, logits[0].device)


def _regions_per_process(count: int, device: torch.device) -> float:
    if comm.get_world_size() == 1:
        return max(count, 1)
    total = torch.tensor(float(count), device=device)
    torch.distributed.all_reduce(total)
    return max(total.item(), 1.0) / comm.get_world_size()
