"""Training and evaluation by command: results, resuming, processes, precisions, mistakes."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, default_argument_parser, launch
from detectron2.utils import comm

import train_net
from regionspot_d2 import add_regionspot_config
from regionspot_d2.data.build import build_test_loader, build_train_loader
from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.data.token_extraction import extract_tokens
from regionspot_d2.engine import ConfigError, RegionSpotTrainer
from regionspot_d2.engine.hooks import ModelEMA
from regionspot_d2.modeling import LOCALIZER_REGISTRY

from .shapes import shapes_cfg
from .tiny import fill_golden, register_tiny_models
from .tools import needs_gpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cfg(tmp_path: Path, tiny_models: None, empty_cache: Path) -> Iterator[CfgNode]:
    """Tiny towers on a dataset of rectangles; loggers and catalogs are as before afterwards."""
    yield shapes_cfg(tmp_path)
    if "shapes" in DatasetCatalog:
        DatasetCatalog.remove("shapes")
        MetadataCatalog.remove("shapes")
    for name in ("detectron2", "fvcore", "regionspot_d2"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).handlers.clear()


def arguments(cfg: CfgNode, *options: str) -> argparse.Namespace:
    file = Path(cfg.OUTPUT_DIR).with_suffix(".yaml")
    file.write_text(cfg.dump())
    return default_argument_parser().parse_args(["--config-file", str(file), *options])


def run(cfg: CfgNode, *options: str) -> Any:
    return train_net.main(arguments(cfg, *options))


class Losses(HookBase):
    """Remembers the loss of each iteration, and may stop the training in the middle of a step."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.values: dict[int, float] = {}
        self._stop_before = stop_before

    def before_step(self) -> None:
        if self.trainer.iter == self._stop_before:
            raise KeyboardInterrupt

    def after_step(self) -> None:
        if comm.is_main_process():
            self.values[self.trainer.iter] = self.trainer.storage.latest()["total_loss"][0]


def train(cfg: CfgNode, *, resume: bool = False, stop_before: int | None = None) -> Losses:
    """Loads the config from a file and trains without evaluation, in this process."""
    train_net.load_config(arguments(cfg).config_file)
    return fit(cfg, resume=resume, stop_before=stop_before)


def fit(cfg: CfgNode, *, resume: bool = False, stop_before: int | None = None) -> Losses:
    """Trains with a config that is loaded: no file is written, so several processes may call it."""
    # The tiny towers have random weights; those of a real one come from a file.
    torch.manual_seed(cfg.SEED)
    trainer = RegionSpotTrainer(cfg)
    losses = Losses(stop_before)
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return losses


def saved(cfg: CfgNode, name: str = "model_final") -> dict[str, Any]:
    return torch.load(Path(cfg.OUTPUT_DIR, f"{name}.pth"))


def assert_same_weights(
    one: dict[str, Any], other: dict[str, Any], atol: float = 0.0, key: str = "model"
) -> None:
    assert one[key].keys() == other[key].keys()
    for name, value in one[key].items():
        torch.testing.assert_close(value, other[key][name], atol=atol, rtol=0)


def without_tests(cfg: CfgNode, output: str = "output") -> CfgNode:
    cfg = cfg.clone()
    cfg.DATASETS.TEST = ()
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR).with_name(output))
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    return cfg


