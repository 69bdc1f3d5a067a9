#!/usr/bin/env python
"""Names boxes with an exported model. It needs onnxruntime, NumPy and PIL, but no torch.

    python demo/onnx_inference.py --model regionspot_onnx --input photo.jpg --boxes 15,0,451,300

``tools/export_onnx.py`` writes the folder of ``--model``. This file is all the code that a
deployment needs: copy it with the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def _box(text: str) -> list[float]:
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}': X0,Y0,X1,Y1 is expected") from error
    return [x0, y0, x1, y1]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the program with one line if it makes no sense."""
    description, _, examples = str(__doc__).partition("\n\n")
    parser = _Parser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="of tools/export_onnx.py")
    add("--input", nargs="+", type=Path, required=True, metavar="PHOTO")
    add("--boxes", nargs="+", type=_box, required=True, metavar="X0,Y0,X1,Y1", help="in pixels")
    add("--topk", type=int, default=1, help="names per box")
    # argparse takes "-5,10,20,30" for an option; float() skips a leading space.
    args = parser.parse_args([re.sub(r"^(-[\d.]+,)", r" \1", text) for text in arguments])
    if args.topk < 1:
        parser.error(f"--topk {args.topk}: 1 or more is expected")
    return args


if __name__ == "__main__":
    parse(sys.argv[1:])  # help and mistakes, before the imports below

try:
    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: the package {missing.name} is missing: pip install onnxruntime numpy pillow"
    ) from missing

FORMAT = 1
# Of the sides of a view, in pixels, as regionspot_d2 has it.
MIN_SIDE = 48


