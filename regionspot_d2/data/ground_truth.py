"""``ground_truth://<dataset>``: the annotated boxes of a dataset in place of a proposal file."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import IO, Any

from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathHandler, PathManager

from .proposal_sources import from_ground_truth
from .proposals import fit_to_dataset, write_proposals

PREFIX = "ground_truth://"


class _GroundTruth(PathHandler):
    """Gives :data:`PathManager` the file that ``tools/prepare_proposals.py --source gt`` would write."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "rb", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        if mode != "rb":
            raise ValueError(
                f"{path} is made from the dataset; it can be read, in binary mode, alone."
            )
        name = path[len(PREFIX) :]
        records = DatasetCatalog.get(name)
        found = fit_to_dataset(from_ground_truth(records), records, name)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "ground_truth.pkl")
            write_proposals(str(file), records, found, {"dataset": name, "source": "gt"})
            return io.BytesIO(file.read_bytes())

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path[len(PREFIX) :] in DatasetCatalog

    _exists = _isfile


PathManager.register_handler(_GroundTruth())
