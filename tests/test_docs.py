"""The documents.

Their Python runs as printed, the options of their commands exist, and so do the files they name.
"""

from __future__ import annotations

import argparse
import functools
import re
import runpy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image

from regionspot_d2 import add_regionspot_config

from .detectors import MASK_RCNN, zoo_cfg
from .documents import COMMANDS, DOCUMENTS, commands, name_of, other_programs, python_blocks
from .tiny_detectors import tiny_detector
from .tools import ROOT

# Programs of shell blocks besides python, make and regionspot, and what they are.
OTHERS = {
    ".venv/bin/activate": "switches to the environment of make setup",
    ".venv/bin/python": "the Python of the environment of make setup",
    "cvat-cli": "CVAT's command, of the package cvat-cli",
    "pip": "Python's installer",
}


@pytest.fixture
def as_a_reader(mini_predictor, tmp_path, monkeypatch) -> dict:
    """The folder and the names that a reader of the examples has."""
    generator = np.random.default_rng(0)
    photo = generator.integers(0, 256, (320, 400, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    # What the examples take from the model hub is a folder here, which has priority.
    folder = tmp_path / "IDEA-Research" / "grounding-dino-tiny"
    folder.mkdir(parents=True)
    tiny_detector("grounding-dino", folder)
    # The zoo's weights are on a model hub; the detector is Detectron2's own, random.
    monkeypatch.setattr(
        "detectron2.model_zoo.get", lambda name, trained: build_model(zoo_cfg(name))
    )
    return {"image": torch.from_numpy(photo).permute(2, 0, 1).flip(0)}


def run(blocks: list[str], names: dict) -> dict:
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    return names


def test_readme(as_a_reader, capsys):
    [block] = python_blocks("README.md")
    run([block], as_a_reader)
    assert re.fullmatch(r"(dog|bicycle) [01]\.\d+\n", capsys.readouterr().out)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "regionspot name --input photo.jpg" in text


def test_getting_started(as_a_reader):
    blocks = python_blocks("GETTING_STARTED.md")
    assert any("wrap(" in block and MASK_RCNN.split("/")[0] in block for block in blocks)
    names = run(blocks, as_a_reader)
    assert len(names["names"]) == 2 and set(names["names"]) <= {"cat", "dog", "sofa"}
    assert len(names["found"]) == 2
    assert names["vectors"].shape == (1, names["predictor"].model.vision_language.text_dim)
    assert [row["image_id"] for row in names["rows"]] == [1, 1]
    expected = names["found"].pred_boxes.tensor.numpy()
    np.testing.assert_allclose(names["detections"].xyxy, expected)
    assert [len(found) for found in names["results"]] == [1, 0]
    found = names["output"]["instances"]
    assert len(found) > 0 and found.has("pred_masks")
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


def test_demo_readme(as_a_reader, capsys):
    run(python_blocks("demo/README.md"), as_a_reader)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and all(re.match(r"(cat|dog|sofa) 0\.\d+", line) for line in lines)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_scripts_and_configs_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (document.parent / target).exists(), f"{document.name} points to {target}"
    for script in re.findall(r"(?<![\w/.-])(?:tools|demo)/[\w/]+\.py|train_net\.py", text):
        assert (ROOT / script).is_file(), f"{document.name} names {script}"
    for config in re.findall(r"(?<![\w/])configs/[\w/]+\.yaml", text):
        assert (ROOT / config).is_file(), f"{document.name} names {config}"


class Parsed(BaseException):
    """Ends a script once it has parsed its command line; no script tells it as an error."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Scripts end with ``Parsed`` as soon as their command line has been parsed."""
    depth = 0

    def outermost_stops(parse):
        @functools.wraps(parse)
        def wrapped(*args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                found = parse(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed(found)
            return found

        return wrapped

    for way in ("args", "known_args", "intermixed_args", "known_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, f"parse_{way}")
        monkeypatch.setattr(argparse.ArgumentParser, f"parse_{way}", outermost_stops(parse))


def parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """What a script's own parser makes of a command line; None if it ends without one."""
    script = ROOT / arguments[0]
    monkeypatch.syspath_prepend(script.parent)  # as ``python script.py`` does
    monkeypatch.setattr("sys.argv", arguments)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Parsed as parsed:
        [found] = parsed.args
        return found[0] if isinstance(found, tuple) else found
    except SystemExit as end:
        if end.code == 0 and "--help" in arguments:
            return None
        raise
    assert len(arguments) == 1, f"{arguments[0]} reads no command line"
    return None


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_options_of_commands_exist(command, stop_after_parsing, monkeypatch, capsys):
    try:
        args = parse(list(command), monkeypatch)
    except SystemExit:
        pytest.fail(capsys.readouterr().err.strip().splitlines()[-1])
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_list(vars(args or argparse.Namespace()).get("opts") or [])


def test_a_wrong_option_is_found(stop_after_parsing, monkeypatch):
    with pytest.raises(SystemExit):
        parse(["tools/prepare_tinycoco.py", "--no-such-option"], monkeypatch)


def test_shell_blocks_are_read_as_bash_reads_them(tmp_path):
    document = tmp_path / "README.md"
    document.write_text(
        "```bash\n"
        "KEYS=\"A.B ['x y']\"\n"
        "python train_net.py \\\n    --resume $KEYS  # a comment\n"
        "make test VENV=here\n"
        "```\n"
        "`tools/check_datasets.py --help` and `demo/demo.py`"
    )
    assert commands(document) == [
        ("python", "train_net.py", "--resume", "A.B", "['x", "y']"),
        ("make", "test", "VENV=here"),
        ("python", "tools/check_datasets.py", "--help"),
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_has_the_targets_and_variables(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    # Through make to the build of Detectron2.
    variables = {"CUDA_HOME", "DETECTRON2_SPEC"}
    variables |= set(re.findall(r"^([A-Z_0-9]+) \?=", makefile, re.MULTILINE))
    for command, *words in commands(document):
        if command == "make":
            named = {word.partition("=")[0] for word in words if "=" in word}
            assert named <= variables
            assert {word for word in words if "=" not in word} <= targets


def test_programs_of_shell_blocks_are_known():
    used = {
        name: other_programs(document) for document in DOCUMENTS for name in [name_of(document)]
    }
    unknown = {name: found - OTHERS.keys() for name, found in used.items() if found - OTHERS.keys()}
    assert not unknown, f"typos, or to be listed in OTHERS: {unknown}"
    assert set().union(*used.values()) == OTHERS.keys(), "OTHERS has some that no document uses"


def test_a_misspelled_program_is_found(tmp_path):
    document = tmp_path / "README.md"
    document.write_text(
        "```bash\nexport A=1\npyhton a.py && make test\nP=regoinspot\n$P name --input a.jpg\n"
        "python b.py | toools/c.py\n```\n```python\nnothing\n```\n`pyp install`"
    )
    assert other_programs(document) == {"pyhton", "regoinspot", "toools/c.py"}
