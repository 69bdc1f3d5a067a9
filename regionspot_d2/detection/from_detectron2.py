"""Detectors with a Detectron2 config."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from ..checkpoint import RegionSpotCheckpointer
from ..data.proposal_sources import from_instances
from ..engine.config import merge_config_file
from ..files import local_weights
from .interface import Detected, RegionDetector


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
            names = [self._name(place) for place in found.pred_classes.tolist()]
        return Detected(*from_instances(found), names)

    def _name(self, place: int) -> str:
        return self._classes[place] if place < len(self._classes) else f"class {place}"


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