class OnnxRegionSpot:
    """A RegionSpot out of a folder that ``tools/export_onnx.py`` wrote.

    Attributes:
        names: the C class names of its vocabulary.
    """

    names: list[str]

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None) -> None:
        """
        Args:
            folder: with ``model.json`` and what it names.
            providers: of onnxruntime; by default the CPU's.

        Raises:
            ValueError: a file of the folder is missing, or does not fit the others.
        """
        self._folder = Path(folder)
        self._providers = list(providers or ["CPUExecutionProvider"])
        self._settings = self._read("model.json")
        if not isinstance(self._settings, dict) or self._settings.get("format") != FORMAT:
            raise ValueError(
                f"{self._folder / 'model.json'} is not of format {FORMAT}: export the model again "
                "with tools/export_onnx.py of the version that this file is from."
            )
        self.names = self._read(self._settings["vocabulary"]["names"])
        path = self._file(self._settings["vocabulary"]["text"])
        self._text = np.load(path, allow_pickle=False).astype(np.float32)
        if len(self._text) != len(self.names):
            raise ValueError(
                f"{path} has {len(self._text)} rows for {len(self.names)} class names; they must "
                "be of one export."
            )
        self._tower = self._session(self._settings["image_tower"]["file"])
        self._head = self._session(self._settings["head"]["file"])
        self._reads: list[str] = self._settings["head"]["reads"]
        if "mask_tokens" in self._reads:
            self._encoder = self._session(self._settings["localizer"]["encoder"])
            self._decoder = self._session(self._settings["localizer"]["decoder"])

    def _file(self, name: str) -> Path:
        path = self._folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; tools/export_onnx.py writes it.")
        return path

    def _read(self, name: str) -> Any:
        path = self._file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not json: {error}") from error

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(self._file(name)), providers=self._providers)

    def logits(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Compares R boxes of an image with the class names.

        Args:
            image: (H, W, 3), uint8, RGB.
            boxes: (R, 4), XYXY, pixels of the image. R may be 0.

        Returns:
            (R, C), float32; the softmax over a row is the scores of a region's names.

        Raises:
            ValueError: the shapes are others, or a box has no area inside the image.
        """
        boxes = np.asarray(boxes, np.float32)
        _check(image, boxes)
        logits = np.zeros((len(boxes), len(self.names)), np.float32)
        if not len(boxes):
            return logits
        tokens = self._mask_tokens(image, boxes) if "mask_tokens" in self._reads else None
        groups = math.ceil(len(boxes) / self._settings["head"]["max_regions"])
        views, view_of_region = self._views(image.shape[:2], boxes)
        for place, view in enumerate(views):
            image_tokens = self._image_tokens(image, view)
            # Regions of one view, and of one group, see each other.
            for group in np.array_split(np.arange(len(boxes)), groups):
                rows = group[view_of_region[group] == place]
                if not len(rows):
                    continue
                given = {"image_tokens": image_tokens, "boxes": _boxes_in_view(boxes[rows], view)}
                if tokens is not None:
                    given["mask_tokens"] = tokens[rows]
                given = {name: given[name] for name in self._reads}
                [logits[rows]] = self._head.run(["logits"], {**given, "text": self._text})
        return logits

    def _views(self, size: tuple[int, int], boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        zoom = self._settings["zoom"]
        if zoom["factor"]:
            return find_views(size, boxes, zoom["factor"], zoom["max_views"])
        return np.array([[0, 0, size[1], size[0]]]), np.zeros(len(boxes), int)

    def _image_tokens(self, image: np.ndarray, view: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = view
        [tokens] = self._tower.run(None, {"image": _channels_first(image[y0:y1, x0:x1])})
        return tokens

    def _mask_tokens(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        side, step = (self._settings["localizer"][key] for key in ("side", "chunk_size"))
        height, width = image.shape[:2]
        scale = side / max(height, width)
        new_height, new_width = (max(1, int(n * scale + 0.5)) for n in (height, width))
        small = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        [embedding] = self._encoder.run(None, {"image": _channels_first(np.asarray(small))})
        boxes = boxes * np.array([new_width / width, new_height / height] * 2, np.float32)
        tokens_only = onnxruntime.RunOptions()
        tokens_only.only_execute_path_to_fetches = True  # the graph makes masks too
        found = []
        for start in range(0, len(boxes), step):
            inputs = {"embedding": embedding, "boxes": boxes[start : start + step]}
            found += self._decoder.run(["mask_tokens"], inputs, tokens_only)
        return np.concatenate(found)

    def name(
        self, image: np.ndarray, boxes: np.ndarray, topk: int = 1
    ) -> list[list[tuple[str, float]]]:
        """The ``topk`` best names of each box with their scores, best first; see :meth:`logits`."""
        logits = self.logits(image, boxes)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        scores = powers / powers.sum(1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
        return [
            [(self.names[place], float(row[place])) for place in places]
            for row, places in zip(scores, best)
        ]


def find_views(
    size: tuple[int, int], boxes: np.ndarray, factor: float, max_views: int
) -> tuple[np.ndarray, np.ndarray]:
    """The views in which boxes are seen, as ``regionspot_d2.modeling.views`` finds them.

    Args:
        size: (H, W) of the image.
        boxes: (R, 4), XYXY, pixels of the image.
        factor: the side of a view, in longer sides of its box.
        max_views: of an image; more boxes share the views of a pyramid.

    Returns:
        Views (V, 4), XYXY, whole pixels, and the place of each box's view (R,).
    """
    extent = np.array(size[::-1], np.float64)
    corners = np.clip(boxes.astype(np.float64).reshape(-1, 2, 2), 0, extent)
    longer = (corners[:, 1] - corners[:, 0]).max(1, keepdims=True)
    sides = np.minimum(np.maximum(longer * factor, MIN_SIDE), extent)
    start = np.minimum(np.maximum(corners.mean(1) - sides / 2, 0), extent - sides)
    views = np.concatenate([start, start + sides], axis=1)
    if len(boxes) > max_views:
        views = _in_pyramid(views, extent, max_views)
    whole = np.concatenate([np.floor(views[:, :2]), np.ceil(views[:, 2:])], axis=1).astype(int)
    distinct, places = np.unique(whole, axis=0, return_inverse=True)
    return distinct, places.reshape(-1)


def _in_pyramid(squares: np.ndarray, extent: np.ndarray, max_views: int) -> np.ndarray:
    """The smallest view of a pyramid of at most so many that holds each square."""
    found = np.tile(np.concatenate([np.zeros(2), extent]), (len(squares), 1))
    center = (squares[:, :2] + squares[:, 2:]) / 2
    for sides, counts in _pyramid(extent, max_views):
        steps = (extent - sides) / np.maximum(counts - 1, 1)
        places = np.round((center - sides / 2) / np.maximum(steps, 1e-9))
        start = np.minimum(np.maximum(places, 0), counts - 1) * steps
        views = np.concatenate([start, start + sides], axis=1)
        holds = (views[:, :2] <= squares[:, :2] + 0.5) & (squares[:, 2:] <= views[:, 2:] + 0.5)
        found = np.where(holds.all(1, keepdims=True), views, found)
    return found


def _pyramid(extent: np.ndarray, max_views: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sides of each level's views, and how many there are across and down."""
    total, side = 1, extent.max() / 2
    while side >= MIN_SIDE:
        sides = np.minimum(extent, side)
        counts = np.ceil((extent - sides) / (sides / 2)) + 1
        total += int(counts.prod())
        if total > max_views:
            return
        yield sides, counts
        side /= 2


def _boxes_in_view(boxes: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Boxes in pixels of the image as XYXY in 0..1 of a view, cut at its edges."""
    start, extent = view[:2].astype(np.float32), (view[2:] - view[:2]).astype(np.float32)
    inside = np.clip(boxes.reshape(-1, 2, 2) - start, 0, extent)
    return (inside / extent).reshape(-1, 4)


def _channels_first(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)


def _check(image: np.ndarray, boxes: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"The image is {image.dtype} of the shape {image.shape}; uint8 (H, W, 3) is expected."
        )
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"The boxes have the shape {boxes.shape}; (R, 4), XYXY, is expected.")
    height, width = image.shape[:2]
    for place, box in enumerate(boxes):
        x0, y0, x1, y1 = np.clip(box, 0, [width, height] * 2)
        if not (np.isfinite(box).all() and x0 < x1 and y0 < y1):
            raise ValueError(
                f"Box {place}, {box.tolist()}, has no area in the image of {width} x {height} "
                "pixels; X0,Y0,X1,Y1 in pixels are expected."
            )


def read_image(path: Path) -> np.ndarray:
    """Reads an image file, upright, as RGB (H, W, 3), uint8; what is transparent becomes white."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    model = OnnxRegionSpot(args.model)
    for path in args.input:
        for box, found in zip(args.boxes, model.name(read_image(path), args.boxes, args.topk)):
            place = ",".join(f"{x:g}" for x in box)
            print(f"{path} {place}: " + ", ".join(f"{name} {score:.4f}" for name, score in found))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    # A damaged graph raises an error of onnxruntime's own.
    except Exception as error:
        sys.exit(f"onnx_inference.py: {' '.join(str(error).split()) or type(error).__name__}")
