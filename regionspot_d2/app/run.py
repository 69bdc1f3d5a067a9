"""A run: names the regions of one image after another, draws them, and notes the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.images import read_image
from ..files import write_atomically
from ..journal import Journal
from ..modeling.everything import Search
from ..predictor import RegionSpotPredictor
from .drawing import draw_attention, draw_regions, side_by_side
from .names import one_line, printable
from .results import NONE_OF_THESE, Entry, OtherResults, is_entry, to_entry
from .sources import Regions, RegionSource
from .tracking import TrackedRegions
from .video import Video, video_writer

# Regions that are named where none are given: masks of a localizer, and boxes that are grouped from
# what a vision-language model sees, of which the first are the good ones.
MAX_MASKS, MAX_GROUPED = 100, 8
# Of --confidence-threshold auto: times the score of a guess, and the most. On 284 boxes of COCO it
# keeps nine of ten right names with the 80 names of COCO, and nearly all with the 1,203 of LVIS,
# of which a fixed 0.3 keeps one of ten.
_GUESSES, _MAX_THRESHOLD = 20, 0.3


def automatic_threshold(num_names: int) -> float:
    """The lowest score of a name that is shown; it falls as a vocabulary grows.

    A score is a softmax over the vocabulary, and so a guess has 1 / ``num_names``. The score of a
    single name says nothing: none is dropped.
    """
    return min(_MAX_THRESHOLD, _GUESSES / num_names) if num_names > 1 else 0.0


class Run:
    """Names the regions of one image after another, draws them, and notes the results."""

    def __init__(
        self,
        args: argparse.Namespace,
        predictor: RegionSpotPredictor,
        source: RegionSource,
        journal: Journal,
        other: OtherResults | None,
    ) -> None:
        self.args = args
        self.predictor = predictor
        self.source = source
        self.journal = journal
        self.other = other
        self.names = {0: NONE_OF_THESE, **dict(enumerate(predictor.vocabulary, start=1))}
        self.entries: list[Entry] = []

    def photo(self, path: Path, pictures: Sequence[Path]) -> None:
        """Names the regions of a photo and draws them, and with --attention where the head looks.

        Results are kept even if the picture cannot be drawn or written. Without ``pictures``, the
        paths of which --no-pictures takes, nothing is drawn; so it is for videos.
        """
        entry = self.known(str(path))
        if entry is None or not all(map(Path.exists, pictures)):
            image = read_image(str(path), max_pixels=self.predictor.max_pixels)
            entry, attention = self.name_regions(str(path), image)
            self.journal.add(path, entry)
            self.entries.append(entry)
            if pictures:
                _save(self.draw(entry, image), pictures[0])
            if attention is not None:
                panels = draw_attention(image, attention, entry["annotations"], self.names)
                _save(panels, pictures[1])
        else:
            self.entries.append(entry)

    def video(self, path: Path, pictures: Sequence[Path]) -> None:
        """Names the regions of a video's frames and draws them as a video."""
        # The first frame is noted last: if it is known, all are.
        if self.args.track and self.known(f"{path}#0") is None:
            self._track(path)
        video = Video(path, self.args.every)
        frames = _progress(video, printable(path.name))
        with video_writer(pictures[0], video.fps) if pictures else nullcontext() as write:
            for number, image in frames:
                name = f"{path}#{number}"
                # An unfinished video is written again, from what the journal has of its frames.
                entry = self.known(name)
                if entry is None:
                    entry, _ = self.name_regions(name, image)
                    self.journal.add(name, entry)
                self.entries.append(entry)
                if write is not None:
                    write(self.draw(entry, image, legend=False))
        # Only now, so that what could be read is kept.
        video.check_whole()

    def _track(self, path: Path) -> None:
        """Names the tracks of a video, which takes all of its frames, and notes the results."""
        video = Video(path, self.args.every)
        tracked = TrackedRegions(self.predictor, video.fps, self.args.topk)
        have_scores = False
        for number, image in _progress(video, f"{printable(path.name)}: tracks"):
            name = f"{path}#{number}"
            regions = self.source(name, image)
            assert isinstance(regions, Regions)  # as --track is checked
            have_scores |= regions.scores is not None
            tracked.add(name, image, regions)
        for entry in reversed(tracked.entries(self._threshold(have_scores))):
            self.journal.add(entry["file_name"], entry)

    def known(self, name: str) -> Entry | None:
        """The results that a run which is continued has of an image."""
        entry = self.journal.entries.get(name)
        return entry if is_entry(entry, self.names) else None

    def name_regions(self, file_name: str, image: np.ndarray) -> tuple[Entry, np.ndarray | None]:
        """The names of an image's regions, and with --attention (R, rows, columns) maps."""
        regions = self.source(file_name, image)
        self.predictor.set_image(image)
        if isinstance(regions, Search):
            limit = MAX_MASKS if regions.by_masks else MAX_GROUPED
            found = self.predictor.everything(
                search=regions, topk=self.args.topk, max_regions=limit
            )
            first = found.region_index.diff(prepend=found.region_index.new_tensor([-1])) > 0
            prompts: dict[str, Any] = {"boxes": found.pred_boxes[first]}
            scores = None
        else:
            prompts = {
                "boxes": regions.boxes,
                "points": regions.points,
                "point_labels": regions.point_labels,
            }
            found = self.predictor.predict(**prompts, topk=self.args.topk)
            scores = regions.scores
        if len(found) == 0:
            write_line(f"{file_name}: there is no region to name.")
        if scores is not None:
            found.scores = found.scores * found.scores.new_tensor(scores)[found.region_index]
        attention = None
        if self.args.attention:
            attention = self.predictor.attention_maps(**prompts).float().cpu().numpy()
        found = found[found.scores >= self._threshold(scores is not None)]
        clicks = {} if isinstance(regions, Search) else regions.clicks
        return to_entry(file_name, found, clicks), attention

    def _threshold(self, have_scores: bool) -> float:
        """What a person points at is named, however badly; of what a detector finds, much is not.

        Args:
            have_scores: whether the regions came with scores.
        """
        given = self.args.confidence_threshold
        if given == "auto" or (given is None and have_scores):
            return automatic_threshold(len(self.predictor.vocabulary))
        return given or 0.0

    def draw(self, entry: Entry, image: np.ndarray, *, legend: bool = True) -> np.ndarray:
        """The picture of an image (H, W, 3), beside the other run's if there is one.

        Without a legend, all pictures of images of one size have one size, as a video needs it.
        """
        ours = draw_regions(image, entry["annotations"], self.names, legend=legend)
        if self.other is None:
            return ours
        title = printable("/".join(Path(self.args.compare).absolute().parts[-2:]))
        annotations = self.other.of(entry["file_name"])
        if annotations is None:
            theirs = draw_regions(image, [], {})
            return side_by_side([(f"{title}: no results", theirs), ("this run", ours)])
        theirs = draw_regions(image, annotations, self.other.names, legend=legend)
        return side_by_side([(title, theirs), ("this run", ours)])


def _save(picture: np.ndarray, path: Path) -> None:
    # Whole or not at all: --resume takes a picture that exists for finished.
    with write_atomically(path) as file:
        if path.suffix == ".jpg":
            Image.fromarray(picture).save(file, format="JPEG", quality=90)
        else:
            Image.fromarray(picture).save(file, format="PNG")


def _progress(video: Video, label: str) -> Any:
    return tqdm(
        video, desc=label, unit="frame", total=video.expected_frames, leave=False, disable=None
    )


def write_line(message: str) -> None:
    """Prints a message about an image as one line, above the progress bar."""
    tqdm.write(one_line(message), file=sys.stderr)
