"""Small real models out of packages of the package index, for machines that reach no model hub."""

from . import paths as _  # only registration
from .lite_medsam import LiteMedSam
from .mini import MiniVisionLanguage
from .text_vectors import VOCABULARIES, known_vocabulary

__all__ = ["LiteMedSam", "MiniVisionLanguage", "VOCABULARIES", "known_vocabulary"]
