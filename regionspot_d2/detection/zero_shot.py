"""transformers' zero-shot detectors: Grounding DINO, MM-Grounding-DINO, LLMDet, OWL-ViT, OWLv2."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.layers import nms
from torch import Tensor, nn

from ..files import WeightsNotFoundError
from ..modeling.vocabulary import check_names, clean_name
from .interface import Detected, RegionDetector


class ZeroShotDetector(RegionDetector):
    """A detector that is told the names of what it shall find, in chunks below its text limit.

    A subclass runs the model.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        class_names: Sequence[str],
        *,
        score_thresh: float,
        nms_thresh: float = 0.7,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            model: a zero-shot detector of transformers.
            processor: of the model.
            class_names: what it shall find.
            score_thresh: boxes with a lower score are dropped.
            nms_thresh: of boxes with a larger IoU, whatever their names, the best is left: each
                chunk of names finds the same objects again, and RegionSpot needs them once.
            device: where it runs.

        Raises:
            ValueError: there are no names, or one is empty.
        """
        check_names(class_names, repeats=True)
        self.model: Any = model.eval().to(device)
        self.processor = processor
        self.class_names = list(class_names)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.device = device

    @abstractmethod
    def chunks(self, pixels: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Runs the model on a preprocessed image, with one chunk of the names after another.

        Returns:
            Boxes (Q, 4), XYXY in 0..1 of :meth:`frame`; scores (Q, n) of the n names of the chunk;
            and the place of the first of them in ``class_names``.
        """

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """(W, H) of what the boxes are relative to, in pixels of the image."""
        return width, height

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Detected:
        # PyTorch warns of arrays that are read-only, and the copy is in order.
        image = np.array(image, order="C")
        pixels = self.processor.image_processor(images=image, return_tensors="pt").to(self.device)
        height, width = image.shape[:2]
        found = []
        for boxes, all_scores, start in self.chunks(pixels):
            scores, places = all_scores.max(1)
            good = scores >= self.score_thresh
            found.append((boxes[good], scores[good], places[good] + start))
        boxes, scores, places = (torch.cat(column).cpu() for column in zip(*found))
        boxes = boxes * torch.tensor([*self.frame(width, height)] * 2)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores, places = boxes[inside], scores[inside], places[inside]
        kept = nms(boxes, scores, self.nms_thresh)
        names = [self.class_names[place] for place in places[kept].tolist()]
        return Detected(boxes[kept].numpy(), scores[kept].numpy(), names)


class GroundingDetector(ZeroShotDetector):
    """Grounding DINO and its kin, which read names as one sentence: "cat. traffic light."

    A name's score is the mean over its tokens, as in their evaluations on COCO and LVIS. A name
    that is longer than the whole text may be is cut.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        tokenizer = self.processor.tokenizer
        # These part the names, so none may stand within one.
        self._stop, question = tokenizer.convert_tokens_to_ids([".", "?"])
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        parting = {self._stop, question, first, last}
        limit = self.model.config.max_text_len - 3
        self._prompts: list[tuple[int, list[int], list[slice]]] = []
        tokens, spans = [first], list[slice]()
        for place, name in enumerate(self.class_names):
            text = clean_name(name).lower()
            ids = [i for i in tokenizer(text, add_special_tokens=False).input_ids]
            ids = [i for i in ids if i not in parting][:limit] or [tokenizer.unk_token_id]
            if len(tokens) + len(ids) + 2 > self.model.config.max_text_len:
                self._prompts.append((place - len(spans), [*tokens, last], spans))
                tokens, spans = [first], []
            spans.append(slice(len(tokens), len(tokens) + len(ids)))
            tokens += [*ids, self._stop]
        self._prompts.append((len(self.class_names) - len(spans), [*tokens, last], spans))

    def chunks(self, pixels: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
        for start, tokens, spans in self._prompts:
            ids = torch.tensor([tokens], device=self.device)
            output = self.model(**pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
            scores = output.logits[0].sigmoid()
            scores = torch.stack([scores[:, span].mean(1) for span in spans], dim=1)
            yield _corners(output.pred_boxes[0]), scores, start


class OwlDetector(ZeroShotDetector):
    """OWL-ViT and OWLv2, for which each name is a text of its own; longer ones are cut.

    Image and names are encoded apart: the names once, each image once.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        limit = self.model.config.text_config.max_position_embeddings
        encoded = self.processor.tokenizer(
            [f"a photo of a {clean_name(name)}" for name in self.class_names],
            padding="max_length",
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(self.device)
        with torch.no_grad():
            parts = [
                self.model.base_model.get_text_features(ids, mask).pooler_output
                for ids, mask in zip(encoded.input_ids.split(64), encoded.attention_mask.split(64))
            ]
        self._queries = torch.cat(parts)

    def frame(self, width: int, height: int) -> tuple[int, int]:
        if self.model.config.model_type == "owlvit":
            return width, height
        return max(width, height), max(width, height)  # it pads images to a square

    def chunks(self, pixels: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
        features, _ = self.model.image_embedder(pixels["pixel_values"])
        cells = features.flatten(1, 2)
        logits, _ = self.model.class_predictor(cells, self._queries[None])
        boxes = self.model.box_predictor(cells, features)
        yield _corners(boxes[0]), logits[0].sigmoid(), 0


def _corners(boxes: Tensor) -> Tensor:
    """(R, 4) centers and sizes -> corners."""
    center, size = boxes.chunk(2, dim=1)
    return torch.cat([center - size / 2, center + size / 2], dim=1)


# Of each type of model: what runs it, and the score below which its authors drop boxes.
_KINDS: dict[str, tuple[type[ZeroShotDetector], float]] = {
    "grounding-dino": (GroundingDetector, 0.25),
    "mm-grounding-dino": (GroundingDetector, 0.25),
    "owlv2": (OwlDetector, 0.1),
    "owlvit": (OwlDetector, 0.1),
}


def load_zero_shot_detector(
    name: str, weights: str | None, class_names: Sequence[str], device: torch.device | str
) -> RegionDetector:
    """Builds the detector of a name on the Hugging Face hub, or of a folder; runs none of its code.

    The arguments are those of :func:`~regionspot_d2.detection.build_detector`.
    """
    name = os.path.expanduser(name)
    if weights:
        raise ValueError("its weights come with it; leave out --detector-weights.")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "zero-shot detectors need the transformers package: pip install transformers"
        ) from error
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(name)
        if not config:  # of a folder without a config.json
            raise OSError
        kind = config.get("model_type")
        if kind not in _KINDS:
            raise ValueError(f"a model of type '{kind}'; one of {', '.join(_KINDS)} is expected.")
        detector_class, score_thresh = _KINDS[kind]
        model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False
        )
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except OSError as error:  # transformers explains it in a paragraph
        raise WeightsNotFoundError(
            f"no detector in the folder or on the hub under '{name}'. Give the name of one on the "
            "hub, such as 'IDEA-Research/grounding-dino-tiny', or a folder with its config.json, "
            "weights and processor."
        ) from error
    return detector_class(model, processor, class_names, score_thresh=score_thresh, device=device)