def test_trains_evaluates_and_evaluates_again(cfg):
    cfg.SOLVER.MAX_ITER = 21
    cfg.TEST.EVAL_PERIOD = 10
    run(cfg)
    output = Path(cfg.OUTPUT_DIR)
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [19, 20, 21]
    assert 0 <= lines[0]["[metric]accuracy"] <= 1
    assert lines[0]["[metric]images/s"] > 0
    assert {"data_time", "eta_seconds", "lr", "bbox/AP"} <= set().union(*lines)
    assert next(output.glob("events.out.tfevents*")).stat().st_size > 0

    # Only the head is saved, without frozen weights.
    final = saved(cfg)
    assert all(key.startswith("region_head.") for key in final["model"])
    assert final["trained_on"]["datasets"] == ["shapes"]
    best = saved(cfg, "model_best")
    assert best["bbox/AP"] == max(line.get("bbox/AP", 0.0) for line in lines)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"

    table = (output / "results_table.md").read_text()
    assert "shapes" in table and "ground truth" in table
    (output / "results_table.md").unlink()
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    log = output / "log.txt"
    told = "The head was trained on 12 of the 12 photos of 'shapes'"
    before = log.read_text().count(told)
    results = run(cfg, "--eval-only")
    assert log.read_text().count(told) == before + 1
    assert results["bbox"]["AP"] == pytest.approx(lines[-1]["bbox/AP"], abs=1e-6)
    assert results["bbox"]["AP"] > 50
    assert (output / "results_table.md").exists()


HEADS = ["CropRegionHead", "MaskPooledRegionHead", "PooledRegionHead"]


@pytest.mark.parametrize("head", HEADS)
def test_baselines_are_evaluated_and_adapted_by_the_same_command(cfg, head):
    cfg.MODEL.REGION_HEAD.NAME = head
    cfg.TEST.REGION_CLASSIFICATION = True
    plain = run(cfg, "--eval-only")
    assert plain["bbox"]["AP"] > 0 and plain["region_classification"]["decided1"] == 100
    cfg.MODEL.REGION_HEAD.NAME = "AdapterRegionHead"
    cfg.MODEL.REGION_HEAD.ADAPTED = head
    cfg.MODEL.REGION_HEAD.ADAPTER_SHARE = 0.8
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MAX_ITER = 12
    losses = train(without_tests(cfg)).values
    assert max(losses[10], losses[11]) < 0.8 * losses[0]
    assert len(saved(cfg)["model"]) == 2
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    assert run(cfg, "--eval-only")["bbox"]["AP"] != plain["bbox"]["AP"]


def test_a_resumed_run_is_the_run_that_was_not_stopped(cfg):
    cfg.MODEL.EMA.ENABLED = True
    whole = without_tests(cfg, "whole")
    expected = train(whole).values
    assert max(expected[6], expected[7]) < 0.8 * expected[0]
    parts = without_tests(cfg, "parts")
    parts.SOLVER.CHECKPOINT_PERIOD = 2
    with pytest.raises(KeyboardInterrupt):
        train(parts, stop_before=3)
    with pytest.raises(KeyboardInterrupt):
        train(parts, resume=True, stop_before=7)
    found = train(parts, resume=True).values
    assert list(found) == [6, 7]
    for iteration, loss in found.items():
        assert loss == pytest.approx(expected[iteration], abs=1e-6)
    assert_same_weights(saved(parts), saved(whole), atol=1e-6)
    assert_same_weights(saved(parts), saved(whole), atol=1e-6, key="ema")
    # The seed matters (dropout depends on it), so the equality above is no coincidence.
    again = without_tests(cfg, "seed")
    again.SEED = 6
    again.SOLVER.MAX_ITER = 1
    assert train(again).values[0] != expected[0]


def _run_in_a_new_process(cfg: CfgNode) -> None:
    register_tiny_models()
    run(cfg)


