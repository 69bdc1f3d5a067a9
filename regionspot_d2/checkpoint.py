"""Checkpoints of the trained part: saved whole or not at all, loaded only if they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, Protocol, runtime_checkable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import load_file

from .files import local_weights

logger = logging.getLogger(__name__)

_HEAD = "region_head."


@runtime_checkable
class RenamedParameters(Protocol):
    """A module that knows older files' names of its parameters and buffers."""

    renamed_parameters: Mapping[str, str]


class RegionSpotCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with four differences.

    * A checkpoint appears under its name when it is complete, so a full disk or a killed process leaves the last good
      one, and ``last_checkpoint`` names it. The folder is a local one.
    * ``.safetensors`` files are read as well.
    * Files of a region head alone are read, with or without the prefix ``region_head.``, wherever in the model the head
      sits.
    * A file that does not hold the whole region head of the model is an error, not a warning: a part that keeps its
      random weights names regions at random. Only where the head sits in a detector, a file of the detector will do.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves the model and the checkpointables.

        Args:
            name: of the file, without ``.pth``.
            kwargs: further plain values to save.

        Raises:
            OSError: if it cannot be written; what was there before is still there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        _write_whole(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def save_model(self, name: str, **kwargs: Any) -> None:
        """Saves the model alone, as :meth:`save` does; a run does not resume from it."""
        path = os.path.join(self.save_dir, f"{name}.pth")
        data = {"model": self.model.state_dict(), **kwargs}
        _write_whole(path, lambda file: torch.save(data, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes a file of the folder the one that a run resumes from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_whole(path, lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint, or the weights of a head.

        Args:
            path: a file, an URL, or "" to load nothing.
            args, kwargs: as for Detectron2's checkpointer.

        Raises:
            WeightsNotFoundError: if there is no such file.
            ValueError: if it is damaged, or does not fit the model.
        """
        if not path:
            if self._head_keys():
                logger.warning("MODEL.WEIGHTS is empty: the region head starts untrained.")
            return {}
        self._path = str(local_weights(path, "MODEL.WEIGHTS"))
        return super().load(self._path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".safetensors"):
                return {"model": load_file(filename)}
            content = super()._load_file(filename)
        except (
            Exception
        ) as error:  # torch, pickle, zipfile and safetensors each have exceptions of their own
            raise ValueError(f"'{filename}' is not a checkpoint, or damaged: {error}") from error
        if not isinstance(content.get("model"), dict):
            raise ValueError(f"'{filename}' is not a checkpoint: it holds no 'model'.")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state = checkpoint["model"]
        wanted = self._head_keys()
        renamed: dict[str, str] = {}
        for module in self.model.modules():
            if isinstance(module, RenamedParameters):
                renamed.update(module.renamed_parameters)
        prefixes = {key[: key.index(_HEAD) + len(_HEAD)] for key in wanted}
        for key in list(state):
            bare = key[key.index(_HEAD) + len(_HEAD) :] if _HEAD in key else key
            bare = renamed.get(bare, bare)
            for prefix in prefixes:
                if prefix + bare in wanted and prefix + bare != key:
                    state[prefix + bare] = state.pop(key)
                    break
        expected = self.model.state_dict()
        missing = [key for key in wanted if key not in state]
        if missing == wanted and any(key in expected for key in state):
            logger.warning(
                "'%s' holds a detector without a region head: the head keeps the weights it has.",
                self._path,
            )
            return super()._load_model(checkpoint)
        if missing:
            raise ValueError(
                f"'{self._path}' does not hold the region head of this model: {_some(missing)} not in it. "
                f"It holds {_some(state)}. MODEL.REGION_HEAD and the file must belong together."
            )
        for key in wanted:
            found = tuple(state[key].shape)
            if found != tuple(expected[key].shape):
                raise ValueError(
                    f"The region head in '{self._path}' does not fit this model: {key} is {found} in the file and "
                    f"{tuple(expected[key].shape)} in the model. Was it trained with another MODEL.VISION_LANGUAGE, "
                    "MODEL.LOCALIZER or MODEL.REGION_HEAD (DEPTH; NUM_CENTERS of a KernelRegionHead)?"
                )
        return super()._load_model(checkpoint)

    def _head_keys(self) -> list[str]:
        return [key for key in self.model.state_dict() if _HEAD in key]


def _write_whole(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Writes beside ``path`` and moves the complete file into place."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save gives either for a full disk
        if os.path.exists(partial):
            os.remove(partial)
        raise OSError(
            f"Cannot save '{path}': {error}. Earlier checkpoints are as they were; --resume goes on from the last."
        ) from error


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    shown = ", ".join(keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "nothing"
