"""The conditions that evaluate_robustness.py measures. No imports, so that --help is immediate."""

from __future__ import annotations

BOX_NOISE, LOOSE_BOXES, ATTACK = "box-noise", "loose-boxes", "attack"

# Those of ImageNet-C (Hendrycks & Dietterich, ICLR 2019), by their names in imagecorruptions.
CORRUPTIONS = {
    "noise": "gaussian_noise",
    "blur": "defocus_blur",
    "jpeg": "jpeg_compression",
    "brightness": "brightness",
    "contrast": "contrast",
    "fog": "fog",
}

# Of box noise in sides of the box, of loose boxes the factor, of corruptions ImageNet-C's severity,
# of the attack the largest change of a pixel's value, of 255.
STRENGTHS: dict[str, tuple[float, ...]] = {
    BOX_NOISE: (0, 0.1, 0.2, 0.4),
    LOOSE_BOXES: (1.2, 1.5),
    **{kind: (1, 2, 3, 4, 5) for kind in CORRUPTIONS},
    ATTACK: (0, 1, 2, 4),
}
