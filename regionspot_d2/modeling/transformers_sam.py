"""SAM and its successors, as the transformers package has them, as localizers."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..files import WeightsNotFoundError
from .interfaces import LOCALIZER_REGISTRY
from .sam_kinds import KINDS, EncodedBySam
from .square import SquareLocalizer


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
        self, *, model: nn.Module, tokens: str = "mask", chunk_size: int = 0, arch: str = ""
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
        view = next((view for known, view in KINDS.values() if known == name), None)
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

    def layers_to_compile(self) -> list[nn.Module]:
        return self._view.layers()

    @torch.no_grad()
    def encode_images(self, images: list[Tensor]) -> list[EncodedBySam]:
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
        self,
        embedding: EncodedBySam,
        sparse: Tensor,
        dense: Tensor | None,
        *,
        with_masks: bool,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if len(sparse) == 0:
            none = sparse.new_zeros(0, self.model.prompt_encoder.hidden_size)
            masks = none.view(0, 1, *self.mask_prompt_size) if with_masks else None
            return none, masks, none[:, 0] if with_masks else None
        found = []
        multimask &= self._view.has_multimask
        for start in range(0, len(sparse), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            own = None if dense is None else dense[rows]
            found.append(self._decode_chunk(embedding, sparse[rows], own, with_masks, multimask))
        parts: list[Any] = list(zip(*found))
        if not with_masks:
            return torch.cat(parts[0]), None, None
        return torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2])

    def _decode_chunk(
        self,
        encoded: EncodedBySam,
        sparse: Tensor,
        dense: Tensor | None,
        with_masks: bool,
        multimask: bool,
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
            multimask_output=multimask,
            **self._view.decoder_options(encoded, len(image)),
        )
        # The first mask's token stands before those of the masks for vague prompts.
        first += multimask
        tokens = decoder.tokens[:, :, first : first + masks.shape[2]]
        return tokens.flatten(0, 2), masks.flatten(0, 2)[:, None], ious.flatten()


def _known_classes() -> str:
    return ", ".join(sorted({known for known, _ in KINDS.values()}))


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
        if kind not in KINDS:
            raise ValueError(
                f"MODEL.LOCALIZER.ARCH: '{arch}' is a model of type '{kind}'; one of "
                f"{', '.join(KINDS)} is expected."
            )
        name, _ = KINDS[kind]
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
