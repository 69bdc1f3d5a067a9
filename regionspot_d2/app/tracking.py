"""Follows the regions of a video from frame to frame: a track is one thing, and has one name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from ..data.images import as_image_tensor
from ..modeling.answers import Answer
from ..modeling.questions import as_prompts
from ..predictor import RegionSpotPredictor
from .results import Entry, to_entry
from .sources import Regions

# A region with a lower score continues a track but starts none, as ByteTrack has it. Detectors
# that look for words are seldom surer of what they find.
_STARTS_TRACK = 0.25
_MIN_IOU = 0.1  # of a region with its track, ByteTrack's own


def check_tracking() -> None:
    """Exits with one line if a package that --track needs is missing."""
    try:
        import supervision  # noqa: F401
        import trackers  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: --track: the package {error.name} is missing: "
            "pip install regionspot_d2[track] && pip install --no-deps trackers"
        ) from error


@dataclass
class _Frame:
    """What is known of a frame of R regions.

    Attributes:
        entry: its results, each region with the names that it has by itself.
        boxes: (R, 4), XYXY, pixels of the frame.
        scores: (R,) of the regions.
        tracks: (R,) numbers of tracks, from 0; -1 for none.
    """

    entry: Entry
    boxes: Tensor
    scores: np.ndarray
    tracks: np.ndarray


class TrackedRegions:
    """The regions of one video, frame after frame, and the tracks that ByteTrack makes of them."""

    def __init__(self, predictor: RegionSpotPredictor, fps: float, topk: int) -> None:
        """
        Args:
            predictor: embeds and names regions, by its vocabulary.
            fps: frames per second of those that are added; a track survives one second unseen.
            topk: names per region.
        """
        from trackers import ByteTrackTracker

        self._predictor, self._topk = predictor, topk
        self._tracker = ByteTrackTracker(
            frame_rate=fps,
            track_activation_threshold=_STARTS_TRACK,
            high_conf_det_threshold=_STARTS_TRACK,
            minimum_iou_threshold=_MIN_IOU,
        )
        self._frames: list[_Frame] = []
        # Of all regions of a track: of unit length, the sum is the average.
        self._sums: dict[int, Tensor] = {}
        self._before: Tensor = torch.empty(0)

    def add(self, file_name: str, image: np.ndarray, regions: Regions) -> None:
        """Embeds the regions of the next frame, and finds the tracks that they continue.

        Args:
            file_name: of the frame, in the results.
            image: (H, W, 3), uint8, RGB.
            regions: boxes only.

        Raises:
            ValueError: a box makes no sense.
        """
        answer = self._embed(image, regions)
        found = self._predictor.model.name(answer, self._predictor.vocabulary, topk=self._topk)
        boxes, embeddings = answer.boxes.tensor.cpu(), answer.embeddings.float().cpu()
        scores = np.ones(len(boxes), np.float32) if regions.scores is None else regions.scores
        found.scores = found.scores * found.scores.new_tensor(scores)[found.region_index]
        tracks = self._follow(boxes.numpy(), scores)
        frame = _Frame(to_entry(file_name, found), boxes, scores, tracks)
        for region in np.flatnonzero(tracks >= 0):
            track = int(tracks[region])
            if track not in self._sums:
                self._sums[track] = torch.zeros_like(embeddings[region])
                self._find_beginning(track, boxes[region])
            self._sums[track] += embeddings[region]
        self._frames.append(frame)
        self._before = embeddings

    def entries(self, threshold: float) -> list[Entry]:
        """The results of all frames: every region of a track has the names of the track.

        The score of a name is that for the track's average embedding, times the score of the
        region. Annotations of a track have its number, from 1, as "track_id".

        Args:
            threshold: annotations of a lower score are left out.
        """
        names = self._names_of_tracks()
        numbers = {track: number for number, track in enumerate(sorted(self._sums), start=1)}
        for frame in self._frames:
            kept: list[dict[str, Any]] = []
            places: dict[int, int] = {}
            for annotation in frame.entry["annotations"]:
                region = annotation["region"]
                track = int(frame.tracks[region])
                if track >= 0:
                    place = places[region] = places.get(region, -1) + 1
                    category, score = names[track][place]
                    annotation["category_id"] = category
                    annotation["score"] = score * float(frame.scores[region])
                    annotation["track_id"] = numbers[track]
                if annotation["score"] >= threshold:
                    kept.append(annotation)
            frame.entry["annotations"] = kept
        return [frame.entry for frame in self._frames]

    @torch.no_grad()
    def _embed(self, image: np.ndarray, regions: Regions) -> Answer:
        model = self._predictor.model
        pixels = as_image_tensor(image, "RGB").to(model.device)
        encoded = model.encode([pixels])
        prompts = as_prompts(encoded.image_sizes[0], boxes=regions.boxes)
        return model.answer(encoded, [prompts], with_masks=model.with_masks)[0]

    def _follow(self, boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
        from supervision import Detections

        tracks = np.full(len(boxes), -1)
        # The tracker gives regions back in its own order.
        places: dict[str, Any] = {"place": np.arange(len(boxes))}
        found = self._tracker.update(Detections(xyxy=boxes, confidence=scores, data=places))
        if len(found):
            tracks[found.data["place"]] = found.tracker_id
        return tracks

    def _find_beginning(self, track: int, box: Tensor) -> None:
        """Gives a track its first region: ByteTrack knows it only from the second one on."""
        if not self._frames:
            return
        last = self._frames[-1]
        free = np.flatnonzero(last.tracks < 0)
        overlap = pairwise_iou(Boxes(box[None]), Boxes(last.boxes[free]))[0]
        if len(free) and overlap.max() >= _MIN_IOU:
            region = int(free[overlap.argmax()])
            last.tracks[region] = track
            self._sums[track] += self._before[region]

    @torch.no_grad()
    def _names_of_tracks(self) -> dict[int, list[tuple[int, float]]]:
        """Per track its names, best first, as category ids and scores."""
        if not self._sums:
            return {}
        model, tracks = self._predictor.model, sorted(self._sums)
        embeddings = torch.stack([self._sums[track] for track in tracks]).to(model.device)
        answer = Answer(
            image_size=(1, 1),
            embeddings=F.normalize(embeddings, dim=1),
            boxes=Boxes(embeddings.new_zeros(len(tracks), 4)),
            mask_logits=None,
            localizer=model.localizer,
        )
        found = model.name(answer, self._predictor.vocabulary, topk=self._topk)
        names: dict[int, list[tuple[int, float]]] = {track: [] for track in tracks}
        rows = zip(found.region_index.tolist(), found.pred_classes.tolist(), found.scores.tolist())
        for place, name, score in rows:
            names[tracks[place]].append((name + 1, score))
        return names
