"""Files that somebody made to do harm, or that bad luck made: no code runs, one line is told."""

from __future__ import annotations

import json
import os
import pickle
import stat
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.engine import ConfigError, load_config
from regionspot_d2.engine.config import merge_config_file, told_in_a_line
from regionspot_d2.files import WeightsNotFoundError, fingerprint, local_weights, private_folder
from regionspot_d2.modeling import RegionSpotHead
from regionspot_d2.modeling.vocabulary import TextEmbedder
from regionspot_d2.safe_loading import load_pickle, read_yaml

from .datasets_on_disk import write_coco

KEY = "MODEL.WEIGHTS"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.region_head = RegionSpotHead(
            token_dim=12, image_dim=16, text_dim=10, depth=1, num_heads=4, ffn_dim=24
        )


# Pickles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.pt", "w.pyth", "w.safetensors", "w"])
@pytest.mark.parametrize("writer", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_weights_run_nothing(tmp_path, monkeypatch, name, writer, force):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    state = {"x": np.zeros(2), "y": Payload(tmp_path / "ran")}
    for content in (Payload(tmp_path / "ran"), {"model": state, "__author__": "me"}, [state]):
        with open(tmp_path / name, "wb") as file:
            writer(content, file)
        with pytest.raises(ValueError, match=name) as error:
            RegionSpotCheckpointer(Model()).load(str(tmp_path / name))
        assert "\n" not in str(error.value) and "weights_only=False" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_pickles_run_nothing_and_plain_ones_are_read(tmp_path):
    path = tmp_path / "boxes.pkl"
    boxes = {"boxes": [np.ones((3, 4), np.float32)], "ids": [1], "bbox_mode": 1}
    path.write_bytes(pickle.dumps({**boxes, "ids": [Payload(tmp_path / "ran")]}))
    with pytest.raises(ValueError, match="boxes.pkl' is not safe to open: it asks for posix.mkdir"):
        load_pickle(path)
    assert not (tmp_path / "ran").exists()
    for protocol in range(5):
        path.write_bytes(pickle.dumps(boxes, protocol))
        assert np.array_equal(load_pickle(path)["boxes"][0], boxes["boxes"][0])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="boxes.pkl' is not a file"):
        load_pickle(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x08\0\0\0punycode\x86R.", "encoding 'punycode'"),
        (b"\x80\x02c__builtin__\nbytes\n\x8a\x05\0\0\0\0\x02\x85R.", "damaged: TypeError"),
    ],
)
def test_pickles_do_no_work_of_their_own(tmp_path, content, message):
    (tmp_path / "boxes.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pickle(tmp_path / "boxes.pkl")


def test_pickles_with_a_huge_memo_take_no_memory(tmp_path):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="is not a pickle, or damaged: .*numbers an object"):
        load_pickle(path)


def test_pickles_of_bytes(tmp_path):
    for protocol in range(5):
        (tmp_path / "b.pkl").write_bytes(pickle.dumps([b"", b"\xff\0a"], protocol))
        empty, some = load_pickle(tmp_path / "b.pkl")
        assert (empty, some) == (b"", b"\xff\0a")