def test_a_killed_run_continues(cfg):
    whole = without_tests(cfg, "whole")
    whole.SOLVER.MAX_ITER = 16
    run(whole)
    killed = without_tests(whole, "killed")
    killed.SOLVER.CHECKPOINT_PERIOD = 2
    # Not forked: a fork of a process that has threads may wait forever for one of their locks.
    process = mp.get_context("spawn").Process(target=_run_in_a_new_process, args=(killed,))
    process.start()
    while process.is_alive() and not Path(killed.OUTPUT_DIR, "last_checkpoint").exists():
        process.join(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run(killed, "--resume")
    assert_same_weights(saved(killed), saved(whole), atol=1e-6)


def _train_with_losses(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    register_tiny_models()
    cfg = train_net.load_config(args.config_file)
    losses = fit(cfg)
    if comm.is_main_process():
        Path(cfg.OUTPUT_DIR, "losses.json").write_text(json.dumps(losses.values))


def test_two_processes_train_as_one_with_the_whole_batch(cfg):
    cfg.MODEL.REGION_HEAD.DROPOUT = 0.0
    cfg.SOLVER.MAX_ITER = 20
    one = without_tests(cfg, "one")
    expected = train(one).values
    two = without_tests(cfg, "two")
    launch(_train_with_losses, 2, dist_url="auto", args=(arguments(two),))
    found = json.loads(Path(two.OUTPUT_DIR, "losses.json").read_text())
    assert len(found) == 20
    for iteration, loss in found.items():
        assert loss == pytest.approx(expected[int(iteration)], abs=1e-5)
    # A checkpoint of one number of processes is continued by another number.
    one.SOLVER.MAX_ITER = two.SOLVER.MAX_ITER = 22
    expected = train(one, resume=True).values
    found = train(two, resume=True).values
    assert list(found) == [20, 21]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_nonfinite_loss_stops_and_names_the_images(cfg):
    cfg = without_tests(cfg)
    cfg.SOLVER.BASE_LR = 1e30
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    with pytest.raises(
        FloatingPointError, match="not a finite number at iteration 1.*nonfinite_batch.json"
    ):
        train(cfg)
    found = json.loads(Path(cfg.OUTPUT_DIR, "nonfinite_batch.json").read_text())
    assert found["iteration"] == 1
    [batch] = found["batches"]
    assert batch["process"] == 0 and not math.isfinite(batch["losses"]["loss_cls"])
    assert len(batch["images"]) == 4
    for image in batch["images"]:
        assert Path(image["file_name"]).exists() and image["dataset_name"] == "shapes"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_resumes(cfg, precision):
    cfg.MODEL.REGION_HEAD.DROPOUT = 0.0
    cfg.SOLVER.MAX_ITER = 5
    single = without_tests(cfg)
    single.SOLVER.MAX_ITER = 1
    single_loss = train(single).values[0]
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.AMP.DTYPE = precision
    expected = train(without_tests(cfg, "whole")).values
    assert expected[0] != single_loss
    assert expected[0] == pytest.approx(single_loss, rel=0.1)
    half = without_tests(cfg, "half")
    half.SOLVER.CHECKPOINT_PERIOD = 3
    with pytest.raises(KeyboardInterrupt):
        train(half, stop_before=4)
    found = train(half, resume=True).values
    assert found == pytest.approx({k: expected[k] for k in (3, 4)}, abs=1e-6)
    assert ("scale" in saved(half)["trainer"]["_trainer"]["grad_scaler"]) == (
        precision == "float16"
    )


def test_unknown_precision_is_refused(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.AMP.DTYPE = "int8"
    with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE is 'int8'; it must be one of float16"):
        train(without_tests(cfg))


def test_the_average_is_evaluated_saved_and_resumed(cfg):
    cfg.MODEL.EMA.ENABLED = True
    cfg.MODEL.EMA.DECAY = 0.5
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    run(cfg)
    average = {}
    for name in [f"model_{i:07d}" for i in range(3)] + ["model_final"]:
        checkpoint = saved(cfg, name)
        for key, value in checkpoint["model"].items():
            # The average starts from the weights before the first step, which are not saved.
            start = 2 * checkpoint["ema"][key] - value
            average[key] = 0.5 * average.get(key, start) + 0.5 * value
            torch.testing.assert_close(checkpoint["ema"][key], average[key], atol=1e-6, rtol=0)
    expected = json.loads(Path(cfg.OUTPUT_DIR, "results_table.json").read_text())["detection"]
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    with_average = run(cfg, "--eval-only")["bbox"]["AP"]
    assert with_average == pytest.approx(expected[0]["box"]["AP"], abs=1e-6)
    cfg.MODEL.EMA.ENABLED = False
    assert run(cfg, "--eval-only")["bbox"]["AP"] != with_average


def test_tokens_are_extracted_once_and_give_the_same_loss(cfg, caplog, monkeypatch):
    cfg.SOLVER.MAX_ITER = 3
    live = train(without_tests(cfg, "live")).values
    cached = without_tests(cfg, "cached")
    cached.INPUT.TOKEN_CACHE = str(Path(cfg.OUTPUT_DIR).with_name("tokens"))
    with caplog.at_level(logging.INFO, "regionspot_d2"):
        # Tokens on disk are float16.
        assert train(cached).values == pytest.approx(live, rel=1e-2)
        assert "no tokens of 'shapes'" in caplog.text
        caplog.clear()
        train(cached)
        assert "no tokens" not in caplog.text
    cached.INPUT.CACHED_IMAGE_SIZE = 32
    with pytest.raises(ConfigError, match="CACHED_IMAGE_SIZE is 32, .* 64 x 64"):
        train(cached)
    cached.INPUT.CACHED_IMAGE_SIZE, cached.INPUT.ZOOM_TRAIN, cached.MODEL.ZOOM = 64, True, 2.0
    with pytest.raises(ConfigError, match="leaves no details for INPUT.ZOOM_TRAIN"):
        train(cached)
    cached.INPUT.ZOOM_TRAIN = False
    cached.INPUT.CACHED_IMAGE_SIZE = 64
    # Large datasets are not extracted implicitly.
    monkeypatch.setattr("regionspot_d2.engine.trainer.MAX_IMAGES_EXTRACTED", 3)
    cached.INPUT.TOKEN_CACHE += "_none"
    with pytest.raises(ConfigError, match="12 images of 'shapes'.*extract_tokens.py"):
        train(cached)


def test_a_second_stage_starts_from_the_weights_of_the_first(cfg):
    first = without_tests(cfg, "first")
    first.SOLVER.MAX_ITER = 2
    train(first)
    second = without_tests(cfg, "second")
    second.MODEL.WEIGHTS = str(Path(first.OUTPUT_DIR, "model_final.pth"))
    second.SOLVER.BASE_LR = 0.0
    second.SOLVER.MAX_ITER = 1
    train(second)
    assert_same_weights(saved(second), saved(first))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["MODEL.REGION_HEAD.DEPHT", "2"],
            "no config key MODEL.REGION_HEAD.DEPHT.*REGION_HEAD.DEPTH",
        ),
        (["SOLVER.MAX_ITER"], "the options: Override list has odd length"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["DATASETS.TRAIN", "('lvis_v1_trian',)"], "no dataset 'lvis_v1_trian'.*lvis_v1_train"),
        (["DATASETS.TRAIN", "('lvis_v1_train',)"], "annotations of 'lvis_v1_train' are not there"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (
            ["--eval-only", "DATASETS.TEST", "()", "DATASETS.PROPOSAL_FILES_TEST", "()"],
            "DATASETS.TEST is empty: there is nothing to evaluate",
        ),
        (["DATASETS.PROPOSAL_FILES_TEST", "('a.pkl',)"], "no file 'a.pkl'.*prepare_proposals.py"),
        (["DATASETS.PROPOSAL_FILES_TEST", "()"], "has 0 files for the 1 datasets"),
        (["DATASETS.COCO_FORMAT", "[['mine', 'no.json', '.']]"], "no annotation file 'no.json'"),
        (["MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS names a weights file that does not exist"),
    ],
)
def test_mistakes_give_one_line(cfg, monkeypatch, options, message):
    file = arguments(cfg).config_file
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", file, *options])
    with pytest.raises(SystemExit, match=message):
        train_net.invoke_main()


@pytest.mark.parametrize(
    "document",
    [ROOT / "train_net.py", *sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("*.md"))],
    ids=lambda path: path.name,
)
def test_evaluating_needs_a_dataset(document):
    lines = document.read_text(encoding="utf-8").splitlines()
    for line in (line for line in lines if "--eval-only" in line):
        for config in re.findall(r"--config-file (\S+)", line):
            cfg = get_cfg()
            add_regionspot_config(cfg)
            cfg.merge_from_file(str(ROOT / config))
            assert cfg.DATASETS.TEST, f"{document.name}: {line}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL: [", "wrong.yaml: .*expected"),
        ("- 1", "wrong.yaml: this is not a config file"),
        ("MODEL: {DEVICE: 1}", "wrong.yaml: Type mismatch.*MODEL.DEVICE"),
        ("MODEL: {DEVISE: cpu}", "wrong.yaml: there is no config key MODEL.DEVISE"),
        ("_BASE_: base.yaml", "wrong.yaml: .*base.yaml"),
    ],
)
def test_wrong_config_files_are_named(tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        train_net.load_config(str(file))
    assert re.search(message, str(error.value), re.DOTALL)


def test_missing_config_file_is_named():
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        train_net.load_config("nowhere.yaml")


def test_the_average_covers_the_trained_parameters_and_loads_one_of_version_0_1():
    torch.manual_seed(0)
    frozen, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(frozen.requires_grad_(False), trained)
    ema = ModelEMA(model, 0.5)
    assert ema.state_dict().keys() == {"1.weight", "1.bias"}
    saved = {"1.weight": torch.ones(2, 2), "1.bias": torch.zeros(2)}
    ema.load_state_dict(saved)
    ema.start()  # what a checkpoint gave is not replaced
    before = copy.deepcopy(model.state_dict())
    with ema.applied():
        assert torch.equal(trained.weight, saved["1.weight"])
        assert torch.equal(frozen.weight, before["0.weight"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ema.update()
    expected = 0.5 * saved["1.weight"] + 0.5 * trained.weight
    torch.testing.assert_close(ema.state_dict()["1.weight"], expected)


@needs_gpu
@pytest.mark.parametrize("precision", ["", "bfloat16", "float16"])
def test_a_gpu_learns_as_a_cpu_does(precision, cfg):
    cfg.MODEL.REGION_HEAD.DROPOUT = 0.0
    expected = train(without_tests(cfg, "cpu")).values
    cfg.MODEL.DEVICE = "cuda"
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = bool(precision), precision or "float16"
    found = train(without_tests(cfg, "cuda")).values
    assert found[0] == pytest.approx(expected[0], rel=0.1 if precision else 1e-2)
    # The scaler of float16 skips steps until it has found its scale.
    if precision != "float16":
        assert found == pytest.approx(expected, rel=0.1)
    assert found.keys() == expected.keys() and all(map(math.isfinite, found.values()))


@needs_gpu
def test_a_gpu_extracts_the_tokens_of_a_cpu(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    tokens = []
    for device in ("cpu", "cuda"):
        localizer = fill_golden(LOCALIZER_REGISTRY.get("SamLocalizer")(cfg)).to(device)
        cache = extract_tokens(cfg, localizer, "shapes", tmp_path / device)
        tokens.append(torch.cat([cache.read(number).float() for number in range(1, 13)]))
    # The cache holds float16, and a GPU resizes images to within one level of 255.
    assert (tokens[1] - tokens[0]).norm() < 0.02 * tokens[0].norm()


@needs_gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_batches_for_a_gpu_come_in_pinned_memory(device, cfg):
    cfg.MODEL.DEVICE = device
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    for loader in (build_train_loader(cfg), build_test_loader(cfg, "shapes")):
        inputs = next(iter(loader))
        assert {x["image"].is_pinned() for x in inputs} == {device == "cuda"}
