"""Models by name and in folders: from_pretrained, save_pretrained and the model zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode

from regionspot_d2 import RegionSpotPredictor, model_zoo
from regionspot_d2.data.datasets.corrections import photos_of
from regionspot_d2.files import WeightsNotFoundError

from .tiny import build_tiny_sam, golden, tiny_cfg, tiny_open_clip

WORDS = ["cat", "dog", "bird"]


@pytest.fixture
def cfg(tiny_models: None, empty_cache: Path, tmp_path: Path) -> CfgNode:
    """Tiny towers whose weights are files of this machine, and a head of random weights."""
    cfg = tiny_cfg()
    for key, tower in (("LOCALIZER", build_tiny_sam()), ("VISION_LANGUAGE", tiny_open_clip())):
        file = tmp_path / f"{key.lower()}.pth"
        torch.save(tower.state_dict(), file)
        cfg.MODEL[key].WEIGHTS = str(file)
    cfg.MODEL.REGION_HEAD.DEPTH = 2
    cfg.MODEL.ZOOM = 1.5
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.fixture
def folder(cfg: CfgNode, tmp_path: Path) -> Path:
    """What ``save_pretrained`` writes."""
    RegionSpotPredictor(cfg, vocabulary=WORDS).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def answers(predictor: RegionSpotPredictor) -> dict[str, torch.Tensor]:
    predictor.set_image(golden()["image"])
    boxes = golden()["boxes"]
    found = predictor.predict(boxes=boxes, topk=3)
    return {
        "scores": found.scores,
        "classes": found.pred_classes,
        "embeddings": predictor.region_embeddings(boxes=boxes),
    }


def assert_same(one: RegionSpotPredictor, other: RegionSpotPredictor) -> None:
    states = [predictor.model.region_head.state_dict() for predictor in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert value.dtype == states[1][key].dtype and torch.equal(value, states[1][key]), key
    first, second = answers(one), answers(other)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_saved_model_is_the_same_to_the_bit(cfg, tmp_path):
    saved = RegionSpotPredictor(cfg, vocabulary=WORDS)
    saved.save_pretrained(tmp_path / "saved")
    loaded = RegionSpotPredictor.from_pretrained(tmp_path / "saved")
    assert loaded.vocabulary == WORDS and loaded.model.zoom == 1.5
    assert_same(saved, loaded)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.yaml", "head.safetensors", "vocabulary.json"):
        first, second = (tmp_path / folder / name for folder in ("saved", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_the_mini_model_is_the_same_to_the_bit(mini_predictor, tmp_path):
    saved = RegionSpotPredictor.from_pretrained("mini", device="cpu", vocabulary=WORDS)
    saved.save_pretrained(tmp_path)
    assert str(Path.home()) not in (tmp_path / "config.yaml").read_text()
    loaded = RegionSpotPredictor.from_pretrained(str(tmp_path), device="cpu")
    assert_same(saved, loaded)
    # It says of itself that it knows the photos of tinycoco.
    photo = {"file_name": "val/000000397133.jpg", "width": 640, "height": 427}
    for note in (each.model.region_head.trained_on for each in (saved, loaded)):
        assert photos_of([photo]) in note["photos"]


@pytest.mark.slow
def test_the_papers_model_is_the_same_to_the_bit(tmp_path, empty_cache):
    cfg = model_zoo.get_config("regionspot_B")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LOCALIZER.WEIGHTS = cfg.MODEL.VISION_LANGUAGE.WEIGHTS = ""
    torch.manual_seed(0)
    saved = RegionSpotPredictor(cfg, vocabulary=WORDS)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)  # the frozen models, whose weights come from no file
    assert_same(saved, RegionSpotPredictor.from_pretrained(tmp_path, device="cpu"))


def test_a_head_trained_further_is_what_is_saved(cfg, tmp_path):
    predictor = RegionSpotPredictor(cfg, vocabulary=WORDS)
    with torch.no_grad():
        for parameter in predictor.model.region_head.parameters():
            parameter.mul_(1.25)
    predictor.save_pretrained(tmp_path / "saved")
    assert_same(predictor, RegionSpotPredictor.from_pretrained(tmp_path / "saved"))


def test_the_config_has_the_model_and_nothing_of_this_machine_but_its_weights(folder, tmp_path):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert set(content) <= {"MODEL", "INPUT", "TEST", "VERSION"}
    assert "DEVICE" not in content["MODEL"] and content["MODEL"]["WEIGHTS"] == "head.safetensors"
    assert content["MODEL"]["REGION_HEAD"] == {"DEPTH": 2, "FFN_DIM": 96}
    assert content["MODEL"]["LOCALIZER"]["WEIGHTS"] == str(tmp_path / "localizer.pth")
    assert json.loads((folder / "vocabulary.json").read_text()) == WORDS


def test_urls_stay_urls(cfg, folder, empty_cache):
    # Where a download would put it.
    cached = empty_cache / "weights" / "example.org" / "sam.pth"
    cached.parent.mkdir(parents=True)
    shutil.copy(cfg.MODEL.LOCALIZER.WEIGHTS, cached)
    cfg.MODEL.LOCALIZER.WEIGHTS = "https://example.org/sam.pth"
    RegionSpotPredictor(cfg).save_pretrained(folder)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert content["MODEL"]["LOCALIZER"]["WEIGHTS"] == "https://example.org/sam.pth"
    assert not (folder / "vocabulary.json").exists()  # of the model that was there before
    RegionSpotPredictor.from_pretrained(folder)


def test_weights_of_another_machine_are_looked_for_in_the_folder(folder, tmp_path):
    here = RegionSpotPredictor.from_pretrained(folder)
    (tmp_path / "localizer.pth").rename(tmp_path / "moved")
    with pytest.raises(WeightsNotFoundError, match="LOCALIZER.*put 'localizer.pth' into the fold"):
        RegionSpotPredictor.from_pretrained(folder)
    (tmp_path / "moved").rename(folder / "localizer.pth")
    (tmp_path / "there").mkdir()
    moved = shutil.move(folder, tmp_path / "there" / "model")
    assert_same(here, RegionSpotPredictor.from_pretrained(moved))


def test_keywords_go_before_what_the_folder_says(folder):
    predictor = RegionSpotPredictor.from_pretrained(
        folder,
        device=torch.device("cpu"),
        precision="bfloat16",
        vocabulary=["cup", "bread"],
        zoom=0,
    )
    assert predictor.vocabulary == ["cup", "bread"] and predictor.model.zoom == 0
    assert predictor.model.precision == "bfloat16"


def set_limit(folder: Path, max_pixels: object) -> None:
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content.setdefault("INPUT", {})["MAX_PIXELS"] = max_pixels
    file.write_text(yaml.safe_dump(content))


def test_a_folder_cannot_raise_the_limit_for_image_files(folder, caplog):
    limit = model_zoo.get_config("mini").INPUT.MAX_PIXELS
    set_limit(folder, 10 * limit)
    predictor = RegionSpotPredictor.from_pretrained(folder)
    assert predictor.max_pixels == limit
    assert "INPUT.MAX_PIXELS 1,200,000,000 in '" in caplog.text and "is ignored" in caplog.text
    set_limit(folder, 1000)
    assert RegionSpotPredictor.from_pretrained(folder).max_pixels == 1000


def test_the_limit_of_this_machine_does_not_travel(cfg, tmp_path):
    cfg.INPUT.MAX_PIXELS *= 10
    predictor = RegionSpotPredictor(cfg)
    assert predictor.max_pixels == cfg.INPUT.MAX_PIXELS  # a config of the user's own
    predictor.save_pretrained(tmp_path / "saved")
    assert "MAX_PIXELS" not in (tmp_path / "saved" / "config.yaml").read_text()


def test_a_repository_on_the_hub_is_a_folder(folder, hub, caplog):
    set_limit(folder, 10**9)
    shutil.copytree(folder, hub("someone/my-regions"), dirs_exist_ok=True)
    here = RegionSpotPredictor.from_pretrained(folder)
    caplog.clear()
    there = RegionSpotPredictor.from_pretrained("someone/my-regions")
    assert there.vocabulary == WORDS and there.max_pixels < 10**9 and "is ignored" in caplog.text
    assert_same(here, there)
    with pytest.raises(WeightsNotFoundError, match="from_pretrained names 'no/such' on the .* hub"):
        RegionSpotPredictor.from_pretrained("no/such")


def test_a_config_file_is_a_model_too(cfg, tmp_path):
    (tmp_path / "model.yaml").write_text(cfg.dump())
    predictor = RegionSpotPredictor.from_pretrained(str(tmp_path / "model.yaml"), zoom=3)
    assert predictor.vocabulary == [] and predictor.model.zoom == 3.0
    predictor.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocabulary.json").exists()


def test_a_predictor_of_a_model_has_no_config_to_save(cfg, tmp_path):
    predictor = RegionSpotPredictor(RegionSpotPredictor(cfg).model)
    with pytest.raises(ValueError, match="no config to write"):
        predictor.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Danger:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "has no config.yaml: a folder of .*save_pretrained is expected"),
        ("config.yaml", b"MODEL: [1", "config.yaml: "),
        ("config.yaml", b"!!python/object/apply:os.getcwd []", "config.yaml: .*getcwd"),
        ("config.yaml", b"MODEL: {NO_SUCH_KEY: 1}", "no config key MODEL.NO_SUCH_KEY"),
        ("config.yaml", b"MODEL: 3", "MODEL is of type int, expected section"),
        ("config.yaml", b"DATASETS: {COCO_FORMAT: []}", "has the key DATASETS; in a folder only"),
        ("config.yaml", b"MODEL: {WEIGHTS: ../head.pkl}", "MODEL.WEIGHTS is '../head.pkl'; head.s"),
        ("config.yaml", b"_BASE_: ../other.yaml", "config.yaml: .*_BASE_; here a config has to be"),
        (
            "config.yaml",
            b"_BASE_: [https://a.b/c.yaml]",
            "config.yaml: .*_BASE_; here a config has",
        ),
        ("config.yaml", b"MODEL: {LOCALIZER: {WEIGHTS: ../a.pth}}", "put 'a.pth' into the folder"),
        ("head.safetensors", None, "has no head.safetensors"),
        ("head.safetensors", Danger, "does not hold a checkpoint, or is damaged"),
        ("vocabulary.json", b'{"cat": 1}', "a list of class names is expected"),
        ("vocabulary.json", b'["cat", 3]', "a list of class names is expected"),
        ("vocabulary.json", b"[", "vocabulary.json is not a json file"),
        ("vocabulary.json", b'["cat", "cat"]', "cat"),
    ],
)
def test_folders_that_are_refused(folder, file, content, message):
    if content is None:
        (folder / file).unlink()
    elif content is Danger:
        torch.save(Danger(), folder / file)
    else:
        (folder / file).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        RegionSpotPredictor.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("LOCALIZER", "NAME", "Sam9", "MODEL.LOCALIZER.NAME is 'Sam9'; it must be one of .*Sam"),
        ("VISION_LANGUAGE", "NAME", "os", "MODEL.VISION_LANGUAGE.NAME is 'os'; it must be one of"),
        ("REGION_HEAD", "NAME", "", "MODEL.REGION_HEAD.NAME is ''; it must be one of"),
        ("NAMING", "TEMPERATURE", 1e-300, "temperature is 1e-300; it must be in"),
    ],
)
def test_values_of_a_folder_that_are_refused(folder, section, key, value, message):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["MODEL"].setdefault(section, {})[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message) as caught:
        RegionSpotPredictor.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "keywords", "message"),
    [
        ("regionspot_l", {}, "no config 'regionspot_l'.* Similar: .*regionspot_L"),
        ("../configs/mini/regionspot_mini", {}, "There is no config"),
        ("mini", {"device": "gpu"}, "MODEL.DEVICE gpu: "),
        ("mini", {"device": "meta"}, "MODEL.DEVICE meta: nothing is computed there"),
        ("mini", {"zoom": "near"}, "ZOOM"),
        ("mini", {"zoom": -1}, "ZOOM"),
        ("mini", {"precision": "half"}, "MODEL.PRECISION is 'half'"),
    ],
)
def test_models_that_do_not_exist(source, keywords, message):
    with pytest.raises(ValueError, match=message) as caught:
        RegionSpotPredictor.from_pretrained(source, **keywords)
    assert "\n" not in str(caught.value)


def test_every_name_of_the_model_zoo_is_that_of_a_model():
    for name in model_zoo.MODELS:
        cfg = model_zoo.get_config(name)
        assert cfg.MODEL.META_ARCHITECTURE == "RegionSpot" and not cfg.is_frozen()
    assert model_zoo.get_config("regionspot_L_336").MODEL.VISION_LANGUAGE.ARCH.startswith("ViT-L")
    assert model_zoo.get_config("published_B").MODEL.VISION_LANGUAGE.RAW_NAMES
    for name in ("eval_lvis_gt", "published/eval_lvis_gt.yaml"):
        assert Path(model_zoo.get_config_file(name)).is_file()
        assert np.all([model_zoo.get_config(name).DATASETS.TEST])
