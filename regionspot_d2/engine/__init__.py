"""Training and evaluation: a checked config, the trainer, its optimizer and hooks."""

from .config import ConfigError, load_config
from .trainer import RegionSpotTrainer, build_optimizer

__all__ = ["ConfigError", "RegionSpotTrainer", "build_optimizer", "load_config"]
