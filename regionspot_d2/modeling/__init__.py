from .frozen import FrozenModule
from .localizer import LOCALIZER_REGISTRY, Localizer, PointPrompts, SamLocalizer
from .region_head import REGION_HEAD_REGISTRY, PooledRegionHead, RegionSpotHead
from .regionspot import RegionSpot
from .roi_heads import RegionSpotROIHeads
from .vision_language import VISION_LANGUAGE_REGISTRY, VisionLanguageModel

__all__ = [
    "FrozenModule",
    "LOCALIZER_REGISTRY",
    "Localizer",
    "PointPrompts",
    "PooledRegionHead",
    "REGION_HEAD_REGISTRY",
    "RegionSpot",
    "RegionSpotHead",
    "RegionSpotROIHeads",
    "SamLocalizer",
    "VISION_LANGUAGE_REGISTRY",
    "VisionLanguageModel",
]
