"""The commands index and search: what is in photos, in one file, found again by words."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from regionspot_cli import parse_index, parse_search

from ..data.images import ImageReadError, read_image
from ..files import write_atomically
from ..modeling.everything import Search
from ..modeling.names import check_names
from ..modeling.questions import as_boxes
from ..predictor import RegionSpotPredictor
from ..region_index import RegionIndex
from ..stopping import INTERRUPTED
from ..vector_files import check_model, model_fingerprint
from .drawing import side_by_side
from .inputs import IMAGE_SUFFIXES, tell
from .main import build_predictor, run_command, tell_what_stood_in
from .names import OutputFolder, printable
from .run import MAX_GROUPED, MAX_MASKS, write_line
from .sources import RegionSource, choose_source

_TILE = 256  # pixels, the side of a picture in a sheet
_BLANK = np.full((_TILE, _TILE, 3), 200, np.uint8)
_AROUND = 1.5  # times the longer side of a region are shown
_SOURCES = ("proposals", "detector", "detector_config")

# A photo's path in its folder, the boxes of its regions and their embeddings.
Found = tuple[str, Tensor, Tensor]


def index_photos(arguments: Sequence[str]) -> int:
    """Runs ``regionspot index``; returns the exit status, 1 if a photo failed."""
    return run_command(_index, parse_index(arguments))


def search_photos(arguments: Sequence[str]) -> int:
    """Runs ``regionspot search``; returns the exit status, 1 if a photo cannot be shown."""
    return run_command(_search, parse_search(arguments))


def _index(args: argparse.Namespace) -> int:
    folder, output = Path(args.input), Path(args.output)
    made_with = " ".join([args.config_file, *args.opts])
    photos = _photos_below(folder)
    _check_output(args, output)
    _, predictor = build_predictor(args)
    model = model_fingerprint(predictor.model)
    known = _known(output, folder, model) if args.resume else {}
    source = (
        choose_source(args, predictor.model, predictor.vocabulary)
        if _has_source(args)
        else _whatever_is_there
    )
    found, outcomes, stopped = list[Found](), Counter[str](), False
    try:
        for name in tqdm(photos, desc="Looking at photos", unit="photo"):
            try:
                found.append(known.get(name) or _embed(predictor, source, folder, name))
            # Each library has its own errors for files that are damaged. None ends the run.
            except Exception as error:
                outcomes[type(error).__name__] += 1
                write_line(f"{folder / name}: {error}")
    except KeyboardInterrupt:
        stopped = True
    try:
        index = RegionIndex.of_images(
            found, folder=folder.absolute(), model=model, made_with=made_with
        )
        index.save(output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --output {output}: {error}") from error
    print(f"In {printable(output)}: {len(index)} regions of {len(found)} photos.")
    if outcomes:
        tell(f"{outcomes.total()} of {len(photos)} photos failed; see above.")
    if stopped:
        tell("Stopped; the index has the photos so far. The same command with --resume goes on.")
        return INTERRUPTED
    return 1 if outcomes else 0


def _photos_below(folder: Path) -> list[str]:
    """Paths in a folder of the photos in it and in the folders in it."""
    if not folder.is_dir():
        raise SystemExit(f"error: --input {folder}: a folder is expected.")
    found: list[str] = []
    for place, folders, files in os.walk(folder, onerror=lambda error: tell(f"--input: {error}")):
        folders.sort()
        images = [name for name in sorted(files) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        found += [Path(place, name).relative_to(folder).as_posix() for name in images]
    if not found:
        raise SystemExit(f"error: --input {folder}: there is no image.")
    return found


def _check_output(args: argparse.Namespace, output: Path) -> None:
    given = [args.config_file, args.proposals, args.detector_config, args.detector_weights]
    given.append((args.detector or "").partition(":")[2])
    taken = OutputFolder(output.parent, filter(None, given)).is_input(output)
    if taken or output.is_dir() or output.suffix.lower() in IMAGE_SUFFIXES:
        raise SystemExit(
            f"error: --output {output}: the name of a new file is expected, not that of a folder, "
            "a photo, or an input."
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output {output}: {error}") from error


def _known(output: Path, folder: Path, model: str) -> dict[str, Found]:
    """What an earlier run has found, by photo."""
    if not output.exists():
        return {}
    try:
        index = RegionIndex.open(output, model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --resume: {error}") from error
    if index.folder != folder.absolute():
        raise SystemExit(f"error: --resume: {output} is of the photos in {index.folder}.")
    return {found[0]: found for found in index.by_image()}


def _has_source(args: argparse.Namespace) -> bool:
    return any(vars(args).get(option) for option in _SOURCES)


def _whatever_is_there(name: str, image: np.ndarray) -> Search:
    return Search()


def _embed(predictor: RegionSpotPredictor, source: RegionSource, folder: Path, name: str) -> Found:
    image = read_image(str(folder / name), max_pixels=predictor.max_pixels)
    regions = source(name, image)
    predictor.set_image(image)
    if isinstance(regions, Search):
        by_masks = regions.by_masks
        if by_masks is None:
            by_masks = predictor.model.localizer.masks_are_fine
        limit = MAX_MASKS if by_masks else MAX_GROUPED
        boxes = predictor.everything(search=regions, max_regions=limit).pred_boxes
    else:
        boxes = as_boxes(regions.boxes, predictor.image_size)
    return name, boxes.tensor, predictor.region_embeddings(boxes=boxes)


def _search(args: argparse.Namespace) -> int:
    queries, output = list(dict.fromkeys(args.query)), Path(args.output)
    args.vocabulary = None
    try:
        check_names(queries, repeats=True)
        index = RegionIndex.open(args.index)  # what is wrong with it is told before a model loads
        if args.images:
            index.folder = Path(args.images)
        _, predictor = build_predictor(args)
        check_model(args.index, index.model, model_fingerprint(predictor.model), index.made_with)
        embedder = predictor.model.text_embedder
        tell_what_stood_in("search", embedder.stood_in(queries))
        hits = index.search(embedder(queries), args.topk, method=args.method)
        output.mkdir(parents=True, exist_ok=True)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    given = [args.index, args.config_file, *(index.folder / name for name in index.images)]
    folder = OutputFolder(output, given)
    if folder.is_input(output / "results.json"):
        raise SystemExit(f"error: --output {output}: its results.json is an input.")
    results = [
        {"query": query, "regions": _regions(index, scores, places)}
        for query, scores, places in zip(queries, hits.scores.tolist(), hits.places.tolist())
    ]
    try:
        return _report(args, results, folder)
    except OSError as error:
        raise SystemExit(f"error: --output {output}: {error}") from error


def _regions(
    index: RegionIndex, scores: Sequence[float], places: Sequence[int]
) -> list[dict[str, Any]]:
    return [
        {
            "file_name": str(index.image_of(place)),
            "box": index.boxes[place].tolist(),
            "score": score,
        }
        for score, place in zip(scores, places)
    ]


def _report(args: argparse.Namespace, results: list[dict[str, Any]], folder: OutputFolder) -> int:
    """Prints and writes what was found; returns the exit status."""
    rows, failed = [], 0
    for result in results:
        panels = []
        for rank, region in enumerate(result["regions"], start=1):
            box = ", ".join(f"{value:.0f}" for value in region["box"])
            file_name = printable(region["file_name"])
            rows.append(
                [printable(result["query"]), rank, f"{region['score']:.3f}", box, file_name]
            )
            if not args.no_pictures:
                picture = _tile(region)
                failed += picture is None
                title = f"{rank}: {region['score']:.3f} {Path(file_name).name}"
                panels.append((title, _BLANK if picture is None else picture))
        if panels:
            [path] = folder.claim(result["query"], ".jpg")
            with write_atomically(path) as file:
                Image.fromarray(side_by_side(panels)).save(file, format="JPEG", quality=90)
    with write_atomically(folder.path / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    print(tabulate(rows, headers=["search", "rank", "score", "box (x0, y0, x1, y1)", "image"]))
    sheets = "" if args.no_pictures else " and a sheet of pictures for each search"
    print(f"\nIn {printable(folder.path)}: results.json{sheets}.")
    if failed:
        tell(f"{failed} regions cannot be shown; if the photos have moved, give --images.")
    return 1 if failed else 0


def _tile(region: dict[str, Any]) -> np.ndarray | None:
    """A region and what is around it, in a square; None if the photo cannot be read."""
    try:
        image = Image.fromarray(read_image(region["file_name"]))
    except (ImageReadError, ValueError) as error:
        write_line(f"{region['file_name']}: {error}")
        return None
    limits = [*image.size, *image.size]
    x0, y0, x1, y1 = (min(max(v, 0), limit) for v, limit in zip(region["box"], limits))
    half = max(x1 - x0, y1 - y0, 2) * _AROUND / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    # What is outside of the photo stays white, and is never made: a photo may be very long.
    left, top = max(x - half, 0), max(y - half, 0)
    right, bottom = min(x + half, image.width), min(y + half, image.height)
    scale = _TILE / (2 * half)
    size = [max(1, round(side * scale)) for side in (right - left, bottom - top)]
    view = image.resize((size[0], size[1]), box=(left, top, right, bottom))
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    shift_x, shift_y = x - half, y - half
    tile.paste(view, (round((left - shift_x) * scale), round((top - shift_y) * scale)))
    corners = [(v - s) * scale for v, s in zip((x0, y0, x1, y1), (shift_x, shift_y) * 2)]
    ImageDraw.Draw(tile).rectangle(corners, outline="red", width=2)
    return np.array(tile)