@pytest.mark.parametrize(
    "content",
    [b"", b"../evil.pkl", b"/etc/passwd", b"..", b"no.pth", b"\xff\x00", b"link.pth", b"x" * 999],
)
def test_last_checkpoint_names_a_file_of_its_folder(tmp_path, content):
    folder = tmp_path / "output"
    RegionSpotCheckpointer(Model(), str(folder)).save("model", iteration=1)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (folder / "link.pth").symlink_to(tmp_path / "evil.pkl")
    (folder / "last_checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match="last_checkpoint' is damaged.*model.pth.*--resume"):
        RegionSpotCheckpointer(Model(), str(folder)).resume_or_load("", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_models(tmp_path, prefix):
    trained, model = Model(), Model()
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    RegionSpotCheckpointer(model).load(str(tmp_path / "model.pth"))
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_the_authors_checkpoint_is_to_be_converted(tmp_path):
    state = {f"module.model.{k}": v for k, v in Model().region_head.state_dict().items()}
    torch.save(state | {"module.model.sam.x": torch.ones(1)}, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="tools/convert_checkpoint.py .*raw.pth"):
        RegionSpotCheckpointer(Model()).load(str(tmp_path / "raw.pth"))


# Yaml ---------------------------------------------------------------------------------------------

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL: {WEIGHTS: !!python/object/apply:os.mkdir [ran]}", "tag .*os.mkdir"),
        ("MODEL: {WEIGHTS: !!python/object/new:os.mkdir [ran]}", "tag .*os.mkdir"),
        ('MODEL: !!python/object/apply:eval [\'__import__("os").mkdir("ran")\']', "asks for eval"),
        ("MODEL: !!python/object/apply:eval {args: ['1']}", "asks for eval"),
        ("MODEL: !!python/name:os.mkdir", "tag"),
        ("MODEL: !own 1", "tag '!own'"),
        ("", "holds nothing"),
        ("~", "holds nothing"),
        ("5", "holds one int"),
        ("[1]", "holds one list"),
        ("text", "holds one str"),
        ("MODEL: null", "MODEL is of type NoneType, expected section"),
        ("MODEL: {LOCALIZER: null}", "LOCALIZER is of type NoneType"),
        ("MODEL: {WEIGHTS: null}", "MODEL.WEIGHTS is null"),
        ("MODEL: 5", "MODEL is of type int"),
        ("[" * 200_000, "nested too deeply"),
        ("MODEL: " + "{a: " * 200_000, "nested too deeply"),
        (f"SOLVER: {{IMS_PER_BATCH: {'9' * 400}}}", "IMS_PER_BATCH is 999"),
        (f"SOLVER: {{IMS_PER_BATCH: {'9' * 5000}}}", "limit"),
        (f"SOLVER: {{IMS_PER_BATCH: {'1:' * 300_000}1}}", "limit"),
        ("MODEL: {DEVICE: cpu}\nSEED: 1\nMODEL: {MASK_ON: True}", "key 'MODEL' is there 2 times"),
        ("SOLVER: {BASE_LR: .nan}", "BASE_LR is nan"),
        ("SOLVER: {BASE_LR: -.inf}", "BASE_LR is -inf"),
        (LAUGHS, "more than 100000 values"),
        (LAUGHS.replace("[*", "{<<: [*").replace("]\n", "]}\n"), "more than|line"),
        ("MODEL: &a {X: *a}", "more than 100000 values"),
        ("{[a]: 1}", "unhashable"),
        ("1: 2", "key 1 is not text"),
        ("_BASE_: config.yaml", "back to itself"),
        ("_BASE_: 5", "_BASE_ holds 5"),
        ("_BASE_: null", "_BASE_ holds None"),
        ("DATASETS: {TEST: [[1]]}", "expected names of datasets"),
        ("\0", "special characters"),
        ("#" * 1_000_001, "no config"),
    ],
)
def test_yaml_is_plain_and_bounded(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    Path("outer.yaml").write_text("_BASE_: ./config.yaml")
    for name in ("config.yaml", "outer.yaml"):
        with pytest.raises(ConfigError, match=message) as error:
            load_config(name, training=False)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not Path("ran").exists()


def test_bases_that_multiply_are_refused(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]")
    (tmp_path / "40.yaml").write_text("SEED: 1")
    with pytest.raises(ValueError, match="_BASE_ leads to more than 100 configs"):
        read_yaml(str(tmp_path / "0.yaml"))
    assert read_yaml(str(tmp_path / "36.yaml")) == {"SEED": 1}


def test_configs_that_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfMODEL: {MASK_ON: True}")
    (tmp_path / "top.yaml").write_text("_BASE_: [~/bom.yaml]\nSEED: 3")
    cfg = load_config("~/top.yaml", training=False)
    assert cfg.MODEL.MASK_ON and cfg.SEED == 3


def test_configs_of_the_model_zoo_are_read_as_detectron2_reads_them():
    from detectron2 import model_zoo

    for name in (
        "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
        "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    ):
        expected, cfg = get_cfg(), get_cfg()
        expected.merge_from_file(model_zoo.get_config_file(name))
        merge_config_file(cfg, model_zoo.get_config_file(name))
        assert cfg == expected


@pytest.mark.parametrize("value", ["None", "5", "[1]", "x", "[" * 10_000])
def test_options_that_do_not_fit(value):
    with pytest.raises(ConfigError, match="the options: .*MODEL"):
        load_config("", ["MODEL", value], training=False)


def test_evaluation_without_proposals_is_told_at_once(tmp_path):
    json_file, images = write_coco(tmp_path)
    own = ["DATASETS.COCO_FORMAT", f"[['eval_me', '{json_file}', '{images}']]"]
    own += ["DATASETS.TEST", "('eval_me',)", "MODEL.META_ARCHITECTURE", "RegionSpot"]
    try:
        with pytest.raises(ConfigError, match="MODEL.LOAD_PROPOSALS is False.*ground_truth://"):
            load_config("", own, training=False, testing=True)
    finally:
        DatasetCatalog.remove("eval_me")
        MetadataCatalog.remove("eval_me")


# Downloads and the cache --------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        if self.path.startswith("/slow"):
            for byte in b"bytes":  # each in time, all of them too slow
                time.sleep(0.3)
                self.wfile.write(bytes([byte]))
        elif self.path.startswith("/silent"):
            time.sleep(2)
        elif "yaml" in self.path:
            self.wfile.write(b"!!x 5")
        else:
            self.wfile.write(b"bytes")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "name",
    [
        "/../../../evil.pth",
        "/a/..%2f..%2f..%2fevil.pth",
        "/%2e%2e/%2e%2e/evil.pth",
        "/..",
        "/.",
        "/",
        "",
        "//etc/evil.pth",
        "/a%00b.pth",
        "/..\\..\\evil.pth",
        "/" + "x" * 3000,
        "/a" * 2000,
        "/a.pth?x=../../evil",
        "/a.pth#../../evil",
        "/a;b=c",
        "/\N{SNOWMAN}.pth",
        "/a b.pth",
    ],
)
def test_the_name_of_a_url_stays_in_the_cache(url, empty_cache, tmp_path, name):
    before = set(tmp_path.rglob("*"))
    for load in (local_weights, lambda url, _: PathManager.get_local_path(url)):
        try:
            path = Path(load(url + name, KEY))
        except WeightsNotFoundError:  # what is not a URL at all
            continue
        assert path.resolve().is_relative_to(empty_cache / "weights")
        assert path.read_bytes() == b"bytes"
        assert len(path.name) < 120
    outside = set(tmp_path.rglob("*")) - before - {empty_cache}
    assert all(path.is_relative_to(empty_cache / "weights") for path in outside)


@pytest.mark.parametrize(
    "address, reason",
    [
        ("/slow", "stalled|timed out"),
        ("/silent", "timed out"),
        ("/redirect", "redirect|not allowed"),
    ],
)
def test_downloads_that_stall_or_lead_elsewhere(url, empty_cache, monkeypatch, address, reason):
    monkeypatch.setenv("REGIONSPOT_DOWNLOAD_TIMEOUT", "0.5")
    with pytest.raises(WeightsNotFoundError, match=reason):
        local_weights(f"{url}{address}/w.pth", KEY)
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "value", ["a\0b", "http://[", "http://a\0b/c", "http://", "file:///etc", "x" * 9999]
)
def test_values_that_are_no_place(value, empty_cache):
    with pytest.raises(WeightsNotFoundError, match=KEY):
        local_weights(value, KEY)


