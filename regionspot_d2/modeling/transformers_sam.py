"""SAM and its successors, as the transformers package has them, as localizers."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..files import WeightsNotFoundError
from .interfaces import LOCALIZER_REGISTRY
from .square import SquareLocalizer

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class _Encoded(NamedTuple):
    """What a model knows of an image: (1, C, h, w), and the finer maps that only masks need."""

    image: Tensor
    details: tuple[Tensor, ...] = ()


class _Sam:
    """What ``SamModel`` does in its own way. Nothing is copied, so threads may share it."""

    squashed = False
    statistics = _IMAGENET
    first_mask_token = 1

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def side(self) -> int:
        return self.model.prompt_encoder.input_image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.prompt_encoder.image_embedding_size

    def encode(self, pixels: Tensor) -> list[_Encoded]:
        """Encodes preprocessed images (B, 3, side, side)."""
        return [_Encoded(image) for image in self.model.get_image_embeddings(pixels).split(1)]

    def output_tokens(self) -> Tensor:
        """The decoder's own tokens, which stand before those of the prompts: (N, C)."""
        decoder = self.model.mask_decoder
        return torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])

    def decoder_options(self, encoded: _Encoded, batch: int) -> dict[str, Any]:
        """Further arguments of the decoder, for a batch of copies of one image."""
        return {}


class _SamHQ(_Sam):
    """``SamHQModel``: one more token, and masks that look at the first global block's output."""

    def encode(self, pixels: Tensor) -> list[_Encoded]:
        images, blocks = self.model.get_image_embeddings(pixels)
        return [_Encoded(*each) for each in zip(images.split(1), zip(blocks[0].split(1)))]

    def output_tokens(self) -> Tensor:
        return torch.cat([super().output_tokens(), self.model.mask_decoder.hq_token.weight])

    def decoder_options(self, encoded: _Encoded, batch: int) -> dict[str, Any]:
        return {"hq_token_only": False, "intermediate_embeddings": list(encoded.details)}


class _Sam2(_Sam):
    """``Sam2Model`` and its kin: squashed images, a token for whether there is an object."""

    squashed = True
    first_mask_token = 2

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # It may put one of the three masks for vague prompts in place of the one whose token this
        # is. A region's token would then depend on a threshold.
        model.mask_decoder.dynamic_multimask_via_stability = False

    def encode(self, pixels: Tensor) -> list[_Encoded]:
        *details, images = (x.split(1) for x in self.model.get_image_embeddings(pixels))
        return [_Encoded(image, tuple(fine)) for image, *fine in zip(images, *details)]

    def output_tokens(self) -> Tensor:
        return torch.cat([self.model.mask_decoder.obj_score_token.weight, super().output_tokens()])

    def decoder_options(self, encoded: _Encoded, batch: int) -> dict[str, Any]:
        details = [each.expand(batch, -1, -1, -1) for each in encoded.details]
        return {"high_resolution_features": details}


class _Sam3(_Sam2):
    """``Sam3TrackerModel``, the part of SAM 3 that boxes and points prompt."""

    statistics = _HALVES


# transformers' class of each type of model, and what reads it. Files of trackers hold the model of
# single images too.
_KINDS: dict[str, tuple[str, type[_Sam]]] = {
    "sam": ("SamModel", _Sam),
    "sam_hq": ("SamHQModel", _SamHQ),
    "sam2": ("Sam2Model", _Sam2),
    "sam2_video": ("Sam2Model", _Sam2),
    "edgetam": ("EdgeTamModel", _Sam2),
    "edgetam_video": ("EdgeTamModel", _Sam2),
    "sam3_tracker": ("Sam3TrackerModel", _Sam3),
    "sam3_tracker_video": ("Sam3TrackerModel", _Sam3),
    "sam3_video": ("Sam3TrackerModel", _Sam3),
}


