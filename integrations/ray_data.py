"""Names regions of millions of images with Ray Data: a model per actor, results as Parquet.

    python integrations/ray_data.py --input photos/ --vocabulary cat,dog --output named/ \\
        --actors 4 --gpus-per-actor 0.25

The input is a folder or anything that Ray reads files from (s3://bucket/photos). Each region that
is found becomes a row. In a program, the boxes may be given::

    rows = [{"path": "photos/1.jpg", "boxes": [[10.0, 20.0, 200.0, 300.0]]}, ...]
    named = ray.data.from_items(rows).map_batches(
        NameRegions, fn_constructor_kwargs={"model": "mini", "vocabulary": ["cat", "dog"]},
        batch_size=8, num_gpus=0.25, compute=ray.data.ActorPoolStrategy(size=4),
    )
    named.write_parquet("named/")
"""

from __future__ import annotations

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    add = parser.add_argument
    add("--input", required=True, metavar="FOLDER|URL", help="where the images are")
    add("--output", required=True, metavar="FOLDER|URL", help="for Parquet files; new or empty")
    add("--vocabulary", required=True, metavar="NAMES", help="coco|lvis|..., or names with commas")
    add("--model", default="mini", metavar="NAME|FILE|FOLDER", help="by default mini")
    add("--actors", type=int, default=1, help="models at work at once")
    add("--gpus-per-actor", type=float, default=0.0, help="0.25 lets four share a GPU")
    add("--batch-size", type=int, default=8, help="images at a time")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from detectron2.structures import Instances

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.datasets.vocabularies import VOCABULARIES, known_vocabulary
from regionspot_d2.data.images import ImageReadError, read_image

# A row for each name of a region: XYXY in pixels of the image; of an unreadable image path, error.
SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "region": pa.int64(),
        **{side: pa.float32() for side in ("x0", "y0", "x1", "y1")},
        "name": pa.string(),
        "score": pa.float32(),
        "error": pa.string(),
    }
)
IMAGE_SUFFIXES = ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"]


class NameRegions:
    """Names the regions of a batch of images; what ``ray.data.Dataset.map_batches`` takes.

    Each actor builds a model of its own. An image that cannot be read gives one row, without a name
    and with the reason in ``error``; it does not end the work on the others.
    """

    def __init__(
        self,
        model: str = "mini",
        vocabulary: Sequence[str] = (),
        *,
        topk: int = 1,
        zoom: float | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
            model, vocabulary, zoom, device: as :meth:`RegionSpotPredictor.from_pretrained` takes
                them.
            topk: names per region.
        """
        self.predictor = RegionSpotPredictor.from_pretrained(
            model, device=device, vocabulary=list(vocabulary) or None, zoom=zoom
        )
        self.topk = topk

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Names the regions of a batch.

        Args:
            batch: ``path`` of each image; its encoded ``bytes``, or else the path is read;
                ``boxes``, (R, 4), XYXY, pixels of the image, or else all that is found is named.

        Returns:
            A table of :data:`SCHEMA`, with ``topk`` rows for each region.
        """
        paths = [str(path) for path in batch["path"]]
        images, boxes, rows = [], [], []
        for i, path in enumerate(paths):
            content = batch["bytes"][i] if "bytes" in batch else None
            try:
                images.append((path, read(path, content)))
                boxes.append(as_boxes(batch["boxes"][i]) if "boxes" in batch else None)
            except ImageReadError as error:
                rows.append({"path": path, "error": str(error)})
        for (path, _), found in zip(images, self._name([image for _, image in images], boxes)):
            rows += self._rows(path, found)
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _name(self, images: list[np.ndarray], boxes: list[np.ndarray | None]) -> list[Instances]:
        given = [box for box in boxes if box is not None]
        if given:
            return self.predictor.predict_batch(
                images, given, topk=self.topk, batch_size=len(images)
            )
        found = []
        for image in images:
            self.predictor.set_image(image)
            found.append(self.predictor.everything(topk=self.topk))
        return found

    def _rows(self, path: str, found: Instances) -> Iterable[dict[str, Any]]:
        found = found.to("cpu")
        corners = found.pred_boxes.tensor.tolist()
        regions, scores = found.region_index.tolist(), found.scores.tolist()
        for region, box, place, score in zip(regions, corners, found.pred_classes, scores):
            name = self.predictor.vocabulary[int(place)]
            sides = dict(zip(("x0", "y0", "x1", "y1"), box))
            yield {"path": path, "region": region, **sides, "name": name, "score": score}


def as_boxes(boxes: Any) -> np.ndarray:
    """Boxes of one image, as Ray hands them on: (R, 4), float64."""
    return np.array([list(box) for box in boxes], dtype=float).reshape(-1, 4)


def read(path: str, content: bytes | None) -> np.ndarray:
    """Reads an image, RGB (H, W, 3); its content, if Ray has read it, goes through a file.

    Raises:
        ImageReadError: the image cannot be read.
    """
    if content is None:
        return read_image(path)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return read_image(file.name)
        except ImageReadError as error:
            raise ImageReadError(str(error).replace(file.name, path)) from error


def main() -> None:
    args = argument_parser().parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    known = args.vocabulary in VOCABULARIES
    names = known_vocabulary(args.vocabulary) if known else args.vocabulary.split(",")
    files = ray.data.read_binary_files(
        args.input, include_paths=True, file_extensions=IMAGE_SUFFIXES
    )
    named = files.map_batches(
        NameRegions,
        fn_constructor_kwargs={"model": args.model, "vocabulary": names},
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_gpus=args.gpus_per_actor,
    )
    # Run twice, the default would add all rows again.
    named.write_parquet(args.output, mode=ray.data.SaveMode.CREATE)


if __name__ == "__main__":
    main()
