from .baselines import AdapterRegionHead, CropRegionHead, MaskPooledRegionHead
from .clip import OpenAIClip, OpenClip
from .detectors import OpenVocabularyDetector, RegionSpotROIHeads, wrap
from .interfaces import (
    LOCALIZER_REGISTRY,
    REGION_HEAD_REGISTRY,
    VISION_LANGUAGE_REGISTRY,
    FrozenModule,
    Localizer,
    RegionHead,
    VisionLanguageModel,
)
from .panoptic import PanopticRegionSpot
from .prompts import BoxPrompts, MaskPrompts, PointPrompts, Prompts
from .region_head import PooledRegionHead, RegionSpotHead
from .regionspot import RegionSpot
from .sam import SamLocalizer
from .transformers_sam import TransformersSam