class _Overheard:
    """A mask decoder for one call that keeps what its transformer made of the tokens."""

    tokens: Tensor

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def transformer(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.tokens, image = self._decoder.transformer(*args, **kwargs)
        return self.tokens, image

    def __call__(self, **kwargs: Any) -> Any:
        # The decoder's own code runs with this object for ``self``: unlike a hook, it leaves the
        # decoder, which threads share, as it is.
        return type(self._decoder).forward(self, **kwargs)


@LOCALIZER_REGISTRY.register()
class TransformersSam(SquareLocalizer):
    """SAM, SAM-HQ, SAM 2 and 2.1, EdgeTAM or SAM 3, by the transformers package.

    ``MODEL.LOCALIZER.ARCH`` is the name of a model on the Hugging Face hub, such as
    "facebook/sam2.1-hiera-large", or a folder that ``save_pretrained`` wrote. The weights are
    those that come with it, so ``MODEL.LOCALIZER.WEIGHTS`` has to be "". A region's token is that
    of the decoder's first mask, after the two-way transformer.
    """

    @configurable
    def __init__(
        self, *, model: nn.Module, tokens: str = "mask", chunk_size: int = 16, arch: str = ""
    ) -> None:
        """
        Args:
            model: of one of transformers' classes ``SamModel``, ``SamHQModel``, ``Sam2Model``,
                ``EdgeTamModel`` and ``Sam3TrackerModel``.
            tokens, chunk_size, arch: as for :class:`SquareLocalizer`.

        Raises:
            ValueError: ``model`` is of another class.
        """
        name = type(model).__name__
        view = next((view for known, view in _KINDS.values() if known == name), None)
        if view is None:
            raise ValueError(f"A model of class {name} was given; {_known_classes()} is expected.")
        mean, std = ([255 * value for value in values] for values in view.statistics)
        super().__init__(
            pixel_mean=mean,
            pixel_std=std,
            tokens=tokens,
            chunk_size=chunk_size,
            squashed=view.squashed,
            arch=arch,
        )
        self.model: Any = model
        self._view = view(model)
        self.side = self._view.side
        grid = self._view.grid
        self.mask_prompt_size = (4 * grid[0], 4 * grid[1])
        self.freeze()

    @property
    def token_dim(self) -> int:  # type: ignore[override]
        return self.model.prompt_encoder.hidden_size * (2 if self.tokens == "both" else 1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        settings = cfg.MODEL.LOCALIZER
        if settings.WEIGHTS:
            raise ValueError(
                f"MODEL.LOCALIZER.WEIGHTS is '{settings.WEIGHTS}', but the weights of "
                "TransformersSam are those of MODEL.LOCALIZER.ARCH: set it to ''."
            )
        return {
            "model": _load(settings.ARCH),
            "tokens": settings.TOKENS,
            "chunk_size": settings.CHUNK_SIZE,
            # A model of the hub is the same in a folder of that name.
            "arch": os.path.basename(settings.ARCH.rstrip("/")),
        }

    @torch.no_grad()
    def encode_images(self, images: list[Tensor]) -> list[_Encoded]:
        if not images:
            return []
        return self._view.encode(torch.stack([self.preprocess(image) for image in images]))

    def embed_prompts(
        self,
        *,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        places, labels = points if points is not None else (None, None)
        # Its prompts are (images, regions, ...): all regions are those of one image.
        sparse, dense = self.model.prompt_encoder(
            input_points=None if places is None else places[None],
            input_labels=None if labels is None else labels[None],
            input_boxes=None if boxes is None else boxes[None],
            input_masks=masks,
        )
        return sparse[0], None if masks is None else dense

    def decode_embedded(
        self, embedding: _Encoded, sparse: Tensor, dense: Tensor | None, *, with_masks: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if len(sparse) == 0:
            none = sparse.new_zeros(0, self.model.prompt_encoder.hidden_size)
            masks = none.view(0, 1, *self.mask_prompt_size) if with_masks else None
            return none, masks, none[:, 0] if with_masks else None
        found = []
        for start in range(0, len(sparse), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            own = None if dense is None else dense[rows]
            found.append(self._decode_chunk(embedding, sparse[rows], own, with_masks))
        parts: list[Any] = list(zip(*found))
        if not with_masks:
            return torch.cat(parts[0]), None, None
        return torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2])

    def _decode_chunk(
        self, encoded: _Encoded, sparse: Tensor, dense: Tensor | None, with_masks: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Regions that share the image are regions of one image; those with a mask of their own
        # each have a copy of it.
        if dense is None:
            sparse, image = sparse[None], encoded.image
            shared = self.model.prompt_encoder.no_mask_embed.weight
            dense = shared.view(1, -1, 1, 1).expand_as(image)
        else:
            sparse, image = sparse[:, None], encoded.image.expand(len(sparse), -1, -1, -1)
        places = self.model.get_image_wide_positional_embeddings().expand_as(image)
        first = self._view.first_mask_token
        if not with_masks:
            own = self._view.output_tokens().expand(*sparse.shape[:2], -1, -1)
            copies = sparse.shape[1]
            tokens, _ = self.model.mask_decoder.transformer(
                point_embeddings=torch.cat([own, sparse], dim=2),
                image_embeddings=(image + dense).repeat_interleave(copies, 0),
                image_positional_embeddings=places.repeat_interleave(copies, 0),
                attention_similarity=None,
            )
            return tokens.flatten(0, 1)[:, first], None, None
        decoder = _Overheard(self.model.mask_decoder)
        masks, ious, *_ = decoder(
            image_embeddings=image,
            image_positional_embeddings=places,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            **self._view.decoder_options(encoded, len(image)),
        )
        tokens = decoder.tokens.flatten(0, 1)[:, first]
        return tokens, masks.flatten(0, 1), ious.flatten()


def _known_classes() -> str:
    return ", ".join(sorted({known for known, _ in _KINDS.values()}))


def _load(arch: str) -> nn.Module:
    """The model of a folder or of the hub, in float32."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "MODEL.LOCALIZER.NAME TransformersSam needs the transformers package: "
            "pip install transformers"
        ) from error
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(arch)
        if not config:  # of a folder without a config.json
            raise OSError
        kind = config.get("model_type")
        if kind not in _KINDS:
            raise ValueError(
                f"MODEL.LOCALIZER.ARCH: '{arch}' is a model of type '{kind}'; one of "
                f"{', '.join(_KINDS)} is expected."
            )
        name, _ = _KINDS[kind]
        if name not in dir(transformers):
            raise ImportError(
                f"MODEL.LOCALIZER.ARCH: '{arch}' is a {name}, which transformers "
                f"{transformers.__version__} does not have: pip install --upgrade transformers"
            )
        return getattr(transformers, name).from_pretrained(arch, dtype=torch.float32)
    except OSError as error:  # transformers explains it in a paragraph
        raise WeightsNotFoundError(
            f"MODEL.LOCALIZER.ARCH: no model in the folder or on the hub under '{arch}'. Give the "
            "name of one on the hub, such as 'facebook/sam2.1-hiera-tiny', or a folder with its "
            "config.json and model.safetensors."
        ) from error
