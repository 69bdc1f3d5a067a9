"""CLIP and its kind as vision-language models: open_clip's, and those of the clip package."""

from __future__ import annotations

import difflib
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from open_clip.factory import load_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn

from ..files import fingerprint, local_weights
from .image_towers import image_tower
from .interfaces import VISION_LANGUAGE_REGISTRY, VisionLanguageModel

logger = logging.getLogger(__name__)

# "{}." and OpenAI's 80 templates for ImageNet, as format strings.
CLIP_TEMPLATES = ("{}.", *(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES))

_WEIGHTS_KEY = "MODEL.VISION_LANGUAGE.WEIGHTS"
_ARCH_KEY = "MODEL.VISION_LANGUAGE.ARCH"
_TEXTS_AT_A_TIME = 256


class ClipModel(VisionLanguageModel):
    """What open_clip's models and the clip package's have in common."""

    # Set in __init__.
    model: Any
    pixel_mean: Tensor
    pixel_std: Tensor
    image_dim = text_dim = num_prefix_tokens = 0
    image_size = grid_size = (0, 0)
    templates: tuple[str, ...] = ()
    # The transformers of the clip package give (L, B, W).
    _sequence_first = False

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        image_size: int | tuple[int, int],
        pixel_mean: Sequence[float] = open_clip.OPENAI_DATASET_MEAN,
        pixel_std: Sequence[float] = open_clip.OPENAI_DATASET_STD,
        templates: Sequence[str] = CLIP_TEMPLATES,
    ) -> None:
        """
        Args:
            model: a CLIP with an image tower ``visual``, ``encode_text`` and ``logit_scale``.
            tokenizer: called with a list of texts and optionally ``context_length``, gives token
                ids (texts, context_length); longer texts are cut.
            image_size: height and width of the images that the image tower takes.
            pixel_mean, pixel_std: of RGB values in 0..1.
            templates: prompt templates that suit the text side.
        """
        super().__init__()
        self.model = model.float()
        self.tokenizer = tokenizer
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.templates = tuple(templates)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self._tower = image_tower(
            self.model.visual, self.image_size, sequence_first=self._sequence_first
        )
        self.image_dim = self._tower.width
        self.grid_size = self._tower.grid_size
        self.num_prefix_tokens = self._tower.num_prefix_tokens
        self.freeze()
        self.text_dim = self.encode_text(["a"]).shape[1]

    @property
    def logit_scale(self) -> Tensor:
        # Some models of open_clip keep it with shape (1,).
        return self.model.logit_scale.reshape(())

    @cached_property
    def fingerprint(self) -> str:
        weights = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if not name.startswith(("visual.", "logit_"))
        ]
        # What the weights do not show counts too: the activation, the number of heads.
        parts = [
            f"{name} {type(module).__name__} {vars(module).get('num_heads', '')}"
            for name, module in self.model.named_modules()
            if not name.startswith("visual")
        ]
        return f"{type(self).__name__}-{fingerprint(weights, *parts)[:16]}"

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess_images(self, images: list[Tensor]) -> Tensor:
        """Squashes images to the model's size, without antialiasing, and normalizes them.

        The published heads were trained on images made in this way, not in CLIP's own.

        Args:
            images: as for :meth:`forward`.

        Returns:
            Float images (B, 3, *image_size) on the model's device.

        Raises:
            ValueError: an image has another shape or is empty.
        """
        pixels = self.pixel_mean.new_empty(len(images), 3, *self.image_size)
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
                raise ValueError(
                    f"Image {index} has the shape {tuple(image.shape)}; RGB (3, H, W) is expected."
                )
            pixels[index] = F.interpolate(
                image.to(self.device).float()[None],
                size=self.image_size,
                mode="bilinear",
                align_corners=False,
            )[0]
        return (pixels / 255 - self.pixel_mean) / self.pixel_std

    def forward(self, images: list[Tensor]) -> Tensor:
        if not images:
            rows, columns = self.grid_size
            return self.pixel_mean.new_zeros(
                0, self.num_prefix_tokens + rows * columns, self.image_dim
            )
        return self._tower.tokens(self.preprocess_images(images))

    def project(self, image_tokens: Tensor) -> Tensor:
        return self._tower.project(image_tokens)

    def encode_text(self, texts: list[str]) -> Tensor:
        # Always in full precision: the embeddings are kept, on disk too.
        with torch.autocast(self.device.type, enabled=False):
            embeddings = [
                self._encode_tokens(self._tokenize(texts[start : start + _TEXTS_AT_A_TIME]))
                for start in range(0, len(texts), _TEXTS_AT_A_TIME)
            ]
        return torch.cat(embeddings) if embeddings else self.pixel_mean.new_zeros(0, self.text_dim)

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)

    def _tokenize(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts)
        length = tokens.shape[1]
        # The tokenizers cut in silence, and end the rest. A text that fills its row is looked at
        # again with one more place: only if it was cut, its last token changes.
        full = tokens[:, -1].nonzero().flatten().tolist()
        if full:
            longer = self.tokenizer([texts[i] for i in full], context_length=length + 1)
            for i, last in zip(full, longer[:, length - 1].tolist()):
                if tokens[i, -1] != last:
                    raise ValueError(
                        f"A text has more than the {length} tokens that this model reads: "
                        f"'{texts[i][:60]}...'. Use a shorter name."
                    )
        return tokens.to(self.device)


