"""Names regions of photos. README.md beside this file has examples."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_api
from tabulate import tabulate
from tqdm import tqdm

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.images import ImageReadError, read_image
from regionspot_d2.engine import load_config
from regionspot_d2.modeling.automatic_masks import automatic_boxes
from regionspot_d2.modeling.embedded import VOCABULARIES, known_vocabulary
from regionspot_d2.modeling.vocabulary import clean_name

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Names regions of photos.")
    parser.add_argument(
        "--config-file",
        default=str(ROOT / "configs" / "mini" / "regionspot_mini.yaml"),
        help="model to use; by default the small one that needs no download from a model hub",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, globs or folders"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for pictures and json")
    regions = parser.add_mutually_exclusive_group(required=True)
    regions.add_argument(
        "--boxes", nargs="+", metavar="X0,Y0,X1,Y1", help="regions, in pixels of each image"
    )
    regions.add_argument(
        "--proposals",
        metavar="FILE|sam",
        help='json {"file name": {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}, or "sam": '
        "whatever the localizer's automatic mask generator finds",
    )
    parser.add_argument(
        "--vocabulary",
        default="lvis",
        metavar="WORDS",
        help=f"{'|'.join(VOCABULARIES)}, or names with commas between, or a text file with a name per line",
    )
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.0, help="leave out names that score less"
    )
    parser.add_argument("--topk", type=int, default=1, help="names per region")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ..."
    )
    return parser.parse_args()


def find_images(patterns: list[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            inside = sorted(Path(pattern).iterdir())
            matches = [path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES]
        else:
            # A name that exists is meant as it is, brackets and all.
            exists = Path(pattern).exists()
            matches = [Path(p) for p in ([pattern] if exists else sorted(glob.glob(pattern)))]
        if not matches:
            raise SystemExit(f"error: --input {pattern}: there is no image.")
        found += matches
    return list(dict.fromkeys(found))


def read_vocabulary(words: str) -> list[str]:
    if words in VOCABULARIES:
        return known_vocabulary(words)
    if "," not in words and Path(words).is_file():
        lines = Path(words).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    return [word.strip() for word in words.split(",")]


class Regions:
    """The boxes of each image, from wherever the arguments say."""

    def __init__(self, args: argparse.Namespace, predictor: RegionSpotPredictor) -> None:
        self.localizer = predictor.model.localizer
        self.boxes = [parse_box(text) for text in args.boxes] if args.boxes else None
        self.by_name: dict[str, Any] | None = None
        if args.proposals and args.proposals != "sam":
            self.by_name = read_proposals(args.proposals)
            self.file = args.proposals

    def of(self, path: Path, image: np.ndarray) -> tuple[Any, np.ndarray | None]:
        """Boxes (R, 4) XYXY in pixels of the image (H, W, 3), and their scores if they have any."""
        if self.boxes is not None:
            return self.boxes, None
        if self.by_name is not None:
            if path.name not in self.by_name:
                raise ValueError(f"{self.file} has no boxes for '{path.name}'.")
            entry = self.by_name[path.name]
            scores = entry.get("scores")
            return entry["boxes"], None if scores is None else np.asarray(scores, dtype=np.float32)
        found = automatic_boxes(self.localizer, torch.from_numpy(image).permute(2, 0, 1))
        if len(found) == 0:
            raise ValueError(
                "the automatic mask generator found no region. SAM finds many; the mini localizer, tuned to boxes, "
                "finds few or none: give --boxes, or another --config-file."
            )
        return found.proposal_boxes.tensor, found.objectness_logits.cpu().numpy()


def parse_box(text: str) -> list[float]:
    try:
        box = [float(number) for number in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise SystemExit(f"error: --boxes {text}: four numbers x0,y0,x1,y1 are expected.")
    return box


def read_proposals(file: str) -> dict[str, Any]:
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --proposals {file}: {error}") from error
    if not isinstance(entries, dict):
        raise SystemExit(f"error: --proposals {file}: a dict from file names to boxes is expected.")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or "boxes" not in entry:
            raise SystemExit(f"error: --proposals {file}: '{name}' has no 'boxes'.")
        if len(entry.get("scores", entry["boxes"])) != len(entry["boxes"]):
            raise SystemExit(f"error: --proposals {file}: '{name}' has not one score per box.")
    return entries


def by_region(found: Instances) -> Iterator[tuple[int, Instances]]:
    for index in found.region_index.unique().tolist():
        yield index, found[found.region_index == index]


def draw(image: np.ndarray, found: Instances, names: list[str], path: Path) -> None:
    """Draws each region once, with all its names, and saves the picture."""
    boxes, labels, masks = [], [], []
    for _, region in by_region(found):
        words = [
            f"{clean_name(names[c])} {100 * s:.0f}%"
            for c, s in zip(region.pred_classes.tolist(), region.scores.tolist())
        ]
        boxes.append(region.pred_boxes.tensor[0].cpu().numpy())
        labels.append(", ".join(words))
        if region.has("pred_masks"):
            masks.append(region.pred_masks[0].cpu().numpy())
    visualizer = Visualizer(image)
    visualizer.overlay_instances(
        boxes=np.array(boxes).reshape(-1, 4), labels=labels, masks=masks or None
    ).save(str(path))


def to_coco(found: Instances, image_id: int, first_id: int) -> list[dict[str, Any]]:
    annotations = []
    for i in range(len(found)):
        x0, y0, x1, y1 = (round(v, 2) for v in found.pred_boxes.tensor[i].tolist())
        annotation = {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": int(found.pred_classes[i]) + 1,
            "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
            "area": round((x1 - x0) * (y1 - y0), 2),
            "iscrowd": 0,
            "score": round(float(found.scores[i]), 6),
        }
        if found.has("pred_masks"):
            mask = np.asfortranarray(found.pred_masks[i].cpu().numpy().astype(np.uint8))
            rle = mask_api.encode(mask)
            annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotation["area"] = int(mask_api.area(rle))
        annotations.append(annotation)
    return annotations


def main() -> int:
    args = parse_arguments()
    setup_logger(name="regionspot_d2")
    paths = find_images(args.input)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        cfg = load_config(args.config_file, args.opts, training=False)
        predictor = RegionSpotPredictor(cfg, vocabulary=read_vocabulary(args.vocabulary))
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    regions = Regions(args, predictor)

    # Pictures are called after their images; images of the same name get a number.
    names_seen: Counter[str] = Counter()
    rows, images, annotations, failures = [], [], [], []
    for path in tqdm(paths, desc="Naming regions", unit="image"):
        try:
            image = read_image(str(path))
            boxes, scores = regions.of(path, image)
            predictor.set_image(image)
            found = predictor.predict(boxes=boxes, topk=args.topk)
        except (ImageReadError, ValueError) as error:
            failures.append(path)
            tqdm.write(f"{path}: {error}", file=sys.stderr)
            continue
        if scores is not None:
            index = found.region_index
            found.scores = found.scores * found.scores.new_tensor(scores)[index]
        found = found[found.scores >= args.confidence_threshold]
        names = predictor.vocabulary
        names_seen[path.name] += 1
        number = f"-{names_seen[path.name]}" if names_seen[path.name] > 1 else ""
        draw(image, found, names, output / f"{path.name}{number}.png")
        images.append(
            {
                "id": len(images) + 1,
                "file_name": str(path),
                "height": image.shape[0],
                "width": image.shape[1],
            }
        )
        annotations += to_coco(found, len(images), len(annotations) + 1)
        for index, region in by_region(found):
            box = ", ".join(f"{v:.0f}" for v in region.pred_boxes.tensor[0].tolist())
            for c, s in zip(region.pred_classes.tolist(), region.scores.tolist()):
                rows.append([path.name, index, box, clean_name(names[c]), f"{s:.3f}"])

    results = {
        "images": images,
        "categories": [{"id": i + 1, "name": n} for i, n in enumerate(predictor.vocabulary)],
        "annotations": annotations,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(tabulate(rows, headers=["image", "region", "box (x0, y0, x1, y1)", "name", "score"]))
    print(f"\n{len(images)} pictures and results.json are in {output}.")
    if failures:
        print(f"{len(failures)} of {len(paths)} images failed; see above.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
