"""The exported head gives torch's logits for any number of regions, tokens and class names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from regionspot_d2.modeling import RegionSpotHead

from .tools import load_tool

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

export_onnx = load_tool("export_onnx")


@pytest.fixture(scope="module")
def head() -> RegionSpotHead:
    torch.manual_seed(0)
    sizes = {"token_dim": 12, "image_dim": 16, "text_dim": 10, "depth": 2}
    return RegionSpotHead(**sizes, num_heads=4, ffn_dim=24).eval()


@pytest.fixture(scope="module")
def exported(head, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "head.onnx"
    assert export_onnx.export(head, torch.tensor(3.0), 10, path) < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["head.onnx"]
    return path


def test_graph_equals_torch_for_any_sizes(head, exported):
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    for regions, tokens, words in [(1, 1, 1), (2, 9, 30), (40, 5, 3)]:
        inputs = [torch.randn(regions, 12), torch.randn(tokens, 16), torch.randn(words, 10)]
        names = ["mask_tokens", "image_tokens", "text"]
        [found] = session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})
        with torch.no_grad():
            [embeddings] = head([inputs[0]], inputs[1][None])
        expected = embeddings @ inputs[2].T * np.exp(3.0)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_graph_that_differs_is_not_kept(head, exported, tmp_path, monkeypatch):
    def copy(model, inputs, path, **options):
        shutil.copy(exported, path)

    monkeypatch.setattr(torch.onnx, "export", copy)
    other = RegionSpotHead(
        token_dim=12, image_dim=16, text_dim=10, depth=2, num_heads=4, ffn_dim=24
    )
    with pytest.raises(RuntimeError, match="differs from torch"):
        export_onnx.export(other.eval(), torch.tensor(3.0), 10, tmp_path / "head.onnx")
    assert list(tmp_path.iterdir()) == []
