"""The mini model: small real towers out of packages of the package index, and a head trained on them.

It is for machines that reach no model hub. Nothing else in ``regionspot_d2`` imports it; the package does once, so that
its parts are in the registries.
"""

from . import paths as _  # only registration
from .kernel_head import KernelRegionHead
from .lite_medsam import LiteMedSam
from .mini import MiniVisionLanguage
from .text_vectors import VOCABULARIES, known_vocabulary

__all__ = [
    "KernelRegionHead",
    "LiteMedSam",
    "MiniVisionLanguage",
    "VOCABULARIES",
    "known_vocabulary",
]
