#!/usr/bin/env python
"""Installs Detectron2 for the Python that runs this script, unless it has one that works.

    python tools/setup/install_detectron2.py

With an NVIDIA GPU the official source is built (git, a compiler and, for its CUDA operators, the
CUDA toolkit are needed). Without one, or if that build fails, a pure-Python Detectron2 is
installed: the official code of April 2024 without its compiled operators, that is without rotated
boxes, deformable convolution and the fast COCO evaluation. RegionSpot uses none of these.

torch, torchvision and OpenCV must be installed first. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OFFICIAL = "git+https://github.com/facebookresearch/detectron2.git"
PURE_PYTHON = "sal-detectron2==0.7.2"
PURE_PYTHON_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
REQUIREMENTS = Path(__file__).with_name("detectron2-requirements.txt")

# An incomplete copy may still import as `detectron2`, so try the parts that we use.
PARTS = ["model_zoo", "data", "engine", "evaluation", "modeling", "utils.visualizer"]


class SetupError(Exception):
    """The set-up cannot continue; the message says what to do."""


def import_error(*modules: str) -> str | None:
    """Tries imports in a new Python process, which sees what has just been installed.

    Returns:
        None if all import, otherwise the last line of the error.
    """
    command = [sys.executable, "-W", "ignore", "-c", f"import {', '.join(modules)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"the import ended with code {done.returncode}"]
    return lines[-1] if done.returncode else None


def detectron2_error() -> str | None:
    """None if Detectron2 works, otherwise the error of its import."""
    return import_error(*(f"detectron2.{part}" for part in PARTS))


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU. torch is not asked: it may be a build without CUDA."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def pip(*arguments: str) -> None:
    """Runs pip quietly.

    Raises:
        subprocess.CalledProcessError: pip failed; it has printed why.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    # A repository that asks for a password is an error, not a question that nobody answers.
    subprocess.run(command, check=True, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})


def trim_wheel(wheel: Path, folder: Path) -> Path:
    """Copies the pure-Python wheel without the parts that do not belong into site-packages.

    These are a top-level package ``tools``, which would shadow any project's own, and the operators
    compiled for one Python and one torch. The copy carries the tag ``py3``: pip would refuse
    ``cp310`` on every other Python.

    Args:
        wheel: the wheel as downloaded.
        folder: where the copy goes.

    Returns:
        The copy.
    """

    def belongs(name: str) -> bool:
        return not name.startswith(("tools/", "detectron2/_C."))

    trimmed = folder / wheel.name.replace("-cp310-", "-py3-")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(trimmed, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.splitlines(keepends=True)
                content = b"".join(line for line in lines if belongs(line.decode()))
            if belongs(entry.filename):
                target.writestr(entry, content)
    return trimmed


def check_sha256(file: Path, expected: str) -> None:
    """Makes sure that a download is the file that was tested.

    Raises:
        SetupError: it is not.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise SetupError(
            f"{file.name}, as downloaded, has the sha256 {found}, expected {expected}. "
            "It is not installed; is the package index that pip uses the one you mean?"
        )


def build_official() -> bool:
    """Builds and installs the official source, against the torch that is installed.

    Returns:
        Whether it could be built.
    """
    source = os.environ.get("DETECTRON2_SPEC", OFFICIAL)
    print(f"Detectron2: building {source} (4 to 20 minutes)", flush=True)
    try:
        pip("install", "--no-build-isolation", source)
    except subprocess.CalledProcessError:
        print(
            "Detectron2: the official source could not be built (the lines above say why).\n"
            "The pure-Python one does all that RegionSpot needs, on the GPU too. To try the build\n"
            "again, uninstall sal-detectron2 and see INSTALL.md.",
            flush=True,
        )
        return False
    return True


def install_pure_python(constraints: list[str]) -> None:
    """Installs Detectron2 as plain Python files, from the package index.

    Args:
        constraints: pip's constraint files for what Detectron2 needs.

    Raises:
        SetupError: the download is not the file that was tested.
        subprocess.CalledProcessError: pip failed.
    """
    print(f"Detectron2: installing the pure-Python {PURE_PYTHON}", flush=True)
    limits = [argument for file in constraints for argument in ("--constraint", file)]
    pip("install", "--requirement", str(REQUIREMENTS), *limits)
    with tempfile.TemporaryDirectory() as folder:
        download, trimmed = Path(folder, "download"), Path(folder, "trimmed")
        trimmed.mkdir()
        # The wheel is tagged for Python 3.10 only, so ask for that version.
        only = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.10"]
        pip("download", *only, "--dest", str(download), PURE_PYTHON)
        (wheel,) = download.iterdir()
        check_sha256(wheel, PURE_PYTHON_SHA256)
        pip("install", "--no-deps", str(trim_wheel(wheel, trimmed)))


def install(constraints: list[str]) -> None:
    """Installs Detectron2 unless there is one that works.

    Args:
        constraints: pip's constraint files for what Detectron2 needs.

    Raises:
        SetupError: the user has to repair something.
        subprocess.CalledProcessError: pip failed.
    """
    if error := import_error("torch", "torchvision", "cv2"):
        raise SetupError(f"Install torch, torchvision and OpenCV before Detectron2: {error}")

    error = detectron2_error()
    if error is None:
        print("Detectron2: keeping the installed one")
        return

    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise SetupError(
            f"Detectron2 {version} is installed but does not import: {error}\n"
            "Was it built for another torch? Build it again, or uninstall it and run this again."
        )

    if not (has_nvidia_gpu() and build_official()):
        install_pure_python(constraints)
    if error := detectron2_error():
        raise SetupError(f"Detectron2 was installed but does not import: {error}")


def main() -> None:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--constraint", metavar="FILE", action="append", default=[], help="as pip's own option"
    )
    try:
        install(parser.parse_args().constraint)
    except SetupError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError:
        sys.exit("Detectron2 is not installed: pip failed, see above.")


if __name__ == "__main__":
    main()
