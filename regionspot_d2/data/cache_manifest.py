"""What a token cache was made from, and whether that is what a config asks for."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..files import sha256_of_file
from .datasets import class_names

_LABELS = {
    "localizer": "MODEL.LOCALIZER.NAME",
    "arch": "MODEL.LOCALIZER.ARCH",
    "tokens": "MODEL.LOCALIZER.TOKENS",
    "annotations_sha256": "sha256 of the annotations",
    "weights_sha256": "sha256 of the localizer's weights",
}


class TokenCacheError(ValueError):
    """A token cache is missing, unfinished, damaged, or made from something else."""


@dataclass(frozen=True)
class CacheManifest:
    """What the tokens of a cache were made from, and how. A request accepts any for None and 0.

    Attributes:
        dataset: its name, for messages; the same data may be registered under another name.
        annotations_sha256: identifies the boxes.
        class_names: in the order of the contiguous ids.
        localizer, arch, tokens: ``MODEL.LOCALIZER.NAME``, ``.ARCH`` and ``.TOKENS``.
        weights_sha256: :func:`~regionspot_d2.files.module_fingerprint` of the localizer.
        precision: "float32", or the dtype of autocast.
        token_dim, num_images, images_per_shard: the layout, from the cache's writer.
    """

    dataset: str
    annotations_sha256: str
    class_names: tuple[str, ...]
    localizer: str
    arch: str
    tokens: str
    weights_sha256: str | None = None
    precision: str | None = None
    token_dim: int = 0
    num_images: int = 0
    images_per_shard: int = 0

    def require(self, wanted: CacheManifest, problem: str, remedy: str) -> None:
        """Compares the manifest of a cache with a request.

        Raises:
            TokenCacheError: ``problem``, a line for each difference, ``remedy``.
        """
        have, want = asdict(self), asdict(wanted)
        for values in (have, want):
            del values["dataset"]
            names = values.pop("class_names")
            values |= {"number of classes": len(names)}
            values |= {f"class {i}": name for i, name in enumerate(names)}
        lines = [
            f"{_LABELS.get(key, key)}: the cache has {have[key]!r}, {value!r} is wanted"
            for key, value in want.items()
            if value and key in have and have[key] != value
        ]
        if lines:  # a few are enough where all classes differ
            raise TokenCacheError("\n  ".join([problem, *lines[:8]]) + f"\n{remedy}")

    def shard_paths(self, folder: Path) -> list[Path]:
        """The files of a complete cache."""
        number = -(-self.num_images // self.images_per_shard)
        return [folder / f"shard-{shard:05d}.safetensors" for shard in range(number)]

    def missing_shards(self, folder: Path) -> list[int]:
        paths = self.shard_paths(folder)
        return [shard for shard, path in enumerate(paths) if not path.exists()]


def cache_manifest(
    cfg: CfgNode, dataset_name: str, weights_sha256: str | None = None
) -> CacheManifest:
    """What the cache of a registered dataset must be made from to fit ``MODEL.LOCALIZER``."""
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is not None:
        annotations_sha256 = sha256_of_file(json_file)
    else:  # the user registered a function that makes the records
        digest = hashlib.sha256()
        for record in DatasetCatalog.get(dataset_name):
            annotations = record.get("annotations", ())
            regions = [(a["category_id"], *map(float, a["bbox"])) for a in annotations]
            digest.update(repr((record["image_id"], regions)).encode())
        annotations_sha256 = digest.hexdigest()
    return CacheManifest(
        dataset=dataset_name,
        annotations_sha256=annotations_sha256,
        class_names=tuple(class_names(dataset_name)),
        localizer=cfg.MODEL.LOCALIZER.NAME,
        arch=cfg.MODEL.LOCALIZER.ARCH,
        tokens=cfg.MODEL.LOCALIZER.TOKENS,
        weights_sha256=weights_sha256,
    )
