"""The shell commands of the documents, run in their order in a folder like a reader's.

What cannot be run is listed with its reason.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

import regionspot_cli
from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.engine import load_config
from regionspot_d2.exemplars import Exemplars
from regionspot_d2.model_zoo import MODELS
from regionspot_d2.modeling import RegionSpotHead
from regionspot_d2.modeling.sam import SamLocalizer

from .datasets_on_disk import annotation
from .detectors import FASTER_RCNN, zoo_cfg
from .documents import commands
from .synthetic_lvis import forget
from .tiny import tiny_cfg, tiny_open_clip
from .tiny_detectors import tiny_detector
from .tools import ROOT, load_tool

# What is not run, by the beginnings of the commands, and why. Everything else is, but for make,
# which sets up an environment of its own.
DATA_AND_GPUS = "needs a large dataset, weights from a hub and GPUs"
NOT_RUN = {
    "README.md": {
        "python train_net.py --config-file configs/train_o365_L.yaml": DATA_AND_GPUS,
        "python train_net.py --config-file configs/eval_lvis_glip.yaml": DATA_AND_GPUS,
    },
    "demo/README.md": {
        "python tools/mini/prepare_package_photos.py": "downloads packages",
        "regionspot web": "serves until it is stopped (tests/test_web.py)",
    },
    "GETTING_STARTED.md": {
        "python train_net.py --eval-only --config-file configs/eval_coco_panoptic": DATA_AND_GPUS,
        "python train_net.py --eval-only --config-file configs/eval_ade20k": DATA_AND_GPUS,
        "python tools/extract_tokens.py --config-file configs/train_o365_L.yaml": DATA_AND_GPUS,
        "python train_net.py --config-file configs/train_o365_L.yaml": DATA_AND_GPUS,
        "python tools/extract_tokens.py --config-file configs/towers/": DATA_AND_GPUS,
        "python train_net.py --config-file configs/towers/": DATA_AND_GPUS,
        "regionspot name --vocabulary words.yaml": "is a part of a command",
    },
}
# What is made shorter: two steps instead of a hundred and more, without processes; fewer files.
SHORTER = {
    command: f"{command} SOLVER.MAX_ITER 2 SOLVER.STEPS () DATALOADER.NUM_WORKERS 0"
    for command in (
        "python train_net.py --config-file configs/mini/train_package_photos.yaml",
        "python train_net.py --config-file configs/mini/train_tinycoco.yaml",
    )
}
SHORTER["python -m tests.damaged_files damaged 1000"] = "python -m tests.damaged_files damaged 90"


def write_photos(folder: Path, names: Sequence[str], size: tuple[int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for name in names:
        # Blotches, since noise would look the same everywhere.
        blotches = Image.fromarray(random.randint(0, 256, (4, 5, 3), dtype=np.uint8))
        blotches.resize(size).save(folder / name)


def write_dataset(json_file: Path, folder: Path, ids: Sequence[int]) -> None:
    """Writes a photo for each id, with a cat and a dog, and their annotations in COCO format."""
    names = [f"{number:012}.jpg" for number in ids]
    write_photos(folder, names, (96, 72))
    entries = [
        {"id": number, "file_name": name, "width": 96, "height": 72}
        for number, name in zip(ids, names)
    ]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(coco(entries)))


def coco(images: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a json file in COCO format: a cat and a dog in each image."""
    boxes = [[8.0, 6.0, 40.0, 50.0], [50.0, 20.0, 40.0, 40.0]]
    annotations = [
        annotation(2 * place + category, image["id"], box, category)
        for place, image in enumerate(images)
        for category, box in enumerate(boxes, start=1)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which a reader of the documents stands, with a reader's photos."""
    if "DETECTRON2_DATASETS" in os.environ:
        pytest.skip("DETECTRON2_DATASETS names a folder in which no test may change anything")
    write_photos(tmp_path, ["photo.jpg"], (480, 400))
    write_photos(tmp_path / "photos", ["1.jpg", "2.jpg"], (240, 320))
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    interrupt = signal.getsignal(signal.SIGINT)
    tinycoco = copy.deepcopy(MetadataCatalog["tinycoco"])
    yield tmp_path
    MetadataCatalog["tinycoco"] = tinycoco  # its classes are those of the last file that was read
    signal.signal(signal.SIGINT, interrupt)  # train_net.py changes it
    forget("mine", "package_photos")
    for name in ("detectron2", "fvcore", "regionspot_d2"):
        logging.getLogger(name).handlers.clear()


def run(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit status of a command, run in this process as the shell would in its own."""
    program, *arguments = words
    if program == "regionspot":
        try:
            return regionspot_cli.main(arguments)
        except SystemExit as end:
            return end.code
    with monkeypatch.context() as patch:
        script = ROOT / arguments[0]
        patch.setattr(sys, "argv", arguments)
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            if arguments[0] == "-m":
                patch.setattr(sys, "argv", arguments[1:])
                runpy.run_module(arguments[1], run_name="__main__")
            else:
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


class Runner:
    """Runs commands of the documents in the current folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(
        self, document: str, chosen: Callable[[str], bool] = lambda command: True
    ) -> Iterator[str]:
        """Runs what can be run of a document; yields each command after it was run."""
        exceptions = NOT_RUN[document]
        used = set()
        for words in map(list, commands(ROOT / document)):
            command = " ".join(words)
            reasons = {start for start in exceptions if command.startswith(start)}
            used |= reasons
            if not reasons and words[0] != "make" and chosen(command):
                self.run(command, SHORTER[command].split() if command in SHORTER else words)
                yield command
        unused = set(exceptions) - used
        assert not unused, f"{document} no longer has the commands {unused}"

    def run(self, command: str, words: list[str]) -> None:
        """Runs one; fails if it fails, or if it names and does not name everything."""
        if "demo/boxes.json" in words:
            # ``python demo/photos.py`` stands in a substitution, see documents.py.
            photos = map(str, load_tool("../demo/photos").photo_paths())
            place = words.index("photo.jpg")
            words = [*words[:place], *photos, *words[place + 1 :]]
        self._capfd.readouterr()
        status = run(words, self._monkeypatch)
        printed = self._capfd.readouterr()
        some_fail = command.startswith("python demo/demo.py --input damaged ")
        assert status == (1 if some_fail else 0), f"{command}: {status}\n{printed.err}"
        if words[:2] in (["regionspot", "name"], ["python", "demo/demo.py"]):
            output = words[words.index("--output") + 1] if "--output" in words else "output/demo"
            assert f"In {output}: " in printed.out and Path(output, "results.json").is_file()
            assert (", 0 failed." in printed.out) != some_fail, f"{command}:\n{printed.out}"


@pytest.fixture
def runner(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Runner:
    return Runner(monkeypatch, capfd)


@pytest.fixture
def tiny_configs(
    folder: Path, tiny_models: None, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of models, and the folder's configs/mini/, stand for tiny towers."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "heads").mkdir()
    head = RegionSpotHead(token_dim=32, image_dim=64, text_dim=40, ffn_dim=96)
    save_file(head.state_dict(), folder / "heads" / "regionspot_L_336.safetensors")
    # Of a file, so that the texts that one command has embedded are known to the next.
    torch.save(tiny_open_clip().state_dict(), folder / "clip.pth")
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RANDOM_FLIP = (0,), 0, "none"
    cfg.MODEL.VISION_LANGUAGE.WEIGHTS = str(folder / "clip.pth")
    cfg.MODEL.VISION_LANGUAGE.TEMPLATES = ["{}"]  # 80 sentences for each name take minutes
    (folder / "configs" / "regionspot_L_336.yaml").write_text(cfg.dump())
    cfg.MODEL.REGION_HEAD.NAME = "PooledRegionHead"
    for name in ("mini", "mini_pooled"):
        (folder / "configs" / MODELS[name][0]).write_text(cfg.dump())
    # As with the mini model, regions are what looks alike: the tiny SAM finds none under points.
    monkeypatch.setattr(SamLocalizer, "masks_are_fine", False)
    monkeypatch.setattr(
        "regionspot_d2.engine.config.get_config_file",
        lambda name: str(folder / "configs" / MODELS[name][0]),
    )


@pytest.fixture
def detectors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What detectors have of hubs is in the folder, or random."""
    cfg = zoo_cfg(FASTER_RCNN)
    cfg.INPUT.MIN_SIZE_TEST = 160
    (folder / "mine").mkdir()
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "mine" / "model_final.pth")
    (folder / "mine" / "config.yaml").write_text(cfg.dump())
    zoo = "detectron2.model_zoo"
    monkeypatch.setattr(f"{zoo}.get_config_file", lambda name: str(folder / "mine" / "config.yaml"))
    monkeypatch.setattr(
        f"{zoo}.get_checkpoint_url", lambda name: str(folder / "mine" / "model_final.pth")
    )
    small = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    monkeypatch.setattr(
        "regionspot_d2.detection.fixed_classes.get_model",
        lambda name, weights: get_model(name, **small),
    )
    hub = folder / "IDEA-Research" / "grounding-dino-tiny"
    hub.mkdir(parents=True)
    tiny_detector("grounding-dino", hub)


@pytest.mark.usefixtures("tiny_configs")
def test_readme(runner: Runner) -> None:
    assert len(list(runner("README.md"))) >= 2


@pytest.mark.usefixtures("tiny_configs", "detectors")
def test_demo_readme(folder: Path, runner: Runner) -> None:
    for package in ("trackers", "transformers"):
        pytest.importorskip(package)
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 240, "height": 320} for n in (1, 2)]
    (folder / "instances_val2017.json").write_text(json.dumps(coco(images)))
    rows = [f"{n}.jpg,10,20,200,300,0.{n}\n" for n in (1, 2)]
    (folder / "boxes.csv").write_text("".join(["file_name,x0,y0,x1,y1,score\n", *rows]))
    write_photos(folder / "logos" / "our logo", ["1.jpg"], (64, 64))
    write_dataset(folder / "logos.json", folder, [7])
    cfg = load_config(f"configs/{MODELS['mini'][0]}", [], training=False)
    examples = Exemplars(RegionSpotPredictor(cfg))
    examples.add("our logo", "photo.jpg", boxes=[10, 20, 200, 300])
    examples.save("logos.safetensors")
    labels = folder / "runs" / "detect" / "labels"
    labels.mkdir(parents=True)
    for n in (1, 2):
        (labels / f"{n}.txt").write_text("0 0.5 0.5 0.25 0.4 0.9\n")
    writer = cv2.VideoWriter("street.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (240, 320))
    for _ in range(6):
        writer.write(cv2.imread("photos/1.jpg"))
    writer.release()
    photos = folder / "output" / "package_photos" / "labelled"
    write_dataset(photos / "instances.json", photos / "images", range(1, 5))
    for command in runner("demo/README.md"):
        words = command.split()
        if "--compare" in words:
            output = Path(words[words.index("--output") + 1])
            [picture, *_] = sorted(output.glob("*.*g"))
            other = Path(words[words.index("--compare") + 1]).with_name(picture.name)
            assert Image.open(picture).width > 1.5 * Image.open(other).width
    videos = ["video/street.avi.mp4", "tracks/street.avi.mp4"]
    for name in [*videos, "attention/coffee.png.attention.png"]:
        assert (folder / "output" / name).is_file()


def is_evaluation(command: str) -> bool:
    """Whether it is of the part of GETTING_STARTED.md about evaluation on tinycoco."""
    return "tinycoco" in command and "train_tinycoco" not in command


def test_getting_started_evaluates_the_mini_model(
    folder: Path, runner: Runner, mini_predictor: RegionSpotPredictor
) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    ids = load_tool("prepare_tinycoco").IMAGE_IDS
    val = folder / "datasets" / "coco"
    write_dataset(val / "annotations" / "instances_val2017.json", val / "val2017", [*ids, 1])
    for command in runner("GETTING_STARTED.md", is_evaluation):
        if "prepare_tinycoco" in command:
            path = folder / "datasets" / "tinycoco" / "instances.json"
            images = json.loads(path.read_text())["images"]
            assert {image["id"] for image in images} == set(ids)
            # Two are enough for what follows.
            path.write_text(json.dumps(coco(images[:2])))
    output = folder / "output"
    for run_of in ("gt", "sam"):
        table = (output / "mini" / f"eval_tinycoco_{run_of}" / "results_table.md").read_text()
        assert "tinycoco" in table
    assert len(list((output / "pictures").glob("*.jpg"))) == 2


@pytest.mark.usefixtures("tiny_configs")
def test_getting_started(folder: Path, runner: Runner) -> None:
    write_dataset(folder / "data" / "mine.json", folder / "data" / "images", [1, 2])
    write_dataset(folder / "val.json", folder / "images", range(1, 7))
    tinycoco = folder / "datasets" / "tinycoco"
    write_dataset(tinycoco / "instances.json", tinycoco / "images", range(1, 5))
    options = ["MODEL.WEIGHTS", "heads/regionspot_L_336.safetensors"]
    cfg = load_config("configs/regionspot_L_336.yaml", options, training=False)
    RegionSpotPredictor(cfg, vocabulary=["cat", "dog"]).save_pretrained("my_model")
    run = list(runner("GETTING_STARTED.md", lambda command: not is_evaluation(command)))
    assert "regionspot models" in run
    for name in (
        "reliability.png",
        "my_model/head.calibration.json",
        "output/mini/train_tinycoco/model_final.pth",
        "output/search/bicycle.jpg",
        "output/onnx/model.json",
    ):
        assert (folder / name).is_file()


def test_what_is_not_run_or_made_shorter_is_in_a_document(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    documented = {" ".join(words) for name in NOT_RUN for words in commands(ROOT / name)}
    assert SHORTER.keys() <= documented
    for document in NOT_RUN:
        assert list(runner(document, lambda command: False)) == []
    monkeypatch.setitem(NOT_RUN["README.md"], "python gone.py", "is no longer there")
    with pytest.raises(AssertionError, match="README.md no longer has the commands .*gone.py"):
        list(runner("README.md", lambda command: False))
