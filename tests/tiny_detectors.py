"""Tiny zero-shot detectors of transformers' classes, in folders; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Grounding DINO knows what parts names by BERT's own ids.
_BERT_IDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
_BERT_WORDS = ["cat", "traffic", "light", "red", "car", "dog", "bird", "no", "5", "##s"]
# Sentences of this many tokens: a few names.
MAX_TEXT_LEN = 9
IMAGE = 128


def tiny_detector(kind: str, folder: Path) -> nn.Module:
    """Writes a random model and its processor into the folder; returns the model.

    Args:
        kind: one of "grounding-dino", "mm-grounding-dino", "owlv2" and "owlvit".
        folder: becomes what ``from_pretrained`` reads.
    """
    build = _owl if kind.startswith("owl") else _grounding
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build(kind, folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def _grounding(kind: str, folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    names = {
        "grounding-dino": "GroundingDinoForObjectDetection",
        "mm-grounding-dino": "MMGroundingDinoForObjectDetection",
    }
    model_class = getattr(transformers, names[kind])
    backbone = transformers.SwinConfig(
        image_size=IMAGE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_indices=[2, 3, 4],
    )
    text = transformers.BertConfig(
        vocab_size=1100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    config = model_class.config_class(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=8,
        max_text_len=MAX_TEXT_LEN,
    )
    words = [_BERT_IDS.get(i, f"[unused{i}]") for i in range(1100)]
    words[200 : 200 + len(_BERT_WORDS)] = _BERT_WORDS
    (folder / "vocab.txt").write_text("\n".join(words))
    images = transformers.GroundingDinoImageProcessor(size={"height": IMAGE, "width": IMAGE})
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    return model_class(config), transformers.GroundingDinoProcessor(images, tokenizer)


def _owl(kind: str, folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    prefix = {"owlv2": "Owlv2", "owlvit": "OwlViT"}[kind]
    model_class = getattr(transformers, f"{prefix}ForObjectDetection")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "image_size": IMAGE, "patch_size": 16}
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the text tower reads at the largest id
    text = {
        **sizes,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 16,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
    }
    config = model_class.config_class(text_config=text, vision_config=vision, projection_dim=16)
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, pad_token="!")
    size = {"height": IMAGE, "width": IMAGE}
    images = getattr(transformers, f"{prefix}ImageProcessor")(size=size, do_center_crop=False)
    model = model_class(config)
    with torch.no_grad():  # or boxes leave the image, and all scores are 0 or 1
        head = model.class_head
        for layer in (model.box_head.dense2, head.logit_scale, head.logit_shift):
            layer.weight *= 0.05
    return model, getattr(transformers, f"{prefix}Processor")(images, tokenizer)
