"""Checkpoints of the trained part: saved whole or not at all, loaded only if they fit."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import explained_weights, local_weights, write_atomically
from .modeling.interfaces import Localizer, RegionHead, VisionLanguageModel
from .modeling.regionspot import RegionSpot
from .safe_loading import load_pickle

_HEAD = "region_head."
_PAIR, TRAINED_ON = "pair", "trained_on"
_PARTS = {"vision_language": "vision-language model", "localizer": "localizer"}
# What DistributedDataParallel and torch.compile put before the names of a model that they wrap.
_WRAPPERS = re.compile(r"^module\.|\b_orig_mod\.")
# In the files of RegionSpot's authors, beside the frozen models.
_AUTHORS_KEY = "model.to_clip.weight"


class RegionSpotCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with these differences.

    * A checkpoint appears in its (local) folder only when it is complete: a full disk or a killed
      process leaves the last good one, which ``last_checkpoint`` names.
    * It reads ``.safetensors`` too, and files of only a region head, with or without the prefix
      ``region_head.``, wherever in the model the head is. No file can run code.
    * It holds, as ``pair``, which localizer and which vision-language model its head was trained
      with. Loading it into another pair is an error; a file without the record says nothing.
    * It holds, as ``trained_on``, which photos its head was trained on.
    * Lacking part of the region head is an error, not a warning: a part with random weights names
      regions at random. Only a detector's own file may lack the whole head.
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
                state = {"model": self.model.state_dict(), _PAIR: pair_of(self.model)}
                if note := next(
                    (dict(h.trained_on) for h in region_heads(self.model) if h.trained_on), None
                ):
                    state[TRAINED_ON] = note
                torch.save({**state, **kwargs}, file)
        except (OSError, RuntimeError) as error:  # torch.save raises either for a full disk
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(
                f"Cannot save '{path}': {reason}. --resume continues from the last checkpoint that "
                "was saved, if there is one."
            ) from error
        for leftover in Path(self.save_dir).glob(".*.pth.*.partial"):  # of killed processes
            leftover.unlink(missing_ok=True)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint or a head from a file or a URL; "" loads nothing.

        A missing file raises WeightsNotFoundError, a damaged or unsuitable one ValueError.
        """
        if not path:
            if self._head_keys():
                self.logger.warning("MODEL.WEIGHTS is empty: the region head starts untrained.")
            return {}
        self._path = str(local_weights(path, "MODEL.WEIGHTS"))
        return super().load(self._path, *args, **kwargs)

    def get_checkpoint_file(self) -> str:
        """The file in ``save_dir`` that ``last_checkpoint`` names; ValueError if it names none."""
        marker = os.path.join(self.save_dir, "last_checkpoint")
        if not os.path.isfile(marker):  # a pipe would never end
            raise ValueError(f"'{marker}' is not a regular file; remove it.")
        with open(marker, "rb") as file:
            name = file.read(300).decode(errors="replace").strip()
        path = os.path.join(self.save_dir, name)
        # A path, or a link, could lead to a file that this run did not write.
        inside = name.isprintable() and name == os.path.basename(name)
        if not inside or not os.path.isfile(path) or os.path.islink(path):
            found = sorted(file for file in os.listdir(self.save_dir) if file.endswith(".pth"))
            raise ValueError(
                f"'{marker}' is damaged: it holds {name!r}, not the name of a file in its folder. "
                f"Write the name of a checkpoint into it ({', '.join(found[-3:]) or 'none found'})"
                ", or start again without --resume."
            )
        return path

    def _load_file(self, filename: str) -> dict[str, Any]:
        with explained_weights(filename, "a checkpoint"):
            content = _read(filename)
            state = content.get("model")
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise ValueError("it has no state dict 'model'")
            return {**content, "model": {_WRAPPERS.sub("", k): v for k, v in state.items()}}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state, expected, wanted = checkpoint["model"], self.model.state_dict(), self._head_keys()
        for head in region_heads(self.model):
            _move_head(state, wanted, head.renamed_parameters)
        missing = [key for key in wanted if key not in state]
        if wanted and _AUTHORS_KEY in state:
            raise ValueError(
                f"'{self._path}' is a checkpoint of RegionSpot's authors. Convert it first: "
                f"python tools/convert_checkpoint.py {self._path} head.safetensors"
            )
        if wanted and missing == wanted and any(key in expected for key in state):
            self.logger.warning(f"'{self._path}' is of a detector without a region head.")
        elif missing:
            raise ValueError(
                f"'{self._path}' does not hold the region head of this model: {_some(missing)} not "
                f"in it. It holds {_some(state)}. MODEL.REGION_HEAD must match the file."
            )
        if len(missing) < len(wanted):
            self._check_pair(checkpoint.get(_PAIR))
            for head in region_heads(self.model):
                head.trained_on = _checked_note(checkpoint.get(TRAINED_ON))
        for key in wanted:
            if key in state and state[key].shape != expected[key].shape:
                raise ValueError(
                    f"The region head in '{self._path}' does not fit this model: {key} is "
                    f"{(*state[key].shape,)} in the file and {(*expected[key].shape,)} in the "
                    "model. MODEL.VISION_LANGUAGE, LOCALIZER and REGION_HEAD (DEPTH; NUM_CENTERS "
                    "of a KernelRegionHead) must be those that it was trained with."
                )
            if key in state and not _are_weights(state[key], expected[key]):
                raise ValueError(
                    f"The region head in '{self._path}' is damaged: {key} has the type "
                    f"{state[key].dtype}, or holds what is not a number."
                )
        return super()._load_model(checkpoint)

    def _check_pair(self, pair: Any) -> None:
        """Raises ValueError if a head of one pair of models is loaded into another."""
        if not isinstance(pair, dict):  # of an older version, or of only a head
            return
        for part, identity in pair_of(self.model).items():
            if part in pair and pair[part] != identity:
                raise ValueError(
                    f"The region head in '{self._path}' was trained with the {_PARTS[part]} "
                    f"'{pair[part]}', and this model has '{identity}'. "
                    f"Heads do not carry over: set MODEL.{part.upper()} to what it was trained "
                    "with, or train a head for this pair."
                )

    def _head_keys(self) -> list[str]:
        return [key for key in self.model.state_dict() if _HEAD in key]


