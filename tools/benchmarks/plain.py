"""Naming regions the plain way, as one would write it with the libraries themselves.

segment_anything's predictor takes all boxes at once and keeps their masks, open_clip encodes the
image, and ``nn.TransformerDecoder`` joins the two. The stock predictor returns no tokens, so that a
hook reads them.
"""

from __future__ import annotations

import numpy as np
import open_clip
import torch
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms import Compose


class PlainNaming:
    """SAM ViT-B, CLIP ViT-L/14@336 and a decoder of three layers, with random weights.

    Attributes:
        predictor, clip, decoder: the parts.
    """

    def __init__(self, names: int, device: str) -> None:
        self.device = device
        self.predictor = SamPredictor(sam_model_registry["vit_b"]().to(device).eval())
        clip, _, transform = open_clip.create_model_and_transforms("ViT-L-14-336-quickgelu")
        self.clip = clip.to(device).eval()
        self.clip.visual.output_tokens = True
        self.transform: Compose = transform
        layer = nn.TransformerDecoderLayer(256, 8, 2048, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 3).to(device).eval()
        self.image_proj = nn.Linear(1024, 256).to(device)
        self.text_proj = nn.Linear(256, 768).to(device)
        self.texts = normalize(torch.randn(names, 768, device=device), dim=1)
        self.tokens: list[Tensor] = []
        transformer = self.predictor.model.mask_decoder.transformer
        transformer.register_forward_hook(lambda *args: self.tokens.append(args[2][0][:, 1]))

    @torch.no_grad()
    def __call__(self, image: np.ndarray, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An image (H, W, 3), RGB, uint8, and boxes (R, 4): scores, class numbers and masks."""
        self.predictor.set_image(image)
        places = self.predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
        self.tokens.clear()
        masks, _, _ = self.predictor.predict_torch(
            None, None, places.to(self.device), multimask_output=False
        )
        pixels = self.transform(Image.fromarray(image))[None].to(self.device)
        _, patches = self.clip.visual(pixels)
        found = self.decoder(self.tokens[0][None], self.image_proj(patches))[0]
        cosines = normalize(self.text_proj(found), dim=1) @ self.texts.T
        scores, classes = (100 * cosines).softmax(1).max(1)
        return scores, classes, masks[:, 0]
