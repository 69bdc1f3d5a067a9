#!/usr/bin/env python
"""Declares the package. ``INSTALL.md`` says how to install it, and what has to be there first."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def get_version() -> str:
    """Reads ``__version__`` as text: the package imports torch, which a build does not have."""
    text = read("regionspot_d2/__init__.py")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


# These are needed but not declared, because pip would replace a working one with its own choice:
# * torch and torchvision: each CUDA version has its own build, and any working pair is right.
# * detectron2: built against the torch that is there; no package index has it under this name.
# * OpenCV (`cv2`): opencv-python and opencv-python-headless are one module; only one may be there.
REQUIREMENTS = [
    "clip-anytorch>=2.6",  # the module `clip`
    "fvcore>=0.1.5",
    "hotcoco>=1.3",
    "iopath>=0.1.7,<0.1.10",  # Detectron2's own limit
    "matplotlib",  # Detectron2's too; fonts of the demo's pictures
    "numpy>=1.23",
    "open-clip-torch>=3.3",
    "pillow>=9.4",
    "portalocker",  # iopath's too
    "pycocotools>=2.0.2",
    "pyyaml",
    "safetensors>=0.4",
    "segment-anything>=1.0",
    "setuptools>=77.0.3,<82",  # 82 has no pkg_resources, which detectron2.model_zoo and clip import
    "simplejpeg>=1.8",  # tells damage in JPEG files, which PIL passes over
    "tabulate",
    "timm>=0.9",  # the embedded localizer's own code imports it
    "tqdm",
]

EXTRAS = {
    "cvat": ["cvat-sdk"],
    "demo": ["matplotlib", "scikit-image", "supervision"],
    "dev": [
        "black",
        "hypothesis",
        "isort",
        "mypy",
        "playwright",
        "pytest",
        "pytest-xdist",
        "ruff",
        "supervision",
    ],
    # names and tags of open_clip's models; the tokenizers of SigLIP and MetaCLIP 2
    "hub": ["huggingface_hub", "sentencepiece", "transformers>=5"],
    "notebook": ["ipykernel", "matplotlib", "nbclient", "nbformat", "scikit-image"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "ray": ["pyarrow", "ray[data]"],
    "search": ["faiss-cpu"],  # of more than a million regions
    "slurm": ["submitit"],
    # For trackers, which would install a second OpenCV: pip install --no-deps trackers
    "track": ["pydeprecate", "requests", "rich", "scipy", "supervision"],
    "transformers": ["transformers>=5"],  # SAM-HQ, SAM 2, EdgeTAM, SAM 3; tokenizers of SigLIP
    "web": ["gradio>=6.14,<7", "gradio_image_annotation", "scikit-image"],
    "video": ["av>=12"],  # videos in H.264, which browsers play
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="regionspot_d2",
    version=get_version(),
    description="RegionSpot for Detectron2: name any region of an image with any words",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="The regionspot_d2 authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2311.01373",
        "Detectron2": "https://detectron2.readthedocs.io",
    },
    keywords=[
        "detectron2",
        "open-vocabulary recognition",
        "region recognition",
        "segment anything",
        "CLIP",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["regionspot_d2*"]), "regionspot_d2.configs"],
    # The configs are in the wheel without being twice in the repository; model_zoo finds both.
    package_dir={"regionspot_d2.configs": "configs"},
    package_data={
        "regionspot_d2": ["py.typed", *(f"**/*.{e}" for e in ("json", "md", "safetensors", "txt"))],
        "regionspot_d2.configs": ["**/*.yaml"],
    },
    # Beside the package, which takes seconds to import.
    py_modules=["regionspot_cli"],
    entry_points={"console_scripts": ["regionspot = regionspot_cli:main"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
