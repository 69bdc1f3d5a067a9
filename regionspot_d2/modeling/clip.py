"""CLIP-like vision-language models: open_clip's, and those of the clip package."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from open_clip.factory import load_state_dict
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from ..files import explained_weights, fingerprint
from .image_towers import ImageTower, open_clip_tower, openai_tower
from .interfaces import VISION_LANGUAGE_REGISTRY, VisionLanguageModel
from .open_clip_entries import (
    ARCH_KEY,
    WEIGHTS_KEY,
    Entry,
    architecture,
    find_entry,
    find_weights,
    larger_side,
    openai_state_dict,
)

logger = logging.getLogger(__name__)

# OpenAI's 80 templates for ImageNet, with which open_clip evaluates all its models, as format
# strings; and those of the published heads, which add one.
OPEN_TEMPLATES = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
CLIP_TEMPLATES = ("{}.", *OPEN_TEMPLATES)

TEXTS_AT_A_TIME = 256
_TOKENIZER = Lock()


class ClipModel(VisionLanguageModel):
    """What open_clip's models and the clip package's have in common."""

    # Set in __init__, the last two by subclasses.
    model: Any
    pixel_mean: Tensor
    pixel_std: Tensor
    image_dim = text_dim = num_prefix_tokens = 0
    image_size = grid_size = (0, 0)
    templates: tuple[str, ...] = ()
    _view_tower: Callable[[nn.Module, tuple[int, int]], ImageTower]
    _encode_options: dict[str, bool] = {}

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
        interpolation: str | None = None,
        arch: str = "",
    ) -> None:
        """
        Args:
            model: a CLIP with an image tower ``visual``, ``encode_text`` and ``logit_scale``.
            tokenizer: called with a list of texts and optionally ``context_length``, gives token
                ids (texts, context_length); longer texts are cut.
            image_size: (H, W) of the images that the image tower takes.
            pixel_mean, pixel_std: of RGB values in 0..1.
            interpolation: "bilinear" or "bicubic", with antialiasing; None is bilinear without,
                as the published heads were trained.
            arch: name of the architecture, for ``identity``.
        """
        super().__init__()
        self.identity = f"CLIP {arch.removesuffix('-quickgelu')}".strip()
        self.interpolation = interpolation
        self.resizes_plainly = interpolation is None
        self.model = model.float()
        self.tokenizer = tokenizer
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.templates = tuple(templates)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self._tower = self._view_tower(self.model.visual, self.image_size)
        self.image_dim = self._tower.width
        self.grid_size = self._tower.grid_size
        self.num_prefix_tokens = self._tower.num_prefix_tokens
        self.freeze()
        self.text_dim = self.encode_text(["a"]).shape[1]

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        return self.model.logit_scale.reshape(())  # some models of open_clip have it as (1,)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        named = self.model.named_parameters()
        weights = [(n, p) for n, p in named if not n.startswith(("visual.", "logit_"))]
        # What the weights do not show counts too: the activation, the number of heads.
        modules = [x for x in self.model.named_modules() if not x[0].startswith("visual")]
        parts = [f"{n} {type(m).__name__} {vars(m).get('num_heads', '')}" for n, m in modules]
        return f"{type(self).__name__}-{fingerprint(weights, *parts)[:16]}"

    def preprocess_images(self, images: list[Tensor]) -> Tensor:
        """Squashes images to float (B, 3, *image_size) and normalizes them.

        Without an ``interpolation`` there is no antialiasing: the published heads were trained on
        images made in this way, not in CLIP's own. Raises ValueError if an image is empty or not
        (3, H, W).
        """
        mode, smooth = self.interpolation or "bilinear", self.interpolation is not None
        pixels = self.pixel_mean.new_empty(len(images), 3, *self.image_size)
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
                raise ValueError(
                    f"Image {index} has the shape {tuple(image.shape)}; RGB (3, H, W) is expected."
                )
            image = image.to(pixels.device).float()[None]
            resized = F.interpolate(
                image, size=self.image_size, mode=mode, align_corners=False, antialias=smooth
            )
            pixels[index] = resized[0].clamp(0, 255) if smooth else resized[0]
        return (pixels / 255 - self.pixel_mean) / self.pixel_std

    def forward(self, images: list[Tensor]) -> Tensor:
        if images:
            return self._tower.tokens(self.preprocess_images(images))
        length = self.num_prefix_tokens + math.prod(self.grid_size)
        return self.pixel_mean.new_zeros(0, length, self.image_dim)

    def layers_to_compile(self) -> list[nn.Module]:
        # Not those of the text side, which runs once for a vocabulary.
        return self._tower.layers()

    def project(self, image_tokens: Tensor) -> Tensor:
        return self._tower.project(image_tokens)

    def embed_images(self, images: list[Tensor]) -> Tensor:
        # As the model itself pools: by its class token, or by attention (ResNets, SigLIP).
        if not images:
            return self.pixel_mean.new_zeros(0, self.text_dim)
        pixels = self.preprocess_images(images)
        return self.model.encode_image(pixels, **self._encode_options)

    def encode_text(self, texts: list[str]) -> Tensor:
        # Always in full precision: the embeddings are kept, on disk too.
        with torch.autocast(self.pixel_mean.device.type, enabled=False):
            starts = range(0, len(texts), TEXTS_AT_A_TIME)
            batches = [self._tokenize(texts[i : i + TEXTS_AT_A_TIME]) for i in starts]
            embeddings = [self.model.encode_text(x, **self._encode_options) for x in batches]
        return torch.cat(embeddings) if embeddings else self.pixel_mean.new_zeros(0, self.text_dim)

    def _tokenize(self, texts: list[str]) -> Tensor:
        # The fast tokenizers of transformers change their own settings, and refuse a second thread.
        with _TOKENIZER:
            return self._token_ids(texts).to(self.pixel_mean.device)

    def _token_ids(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts)
        length = tokens.shape[1]
        # The tokenizers cut silently, then put the end token last. A text that fills its row is
        # tokenized again with one more place: its last token changes only if it was cut.
        full = tokens[:, -1].nonzero().flatten().tolist()
        if full:
            longer = self.tokenizer([texts[i] for i in full], context_length=length + 1)
            for i, last in zip(full, longer[:, length - 1].tolist()):
                if tokens[i, -1] != last:
                    raise ValueError(
                        f"A text has more than the {length} tokens that this model reads: "
                        f"'{texts[i][:60]}...'. Use a shorter name."
                    )
        return tokens


@VISION_LANGUAGE_REGISTRY.register()
class OpenClip(ClipModel):
    """Models of open_clip that have a grid of image tokens: ViTs, CLIP's ResNets, timm's.

    ``MODEL.VISION_LANGUAGE.ARCH`` and ``WEIGHTS`` are as for
    :func:`~.open_clip_entries.find_entry`. OpenAI's weights need QuickGELU. Their TorchScript
    archives, and tags and URLs that open_clip lists with it, get it whatever the name says; for
    other files of such weights, name the architecture that ends in "-quickgelu".
    """

    _view_tower = staticmethod(open_clip_tower)
    _encode_options = {"normalize": False}  # CoCa normalizes unless told not to

    @property
    def logit_bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.model.logit_bias
        return None if bias is None else bias.reshape(())

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        settings = cfg.MODEL.VISION_LANGUAGE
        entry = find_entry(settings.ARCH, settings.WEIGHTS)
        published, tokenizer = entry.settings, _tokenizer(entry)
        side = larger_side(entry.short_name, entry.config, settings.IMAGE_SIZE)
        with _explained(entry.weights, entry.name):
            if not entry.comes_whole and (state := openai_state_dict(entry.weights)):
                vision = {**entry.config["vision_cfg"], **({"image_size": side} if side else {})}
                options = {**entry.config, "vision_cfg": vision, "quick_gelu": True}
                model = open_clip.CLIP(**options)
                if side:
                    state = {key: each.float() for key, each in state.items()}
                    resize_pos_embed(state, model)
                model.load_state_dict(state)
            else:
                model = open_clip.create_model(
                    entry.name,
                    pretrained=entry.pretrained,
                    pretrained_text=False,
                    require_pretrained=entry.comes_whole,
                    force_quick_gelu=published.get("quick_gelu", False),
                    force_image_size=side,
                    cache_dir=entry.cache,
                    weights_only=True,
                )
        return {
            "model": model,
            "tokenizer": tokenizer,
            "image_size": model.visual.image_size,
            "pixel_mean": published["mean"],
            "pixel_std": published["std"],
            "interpolation": published["interpolation"],
            "templates": CLIP_TEMPLATES if published["interpolation"] is None else OPEN_TEMPLATES,
            "arch": entry.short_name,
        }


@VISION_LANGUAGE_REGISTRY.register()
class OpenAIClip(ClipModel):
    """OpenAI's models by the clip package, always with QuickGELU; ``ARCH`` as for OpenClip."""

    _view_tower = staticmethod(openai_tower)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        try:
            import clip
            from clip.model import CLIP
        except ImportError as error:
            raise ImportError(
                "MODEL.VISION_LANGUAGE.NAME OpenAIClip needs the clip package "
                f"(pip install clip-anytorch): {error}. OpenClip gives the same without it."
            ) from error
        name, config = architecture(cfg.MODEL.VISION_LANGUAGE.ARCH)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if cfg.MODEL.VISION_LANGUAGE.IMAGE_SIZE:
            raise ValueError(
                "MODEL.VISION_LANGUAGE.IMAGE_SIZE is "
                f"{cfg.MODEL.VISION_LANGUAGE.IMAGE_SIZE}, which only OpenClip can use."
            )
        beyond = set(vision) - {"image_size", "layers", "width", "patch_size"}
        if beyond or config.get("custom_text"):
            raise ValueError(
                f"{ARCH_KEY} is '{name}', which the clip package cannot build: it has "
                f"{', '.join(clip.available_models())}. For others use OpenClip."
            )
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
        weights, _ = find_weights(name, cfg.MODEL.VISION_LANGUAGE.WEIGHTS)
        if weights is not None:
            with _explained(weights, name):
                state = openai_state_dict(weights) or load_state_dict(str(weights))
                model.load_state_dict(state)
        tokenizer = partial(clip.tokenize, truncate=True)
        size = vision["image_size"]
        return {"model": model, "tokenizer": tokenizer, "image_size": size, "arch": name}


def _tokenizer(entry: Entry) -> Callable[..., Tensor]:
    options: dict[str, Any] = {}
    if entry.comes_whole:
        options["cache_dir"] = entry.cache
        if entry.config["text_cfg"].get("hf_tokenizer_name"):
            # Whatever the config of the repository says; transformers would run its code.
            options["trust_remote_code"] = False
    try:
        return open_clip.get_tokenizer(entry.name, **options)
    except ImportError as error:
        raise ImportError(
            f"{ARCH_KEY} is '{entry.name}', whose tokenizer needs: pip install {error.name}"
        ) from error


def _explained(weights: Path | None, name: str) -> AbstractContextManager[None]:
    what = f"weights of {name} ({WEIGHTS_KEY} and ARCH must match)"
    return nullcontext() if weights is None else explained_weights(weights, what)
