"""Training and evaluation: a checked config, the trainer, its optimizer and hooks."""

from .config import ConfigError, check_datasets, explained, load_config
from .trainer import RegionSpotTrainer, build_optimizer

__all__ = [
    "ConfigError",
    "RegionSpotTrainer",
    "build_optimizer",
    "check_datasets",
    "explained",
    "load_config",
]
