"""A machine learning backend for Label Studio: a drawn box gets its name.

    python integrations/label_studio.py --model mini --port 9090

A task that is preannotated gets all that the model finds. README.md says how to connect it.
"""

from __future__ import annotations

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--model", default="mini", help="a name, a config or a folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9090)
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import cmath
import copy
import math
import tempfile
from functools import cache, lru_cache, partial
from typing import Any

from label_studio_ml.api import init_app
from label_studio_ml.model import LabelStudioMLBase

from regionspot_d2 import RegionSpotPredictor

load = cache(RegionSpotPredictor.from_pretrained)


@lru_cache(maxsize=4)
def looking_at(model: str, path: str) -> RegionSpotPredictor:
    """A predictor with an image, which outlives a backend: its next box costs no encoder."""
    predictor = copy.copy(load(model))
    predictor.set_image(path)
    return predictor


class RegionSpotBackend(LabelStudioMLBase):
    """Names boxes by the first ``RectangleLabels`` of the labeling interface."""

    def __init__(self, label_config: str | None = None, model: str = "mini", **kwargs: Any) -> None:
        super().__init__(label_config=label_config, **kwargs)
        self.model = model

    def predict(
        self, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Names the boxes drawn in ``context``; without it, all that is found in each task."""
        controls = self.parsed_label_config.items()
        named = [(n, c) for n, c in controls if c["type"] == "RectangleLabels" and c["labels"]]
        if not named:
            raise ValueError("The labeling interface has no RectangleLabels with labels.")
        [(name, control), *_] = named
        labels = control["labels"]
        drawn = [r for r in (context or {}).get("result", []) if "width" in r.get("value", {})]
        predictions = []
        for task in tasks if drawn or not context else []:
            path = self.get_local_path(task["data"][control["inputs"][0]["value"]])
            predictor, results = looking_at(self.model, path), []
            height, width = predictor.image_size
            boxes = [box_of(region["value"], width, height) for region in drawn]
            name_them = partial(predictor.predict, boxes=boxes) if drawn else predictor.everything
            found = name_them(vocabulary=labels)
            ends = {"from_name": name, "to_name": control["to_name"][0], "type": "rectanglelabels"}
            ends |= {"original_width": width, "original_height": height, "image_rotation": 0}
            for i, (x0, y0, x1, y1) in enumerate(found.pred_boxes.tensor.tolist()):
                value = {"x": 100 * x0 / width, "y": 100 * y0 / height, "rotation": 0}
                value |= {"width": 100 * (x1 - x0) / width, "height": 100 * (y1 - y0) / height}
                region = drawn[i] if drawn else {"value": value}
                value = {**region["value"], "rectanglelabels": [labels[found.pred_classes[i]]]}
                results.append(region | ends | {"value": value, "score": float(found.scores[i])})
            score = float(found.scores.mean()) if results else 0.0
            predictions.append({"result": results, "score": score, "model_version": self.model})
        return predictions


def box_of(value: dict[str, float], width: int, height: int) -> list[float]:
    """The box, XYXY in pixels, around a rectangle in percent that is turned around its corner."""
    turn = cmath.rect(0.01, math.radians(value.get("rotation", 0)))
    right, down = turn * value["width"] * width, turn * 1j * value["height"] * height
    start = complex(value["x"] * width, value["y"] * height) / 100
    corners = [start, start + right, start + down, start + right + down]
    xs, ys = zip(*((corner.real, corner.imag) for corner in corners))
    return [min(xs), min(ys), max(xs), max(ys)]


if __name__ == "__main__":
    args = argument_parser().parse_args()
    load(args.model)  # a mistake is told now, not at the first box
    app = init_app(RegionSpotBackend, model_dir=tempfile.mkdtemp(), model=args.model)
    app.run(host=args.host, port=args.port)
