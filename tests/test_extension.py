"""Parts from outside the package: the examples of CONTRIBUTING.md, through the registries only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.data.build import build_test_loader
from regionspot_d2.data.proposals import write_proposals
from regionspot_d2.modeling import LOCALIZER_REGISTRY, REGION_HEAD_REGISTRY

from .documents import python_blocks
from .tiny import WORDS, tiny_cfg

SIZE = (40, 60)


@pytest.fixture(scope="module")
def examples() -> dict:
    """What the code of CONTRIBUTING.md defines; afterwards the registries are as before."""
    registries = (LOCALIZER_REGISTRY, REGION_HEAD_REGISTRY)
    before = [dict(registry) for registry in registries]
    names: dict = {}
    for block in python_blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    yield names
    for registry, kept in zip(registries, before):
        for name in set(dict(registry)) - set(kept):
            del registry._obj_map[name]
    DatasetCatalog.remove("pets")
    MetadataCatalog.remove("pets")


@pytest.fixture
def cfg(examples, vocabularies):
    cfg = tiny_cfg()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.LOCALIZER.NAME = "ColorLocalizer"
    cfg.MODEL.REGION_HEAD.NAME = "LinearHead"
    cfg.DATASETS.TEST = ("regionspot_pets",)
    return cfg


def an_input(boxes: list[list[float]]) -> dict:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
    proposals, truth = Instances(SIZE), Instances(SIZE)
    proposals.proposal_boxes = truth.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    proposals.objectness_logits = torch.ones(len(boxes))
    truth.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return {"image": image, "proposals": proposals, "instances": truth}


BOXES = [[2.0, 3.0, 20.0, 30.0], [10.0, 5.0, 60.0, 40.0]]


def test_a_localizer_and_a_head_from_outside_answer(cfg):
    predictor = RegionSpotPredictor(cfg, vocabulary=WORDS["regionspot_pets"])
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    image[:, 30:] = (255, 0, 51)
    predictor.set_image(image)
    found = predictor.predict(boxes=BOXES)
    assert found.region_index.tolist() == [0, 1] and not found.has("pred_masks")

    # The head saw the color of the region and its box.
    head = predictor.model.region_head
    vector = predictor.region_embeddings(boxes=[[40, 10, 60, 40]])
    expected = head.layer(torch.tensor([[1.0, 0.0, 0.2, 40 / 60, 10 / 40, 1.0, 1.0]]))
    expected = torch.nn.functional.normalize(expected)
    torch.testing.assert_close(vector, expected.detach(), rtol=1e-4, atol=1e-5)


def test_images_without_regions_are_ordinary(cfg):
    model = build_model(cfg).eval()
    results = model([an_input(BOXES), an_input([])])
    assert [len(result["instances"]) for result in results] == [2 * 3, 0]


def test_only_the_head_is_trained_and_saved(cfg, tmp_path):
    model = build_model(cfg).train()
    model([an_input(BOXES), an_input([])])["loss_cls"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"region_head.layer.weight", "region_head.layer.bias"}
    assert model.region_head.layer.weight.grad.abs().sum() > 0

    RegionSpotCheckpointer(model, str(tmp_path)).save("head")
    other = build_model(cfg)
    RegionSpotCheckpointer(other).load(str(tmp_path / "head.pth"))
    torch.testing.assert_close(other.region_head.state_dict(), model.region_head.state_dict())


def test_an_unknown_name_is_an_error_that_names_it(cfg):
    cfg.MODEL.REGION_HEAD.NAME = "NoSuchHead"
    with pytest.raises(ValueError, match="NAME is 'NoSuchHead'; it must be one of .*LinearHead"):
        build_model(cfg)


@pytest.mark.parametrize("part", ["localizer", "head"])
def test_half_a_part_cannot_be_built(examples, part):
    base = examples["Localizer" if part == "localizer" else "RegionHead"]
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (base,), {})()


def test_a_metric_from_outside_reads_the_results(cfg, examples):
    model = build_model(cfg).eval()
    batch = [an_input(BOXES)]
    evaluators = DatasetEvaluators([examples["Confidence"]()])
    evaluators.reset()
    outputs = model(batch)
    evaluators.process(batch, outputs)
    found = outputs[0]["instances"]
    best = [float(found.scores[found.region_index == region].max()) for region in (0, 1)]
    assert evaluators.evaluate()["confidence"]["mean"] == pytest.approx(50 * sum(best))


def test_a_dataset_and_a_proposal_source_from_outside_are_evaluated(
    cfg, examples, tmp_path, monkeypatch
):
    Image.new("RGB", (400, 320)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    cfg.DATASETS.TEST = ("pets",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.LOAD_PROPOSALS = True
    records = DatasetCatalog.get("pets")
    write_proposals("grid.pkl", records, examples["from_grid"](records), {"source": "grid"})
    for file, regions in [("ground_truth://pets", 1), ("grid.pkl", 16)]:
        cfg.DATASETS.PROPOSAL_FILES_TEST = (file,)
        [batch] = build_test_loader(cfg, "pets")
        [result] = build_model(cfg).eval()(batch)
        assert set(result["instances"].pred_classes.tolist()) == {0, 1}
        assert set(result["instances"].region_index.tolist()) == set(range(regions))
