"""MODEL.COMPILE: the same answers from few graphs, however many regions images have."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.compiling import compile_layers

from . import tiny

pytestmark = pytest.mark.usefixtures("vocabularies")
NAMES = tiny.WORDS["regionspot_pets"]


class Backend:
    """Counts the graphs that are compiled, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.fixture
def backend() -> Backend:
    torch.compiler.reset()
    return Backend()


def compiled(model: RegionSpot, *backend: Backend) -> RegionSpot:
    compile_layers([model.localizer, model.vision_language, model.region_head], *backend)
    return model


def boxes(count: int) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count))
    return (corners.sort(1).values * torch.tensor([120.0, 90.0])).reshape(-1, 4)


def image() -> Tensor:
    return torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1)


def scores(model: RegionSpot, count: int, zoom: float = 0.0) -> Tensor:
    predictor = RegionSpotPredictor(model)
    predictor.set_image(image())
    found = predictor.predict(boxes=boxes(count), vocabulary=NAMES, topk=len(NAMES), zoom=zoom)
    return found.scores


def test_the_number_of_regions_is_free(backend):
    model, plain = compiled(tiny.tiny_model(), backend), tiny.tiny_model()
    counted = []
    for count in (3, 7, 50, 4, 21, 34):
        torch.testing.assert_close(scores(model, count), scores(plain, count), atol=1e-5, rtol=0)
        counted.append(backend.graphs)
    # A block of SAM with windows and one without, a block of CLIP, and a layer of the head, twice:
    # for the first number of regions, and for any.
    assert counted == [4, 5, 5, 5, 5, 5]


def batch(*counts: int) -> list[dict[str, Any]]:
    inputs = []
    for count in counts:
        proposals = Instances((90, 120))
        proposals.proposal_boxes = Boxes(boxes(count))
        proposals.objectness_logits = torch.ones(count)
        x = {"image": image(), "dataset_name": "regionspot_pets", "proposals": proposals}
        inputs.append(x)
    return inputs


def test_batches_of_any_size_and_of_uneven_numbers(backend):
    # In bfloat16 too it is the same.
    model, plain = (tiny.tiny_model(with_masks=False, precision="bfloat16") for _ in range(2))
    compile_layers([model.vision_language, model.region_head], backend)
    counted = []
    for counts in ((3, 8), (4, 4, 4), (2, 7, 9), (11,), (0, 4), (5, 5), (12,)):
        for found, wanted in zip(model(batch(*counts)), plain(batch(*counts))):
            found, wanted = found["instances"], wanted["instances"]
            torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=0)
        counted.append(backend.graphs)
    # By then a batch of one and larger ones were seen, with and without padding.
    assert counted[-1] == counted[3]


def test_zoom(backend):
    model, plain = tiny.tiny_model(), tiny.tiny_model()
    compile_layers([model.region_head], backend)
    for count in (3, 20, 33):
        wanted = scores(plain, count, zoom=2.0)
        torch.testing.assert_close(scores(model, count, zoom=2.0), wanted, atol=1e-5, rtol=0)
    before = backend.graphs
    scores(model, 41, zoom=2.0)
    assert backend.graphs == before


def without_dropout() -> RegionSpot:
    """A model in training, without what is random in it."""
    model = tiny.tiny_model().train()
    for layer in model.region_head.modules():
        if isinstance(layer, nn.Dropout | nn.MultiheadAttention):
            layer.train(False)
    return model


def training_batch(*counts: int) -> list[dict[str, Any]]:
    inputs = batch(*counts)
    for x in inputs:
        x["instances"] = Instances((90, 120), gt_boxes=x["proposals"].proposal_boxes)
        x["instances"].gt_classes = torch.arange(len(x["instances"])) % len(NAMES)
    return inputs


def gradients(model: RegionSpot, *counts: int) -> Tensor:
    model.zero_grad()
    model(training_batch(*counts))["loss_cls"].backward()
    return torch.cat([p.grad.flatten() for p in model.region_head.parameters()])


def test_training(backend):
    model, plain = without_dropout(), without_dropout()
    compile_layers([model.region_head], backend)
    for counts in ((3, 8), (5, 9), (2, 7), (12, 1)):
        found, wanted = gradients(model, *counts), gradients(plain, *counts)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    before = backend.graphs
    gradients(model, 6, 17)
    assert backend.graphs == before


@pytest.mark.slow
def test_by_inductor():
    torch.compiler.reset()
    model, plain = compiled(without_dropout()), without_dropout()
    torch.testing.assert_close(gradients(model, 3, 8), gradients(plain, 3, 8), atol=1e-5, rtol=1e-3)
    model.eval(), plain.eval()
    for count in (3, 7, 50):
        torch.testing.assert_close(scores(model, count), scores(plain, count), atol=1e-5, rtol=0)


def test_names_of_weights_stay(backend):
    model, plain = compiled(tiny.tiny_model(), backend), tiny.tiny_model()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(model.state_dict())


def test_a_config_chooses(tiny_models, monkeypatch):
    called = []
    monkeypatch.setattr(nn.Module, "compile", lambda layer, **_: called.append(layer))
    cfg = tiny.tiny_cfg()
    assert cfg.MODEL.COMPILE is False
    build_model(cfg)
    assert called == []
    cfg.MODEL.COMPILE = True
    model = build_model(cfg)
    parts = [model.localizer.image_encoder.blocks, model.region_head.decoder.layers]
    parts.append(model.vision_language.model.visual.transformer.resblocks)
    assert set(called) == {layer for layers in parts for layer in layers}


def test_without_a_compiler(tiny_models, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    cfg = tiny.tiny_cfg()
    cfg.MODEL.COMPILE = True
    with pytest.raises(ValueError, match=r"^MODEL.COMPILE is True, but .* no C\+\+ compiler.*$"):
        build_model(cfg)


def test_a_model_without_such_layers_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        compile_layers([])
    assert "no part of this model names layers to compile" in caplog.text
