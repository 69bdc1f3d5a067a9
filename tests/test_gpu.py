"""On a GPU: what a CPU answers, in each precision and compiled (test_train_net.py trains there)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.compiling import compile_layers
from regionspot_d2.modeling.precision import precision_on

from . import tiny
from .test_compiling import batch
from .test_precision import asked, in_order, questions
from .tools import needs_gpu

pytestmark = [
    needs_gpu,
    pytest.mark.usefixtures("vocabularies"),
]
QUESTIONS = pytest.mark.parametrize("given", questions().values(), ids=questions())
# Of a score. A GPU resizes images to within one level of 255, not to the bit.
TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32; torch's default on such GPUs is TF32, with 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(**attributes: Any) -> RegionSpot:
    return tiny.tiny_model(**attributes).cuda()


@QUESTIONS
def test_a_question_is_answered_as_on_a_cpu(given: dict) -> None:
    expected, found = asked(tiny.tiny_model(), **given), asked(on_gpu(), **given)
    assert found.scores.device.type == found.pred_boxes.device.type == "cuda"
    torch.testing.assert_close(in_order(found).cpu(), in_order(expected), atol=TOLERANCE, rtol=0)
    found = found.to("cpu")
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert (found.pred_masks == expected.pred_masks).float().mean() > 0.99


@QUESTIONS
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "auto"])
def test_half_precision_is_close_and_returns_float32(precision: str, given: dict) -> None:
    exact = in_order(asked(tiny.tiny_model(), **given))
    found = asked(on_gpu(precision=precision), **given)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(in_order(found).cpu(), exact, atol=0.02, rtol=0)


def test_auto_is_bfloat16_where_the_gpu_has_it() -> None:
    device = torch.device("cuda")
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    assert precision_on("auto", device) == (torch.bfloat16 if has_it else torch.float32)


def test_a_batch_is_answered_as_on_a_cpu() -> None:
    inputs = batch(3, 8, 1)
    for found, wanted in zip(on_gpu()(copy.deepcopy(inputs)), tiny.tiny_model()(inputs)):
        found, wanted = found["instances"].to("cpu"), wanted["instances"]
        torch.testing.assert_close(found.scores, wanted.scores, atol=TOLERANCE, rtol=0)
        assert torch.equal(found.pred_classes, wanted.pred_classes)


def test_everything_is_found_as_on_a_cpu() -> None:
    answers = []
    for model in (tiny.tiny_model(), on_gpu()):
        predictor = RegionSpotPredictor(model)
        predictor.set_image(torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1))
        answers.append(predictor.everything(vocabulary=tiny.WORDS["regionspot_pets"]).to("cpu"))
    expected, found = answers
    assert len(found) == len(expected)
    torch.testing.assert_close(found.scores, expected.scores, atol=TOLERANCE, rtol=0)


def test_compiled_by_inductor() -> None:
    torch.compiler.reset()
    model, plain = on_gpu(), on_gpu()
    compile_layers([model.localizer, model.vision_language, model.region_head])
    for counts in ((3, 8), (5, 9), (12, 1)):
        for found, wanted in zip(model(batch(*counts)), plain(batch(*counts))):
            scores = found["instances"].scores
            torch.testing.assert_close(scores, wanted["instances"].scores, atol=1e-3, rtol=0)


def test_an_image_moves_through_the_towers_with_its_gradient() -> None:
    model = on_gpu()
    image = torch.from_numpy(tiny.golden()["image"]).permute(2, 0, 1).float().cuda()
    model.encode([image.requires_grad_()], differentiable=True).image_tokens.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
