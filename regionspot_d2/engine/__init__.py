"""Training and evaluation: the trainer, its optimizer, hooks and launcher."""

from .setup import ConfigError, load_config
from .solver import build_optimizer
from .trainer import RegionSpotTrainer

__all__ = ["ConfigError", "RegionSpotTrainer", "build_optimizer", "load_config"]
