"""Detectors that find classes of their own: those of a Detectron2 config, and torchvision's."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection, get_model, get_model_weights, list_models

from ..checkpoint import RegionSpotCheckpointer
from ..data.proposal_sources import from_instances
from ..engine.config import merge_config_file
from ..files import explained_weights, local_weights
from .interface import Detected, RegionDetector

# COCO's, with the background.
_SOME_CLASSES = 91


class Detectron2Detector(RegionDetector):
    """A detector, or a region proposal network, that a Detectron2 config describes."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: of the detector; ``MODEL.WEIGHTS`` is a file or a URL.
        """
        cfg = cfg.clone()
        path = str(local_weights(cfg.MODEL.WEIGHTS, "--detector-weights"))
        cfg.MODEL.WEIGHTS = ""
        self._predictor = DefaultPredictor(cfg)
        # Not by DefaultPredictor, which runs what a pickle asks for.
        RegionSpotCheckpointer(self._predictor.model).load(path)
        names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
        self._classes = MetadataCatalog.get(names[0]).get("thing_classes", ()) if names else ()

    def __call__(self, image: np.ndarray) -> Detected:
        # DefaultPredictor takes BGR and converts it to the detector's own order.
        output = self._predictor(image[:, :, ::-1])
        # A model that is only a region proposal network gives proposals.
        found = output.get("instances", output.get("proposals"))
        if found is None:
            raise ValueError(f"the detector gives {', '.join(output)}, but no boxes.")
        names = ["object"] * len(found)
        if found.has("pred_classes"):
            names = _names(found.pred_classes, self._classes)
        return Detected(*from_instances(found), names)


def load_detectron2_detector(
    config: str, weights: str | None, class_names: Sequence[str], device: torch.device | str
) -> RegionDetector:
    """Builds the detector of a config file or of a name in Detectron2's model zoo.

    The arguments are those of :func:`~regionspot_d2.detection.build_detector`.
    """
    is_file = os.path.isfile(os.path.expanduser(config))
    if is_file and not weights:
        raise ValueError(
            "its weights are missing, give --detector-weights. (MODEL.WEIGHTS in a config are "
            "those that training started from.)"
        )
    cfg = get_cfg()
    try:
        file = os.path.expanduser(config) if is_file else model_zoo.get_config_file(config)
        merge_config_file(cfg, file)
        cfg.MODEL.WEIGHTS = weights or model_zoo.get_checkpoint_url(config)
    except Exception as error:  # Detectron2 raises anything, from AssertionError to KeyError
        reason = str(error) if is_file else "neither a file nor a name in Detectron2's zoo"
        raise ValueError(f"{reason}.") from error
    cfg.MODEL.DEVICE = str(device)
    return Detectron2Detector(cfg)


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
        pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1).to(self._device)
        [found] = self._model([pixels.float() / 255])
        names = _names(found["labels"], self._categories)
        return Detected(found["boxes"].cpu().numpy(), found["scores"].cpu().numpy(), names)


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


def _names(places: Tensor, known: Sequence[str]) -> list[str]:
    return [known[i] if i < len(known) else f"class {i}" for i in places.tolist()]
