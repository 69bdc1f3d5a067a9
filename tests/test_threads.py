"""Threads with a predictor each over one model get their own results."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling.vocabulary import TextEmbedder

from .tiny import tiny_cfg, tiny_model, tiny_openai_clip

ROUNDS = 30
BOXES = [[5, 5, 40, 50], [20, 10, 90, 60]]
VOCABULARIES = [["cat", "dog", "bird"], ["dog", "car"], ["cup", "chair", "cat", "person"]]
IMAGES = [
    np.random.RandomState(i).randint(0, 255 // (i + 1), (64 + 8 * i, 96, 3), dtype=np.uint8)
    for i in range(4)
]


def own_results(model: nn.Module, rounds: int = ROUNDS) -> None:
    def ask(predictor: RegionSpotPredictor, k: int) -> list[torch.Tensor]:
        predictor.set_image(IMAGES[k % 4])
        words = VOCABULARIES[k % 3]
        found = predictor.predict(boxes=BOXES, points=[[30, 30]], vocabulary=words, topk=2)
        assert predictor.vocabulary == words
        boxes, masks = found.pred_boxes.tensor, found.get_fields().get("pred_masks", torch.zeros(0))
        return [found.scores, boxes, masks.float()]

    wanted = [ask(RegionSpotPredictor(model), k) for k in range(min(12, rounds + 1))]
    barrier = threading.Barrier(2)

    def work(thread: int) -> int:
        predictor = RegionSpotPredictor(model)
        barrier.wait()
        wrong = 0
        for k in range(thread, thread + rounds):
            pairs = zip(ask(predictor, k), wanted[k % 12])
            wrong += not all(torch.allclose(found, right, atol=1e-4) for found, right in pairs)
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [0, 0]


@pytest.mark.usefixtures("vocabularies")
def test_open_clip_and_sam():
    own_results(tiny_model())


@pytest.mark.usefixtures("vocabularies")
def test_openai_clip_and_sam():
    cfg = tiny_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.VISION_LANGUAGE.NAME = "OpenAIClip"
    model = build_model(cfg).eval()
    model.vision_language.model.load_state_dict(tiny_openai_clip().state_dict())
    own_results(model)


def test_mini(mini_predictor):
    own_results(mini_predictor.model, rounds=5)


@pytest.mark.usefixtures("vocabularies")
def test_more_vocabularies_than_are_kept(tmp_path):
    embed = TextEmbedder(tiny_model().vision_language, tmp_path)
    vocabularies = [[f"thing {k}"] for k in range(36)]  # four more
    wanted = [embed(names) for names in vocabularies]
    barrier = threading.Barrier(4)

    def work(thread: int) -> int:
        barrier.wait()
        order = np.random.RandomState(thread).randint(0, 36, 60)
        return sum(not torch.equal(embed(vocabularies[k]), wanted[k]) for k in order)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [0] * 4
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(copy.deepcopy(embed)(vocabularies[0]), wanted[0])
