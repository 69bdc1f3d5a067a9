"""The mini model: small real towers from packages of the package index, and a head trained on them.

It serves machines that reach no model hub. ``regionspot_d2/__init__.py`` imports this package to
register its parts; nothing else in ``regionspot_d2`` does.
"""

from . import paths as _  # registers embedded://
from .head import KernelRegionHead
from .localizer import LiteMedSam
from .vision_language import MiniVisionLanguage

__all__ = ["KernelRegionHead", "LiteMedSam", "MiniVisionLanguage"]
