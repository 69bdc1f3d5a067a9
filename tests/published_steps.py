"""What the published code does at inference and in its loss, step by step for one image.

Written from descriptions and measurements of it, with the libraries that it uses and nothing of
this package, so that the tests can compare the two.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

SHORT_EDGE, LONG_EDGE = 800, 1333
PAIRS_BEFORE_BOX_SCORE, PAIRS = 900, 300


class Pair(NamedTuple):
    """A region with a name: its score, and its box (XYXY) and mask in pixels of the image file.

    Where a mask's logit is above 0, there is the region. It is kept as a number, because a logit
    that is 0 but for rounding may fall on either side.
    """

    region: int
    name: int
    score: float
    box: np.ndarray
    mask_logits: np.ndarray


class PublishedModel:
    """The parts of a checkpoint in the authors' layout, as the libraries build them."""

    def __init__(self, state: dict[str, Tensor], sam: Sam, clip: nn.Module, ffn_dim: int) -> None:
        """
        Args:
            state: keys begin with "model.".
            sam, clip: of the sizes in the file; their weights come from it.
            ffn_dim: of the decoder.
        """
        parts = {key.removeprefix("model."): value for key, value in state.items()}

        def load(module: nn.Module, prefix: str) -> nn.Module:
            own = {k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}
            module.load_state_dict(own)
            return module.eval()

        width, tokens = parts["to_clip.weight"].shape
        layer = nn.TransformerDecoderLayer(width, nhead=8, dim_feedforward=ffn_dim)
        decoder = nn.TransformerDecoder(layer, num_layers=3, norm=nn.LayerNorm(width))
        self.sam, self.clip = load(sam, "sam."), load(clip, "clip_model.")
        self.to_clip = load(nn.Linear(tokens, width), "to_clip.")
        self.decoder = load(decoder, "decoder.")
        self.projector = load(nn.Linear(width, len(parts["projector.bias"])), "projector.")

    @torch.no_grad()
    def name_boxes(
        self, image: Image.Image, boxes: np.ndarray, box_scores: np.ndarray, names: list[str]
    ) -> list[Pair]:
        """The pairs of an image, best first; boxes are XYXY in its pixels."""
        width, height = image.size
        resized = resize_short_edge(image)
        scale = np.array([resized.width / width, resized.height / height] * 2, np.float32)
        boxes = np.asarray(boxes, np.float32) * scale
        corner = [resized.width, resized.height] * 2
        boxes = np.clip(boxes, 0, np.array(corner, np.float32))

        tokens, masks = self.localize(resized, boxes)
        regions = self.embed(tokens, self.image_tokens(resized))
        logits = regions @ self.text(names).T * self.clip.logit_scale.exp()
        probabilities = logits.softmax(1).flatten()
        kept = probabilities.sort(descending=True).indices[:PAIRS_BEFORE_BOX_SCORE]
        scores = probabilities[kept] * torch.as_tensor(box_scores).float()[kept // len(names)]
        best = scores.sort(descending=True).indices[:PAIRS]
        return [
            Pair(
                region=(region := int(kept[i]) // len(names)),
                name=int(kept[i]) % len(names),
                score=float(scores[i]),
                box=boxes[region] / scale,
                mask_logits=floor_nearest(masks[region], (height, width)),
            )
            for i in best.tolist()
        ]

    def localize(self, image: Image.Image, boxes: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """SAM's first mask token of each box, and its mask logits at the size of the image."""
        size, to_input = (image.height, image.width), ResizeLongestSide(
            self.sam.image_encoder.img_size
        )
        pixels = torch.as_tensor(to_input.apply_image(np.asarray(image))).permute(2, 0, 1)
        prompts = torch.as_tensor(to_input.apply_boxes(boxes, size))
        kept: list[tuple[Tensor, Tensor]] = []
        decoder = self.sam.mask_decoder
        hook = decoder.transformer.register_forward_hook(lambda *args: kept.append(args[2]))
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=prompts, masks=None)
        logits, _ = decoder(
            image_embeddings=self.sam.image_encoder(self.sam.preprocess(pixels[None].float())),
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        hook.remove()
        # Row 0 is the token of the predicted IoU.
        tokens = kept[0][0][:, 1]
        masks = self.sam.postprocess_masks(logits, tuple(pixels.shape[1:]), size)
        return tokens, masks[:, 0].numpy()

    def image_tokens(self, image: Image.Image) -> Tensor:
        """What leaves the last block of CLIP's image tower, the class token first: (L, W)."""
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].float()
        visual = self.clip.visual
        squashed = F.interpolate(pixels, visual.image_size, mode="bilinear", align_corners=False)
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        kept: list[Tensor] = []
        hook = visual.transformer.register_forward_hook(lambda *args: kept.append(args[2]))
        visual((squashed / 255 - mean) / std)
        hook.remove()
        return kept[0][0]

    def embed(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        decoded = self.decoder(self.to_clip(tokens)[:, None], image_tokens[:, None])[:, 0]
        return F.normalize(self.projector(decoded), dim=1)

    def text(self, names: list[str]) -> Tensor:
        templates = [lambda name: f"{name}.", *open_clip.OPENAI_IMAGENET_TEMPLATES]
        rows = []
        for name in names:
            plain = re.sub("-other|-merged|-stuff", "", name)
            texts = [template(plain) for template in templates]
            rows.append(self.clip.encode_text(open_clip.tokenize(texts)).mean(0))
        return F.normalize(torch.stack(rows), dim=1)


def resize_short_edge(image: Image.Image) -> Image.Image:
    """The short edge becomes 800 pixels, but the long one at most 1333."""
    scale = SHORT_EDGE / min(image.size)
    scale = min(scale, LONG_EDGE / max(image.size))
    width, height = (int(length * scale + 0.5) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def floor_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = values.shape
    rows = [y * height // size[0] for y in range(size[0])]
    columns = [x * width // size[1] for x in range(size[1])]
    return values[rows][:, columns]


def focal(logit: Tensor, true: bool) -> Tensor:
    """Of one region and one name."""
    probability = 1 / (1 + (-logit).exp())
    if true:
        return -0.25 * (1 - probability) ** 2 * probability.log()
    return -0.75 * probability**2 * (1 - probability).log()


def loss_of_image(logits: Tensor, classes: Tensor) -> list[Tensor]:
    """Of each region: its focal loss, summed over names."""
    found = []
    for row, own in zip(logits, classes.tolist()):
        found.append(torch.stack([focal(x, name == own) for name, x in enumerate(row)]).sum())
    return found


def published_loss(logits: list[Tensor], classes: list[Tensor]) -> Tensor:
    """The mean over the regions of each image, summed over the images of a process."""
    total = torch.zeros((), dtype=torch.float64)
    for found in map(loss_of_image, logits, classes):
        if found:
            total = total + sum(found) / len(found)
    return total


def our_loss(logits: list[Tensor], classes: list[Tensor]) -> Tensor:
    """The mean over the regions of all images."""
    found = [loss for image in map(loss_of_image, logits, classes) for loss in image]
    return sum(found, torch.zeros((), dtype=torch.float64)) / max(len(found), 1)
