"""Mistakes in the commands of tools: one line and exit status 1, not a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .tools import ROOT, load_tool

COMMANDS = {
    "prepare_lvis_minival": "--lvis-val {json} --output {output}",
    "prepare_tinycoco": "--json {json} --output {output}",
    "convert_checkpoint": "{weights} {output}",
    "check_datasets": "--config-file {config}",
    "export_onnx": "--config-file {config} --output {output}.onnx",
    "extract_tokens": "--config-file {config} --output {output}",
    "mini/train_mini_head": "--coco {json} . --output {output}",
    "mini/evaluate_mini": "--coco {json} .",
    "prepare_proposals": "--dataset x --source sam --config-file {config} --output {output}",
}
PACKAGE_PHOTOS = "mini/prepare_package_photos"


def run(tool: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The line in which a command ends; a string given to ``sys.exit`` means the status 1."""
    module = load_tool(tool)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as error:
        (module.invoke_main if hasattr(module, "invoke_main") else module.main)()
    text = error.value.code
    assert isinstance(text, str) and "\n" not in text and len(text) < 500
    assert text.startswith(f"{Path(tool).name}.py: ")
    return text


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("tool", COMMANDS)
def test_missing_and_damaged_files(
    tool: str, damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools" / "mini")
    names = {"json": "a.json", "weights": "a.pth", "config": "a.yaml", "output": "out"}
    paths = {kind: str(tmp_path / name) for kind, name in names.items()}
    if damaged:
        for kind in ("json", "weights", "config"):
            Path(paths[kind]).write_text("[")
    said = run(tool, COMMANDS[tool].format(**paths).split(), monkeypatch)
    assert str(tmp_path / "a.") in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tool", ["check_datasets", "export_onnx", "extract_tokens"])
def test_unknown_config_keys(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    command = COMMANDS[tool].format(config=tmp_path / "a.yaml", output=tmp_path / "out").split()
    assert "no config key NO.KEY" in run(tool, [*command, "NO.KEY", "1"], monkeypatch)


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    said = run(PACKAGE_PHOTOS, ["--output", f"{tmp_path}/file/photos"], monkeypatch)
    assert "Not a directory" in said and "file/photos" in said


def test_the_exit_status(tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_checkpoint.py", f"{tmp_path}/no.pth", "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith(f"convert_checkpoint.py: '{tmp_path}/no.pth' does not exist.\n")