def test_a_base_from_a_url_is_plain_yaml_too(url, empty_cache, tmp_path):
    (tmp_path / "top.yaml").write_text(f"_BASE_: {url}/base.yaml")
    with pytest.raises(ConfigError, match="tag"):
        load_config(str(tmp_path / "top.yaml"), training=False)


def test_the_cache_is_private(url, empty_cache, tmp_path):
    local_weights(f"{url}/a/w.pth", KEY)
    for folder in (empty_cache, *(path for path in empty_cache.rglob("*") if path.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    empty_cache.chmod(0o777)
    with pytest.raises(WeightsNotFoundError, match="Others can change '.*cache'.*chmod 700"):
        local_weights(f"{url}/a/w.pth", KEY)
    empty_cache.chmod(0o755)
    local_weights(f"{url}/a/w.pth", KEY)
    # Neither a folder nor a file of it may be a link.
    (empty_cache / "weights").rename(tmp_path / "elsewhere")
    (empty_cache / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="links in the cache are not followed"):
        private_folder(empty_cache / "weights")
    with pytest.raises(WeightsNotFoundError, match="links in the cache are not followed"):
        local_weights(f"{url}/a/w.pth", KEY)


# Vocabularies -------------------------------------------------------------------------------------


class Words(SimpleNamespace):
    """Encodes a text as (letters, words, 1) and counts the texts it has seen."""

    def __init__(self) -> None:
        super().__init__(fingerprint="a", templates=("{}",), text_dim=3, seen=[])

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        return torch.tensor([[len(t), len(t.split()), 1.0] for t in texts])


def rewrite(path: Path, embeddings: torch.Tensor) -> None:
    """Writes other rows under the same key, with a checksum that fits them."""
    with safe_open(path, "pt") as file:
        content = file.metadata()
    content["sha256"] = fingerprint([("embeddings", embeddings)])
    save_file({"embeddings": embeddings}, path, content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def rename(path: Path) -> None:
    with safe_open(path, "pt") as file:
        content = file.metadata()
    content["key"] = json.dumps(["a", ["{}"], ["dog", "cat"]])
    save_file(load_file(path), path, content)


DAMAGES = {
    "a flipped bit": flip,
    "a cut header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "a cut end": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "nothing": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 1000),
    "a huge header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x00{}"),
    "other names": rename,
    "no key": lambda path: save_file(load_file(path), path),
    "another tensor": lambda path: save_file({"x": torch.ones(2, 3)}, path),
    "zero rows": lambda path: rewrite(path, torch.zeros(2, 3)),
    "NaN": lambda path: rewrite(path, torch.full((2, 3), float("nan"))),
    "other lengths": lambda path: rewrite(path, torch.ones(2, 3)),
    "half precision": lambda path: rewrite(path, load_file(path)["embeddings"].half()),
    "integers": lambda path: rewrite(path, torch.eye(3, dtype=torch.int64)[:2]),
    "fewer rows": lambda path: rewrite(path, load_file(path)["embeddings"][:1].clone()),
    "another width": lambda path: rewrite(path, torch.eye(4)[:2]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_vocabulary_is_made_again(tmp_path, caplog, damage):
    expected = TextEmbedder(Words(), tmp_path)(["cat", "big dog"])
    [path] = tmp_path.iterdir()
    DAMAGES[damage](path)
    again = Words()
    assert torch.equal(TextEmbedder(again, tmp_path)(["cat", "big dog"]), expected)
    assert again.seen == ["cat", "big dog"]
    assert "vocabulary cache" in caplog.text


def test_swapped_vocabularies_are_noticed(tmp_path):
    first = TextEmbedder(Words(), tmp_path)(["cat", "big dog"])
    TextEmbedder(Words(), tmp_path)(["big dog", "cat"])
    one, two = tmp_path.iterdir()
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert torch.equal(TextEmbedder(Words(), tmp_path)(["cat", "big dog"]), first)


def test_names_with_line_breaks_are_not_two_names(tmp_path):
    # clean_name joins them by a space; templates may hold any character.
    two = Words()
    two.templates = ("{}", "a\n{}")
    TextEmbedder(two, tmp_path)(["cat"])
    other = Words()
    other.templates = ("{}\na", "{}")
    TextEmbedder(other, tmp_path)(["cat"])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    folder = tmp_path / "file"
    folder.write_text("")
    assert TextEmbedder(Words(), folder / "vocabularies")(["cat"]).shape == (1, 3)
    assert "cannot be used" in caplog.text


# Errors of processes ------------------------------------------------------------------------------


def fails(rank: int, kind: type[Exception]) -> None:
    raise kind("INPUT.X is wrong:\n  file: a")


@pytest.mark.parametrize("kind, start", [(ValueError, ""), (RuntimeError, "RuntimeError: ")])
def test_an_error_of_a_process_is_told_in_a_line(kind, start):
    with pytest.raises(SystemExit) as error, told_in_a_line("tool.py"):
        torch.multiprocessing.spawn(fails, (kind,))
    assert str(error.value) == f"tool.py: {start}INPUT.X is wrong:\n  file: a"


def test_an_error_of_a_loader_is_told_in_a_line():
    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> None:
            raise ValueError("no image")

    with pytest.raises(SystemExit, match="^tool.py: no image$"), told_in_a_line("tool.py"):
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
