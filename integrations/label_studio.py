#!/usr/bin/env python
"""A machine learning backend for Label Studio: a drawn box gets its name.

    python integrations/label_studio.py --model mini --port 9090

Add http://localhost:9090 under Settings, Model, and switch on interactive preannotations. A box
drawn with the smart tool is named by the labels of the project; a task that is preannotated gets
all that the model finds.
"""

from __future__ import annotations

import argparse
import cmath
import copy
import math
import tempfile
from functools import cache, lru_cache
from typing import Any

from label_studio_ml.model import LabelStudioMLBase

from regionspot_d2 import RegionSpotPredictor

load = cache(RegionSpotPredictor.from_pretrained)


@lru_cache(maxsize=4)
def looking_at(model: str, path: str) -> RegionSpotPredictor:
    """A predictor with an image, so that the next box on it costs no encoder."""
    predictor = copy.copy(load(model))
    predictor.set_image(path)
    return predictor


class RegionSpotBackend(LabelStudioMLBase):
    """Names boxes by the first ``RectangleLabels`` of the labeling interface.

    Label Studio makes a backend anew at each setup; models and the last images outlive it.
    """

    def __init__(self, label_config: str | None = None, model: str = "mini", **kwargs: Any) -> None:
        super().__init__(label_config=label_config, **kwargs)
        self.model = model

    def predict(
        self, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Names the boxes among the results in ``context``, or all that is found."""
        controls = self.parsed_label_config.items()
        named = [(n, c) for n, c in controls if c["type"] == "RectangleLabels" and c["labels"]]
        if not named:
            raise ValueError("The labeling interface has no RectangleLabels with labels.")
        [(name, control), *_] = named
        ends = {"from_name": name, "to_name": control["to_name"][0], "type": "rectanglelabels"}
        drawn = [r for r in (context or {}).get("result", []) if "width" in r.get("value", {})]
        predictions = []
        for task in tasks:
            path = self.get_local_path(task["data"][control["inputs"][0]["value"]])
            predictor, results = looking_at(self.model, path), []
            height, width = predictor.image_size
            boxes = [box_of(region["value"], width, height) for region in drawn]
            if boxes:
                found = predictor.predict(boxes=boxes, vocabulary=control["labels"])
            else:
                found = predictor.everything(vocabulary=control["labels"])
            for i, (x0, y0, x1, y1) in enumerate(found.pred_boxes.tensor.tolist()):
                place = {"x": x0 / width, "y": y0 / height}
                place |= {"width": (x1 - x0) / width, "height": (y1 - y0) / height, "rotation": 0}
                region = drawn[i] if drawn else {"value": {k: 100 * v for k, v in place.items()}}
                label = control["labels"][int(found.pred_classes[i])]
                about = {"original_width": width, "original_height": height, "image_rotation": 0}
                about |= {"value": {**region["value"], "rectanglelabels": [label]}}
                results.append({**region, **ends, **about, "score": float(found.scores[i])})
            score = float(found.scores.mean()) if results else 0.0
            predictions.append({"result": results, "score": score, "model_version": self.model})
        return predictions


def box_of(value: dict[str, float], width: int, height: int) -> list[float]:
    """The box, XYXY in pixels, around a rectangle in percent that is turned around its corner."""
    turn = cmath.rect(1, math.radians(value.get("rotation", 0)))
    right, down = turn * value["width"] * width, turn * 1j * value["height"] * height
    start = complex(value["x"] * width, value["y"] * height)
    corners = [(start + side) / 100 for side in (0, right, down, right + down)]
    xs, ys = [corner.real for corner in corners], [corner.imag for corner in corners]
    return [min(xs), min(ys), max(xs), max(ys)]


if __name__ == "__main__":
    from label_studio_ml.api import init_app

    parser = argparse.ArgumentParser(description="Names boxes drawn in Label Studio.")
    parser.add_argument("--model", default="mini", help="a name, a config or a folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9090)
    args = parser.parse_args()
    load(args.model)  # a mistake is told now, not at the first box
    server = init_app(RegionSpotBackend, model_dir=tempfile.mkdtemp(), model=args.model)
    server.run(host=args.host, port=args.port)
