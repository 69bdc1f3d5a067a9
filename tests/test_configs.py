"""Every config: its model is built, of tiny towers, and what it names exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from regionspot_d2 import add_regionspot_config
from regionspot_d2.engine import build_optimizer
from regionspot_d2.files import WeightsNotFoundError
from regionspot_d2.modeling import LOCALIZER_REGISTRY
from regionspot_d2.modeling.open_clip_entries import published_settings
from regionspot_d2.modeling.vocabulary import dataset_stuff_classes

from .tools import ROOT, load_tool

CONFIGS = ROOT / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
TRAINING = [name for name in FILES if Path(name).name.startswith("train_") or "ablations" in name]
PUBLISHED = [name for name in FILES if name.startswith("published/")]
TOWERS = [name for name in FILES if name.startswith("towers/")]
PANOPTIC = [name for name in FILES if Path(name).name.endswith("_panoptic.yaml")]
EVALUATION = [
    name for name in FILES if Path(name).name.startswith("eval_") and name not in PANOPTIC
]


def read(name: str) -> CfgNode:
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def with_tiny_towers(cfg: CfgNode) -> CfgNode:
    cfg.MODEL.DEVICE = "cpu"
    for key, name in (("LOCALIZER", "SamLocalizer"), ("VISION_LANGUAGE", "OpenClip")):
        cfg.MODEL[key].NAME = name
        cfg.MODEL[key].ARCH = "tiny"
        cfg.MODEL[key].WEIGHTS = ""
    return cfg


def own_data(cfg: CfgNode) -> set[str]:
    return {entry[0] for entry in cfg.DATASETS.COCO_FORMAT}


@pytest.mark.parametrize("name", FILES)
def test_builds_its_model(name, tiny_models, empty_cache):
    cfg = with_tiny_towers(read(name))
    model = build_model(cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    head = cfg.MODEL.REGION_HEAD
    assert type(model.region_head).__name__ == head.NAME
    if head.NAME == "RegionSpotHead":
        assert len(model.region_head.decoder.layers) == head.DEPTH
        assert model.region_head.to_clip.in_features == model.localizer.token_dim
        assert model.localizer.token_dim == 32 * (2 if cfg.MODEL.LOCALIZER.TOKENS == "both" else 1)
    if name in TRAINING:
        optimizer = build_optimizer(cfg, model)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained) > 0


@pytest.mark.parametrize("name", FILES)
def test_names_what_exists(name):
    import open_clip
    from segment_anything import sam_model_registry

    cfg = read(name)
    known = set(DatasetCatalog.list()) | own_data(cfg)
    assert set(cfg.DATASETS.TRAIN) | set(cfg.DATASETS.TEST) <= known
    if cfg.DATASETS.TRAIN_RATIOS:
        assert len(cfg.DATASETS.TRAIN_RATIOS) == len(cfg.DATASETS.TRAIN)
    if name in TOWERS:
        return
    if cfg.MODEL.LOCALIZER.NAME == "SamLocalizer":
        assert cfg.MODEL.LOCALIZER.ARCH in sam_model_registry
        assert f"/sam_{cfg.MODEL.LOCALIZER.ARCH}_" in cfg.MODEL.LOCALIZER.WEIGHTS
    if cfg.MODEL.VISION_LANGUAGE.NAME == "OpenClip":
        arch = cfg.MODEL.VISION_LANGUAGE.ARCH
        model = open_clip.get_model_config(arch)
        official = open_clip.get_pretrained_url(arch.removesuffix("-quickgelu"), "openai")
        assert cfg.MODEL.VISION_LANGUAGE.WEIGHTS == official
        if cfg.INPUT.TOKEN_CACHE:
            assert cfg.INPUT.CACHED_IMAGE_SIZE == model["vision_cfg"]["image_size"]


@pytest.mark.parametrize("name", TOWERS)
def test_other_towers(name):
    cfg = read(name)
    vision_language = cfg.MODEL.VISION_LANGUAGE
    entry = published_settings(vision_language.ARCH, vision_language.WEIGHTS)
    assert entry["hf_hub"] and entry["interpolation"]  # open_clip knows the weights
    assert cfg.MODEL.LOCALIZER.NAME in LOCALIZER_REGISTRY
    if cfg.MODEL.LOCALIZER.NAME == "TransformersSam":
        assert not cfg.MODEL.LOCALIZER.WEIGHTS
    # Workers of the loader resize in the published way only.
    assert cfg.DATASETS.TRAIN and cfg.INPUT.TOKEN_CACHE and not cfg.INPUT.CACHED_IMAGE_SIZE
    assert cfg.OUTPUT_DIR.endswith(Path(name).stem)


@pytest.mark.parametrize("name", TRAINING)
def test_training_configs(name):
    cfg = read(name)
    assert cfg.DATASETS.TRAIN
    assert max(cfg.SOLVER.STEPS, default=0) < cfg.SOLVER.MAX_ITER
    # Runs do not overwrite each other's output or share tokens of different kinds.
    assert cfg.OUTPUT_DIR.endswith(Path(name).stem)
    # An adapter reads no mask tokens.
    if not name.startswith("mini") and cfg.MODEL.REGION_HEAD.NAME != "AdapterRegionHead":
        sam, kind = cfg.MODEL.LOCALIZER.ARCH, cfg.MODEL.LOCALIZER.TOKENS
        suffix = "" if kind == "mask" else f"_{kind}"
        assert cfg.INPUT.TOKEN_CACHE.endswith(f"mask_tokens/sam_{sam}{suffix}")


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_configs(name):
    cfg = read(name)
    assert cfg.MODEL.LOAD_PROPOSALS
    files = cfg.DATASETS.PROPOSAL_FILES_TEST
    assert len(files) == len(cfg.DATASETS.TEST) > 0
    source = Path(name).stem.rpartition("_")[2]
    for dataset, file in zip(cfg.DATASETS.TEST, files):
        if source in ("gt", "odinw13"):
            assert file == f"ground_truth://{dataset}"
        else:
            assert file == f"$DETECTRON2_DATASETS/proposals/{dataset}_{source}.pkl"
    # Tokens are of the original images, which the frozen models resize themselves. The published
    # code resizes them first.
    assert cfg.INPUT.MIN_SIZE_TEST == (800 if name in PUBLISHED else 0)
    if not name.startswith("mini"):
        assert len(cfg.DATASETS.HEAD_TRAINED_ON) == 3
        assert set(cfg.DATASETS.HEAD_TRAINED_ON) <= set(DatasetCatalog.list())


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_configs(name):
    cfg = read(name)
    assert cfg.MODEL.META_ARCHITECTURE == "PanopticRegionSpot" and not cfg.MODEL.LOAD_PROPOSALS
    [dataset] = cfg.DATASETS.TEST
    assert dataset_stuff_classes(dataset)
    assert cfg.OUTPUT_DIR == f"output/{Path(name).stem}"


@pytest.mark.parametrize("stage", ["train_o365_{}.yaml", "train_o365_v3det_openimages_{}.yaml"])
@pytest.mark.parametrize("size", ["B", "L", "L_336"])
def test_published_schedule(stage, size):
    cfg = read(stage.format(size))
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.IMS_PER_BATCH) == (2.5e-5, 1e-4, 16)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 0.01)
    assert (solver.MAX_ITER, solver.STEPS) == (450_000, (350_000, 420_000))
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE) == (
        True,
        "full_model",
        1.0,
        2.0,
    )
    assert solver.AMP.ENABLED and not cfg.MODEL.EMA.ENABLED
    head = cfg.MODEL.REGION_HEAD
    assert (head.DEPTH, head.NUM_HEADS, head.FFN_DIM, head.DROPOUT) == (3, 8, 2048, 0.1)
    assert (head.FOCAL_ALPHA, head.FOCAL_GAMMA) == (0.25, 2.0)
    assert cfg.SEED == 40244023
    if "v3det" in stage:
        assert cfg.MODEL.WEIGHTS == f"output/train_o365_{size}/model_final.pth"
        assert read(f"train_o365_{size}.yaml").OUTPUT_DIR == f"output/train_o365_{size}"


def flat(node: CfgNode, prefix: str = "") -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in node.items():
        values |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value}
        )
    return values


def differences(one: str, other: str) -> set[str]:
    """The keys in which two configs differ."""
    first, second = flat(read(one)), flat(read(other))
    return {key for key in first if first[key] != second[key]}


def test_every_published_config_is_ours_with_the_published_switches():
    switches = differences("Base-RegionSpot.yaml", "published.yaml")
    assert len(switches) >= 16
    for name in PUBLISHED:
        own = {"OUTPUT_DIR", "MODEL.WEIGHTS"} if "v3det" in name else {"OUTPUT_DIR"}
        assert differences(name.removeprefix("published/"), name) == switches | own
        assert read(name).OUTPUT_DIR == f"output/published/{Path(name).stem}"
    models = [f"regionspot_{size}.yaml" for size in ("B", "L", "L_336")]
    ours = {f"published/{name}" for name in EVALUATION + TRAINING + models if "/" not in name}
    # Nothing is known of how the published code trained on LVIS.
    assert set(PUBLISHED) == ours - {"published/train_vild_RN50.yaml"}


@pytest.mark.parametrize("size", ["B", "L", "L_336"])
def test_the_second_published_stage_starts_from_the_first(size):
    first, second = (
        read(f"published/train_o365_{data}{size}.yaml") for data in ("", "v3det_openimages_")
    )
    assert second.MODEL.WEIGHTS == f"{first.OUTPUT_DIR}/model_final.pth"
    assert second.DATASETS.TRAIN_RATIOS == [1, 1, 1] and second.INPUT.TOKEN_CACHE


def test_ablations_are_trained_on_all_data_of_the_paper():
    standard = "ablations/standard.yaml"
    full = "published/train_o365_v3det_openimages_L.yaml"
    assert differences(full, standard) == {"OUTPUT_DIR", "MODEL.WEIGHTS"}
    # Their heads have other sizes than those of a first stage.
    assert read(standard).MODEL.WEIGHTS == ""


@pytest.mark.parametrize(
    "name",
    [name for name in TRAINING if name.startswith("ablations") and "standard" not in name],
)
def test_an_ablation_changes_one_thing(name):
    different = differences("ablations/standard.yaml", name)
    of_the_localizer = {"MODEL.LOCALIZER.ARCH", "MODEL.LOCALIZER.WEIGHTS", "INPUT.TOKEN_CACHE"}
    assert "OUTPUT_DIR" in different
    assert len(different - {"OUTPUT_DIR"} - of_the_localizer) <= 1
    assert len(different) > 1


@pytest.mark.parametrize("name", FILES)
def test_unknown_keys_are_refused(name, tmp_path):
    text = {"_BASE_": str(CONFIGS / name), "MODEL": {"REGION_HEAD": {"DEPHT": 2}}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(text))
    with pytest.raises(KeyError, match="MODEL.REGION_HEAD.DEPHT"):
        cfg = get_cfg()
        add_regionspot_config(cfg)
        cfg.merge_from_file(str(file))


def test_embedded_models_train():
    cfg = read("mini/train_tinycoco.yaml")
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = build_model(cfg)
    except WeightsNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == sum(p.numel() for p in model.region_head.parameters())


@pytest.mark.parametrize("name", ["train_tinycoco", "train_demo_quick"])
def test_tokens_can_be_extracted_with_a_config_that_evaluates_too(name, tmp_path, monkeypatch):
    extract_tokens = load_tool("extract_tokens")
    asked = {}
    monkeypatch.setattr(extract_tokens, "launch", lambda *_, args, **__: asked.update(cfg=args[1]))
    # The data need not be there.
    monkeypatch.setattr("regionspot_d2.engine.config.register_coco_format", lambda entries: None)
    monkeypatch.setattr("regionspot_d2.engine.config.check_datasets", lambda key, names: None)
    file = str(CONFIGS / "mini" / f"{name}.yaml")
    extract_tokens.invoke_main(["--config-file", file, "--output", str(tmp_path)])
    assert asked["cfg"].INPUT.TOKEN_CACHE == str(tmp_path)
    assert asked["cfg"].DATASETS.TRAIN == asked["cfg"].DATASETS.TEST
