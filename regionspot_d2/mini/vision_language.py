"""The mini vision-language model: an ImageNet classifier whose answers lie in CLIP's text space."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..modeling.interfaces import VISION_LANGUAGE_REGISTRY, VisionLanguageModel
from .classifier import DenseEfficientNetLite
from .text_vectors import TextVectors

_IMAGENET_NAMES = Path(__file__).with_name("imagenet_names.json")
# A larger side finds smaller objects; time grows with its square.
_SIDE = 448
# Softness of the classifier's answers and how many of them count, chosen by zero-shot accuracy on
# COCO boxes.
_TEMPERATURE = 2.0
_CLASSES_PER_CELL = 50
# The classifier's largest logit in a cell of a photo, on average; see imagenet_text_vectors.
_USUAL_LOGIT = 5.0
# Length of ImageNet's names in text space, relative to its classes. At 1 they take two in three of
# the package photos' boxes from LVIS's names; at 0.6 they take 3 %, and accuracy stays.
_WORD_LENGTH = 0.6
# These bring all parts of an image token to a standard deviation of about 1.
_CONSE_SCALE = 150.0
_FEATURE_SCALES = (0.4, 0.2, 0.1)
# With the mean vector of all names subtracted, cosines spread five times wider than CLIP's own,
# whose factor is 100.
_LOGIT_SCALE = math.log(20)


@VISION_LANGUAGE_REGISTRY.register()
class MiniVisionLanguage(VisionLanguageModel):
    """A small stand-in for CLIP, for trying, testing and teaching. It is not CLIP.

    Images: EfficientNet-Lite2 classifies each cell of the image, and the CLIP text vectors of its
    ImageNet classes are averaged, weighted by their probabilities ("ConSE", Norouzi et al., ICLR
    2014, per cell). An image token is that average followed by the features of the classifier's
    last blocks at three resolutions. Text: CLIP ViT-B/32's vectors of the names of LVIS, COCO,
    Objects365 and OpenImages; the names of ImageNet lie where their images do, see
    :func:`imagenet_text_vectors`; for others a known name may stand in, see :meth:`known_names`.

    ``MODEL.VISION_LANGUAGE.ARCH`` and ``.WEIGHTS`` are ignored: models and weights are those of
    pinned packages.

    Attributes:
        token_parts: widths of the parts of an image token; the first part lies in text space.
    """

    num_prefix_tokens = 0
    templates = ("{}",)
    # Set in __init__.
    image_dim = text_dim = 0
    image_size = grid_size = (0, 0)
    fingerprint = ""
    class_vectors: Tensor
    _logit_scale: Tensor

    @configurable
    def __init__(
        self, *, classifier: Any, class_vectors: Tensor, text_vectors: TextVectors, side: int
    ) -> None:
        """
        Args:
            classifier: a :class:`DenseEfficientNetLite`, or a module with its interface.
            class_vectors: (K, D), the classifier's classes in text space; zeros for a class that
                has no place there.
            text_vectors: embeds names.
            side: height and width of the images that ``classifier`` takes.
        """
        super().__init__()
        self.classifier = classifier
        self.text_vectors = text_vectors
        self.register_buffer("class_vectors", class_vectors, persistent=False)
        self.register_buffer("_logit_scale", torch.tensor(_LOGIT_SCALE), persistent=False)
        self.text_dim = class_vectors.shape[1]
        self.token_parts = (self.text_dim, *classifier.feature_dims)
        self.image_dim = sum(self.token_parts)
        self.image_size = (side, side)
        self.grid_size = (side // classifier.stride, side // classifier.stride)
        self.fingerprint = f"{type(self).__name__}-{text_vectors.fingerprint}"
        self.freeze()

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        return self._logit_scale

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        classifier = DenseEfficientNetLite(_SIDE)
        text_vectors = TextVectors.from_package()
        class_vectors = imagenet_vectors(text_vectors)
        words = imagenet_text_vectors(classifier.ideal_logits(_USUAL_LOGIT), class_vectors)
        return {
            "classifier": classifier,
            "class_vectors": class_vectors,
            "text_vectors": text_vectors.extended(imagenet_names(), words + text_vectors.mean),
            "side": _SIDE,
        }

    def forward(self, images: list[Tensor]) -> Tensor:
        rows, columns = self.grid_size
        if not images:
            return self.class_vectors.new_zeros(0, rows * columns, self.image_dim)
        features, logits = self.classifier(torch.stack([self._squash(image) for image in images]))
        coarse = self.to_text_space(logits.flatten(2).transpose(1, 2)) * _CONSE_SCALE
        conse = coarse.transpose(1, 2).unflatten(2, logits.shape[2:])
        parts = [F.interpolate(conse, self.grid_size)]
        parts += [part * scale for part, scale in zip(features, _FEATURE_SCALES)]
        return torch.cat([part.flatten(2) for part in parts], dim=1).transpose(1, 2)

    def project(self, image_tokens: Tensor) -> Tensor:
        return image_tokens[..., : self.text_dim]

    def appearance(self, image_tokens: Tensor) -> Tensor:
        # Guesses of classes blur the outlines that the features see.
        return image_tokens[..., self.text_dim :]

    def known_names(self, texts: list[str]) -> list[str]:
        return self.text_vectors.known_names(texts)

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.text_vectors(texts).to(self.logit_scale.device)

    def _squash(self, image: Tensor) -> Tensor:
        image = image.to(self.logit_scale.device, self.class_vectors.dtype)[None]
        return F.interpolate(
            image, self.image_size, mode="bilinear", align_corners=False, antialias=True
        )[0]

    def to_text_space(self, logits: Tensor) -> Tensor:
        """Brings class logits (..., K) into text space: (..., D), not normalized."""
        return _to_text_space(logits, self.class_vectors)


def _to_text_space(logits: Tensor, class_vectors: Tensor) -> Tensor:
    probabilities = (logits / _TEMPERATURE).softmax(-1)
    top, classes = probabilities.topk(min(_CLASSES_PER_CELL, logits.shape[-1]))
    top = top / top.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, classes, top) @ class_vectors


def _imagenet_table() -> list[dict[str, Any]]:
    with PathManager.open(str(_IMAGENET_NAMES)) as file:
        return json.load(file)


def imagenet_names() -> list[list[str]]:
    """Each class of ImageNet, in the classifier's order: its name, then WordNet's other names.

    Class names are those of open_clip. WordNet's one-word names with a more common meaning ("ear"
    for a corn cob, "head" for a promontory) are left out.
    """
    return [[row["class"], *row.get("synonyms", [])] for row in _imagenet_table()]


def imagenet_vectors(text_vectors: TextVectors) -> Tensor:
    """The place of each ImageNet class in text space.

    The mean vector of all names is subtracted. A box holds many half-right guesses, whose average
    comes close to that mean and hence to the names nearest to it; what is left tells names apart.

    Returns:
        (1000, dim), zeros for the few classes (mostly scenes) that no name stands for.
    """
    table = _imagenet_table()
    vectors = torch.zeros(len(table), text_vectors.dim)
    for vector, row in zip(vectors, table):
        if row["names"]:
            weights = torch.tensor(list(row["names"].values()))
            mixed = weights @ text_vectors(list(row["names"]))
            vector.copy_(F.normalize(mixed, dim=0) - text_vectors.mean)
    return vectors


def imagenet_text_vectors(ideal_logits: Tensor, class_vectors: Tensor) -> Tensor:
    """The places of ImageNet's class names, as words of a vocabulary, in text space.

    :func:`imagenet_vectors` puts every breed at "dog". As a word, each breed lies where an image
    of it would: at the mixture of kinds that the classifier's answers to such an image make. That
    is close to "dog" and nowhere the same for two breeds. Scenes, which are no kind of anything
    known, lie among what the classifier takes them for. All are shorter than the vectors of names
    with a text embedding: where "dog" and a breed fit equally well, "dog" wins.

    Args:
        ideal_logits: (K, K), the classifier's answers to one image of each class.
        class_vectors: (K, D), from :func:`imagenet_vectors`.

    Returns:
        (K, D), the mean vector of all names subtracted.
    """
    lengths = class_vectors.norm(dim=1)
    length = _WORD_LENGTH * lengths[lengths > 0].mean()
    return F.normalize(_to_text_space(ideal_logits, class_vectors), dim=1) * length
