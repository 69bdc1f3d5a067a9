#!/usr/bin/env python
"""Fits the region head of the mini model to labeled boxes, with the image classifier as a teacher.

The head is fitted to two kinds of regions. The target of a labeled box is the text vector of its
name. The target of a random box, in a photo with or without labels, mixes the classifier's answer
on its crop with the baseline's: this preserves the names that no label teaches, and brings the
sharper view of a crop into the single pass over the image.

The fit is in closed form, so the same data and seed give the same weights. A head fitted to other
data has another number of regions, ``MODEL.REGION_HEAD.NUM_CENTERS``, which the script prints::

    python tools/mini/train_mini_head.py --coco train.json images/ --photos more_photos/ \\
        --output mini_head.safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from head_settings import Settings, add_settings, settings_of

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument(
        "--coco",
        nargs=2,
        action="append",
        default=[],
        metavar=("JSON", "IMAGES"),
        help="labeled boxes in COCO format and their image folder; may be repeated",
    )
    parser.add_argument(
        "--photos", type=Path, nargs="*", default=[], help="folders of photos without labels"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    add_settings(parser)
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from regionspot_d2 import add_regionspot_config
from regionspot_d2.checkpoint import TRAINED_ON
from regionspot_d2.data.datasets.corrections import photos_of
from regionspot_d2.data.datasets.validation import read_annotations
from regionspot_d2.data.images import read_image
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.files import sha256_of_file, write_atomically
from regionspot_d2.mini.classifier import DenseEfficientNetLite
from regionspot_d2.mini.fit import RegionTargets, fit_kernel_head
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.views import ViewFinder, Zoom, boxes_in_view

CONFIG = Path(__file__).parents[2] / "configs/mini/regionspot_mini.yaml"
T = TypeVar("T")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
# EfficientNet-Lite2's native input size.
CROP_SIDE = 260


@dataclass
class Photo:
    """A photo, and its labeled boxes (R, 4), XYXY in 0..1, with their names; possibly none."""

    path: Path
    boxes: Tensor
    names: list[str]


@dataclass
class Prepared:
    """What the fit needs of a photo; computed once, used in every fold."""

    baseline: Tensor
    descriptions: Tensor
    teacher_baseline: Tensor
    teacher_descriptions: Tensor
    crops: Tensor


def load_model() -> RegionSpot:
    """The mini model with an untrained head."""
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.REGION_HEAD.NUM_CENTERS = 0
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg).eval()


def labeled_photos(json_file: str, images: str) -> list[Photo]:
    """The photos of a COCO-format dataset, without crowds and boxes of no area."""
    read_annotations(json_file)  # a fault is told with its place in the file
    coco = COCO(json_file)
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    photos = []
    for image in coco.loadImgs(sorted(coco.getImgIds())):
        found = coco.loadAnns(coco.getAnnIds([image["id"]], iscrowd=False))
        found = [a for a in found if a["bbox"][2] > 0 and a["bbox"][3] > 0]
        xywh = torch.tensor([a["bbox"] for a in found]).view(-1, 4)
        size = torch.tensor([image["width"], image["height"]] * 2)
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1) / size
        labels = [names[a["category_id"]] for a in found]
        photos.append(Photo(Path(images, image["file_name"]), boxes, labels))
    return photos


def unlabeled_photos(folders: list[Path]) -> list[Photo]:
    """All photos in folders, duplicates left out, in the order of their sha256."""
    unique = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES):
            unique.setdefault(sha256_of_file(path), path)
    return [Photo(unique[key], torch.zeros(0, 4), []) for key in sorted(unique)]


def progress(items: Iterable[T], label: str, unit: str = "photo") -> Iterable[T]:
    """The items, with a bar on a terminal."""
    return tqdm(items, desc=label, unit=unit, disable=None)


def note_of(photos: Iterable[Photo]) -> dict[str, Any]:
    """Which photos the head is fitted to, as its file notes it."""
    sizes = [(photo.path.name, *Image.open(photo.path).size) for photo in photos]
    images = [{"file_name": name, "width": w, "height": h} for name, w, h in sizes]
    return {"datasets": [], "photos": photos_of(images)}


def check_names(model: RegionSpot, photos: list[Photo]) -> None:
    """Exits with a line per name that the model does not know, before the work begins."""
    try:
        model.vision_language.text_vectors([name for photo in photos for name in photo.names])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def read(photo: Photo) -> Tensor:
    """RGB (3, H, W), uint8."""
    return torch.from_numpy(read_image(str(photo.path)).copy()).permute(2, 0, 1)


def random_boxes(count: int, seed: str) -> Tensor:
    """Boxes (count, 4), XYXY in 0..1; the log of each side is uniform from 1/20 to 1."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    u = torch.rand(count, 4, generator=generator)
    size = torch.exp(math.log(0.05) * u[:, :2])
    corner = u[:, 2:] * (1 - size)
    return torch.cat([corner, corner + size], dim=1)


