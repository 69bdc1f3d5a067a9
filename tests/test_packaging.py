"""What the package declares and ships, and the parts of the set-up that need no network."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from detectron2.config import get_cfg
from PIL import Image

import regionspot_d2
from regionspot_d2 import add_regionspot_config

from .tools import ROOT, load_tool

PACKAGE = ROOT / "regionspot_d2"

# Needed, but left to the user: setup.py says why.
UNDECLARED = {"torch", "torchvision", "detectron2", "opencv-python", "opencv-python-headless"}
# Modules whose distribution has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "clip": "clip-anytorch",
    "cv2": "opencv-python",
    "open_clip": "open-clip-torch",
    "yaml": "pyyaml",
}
# Imported only where needed, with an error that names what to install.
OPTIONAL_MODULES = {
    "av",
    "faiss",
    "gradio",
    "gradio_image_annotation",
    "huggingface_hub",
    "lvis",
    "mobile_sam",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "starlette",  # what Gradio stands on
    "supervision",
    "trackers",
    "transformers",
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `setup.py` builds it, where torch and detectron2 fail to import."""
    folder = tmp_path_factory.mktemp("build")
    for module in ("torch", "torchvision", "detectron2", "regionspot_d2"):
        (folder / f"{module}.py").write_text("raise ImportError('a build must not need this')\n")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "regionspot_cli.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name)
    shutil.copytree(ROOT / "configs", source / "configs")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder / "dist"],
        cwd=source,
        env={"PYTHONPATH": str(folder)},
        check=True,
        capture_output=True,
        text=True,
    )
    return folder


@pytest.fixture(scope="module")
def installed(build: Path) -> Path:
    """The folder into which pip installs the wheel that it makes of the source distribution."""
    [sdist] = (build / "dist").glob("*.tar.gz")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        + ["--no-deps", "--no-build-isolation", "--no-index", "--target", build / "site", sdist],
        cwd=build,
        env={"PYTHONPATH": str(build), "PATH": os.environ["PATH"], "HOME": str(build)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return build / "site"


@pytest.fixture(scope="module")
def metadata(build: Path) -> importlib.metadata.Distribution:
    return importlib.metadata.Distribution.at(build / "source" / "regionspot_d2.egg-info")


def normal(requirement: str) -> str:
    """The name in a requirement, as pip compares names."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_the_version_is_read_without_importing_the_package(metadata) -> None:
    assert metadata.version == regionspot_d2.__version__


def test_the_metadata_has_what_a_package_index_shows(metadata) -> None:
    fields = metadata.metadata
    for field in ("Summary", "Author", "Keywords", "Project-URL", "License-Expression"):
        assert fields[field]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload().strip() == (ROOT / "README.md").read_text("utf-8").strip()
    assert fields.get_all("License-File") == ["LICENSE"]
    assert "Typing :: Typed" in fields.get_all("Classifier")


def test_the_version_has_a_section_in_the_changelog_and_the_citation() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d.*?)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest is not None
    assert newest.group(1) == citation["version"] == regionspot_d2.__version__
    assert newest.group(2) == str(citation["date-released"])


def test_what_is_installed_has_every_file_of_the_package_and_nothing_else(installed: Path) -> None:
    def files(root: Path, pattern: str = "*") -> set[str]:
        found = {path.relative_to(root) for path in root.rglob(pattern) if path.is_file()}
        return {path.as_posix() for path in found if "__pycache__" not in path.parts}

    expected = {f"regionspot_d2/{name}" for name in files(PACKAGE)} | {"regionspot_cli.py"}
    expected |= {f"regionspot_d2/configs/{name}" for name in files(ROOT / "configs", "*.yaml")}
    found = {name for name in files(installed) if not re.match(r"bin/|.*\.dist-info/", name)}
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        (["--help"], 0, "name +name regions of photos"),
        (["nmae"], 2, "invalid choice: 'nmae'"),
        (["models", "--help"], 0, "usage: regionspot models"),
        (["web", "--help"], 0, "usage: regionspot web"),
        (["web", "--port", "0"], 2, "error: --port 0: 1..65535 is expected"),
    ],
)
def test_help_and_mistakes_need_no_torch(build, installed, arguments, status, output) -> None:
    """Modules of ``build`` stand for torch and detectron2, and for the package, and fail."""
    done = subprocess.run(
        [sys.executable, installed / "bin" / "regionspot", *arguments],
        env={"PYTHONPATH": f"{build}:{installed}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and re.search(output, done.stdout + done.stderr)


def test_what_is_installed_names_a_photo_from_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    Image.effect_noise((320, 320), 50).convert("RGB").save(tmp_path / "photo.jpg")
    program = (
        "import sys\n"
        "import regionspot_d2\n"  # without the command, whose filters hide what libraries say
        "import regionspot_cli\n"
        "status = regionspot_cli.main(['models']) or regionspot_cli.main()\n"
        f"assert regionspot_d2.__file__.startswith({str(installed)!r})\n"
        "sys.exit(status)"
    )
    words = "name --input photo.jpg --vocabulary coco --boxes 10,20,200,300".split()
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    if "which the mini model needs, is unavailable" in done.stderr:
        pytest.skip("the packages of the mini model are missing")
    assert done.returncode == 0, done.stderr
    assert "regionspot_L_336 " in done.stdout and "1 picture and results.json" in done.stdout
    assert (tmp_path / "output" / "demo" / "photo.jpg.jpg").is_file()
    assert "Warning" not in done.stderr


def test_extras(metadata) -> None:
    extras = set("all cvat demo dev hub notebook onnx ray search slurm track".split())
    extras |= {"transformers", "video", "web"}
    assert set(metadata.metadata.get_all("Provides-Extra")) == extras
    wanted: dict[str, set[str]] = {extra: set() for extra in extras}
    for requirement in metadata.requires:
        if marker := re.search(r"""extra == ['"](\w+)['"]""", requirement):
            wanted[marker.group(1)].add(normal(requirement))
    assert wanted["all"] == set().union(*(wanted[extra] for extra in extras - {"all"}))
    assert {"matplotlib", "scikit-image"} <= wanted["demo"]
    assert {"black", "isort", "mypy", "pytest", "ruff"} <= wanted["dev"]


def test_nothing_is_declared_that_could_replace_a_working_torch_or_opencv(metadata) -> None:
    assert not {normal(requirement) for requirement in metadata.requires} & UNDECLARED


def test_everything_the_package_imports_is_declared(metadata) -> None:
    declared = {normal(requirement) for requirement in metadata.requires if ";" not in requirement}
    expected = declared | UNDECLARED | {"regionspot-d2", "regionspot-cli"}  # installed together
    missing = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            else:
                continue
            for module in {name.partition(".")[0] for name in modules}:
                if module in sys.stdlib_module_names or module in OPTIONAL_MODULES:
                    continue
                if DISTRIBUTIONS.get(module, normal(module)) not in expected:
                    missing[module] = file.relative_to(ROOT).as_posix()
    assert not missing


@pytest.mark.parametrize(
    "file", [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("configs/**/*.yaml"))]
)
def test_every_config_loads_with_its_base(file: str) -> None:
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(ROOT / file))
    assert cfg.MODEL.META_ARCHITECTURE