@VISION_LANGUAGE_REGISTRY.register()
class OpenClip(ClipModel):
    """Models of open_clip that have a grid of image tokens: ViTs, CLIP's ResNets, timm's.

    ``MODEL.VISION_LANGUAGE.ARCH`` is open_clip's name of the architecture, or OpenAI's
    ("ViT-L/14@336px"). OpenAI's weights want the activation QuickGELU. Their own files (TorchScript
    archives) are recognized and get it whatever the name says, and so do URLs that open_clip lists
    with it. For any other file of such weights, name the architecture that ends in "-quickgelu".
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        source = cfg.MODEL.VISION_LANGUAGE.WEIGHTS
        name, config = _architecture(cfg.MODEL.VISION_LANGUAGE.ARCH)
        try:
            tokenizer = open_clip.get_tokenizer(name)
        except ImportError as error:
            raise ImportError(
                f"{_ARCH_KEY} is '{name}', whose tokenizer needs a package that is not installed: "
                f"pip install {error.name}"
            ) from error
        weights = local_weights(source, _WEIGHTS_KEY)
        published = _published(name, source)
        with _explained_errors(name, weights):
            if weights is not None and _is_torchscript(weights):
                model = open_clip.CLIP(**{**config, "quick_gelu": True})
                model.load_state_dict(_torchscript_state_dict(weights))
            else:
                model = open_clip.create_model(
                    name,
                    pretrained=None if weights is None else str(weights),
                    pretrained_text=False,
                    force_quick_gelu=published.get("quick_gelu", False),
                )
        return {
            "model": model,
            "tokenizer": tokenizer,
            "image_size": model.visual.image_size,
            "pixel_mean": published["mean"],
            "pixel_std": published["std"],
        }

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        # CoCa normalizes unless told not to.
        return self.model.encode_text(tokens, normalize=False)


@VISION_LANGUAGE_REGISTRY.register()
class OpenAIClip(ClipModel):
    """OpenAI's models by the clip package, always with QuickGELU.

    ``MODEL.VISION_LANGUAGE.ARCH`` is OpenAI's name of the architecture or open_clip's.
    """

    _sequence_first = True

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        try:
            import clip
            from clip.model import CLIP
        except ImportError as error:
            raise ImportError(
                "MODEL.VISION_LANGUAGE.NAME is OpenAIClip, which needs the clip package "
                f"(pip install clip-anytorch): {error}. OpenClip gives the same without it."
            ) from error
        name, config = _architecture(cfg.MODEL.VISION_LANGUAGE.ARCH)
        vision, text = config["vision_cfg"], config["text_cfg"]
        beyond = set(vision) - {"image_size", "layers", "width", "patch_size"}
        if beyond or config.get("custom_text"):
            raise ValueError(
                f"{_ARCH_KEY} is '{name}', which the clip package cannot build: it has "
                f"{', '.join(clip.available_models())}. For others use OpenClip."
            )
        weights = local_weights(cfg.MODEL.VISION_LANGUAGE.WEIGHTS, _WEIGHTS_KEY)
        layers = vision["layers"]
        model = CLIP(
            embed_dim=config["embed_dim"],
            image_resolution=vision["image_size"],
            vision_layers=tuple(layers) if isinstance(layers, list) else layers,
            vision_width=vision["width"],
            vision_patch_size=vision.get("patch_size"),
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            transformer_width=text["width"],
            transformer_heads=text["heads"],
            transformer_layers=text["layers"],
        )
        if weights is not None:
            with _explained_errors(name, weights):
                if _is_torchscript(weights):
                    model.load_state_dict(_torchscript_state_dict(weights))
                else:
                    model.load_state_dict(load_state_dict(str(weights)))
        return {
            "model": model,
            "tokenizer": partial(clip.tokenize, truncate=True),
            "image_size": vision["image_size"],
        }


def _architecture(arch: str) -> tuple[str, dict[str, Any]]:
    """open_clip's name and config of an architecture, from its own name or OpenAI's."""
    name = arch.replace("/", "-").replace("@", "-").removesuffix("px")
    config = open_clip.get_model_config(name)
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=5)
        raise ValueError(
            f"{_ARCH_KEY} is '{arch}', which open_clip does not have. "
            + (f"Did you mean {', '.join(close)}?" if close else "See open_clip.list_models().")
        )
    return name, config


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _torchscript_state_dict(path: Path) -> dict[str, Tensor]:
    state = torch.jit.load(path, map_location="cpu").state_dict()
    # Numbers that OpenAI keeps among the weights.
    beside = ("input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in state.items() if key not in beside}


@contextmanager
def _explained_errors(name: str, weights: Path | None) -> Iterator[None]:
    """Turns the many errors of a file that holds something else into one that says so."""
    try:
        yield
    except Exception as error:
        if weights is None:
            raise
        reason = "\n".join(str(error).splitlines()[:4])
        raise ValueError(
            f"{_WEIGHTS_KEY}: {weights} does not hold weights of {name} ({_ARCH_KEY}): "
            f"{type(error).__name__}: {reason}"
        ) from error


def _published(name: str, source: str) -> dict[str, Any]:
    """What open_clip knows of an architecture's published weights.

    Args:
        name: open_clip's name of the architecture.
        source: where the weights come from: a file, a URL or "".

    Returns:
        Its entry for these weights if the URL tells, with their mean, std and quick_gelu. Otherwise
        mean and std alone: what all entries agree on, or else OpenAI's.
    """
    entries = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    for entry in entries:
        hub = "/".join(entry.get("hf_hub", "").split("/")[:2])
        if source and (source == entry.get("url") or (hub and f"/{hub}/" in source)):
            return entry
    statistics = {(entry["mean"], entry["std"]) for entry in entries}
    if len(statistics) > 1:
        logger.warning(
            "Weights of %s were trained with different pixel means; OpenAI's are used", name
        )
    openai = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = statistics.pop() if len(statistics) == 1 else openai
    return {"mean": mean, "std": std}
