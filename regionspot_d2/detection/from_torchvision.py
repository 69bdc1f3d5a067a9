"""The detectors of ``torchvision.models.detection``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection, get_model, get_model_weights, list_models

from ..files import explained_weights, local_weights
from .interface import Detected, RegionDetector

# COCO's, with the background.
_SOME_CLASSES = 91


class TorchvisionDetector(RegionDetector):
    """Any model of ``torchvision.models.detection``."""

    def __init__(
        self, model: nn.Module, categories: Sequence[str] = (), device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            model: takes a list of images (3, H, W), RGB in 0..1.
            categories: names of its labels; 0 is the background.
            device: where it runs.
        """
        self._model = model.eval().to(device)
        self._categories = categories
        self._device = device

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Detected:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(self._device)
        [found] = self._model([pixels.float() / 255])
        names = [self._name(label) for label in found["labels"].tolist()]
        return Detected(found["boxes"].cpu().numpy(), found["scores"].cpu().numpy(), names)

    def _name(self, label: int) -> str:
        return self._categories[label] if label < len(self._categories) else f"class {label}"


def load_torchvision_detector(
    name: str, weights: str | None, class_names: Sequence[str], device: torch.device | str
) -> RegionDetector:
    """Builds the detector with torchvision's default weights, or with those of a file.

    A file holds a state dict, by itself or as "model", and may be of any number of classes. It
    runs no code.

    The arguments are those of :func:`~regionspot_d2.detection.build_detector`.
    """
    known = list_models(module=detection)
    if name not in known:
        raise ValueError(f"torchvision has no such detector; it has {', '.join(known)}.")
    if weights is None:
        categories = get_model_weights(name).DEFAULT.meta["categories"]
        return TorchvisionDetector(get_model(name, weights="DEFAULT"), categories, device)
    path = str(local_weights(weights, "--detector-weights"))
    with explained_weights(path, f"the weights of torchvision's {name}"):
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state)
        return TorchvisionDetector(_fitting(name, state), (), device)


def _fitting(name: str, state: dict[str, Tensor]) -> nn.Module:
    """The model of as many classes as its weights are for, with these weights."""
    options = {"weights": None, "weights_backbone": None}
    with torch.device("meta"):
        model = get_model(name, **options, num_classes=_SOME_CLASSES)
    ours = model.state_dict()
    classes = _SOME_CLASSES
    for key, value in state.items():
        if key in ours and ours[key].shape[:1] != value.shape[:1]:
            # Whatever depends on the classes has so many rows for each.
            classes = value.shape[0] * _SOME_CLASSES // ours[key].shape[0]
            break
    model = get_model(name, **options, num_classes=classes)
    # Statistics that stood still in training come without the counters of BatchNorm.
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **state})
    return model