def region_heads(model: nn.Module) -> list[RegionHead]:
    """The region heads in a model, wherever they are."""
    return [module for module in model.modules() if isinstance(module, RegionHead)]


def pair_of(model: nn.Module) -> dict[str, str]:
    """The identities of the frozen models whose outputs the region head of a model reads."""
    for module in model.modules():
        if isinstance(module, RegionSpot):
            parts: dict[str, Localizer | VisionLanguageModel]
            parts = {"vision_language": module.vision_language}
            if module.region_head.needs_localizer:
                parts["localizer"] = module.localizer
            return {key: part.identity or type(part).__name__ for key, part in parts.items()}
    return {}


def _read(path: str) -> dict[str, Any]:
    """Detectron2's formats, with a state dict under "model", read without running anything."""
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file, contextlib.suppress(ValueError):
            note = json.loads((file.metadata() or {}).get(TRAINED_ON, ""))
            return {"model": load_file(path), TRAINED_ON: note}
        return {"model": load_file(path)}
    if not path.endswith(".pkl"):
        # Said outright: an environment variable turns the default off.
        content = torch.load(path, map_location="cpu", weights_only=True)
    else:
        content = load_pickle(path)
        if "__author__" not in content:  # of Caffe2 and Detectron1
            state = content.get("blobs", content)
            state = {key: each for key, each in state.items() if not key.endswith("_momentum")}
            return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    if "model_state" in content:  # of pycls
        state = content["model_state"]
        state = {k: each for k, each in state.items() if not k.endswith("num_batches_tracked")}
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}
    return content if "model" in content else {"model": content}


def _are_weights(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers can stand in for others; whole ones lack the scale of a quantized head."""
    return found.is_floating_point() == expected.is_floating_point() and bool(
        found.isfinite().all()
    )


def _checked_note(note: Any) -> dict[str, Any]:
    """What a file says of the photos that its head was trained on, if it is what we note."""
    if not isinstance(note, dict) or not isinstance(note.get("photos"), str):
        return {}
    names = note.get("datasets")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return {}
    return {"datasets": names, "photos": note["photos"]}


def _move_head(state: dict[str, Any], wanted: list[str], renamed: Mapping[str, str]) -> None:
    """Renames the keys of a head, with whatever prefix, to those that the model wants."""
    places = {key.partition(_HEAD)[2]: key for key in wanted}
    for key in [key for key in state if key not in wanted]:
        bare = key.partition(_HEAD)[2] or key
        if new := places.get(renamed.get(bare, bare)):
            state[new] = state.pop(key)


def _some(keys: Iterable[str]) -> str:
    first, *rest = ", ".join(sorted(keys)[:3]), *sorted(keys)[3:]
    return f"{first} and {len(rest)} more" if rest else first or "nothing"


def build_regionspot(cfg: CfgNode) -> RegionSpot:
    """Builds the RegionSpot of a config with its weights; ValueError if it is of something else."""
    if not isinstance(cfg.get("MODEL"), CfgNode) or "LOCALIZER" not in cfg.MODEL:
        raise ValueError(
            "The config has no MODEL.LOCALIZER. Read it with regionspot_d2.engine.load_config, or "
            "call regionspot_d2.add_regionspot_config before merging it."
        )
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if not (isinstance(kind, type) and issubclass(kind, RegionSpot)):
        raise ValueError(f"MODEL.META_ARCHITECTURE is {name!r:.60}; 'RegionSpot' is expected.")
    model = build_model(cfg)
    RegionSpotCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
