"""Prints the paths of the demo's photos, which come with scikit-image and matplotlib.

The astronaut, the rocket and Grace Hopper are public domain (NASA, SpaceX, U.S. Navy), the cat
Chelsea and the coffee are CC0 (Stéfan van der Walt, Rachel Michetti).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PHOTOS = {
    "skimage": ["data/chelsea.png", "data/coffee.png", "data/astronaut.png", "data/rocket.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}


def photo_paths() -> list[Path]:
    """The paths of the photos, in the packages they come with."""
    paths = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: pip install -e .[demo]")
        paths += [Path(spec.origin).parent / name for name in names]
    return paths


if __name__ == "__main__":
    print(*photo_paths(), sep="\n")