class CropClassifier:
    """Crops each box, squashes it to the classifier's input, brings the answer into text space."""

    def __init__(self, model: RegionSpot) -> None:
        self.classifier = DenseEfficientNetLite(CROP_SIDE).eval()
        self.to_text = model.vision_language.to_text_space

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Tensor) -> Tensor:
        """RGB (3, H, W) and boxes (R, 4), XYXY in 0..1 -> (R, D), rows of unit length."""
        height, width = image.shape[1:]
        crops = image.new_zeros(len(boxes), 3, CROP_SIDE, CROP_SIDE, dtype=torch.float)
        for crop, box in zip(crops, boxes):
            x0, y0, x1, y1 = (box * box.new_tensor([width, height, width, height])).tolist()
            x0, y0 = min(int(x0), width - 1), min(int(y0), height - 1)
            x1, y1 = min(max(math.ceil(x1), x0 + 1), width), min(max(math.ceil(y1), y0 + 1), height)
            part = image[None, :, y0:y1, x0:x1].float()
            size = (CROP_SIDE, CROP_SIDE)
            crop.copy_(F.interpolate(part, size, mode="bilinear", antialias=True)[0])
        # After its pooling the classifier is linear, so the mean logits of the cells are those of
        # the image.
        logits = torch.cat([self.classifier(part)[1].mean((2, 3)) for part in crops.split(10)])
        return F.normalize(self.to_text(logits), dim=-1)


@torch.no_grad()
def prepare(
    model: RegionSpot, photo: Photo, crop_classifier: CropClassifier, settings: Settings
) -> Prepared:
    """Runs the frozen networks over a photo."""
    image = read(photo)
    boxes = random_boxes(settings.boxes_per_photo, f"{settings.seed} {photo.path.name}")
    labeled = describe(model, image, photo.boxes, settings.zoom)
    return Prepared(*labeled, *describe(model, image, boxes, 0.0), crop_classifier(image, boxes))


def describe(model: RegionSpot, image: Tensor, boxes: Tensor, zoom: float) -> tuple[Tensor, Tensor]:
    """What :meth:`KernelRegionHead.describe` says of boxes (R, 4), XYXY in 0..1, each in its view.

    The views are those of a question with as few boxes as ``MODEL.ZOOM_MAX_VIEWS``.
    """
    head, encoded = model.region_head, model.encode([image])
    if not zoom or not len(boxes):
        return head.describe(encoded.image_tokens, [boxes])[0]
    [(height, width)] = encoded.image_sizes
    pixels = Boxes(boxes * boxes.new_tensor([width, height] * 2))
    find = ViewFinder(Zoom(zoom, max_views=len(boxes)), (height, width), len(boxes))
    views, places = find(pixels)
    tokens = encoded.view_tokens(0, views)
    described = [
        head.describe(tokens[place][None], [boxes_in_view(pixels[row], views[place])])[0]
        for row, place in enumerate(places.tolist())
    ]
    baseline, descriptions = zip(*described)
    return torch.cat(baseline), torch.cat(descriptions)


def fit(
    model: RegionSpot, photos: list[Photo], prepared: list[Prepared], settings: Settings
) -> None:
    """Fits the model's head in place."""
    text = model.vision_language.text_vectors
    names = [name for photo in photos for name in photo.names]
    teacher_baseline = torch.cat([p.teacher_baseline for p in prepared])
    crops = torch.cat([p.crops for p in prepared])
    taught = F.normalize(
        settings.crop_share * crops + (1 - settings.crop_share) * teacher_baseline, dim=1
    )
    regions = RegionTargets(
        baseline=torch.cat([*(p.baseline for p in prepared), teacher_baseline]),
        descriptions=torch.cat(
            [*(p.descriptions for p in prepared), *(p.teacher_descriptions for p in prepared)]
        ),
        targets=torch.cat([F.normalize(text(names) - text.mean, dim=1), taught]),
        weights=torch.cat(
            [torch.ones(len(names)), torch.full((len(crops),), settings.teacher_weight)]
        ),
    )
    geometry = regions.descriptions.shape[1] - model.vision_language.image_dim
    fit_kernel_head(
        model.region_head,
        regions,
        share=settings.share,
        ridge=settings.ridge,
        width=settings.width,
        radial_share=settings.radial_share,
        reserve=settings.reserve,
        blocks=[*model.vision_language.token_parts, geometry],
    )
    model.region_head.share += settings.extra_share


@told_in_a_line("train_mini_head.py")
def main() -> None:
    args = argument_parser().parse_args()
    settings = settings_of(args)
    photos = [photo for each in args.coco for photo in labeled_photos(*each)]
    photos += unlabeled_photos(args.photos)
    if not photos:
        raise SystemExit("error: there are no photos; give --coco or --photos")
    model = load_model()
    check_names(model, photos)
    crop_classifier = CropClassifier(model)
    prepared = []
    for photo in progress(photos, "Preparing photos"):
        prepared.append(prepare(model, photo, crop_classifier, settings))
    fit(model, photos, prepared, settings)
    head = {name: part.half().contiguous() for name, part in model.region_head.state_dict().items()}
    with write_atomically(args.output) as file:
        file.write(save(head, {"format": "pt", TRAINED_ON: json.dumps(note_of(photos))}))
    boxes = sum(len(photo.names) for photo in photos)
    print(f"{args.output}: from {len(photos)} photos, {boxes} labeled boxes; {settings}")
    print(f"MODEL.REGION_HEAD.NUM_CENTERS {len(model.region_head.centers)}")


if __name__ == "__main__":
    main()
