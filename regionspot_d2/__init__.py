"""RegionSpot for Detectron2: any region of an image, named with any words."""

import warnings as _warnings

with _warnings.catch_warnings():
    # Detectron2 imports fvcore, which compiles two losses in a way that torch gives up. They are
    # not used here, and nobody who imports this package can change it.
    _warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    # In a notebook tqdm, which open_clip's libraries import, asks for its widgets; text will do.
    _warnings.filterwarnings("ignore", "IProgress not found")
    from . import data as _data  # only registration
    from . import mini as _mini  # only registration
    from . import modeling as _modeling  # only registration
    from .config import add_regionspot_config
    from .modeling import OpenVocabularyDetector, wrap
    from .predictor import RegionSpotPredictor

__version__ = "0.2.0"

__all__ = ["OpenVocabularyDetector", "RegionSpotPredictor", "add_regionspot_config", "wrap"]
