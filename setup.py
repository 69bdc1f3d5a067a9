#!/usr/bin/env python
"""Declares the package. ``INSTALL.md`` says how to install it, and what to have before it."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def get_version() -> str:
    """Reads ``__version__`` as text: the package imports torch, which a build does not have."""
    text = (ROOT / "regionspot_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


# Three packages are needed but not declared, because pip would put its own choice over a good one:
# * torch and torchvision: each CUDA version has its own build, and any working pair is right.
# * detectron2: it is built against the torch that is there, and is on no package index by this name.
# * OpenCV (`cv2`): opencv-python and opencv-python-headless are the same module; one of them only.
REQUIREMENTS = [
    "clip-anytorch>=2.6",  # the module `clip`
    "fvcore>=0.1.5",
    "hotcoco>=1.3",
    "iopath>=0.1.7,<0.1.10",  # Detectron2's own limit
    "matplotlib",  # Detectron2's too; fonts of the demo's pictures
    "numpy>=1.23",
    "open-clip-torch>=3.3",
    "pillow>=9.4",
    "pycocotools>=2.0.2",
    "pyyaml",
    "safetensors>=0.4",
    "segment-anything>=1.0",
    "setuptools>=77.0.3,<82",  # 82 has no pkg_resources, which detectron2.model_zoo and clip import
    "tabulate",
    "timm>=0.9",  # the embedded localizer's own code imports it
    "tqdm",
]

EXTRAS = {
    "demo": ["matplotlib", "scikit-image"],
    "dev": ["black", "isort", "mypy", "pytest", "pytest-xdist", "ruff", "supervision"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "slurm": ["submitit"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="regionspot_d2",
    version=get_version(),
    description="RegionSpot for Detectron2: any region of an image, named with any words",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["regionspot_d2*"]),
    package_data={"regionspot_d2": [f"**/*.{e}" for e in ("json", "md", "safetensors", "txt")]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
