"""One segment per pixel: named regions in Detectron2's panoptic format, and the model of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor

from .everything import Search, name_everything
from .inputs import input_images
from .regionspot import RegionSpot
from .vocabulary import dataset_stuff_classes

# Which segment each pixel belongs to, and what the segments are.
Panoptic: TypeAlias = tuple[Tensor, list[dict[str, Any]]]


def panoptic_segments(
    found: Instances,
    stuff_classes: Collection[int],
    *,
    overlap_thresh: float = 0.5,
    min_area: int = 64,
    stuff_area_limit: int = 4096,
) -> Panoptic:
    """Gives each pixel to the best of the regions that claim it.

    Args:
        found: one name per region: ``pred_masks``, ``scores`` and ``pred_classes``.
        stuff_classes: classes whose regions become one segment; each other region stays a segment
            of its own.
        overlap_thresh: a region that keeps no more than this share of its pixels is dropped.
        min_area: segments of fewer pixels are dropped.
        stuff_area_limit: the same for segments of stuff.

    Returns:
        ``panoptic_seg``, (H, W) int32 on the device of the masks, 0 where there is no segment; and
        ``segments_info``, best first: "id" (from 1), "isthing", "category_id" (the place in the
        vocabulary), "score" (of stuff: the best of its regions) and "area". Detectron2's
        ``Visualizer.draw_panoptic_seg_predictions`` draws them with metadata whose
        ``thing_classes`` and ``stuff_classes`` are both the vocabulary.
    """
    seg = torch.zeros(found.image_size, dtype=torch.int32, device=found.scores.device)
    segments: list[dict[str, Any]] = []
    of_stuff: dict[int, dict[str, Any]] = {}
    order = found.scores.argsort(descending=True, stable=True)
    # One by one: there may be more masks than memory.
    for mask, row in zip(found.pred_masks[order], order.tolist()):
        free = mask.to(seg.device) & (seg == 0)
        name, area = int(found.pred_classes[row]), int(free.sum())
        if area == 0 or area <= overlap_thresh * int(mask.sum()):
            continue
        segment = of_stuff.get(name)
        if segment is None:
            segment = {
                "id": len(segments) + 1,
                "isthing": name not in stuff_classes,
                "category_id": name,
                "score": float(found.scores[row]),
                "area": 0,
            }
            segments.append(segment)
            if not segment["isthing"]:
                of_stuff[name] = segment
        segment["area"] += area
        seg[free] = segment["id"]
    kept = [s for s in segments if s["area"] >= (min_area if s["isthing"] else stuff_area_limit)]
    numbers = seg.new_zeros(len(segments) + 1)
    for number, segment in enumerate(kept, start=1):
        numbers[segment["id"]] = number
        segment["id"] = number
    return numbers[seg.long()], kept


def stuff_places(stuff: Any, class_names: Sequence[str], panoptic: bool) -> set[int]:
    """The places in a vocabulary of the names whose regions are merged.

    Raises:
        ValueError: they are no list of names, one is not in the vocabulary, or there are some but
            no segments to merge, because ``panoptic`` is False.
    """
    if isinstance(stuff, str | bytes) or not isinstance(stuff, Collection):
        raise ValueError(f"stuff is {stuff!r:.60}; a list of class names is expected.")
    if unknown := [name for name in stuff if name not in class_names]:
        raise ValueError(f"stuff: {unknown[0]!r:.60} is not in the vocabulary; add it there too.")
    if len(stuff) and not panoptic:
        raise ValueError("stuff is given, but panoptic is False: only segments are merged.")
    return {list(class_names).index(name) for name in stuff}


@META_ARCH_REGISTRY.register()
class PanopticRegionSpot(RegionSpot):
    """RegionSpot that needs no proposals: it names every region of an image, pixel by pixel.

    It trains as :class:`RegionSpot` does, and loads the same weights.
    """

    @configurable
    def __init__(
        self, *, search: Search, overlap_thresh: float, stuff_area_limit: int, **regionspot: Any
    ) -> None:
        """
        Args:
            search: how regions are looked for.
            overlap_thresh, stuff_area_limit: see :func:`panoptic_segments`.
            regionspot: see :class:`RegionSpot`.
        """
        super().__init__(**regionspot)
        self.search = search
        self.overlap_thresh = overlap_thresh
        self.stuff_area_limit = stuff_area_limit

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        search, combine = cfg.MODEL.EVERYTHING, cfg.MODEL.PANOPTIC_FPN.COMBINE
        return {
            **super().from_config(cfg),
            "search": Search(
                points_per_side=search.POINTS_PER_SIDE,
                pred_iou_thresh=search.PRED_IOU_THRESH,
                stability_thresh=search.STABILITY_THRESH,
            ),
            "overlap_thresh": combine.OVERLAP_THRESH,
            "stuff_area_limit": combine.STUFF_AREA_LIMIT,
        }

    @torch.no_grad()
    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Finds and names every region.

        Args:
            batched_inputs: as for :class:`RegionSpot`; proposals are ignored. The metadata of
                ``dataset_name`` tells things from stuff.
            detected_instances: must be None.
            do_postprocess: must be True; results have the size ``height``, ``width``.

        Returns:
            Per image ``{"instances": Instances, "panoptic_seg": (Tensor, list)}``, the latter as
            :func:`panoptic_segments` gives it.

        Raises:
            ValueError: the dataset does not say what is stuff, or an argument is not as above.
        """
        if detected_instances is not None or not do_postprocess:
            raise ValueError(
                "PanopticRegionSpot finds regions itself, at the size of the output: "
                "detected_instances must be None and do_postprocess True."
            )
        results = []
        for x, image in zip(
            batched_inputs, input_images(batched_inputs, self.input_format, self.device)
        ):
            encoded = self.encode([image])
            height, width = encoded.image_sizes[0]
            found = name_everything(
                self,
                encoded,
                self._class_names(x),
                self.search,
                with_masks=True,
                score_thresh=self.score_thresh,
                max_regions=self.max_detections if self.max_detections > 0 else None,
                output_size=(int(x.get("height", height)), int(x.get("width", width))),
            )
            segments = panoptic_segments(
                found,
                dataset_stuff_classes(x.get("dataset_name", self.default_dataset)),
                overlap_thresh=self.overlap_thresh,
                stuff_area_limit=self.stuff_area_limit,
            )
            results.append({"instances": found, "panoptic_seg": segments})
        return results
