"""Command lines: help and mistakes are told at once, in one line, without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

import regionspot_cli
from regionspot_d2.app.formats import FORMATS
from regionspot_d2.data.datasets.vocabularies import VOCABULARIES
from regionspot_d2.engine import ConfigError, load_config
from regionspot_d2.modeling.automatic_masks import AUTOMATIC_MASK_SETTINGS

from .tools import ROOT, load_tool

# Runs a command line where torch and whatever imports it cannot be imported.
_WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "detectron2", "regionspot_d2", "numpy", "cv2"):
    sys.modules[name] = None
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""


def is_command(script: Path) -> bool:
    """Whether a script is run, rather than imported by others, and has options."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    is_run = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node) for node in tree.body)
    return is_run and script.name != "photos.py"


SCRIPTS = [
    path
    for pattern in ("*.py", "demo/*.py", "tools/*.py", "tools/*/*.py")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "setup.py" and is_command(path)
]


def run(script: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_there_are_commands() -> None:
    names = {script.name for script in SCRIPTS}
    assert {"train_net.py", "demo.py", "prepare_proposals.py", "inference.py"} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_help_needs_no_torch_and_has_an_example(script: Path, tmp_path: Path) -> None:
    done = run(script, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    _, _, below = done.stdout.partition("show this help message and exit")
    assert script.name in below or "regionspot name --input" in below


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("train_net.py", ["--num-gpus", "two"], "argument --num-gpus: invalid int value: 'two'"),
        ("demo/demo.py", ["--input", "a.jpg", "--topk", "0"], "--topk 0: 1 or more is expected"),
        ("demo/onnx_inference.py", ["--model", "m"], "the following arguments are required"),
        ("tools/prepare_proposals.py", ["--source", "x"], "argument --source: invalid choice: 'x'"),
        ("tools/check_datasets.py", ["--no-such-option"], "unrecognized arguments"),
        ("tools/benchmarks/training.py", [], "the following arguments are required: command"),
        ("regionspot_cli.py", ["nmae"], "argument COMMAND: invalid choice: 'nmae'"),
        (
            "regionspot_cli.py",
            ["web", "--max-upload", "0"],
            "--max-upload 0: 1 or more is expected",
        ),
    ],
)
def test_a_mistake_is_one_line(
    script: str, arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = run(ROOT / script, *arguments, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {told}") or (told in line and line.startswith("error: "))
    assert line.endswith("--help lists the options)")


@pytest.mark.parametrize(
    "name",
    ["mini", "mini/eval_lvis_gt", "configs/regionspot_B.yaml", "./configs/eval_lvis_gt.yaml"],
)
def test_configs_of_the_documents_are_found_in_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = load_config(name, training=False, testing=False)
    assert cfg.MODEL.META_ARCHITECTURE == "RegionSpot"
    own = tmp_path / "configs" / "regionspot_B.yaml"
    own.parent.mkdir()
    own.write_text("OUTPUT_DIR: here")
    assert load_config("configs/regionspot_B.yaml", training=False).OUTPUT_DIR == "here"
    with pytest.raises(ConfigError, match="no/such.yaml"):
        load_config("no/such.yaml", training=False)


def test_without_a_command_there_is_a_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert regionspot_cli.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 16 and any(line.split()[:1] == ["name"] for line in lines)


def test_options_that_are_written_twice_agree(capsys: pytest.CaptureFixture[str]) -> None:
    ours = vars(regionspot_cli.launch_parser("Text.").parse_args([]))
    theirs = vars(default_argument_parser().parse_args([]))
    assert ours == {**theirs, "dist_url": "auto"}  # a free port rather than the same one

    args = regionspot_cli.parse_name(["--input", "a.jpg", "--format", *FORMATS])
    assert args.format == list(FORMATS)
    text = " ".join(regionspot_cli.name_parser().format_help().split())
    assert "|".join(VOCABULARIES) in text

    tool = load_tool("prepare_proposals")
    words = ["--dataset", "a", "--source", "sam", "--output", "b"]
    given = vars(tool.argument_parser().parse_args(words))
    assert {name: given[name] for name in AUTOMATIC_MASK_SETTINGS} == AUTOMATIC_MASK_SETTINGS