def test_modules_that_two_packages_could_claim_have_one_owner() -> None:
    providers = importlib.metadata.packages_distributions()
    assert len(set(providers["clip"])) == 1, providers["clip"]
    assert len(set(providers["cv2"])) == 1, providers["cv2"]


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    return load_tool("setup/install_detectron2")


def test_a_trimmed_wheel_has_no_foreign_tools_and_no_foreign_binary(
    setup_script: ModuleType, tmp_path: Path
) -> None:
    wheel = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    record = "sal_detectron2-0.7.2.dist-info/RECORD"
    kept = {"detectron2/__init__.py": b"x = 1\n", "detectron2/tools/a.py": b"", record: b""}
    dropped = ["tools/__init__.py", "tools/train.py", "detectron2/_C.cpython-310-x86_64.so"]
    names = [*kept, *dropped]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            lines = "".join(f"{listed},,\n" for listed in names)
            archive.writestr(name, lines if name == record else kept.get(name, b"other"))

    (tmp_path / "trimmed").mkdir()
    trimmed = setup_script.trim_wheel(wheel, tmp_path / "trimmed")

    assert trimmed.name == "sal_detectron2-0.7.2-py3-none-any.whl"
    with zipfile.ZipFile(trimmed) as archive:
        assert set(archive.namelist()) == set(kept)
        assert archive.read("detectron2/__init__.py") == kept["detectron2/__init__.py"]
        assert archive.read(record).decode().split() == [f"{name},," for name in kept]


def test_a_download_with_another_content_is_refused(
    setup_script: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    file.write_bytes(b"abc")
    found = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    setup_script.check_sha256(file, found)
    with pytest.raises(setup_script.SetupError, match=f"{file.name}.* sha256 {found}, expected 12"):
        setup_script.check_sha256(file, "12" * 32)


def test_an_import_is_tried_in_a_fresh_python(setup_script: ModuleType) -> None:
    assert setup_script.import_error("json", "zipfile") is None
    error = setup_script.import_error("json", "no_such_module")
    assert error == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_detectron2_that_works_is_kept(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_script, "pip", lambda *_: pytest.fail("pip was called"))
    monkeypatch.setattr(setup_script, "import_error", lambda *_: None)
    setup_script.install(constraints=[])
    assert "keeping" in capsys.readouterr().out


def test_a_detectron2_built_for_another_torch_is_named_not_overwritten(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_script, "pip", lambda *_: pytest.fail("pip was called"))
    monkeypatch.setattr(setup_script, "import_error", lambda *_: None)
    monkeypatch.setattr(setup_script, "detectron2_error", lambda: "ImportError: undefined symbol")
    monkeypatch.setattr(setup_script.importlib.metadata, "version", lambda _: "0.6")
    with pytest.raises(
        setup_script.SetupError, match="(?s)0.6 is installed.*symbol.*Build it again"
    ):
        setup_script.install(constraints=[])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_a_target_lists_the_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"help", "setup", "demo", "test", "lint", "clean"} <= listed


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_python_that_is_too_old_is_an_error_that_says_so(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"needs Python 3.10 or newer ({old} is not)" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_workflow_runs_targets_of_the_makefile_on_supported_pythons(metadata) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands == ["make setup", "make lint", "make test"]
    assert {command.split()[1] for command in commands} <= set(targets)
    named = {
        classifier.rpartition(" ")[2]
        for classifier in metadata.metadata.get_all("Classifier")
        if classifier.startswith("Programming Language :: Python :: 3.")
    }
    assert set(job["strategy"]["matrix"]["python"]) == named


def test_lint_checks_line_length_complexity_and_the_types_of_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for setting in ("line-length = 100", '"E501"', '"C90"', "max-complexity = 10"):
        assert setting in text
    assert "follow_imports" not in text and "ignore_errors" not in text


def test_the_hooks_run_the_tools_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    lint = re.findall(r"-m (black|isort|ruff|mypy) ", (ROOT / "Makefile").read_text("utf-8"))
    assert {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]} == set(lint)


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")))
def test_issue_forms_are_complete(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert content["name"] and content["description"] and content["body"]
    for field in content["body"]:
        assert field["type"] == "textarea" and field["attributes"]["label"]
