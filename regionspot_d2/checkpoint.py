"""Checkpoints of the trained part: saved whole or not at all, loaded only if they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import load_file

from .files import explained_weights, load_pickle, local_weights, write_atomically
from .modeling.interfaces import RegionHead

logger = logging.getLogger(__name__)

_HEAD = "region_head."


class RegionSpotCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with four differences.

    * A checkpoint appears in its (local) folder when it is complete, so a full disk or a killed
      process leaves the last good one, which ``last_checkpoint`` names.
    * ``.safetensors`` files are read as well, and no file can run code.
    * Files of only a region head are read, with or without the prefix ``region_head.``, wherever
      in the model the head sits.
    * A file that lacks part of the model's region head is an error, not a warning: a part with
      random weights names regions at random. Only a detector's own file may lack the whole head.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves model, checkpointables and ``kwargs`` as ``<name>.pth``; OSError if it cannot."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: each.state_dict() for key, each in self.checkpointables.items()}
        self.save_model(name, **states, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_model(self, name: str, **kwargs: Any) -> None:
        """Saves only the model and further values, as :meth:`save` does; no run resumes from it."""
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            with write_atomically(path) as file:
                torch.save({"model": self.model.state_dict(), **kwargs}, file)
        except (OSError, RuntimeError) as error:  # torch.save raises either for a full disk
            raise OSError(
                f"Cannot save '{path}': {error}. Earlier checkpoints are unchanged; "
                "--resume continues from the last."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes a file of the folder the one that a run resumes from."""
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint, or the weights of a head.

        Args:
            path: a file, a URL, or "" to load nothing.
            args, kwargs: further arguments of Detectron2's checkpointer.

        Raises:
            WeightsNotFoundError: there is no such file.
            ValueError: it is damaged, or does not fit the model.
        """
        if not path:
            if self._head_keys():
                logger.warning("MODEL.WEIGHTS is empty: the region head starts untrained.")
            return {}
        self._path = str(local_weights(path, "MODEL.WEIGHTS"))
        return super().load(self._path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        with explained_weights(filename, "a checkpoint"):
            if filename.endswith(".safetensors"):
                return {"model": load_file(filename)}
            if filename.endswith(".pkl"):
                load_pickle(filename)  # refuses one that would run code, before Detectron2 reads it
            content = super()._load_file(filename)
            if not isinstance(content.get("model"), dict):
                raise ValueError("it has no state dict 'model'")
            return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state, expected, wanted = checkpoint["model"], self.model.state_dict(), self._head_keys()
        for module in self.model.modules():
            if isinstance(module, RegionHead):
                _move_head(state, wanted, module.renamed_parameters)
        missing = [key for key in wanted if key not in state]
        if missing == wanted and any(key in expected for key in state):
            logger.warning(
                "'%s' holds a detector without a region head: the head keeps the weights it has.",
                self._path,
            )
        elif missing:
            raise ValueError(
                f"'{self._path}' does not hold the region head of this model: {_some(missing)} not "
                f"in it. It holds {_some(state)}. MODEL.REGION_HEAD and the file must match."
            )
        for key in [key for key in wanted if key in state]:
            found, due = tuple(state[key].shape), tuple(expected[key].shape)
            if found != due:
                raise ValueError(
                    f"The region head in '{self._path}' does not fit this model: {key} is {found} "
                    f"in the file and {due} in the model. Was it trained with another MODEL."
                    "VISION_LANGUAGE, MODEL.LOCALIZER or MODEL.REGION_HEAD (DEPTH; NUM_CENTERS of "
                    "a KernelRegionHead)?"
                )
        return super()._load_model(checkpoint)

    def _head_keys(self) -> list[str]:
        return [key for key in self.model.state_dict() if _HEAD in key]


def _move_head(state: dict[str, Any], wanted: list[str], renamed: Mapping[str, str]) -> None:
    """Renames the keys of a head, with whatever prefix, to those that the model wants."""
    prefixes = {key[: key.index(_HEAD) + len(_HEAD)] for key in wanted}
    for key in [key for key in state if key not in wanted]:
        bare = key[key.index(_HEAD) + len(_HEAD) :] if _HEAD in key else key
        bare = renamed.get(bare, bare)
        for new in [prefix + bare for prefix in prefixes if prefix + bare in wanted][:1]:
            state[new] = state.pop(key)


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    shown = ", ".join(keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "nothing"
