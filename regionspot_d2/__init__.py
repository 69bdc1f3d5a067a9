"""RegionSpot for Detectron2: any region of an image, named with any words."""

from . import data as _data  # only registration
from . import mini as _mini  # only registration
from . import modeling as _modeling  # only registration
from .config import add_regionspot_config
from .modeling import OpenVocabularyDetector, wrap
from .predictor import RegionSpotPredictor
from .renaming import rename_detections

__version__ = "0.2.0"

__all__ = [
    "OpenVocabularyDetector",
    "RegionSpotPredictor",
    "add_regionspot_config",
    "rename_detections",
    "wrap",
]
