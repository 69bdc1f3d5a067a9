"""What a long run over a dataset has finished, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .proposals import Proposals, ProposalsByImage


class OtherSettingsError(ValueError):
    """The unfinished run is not one of these settings; the message names the folder and what differs."""


class PartialProposals:
    """The regions of the finished images: a folder of one file per process.

    The number of processes may change from run to run.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            folder: created if it is not there.
            settings: all that the boxes depend on, plain values only.

        Raises:
            OtherSettingsError: if the folder holds the boxes of a run with other settings.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        settings_file = self._folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if settings_file.exists():
            found = json.loads(settings_file.read_text())
            if found != wanted:
                keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
                differences = "; ".join(f"{k}: {found.get(k)} -> {wanted.get(k)}" for k in keys)
                raise OtherSettingsError(
                    f"{self._folder} holds an unfinished run with other settings ({differences}). Delete it, or "
                    "choose another output."
                )
        else:
            partial = settings_file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(wanted, indent=1))
            os.replace(partial, settings_file)

    def load(self) -> ProposalsByImage:
        """The finished images. A line that was cut off in the middle is an image to do again."""
        found = {}
        for path in sorted(self._folder.glob("process*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[entry["image_id"]] = Proposals.create(entry["boxes"], entry["scores"])
        return found

    def append(self, process: int, image_id: Any, proposals: Proposals) -> None:
        """Adds a finished image.

        Args:
            process: the number of this process.
            image_id: the image.
            proposals: its regions.
        """
        path = self._folder / f"process{process}.jsonl"
        entry = {
            "image_id": str(image_id),
            "boxes": proposals.boxes.tolist(),
            "scores": proposals.scores.tolist(),
        }
        # The line break comes first: what an interruption cut off then stands alone.
        with path.open("a") as file:
            file.write("\n" + json.dumps(entry))
