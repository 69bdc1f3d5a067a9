"""From a command line to a config that can run, or to one line that says why it cannot."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.file_io import PathManager

from ..config import add_regionspot_config
from ..data.datasets import (
    AnnotationsError,
    checked_annotations,
    how_to_get,
    register_coco_format,
    source_file,
)
from ..data.proposals import proposals_exist
from ..files import expand_data_root
from ..model_zoo import MODELS, get_config_file
from ..safe_loading import read_yaml
from ..stopping import INTERRUPTED, stoppable

_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,15}")
# Errors whose message says all; others are told with their type.
_EXPECTED = {
    *("ValueError", "OSError", "FileNotFoundError", "PermissionError", "FloatingPointError"),
    *("ConfigError", "TokenCacheError", "WeightsNotFoundError", "ImageReadError"),
    *("ExtractionStoppedError", "TooManyUnreadableError"),
}
# What torch says of a loader's worker, or a process of launch, that another program ended.
_KILLED = re.compile(r"DataLoader worker .*(killed|exited)|process \d+ terminated with signal")


class ConfigError(ValueError):
    """A config file or an option cannot be used; the message says which, and what to do."""


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    training: bool = True,
    testing: bool | None = None,
) -> CfgNode:
    """Reads a config, registers its own datasets, checks that files are there, and freezes it.

    Args:
        config_file: a yaml file, or "" for the defaults. What is not there is looked for among the
            configs of the package, by a name of :mod:`~regionspot_d2.model_zoo` or a path that
            starts with ``configs/``. ``$DETECTRON2_DATASETS`` in the paths of a config stands for
            the folder of all datasets.
        opts: alternating keys and values, as on a command line.
        training: whether ``DATASETS.TRAIN`` is needed.
        testing: True if ``DATASETS.TEST`` is needed; None if it may be empty, but must exist if
            given; False if it is not checked.

    Raises:
        ConfigError: a key, a value or a file is wrong or missing.
    """
    cfg = get_cfg()
    add_regionspot_config(cfg)
    config_file = find_config(config_file)
    with explained(cfg, config_file):
        if config_file:
            merge_config_file(cfg, config_file)
    merge_options(cfg, opts)
    with explained(cfg, ""):
        register_coco_format(cfg.DATASETS.COCO_FORMAT)
    files = map(expand_data_root, cfg.DATASETS.PROPOSAL_FILES_TEST)
    cfg.DATASETS.PROPOSAL_FILES_TEST = tuple(files)
    cfg.INPUT.TOKEN_CACHE = expand_data_root(cfg.INPUT.TOKEN_CACHE)
    if testing is not False:
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
        if cfg.MODEL.LOAD_PROPOSALS:
            _check_proposals(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST)
        elif testing and cfg.DATASETS.TEST and cfg.MODEL.META_ARCHITECTURE == "RegionSpot":
            raise ConfigError(
                "MODEL.LOAD_PROPOSALS is False: RegionSpot names boxes that it is given. Set it to "
                "True, and DATASETS.PROPOSAL_FILES_TEST to a file for each of DATASETS.TEST (or to "
                "ground_truth://<dataset>)."
            )
    if testing and not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TEST is empty: there is nothing to evaluate. Use a config named eval_*, or "
            "add DATASETS.TEST \"('name',)\"."
        )
    if training:
        if not cfg.DATASETS.TRAIN:
            raise ConfigError("DATASETS.TRAIN is empty: there is nothing to train on.")
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    cfg.freeze()
    return cfg


def find_config(config_file: str) -> str:
    """The path of a config, so that the names in the documents work in any folder.

    A name of a model comes first. What nothing has is returned as it is; opening it will tell.
    """
    path = os.path.expanduser(config_file)
    if path and (path in MODELS or not PathManager.isfile(path)):
        with contextlib.suppress(ValueError):
            return get_config_file(os.path.normpath(path).removeprefix(f"configs{os.sep}"))
    return path


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """Merges a yaml file into a config, as Detectron2 does, but without running its tags.

    Raises:
        ConfigError: the file is missing, no config, or does not fit ``cfg``.
    """
    with explained(cfg, path):
        content = read_yaml(path)
        if content.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise ValueError(f"VERSION is {content['VERSION']!r}; expected {cfg.VERSION}")
        _merge(cfg, lambda: cfg.merge_from_other_cfg(CfgNode(_with_floats(cfg, content))))


def merge_options(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merges the keys and values of a command line into a config; ConfigError if they are wrong."""
    with explained(cfg, "the options"):
        known, opts = _flat(cfg), list(opts)
        for i, (key, value) in enumerate(zip(opts[::2], opts[1::2])):
            if type(known.get(key)) is float and _WHOLE_NUMBER.fullmatch(str(value)):
                opts[2 * i + 1] = f"{value}.0"
        _merge(cfg, lambda: cfg.merge_from_list(opts))


def _with_floats(cfg: CfgNode, content: dict[str, Any]) -> dict[str, Any]:
    """Content for a config with 2 as 2.0 where the config has a float, which yacs insists on."""
    content = dict(content)
    for key, value in content.items():
        known = cfg.get(key)
        if isinstance(value, dict) and isinstance(known, CfgNode):
            content[key] = _with_floats(known, value)
        elif type(value) is int and type(known) is float:
            content[key] = float(value)
    return content


def _merge(cfg: CfgNode, merge: Callable[[], object]) -> None:
    """Merges, and refuses what yacs lets pass: null in place of a value, and absurd numbers."""
    before = _flat(cfg)
    merge()
    after = _flat(cfg)
    for key, value in before.items():
        if value is not None and (key not in after or after[key] is None):
            kind = "section" if key not in after else type(value).__name__
            raise ValueError(f"{key} is null, or inside something null; expected a {kind}")
    for key, value in after.items():
        whole = type(value) is int and abs(value) < 2**63  # larger ones fit no tensor
        if type(value) in (int, float) and not whole and value != before.get(key):
            if type(value) is int or not math.isfinite(value):
                raise ValueError(f"{key} is {str(value)[:20]}, which is not a number to work with")


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """The values of a config by their full keys."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def check_datasets(key: str, names: Iterable[str]) -> None:
    """Raises a ConfigError about ``key`` if a dataset is not registered or has no annotations."""
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{key} holds {name!r:.50}; expected names of datasets.")
        if name not in DatasetCatalog:
            raise ConfigError(
                f"{key}: there is no dataset '{name}'.{_similar(name, DatasetCatalog.list())} "
                'Register your own by DATASETS.COCO_FORMAT "[[name, json, image folder], ...]".'
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        for file in filter(None, (json_file, MetadataCatalog.get(name).get("panoptic_json"))):
            if not PathManager.isfile(path := source_file(file)):
                raise ConfigError(
                    f"{key}: the annotations of '{name}' are not there: no file '{path}'. "
                    f"{how_to_get(name)}"
                )
        if json_file:
            try:
                checked_annotations(name)
            except AnnotationsError as error:
                raise ConfigError(f"{key}: '{name}': {error}") from error


def _check_proposals(names: Sequence[str], files: Sequence[str]) -> None:
    if len(names) != len(files):
        raise ConfigError(
            f"DATASETS.PROPOSAL_FILES_TEST has {len(files)} files for the {len(names)} datasets "
            "of DATASETS.TEST; it must list one for each, in the same order."
        )
    for name, file in zip(names, files):
        if not proposals_exist(file):
            raise ConfigError(
                f"DATASETS.PROPOSAL_FILES_TEST: the boxes for '{name}' are missing: no file "
                f"'{file}'. Run tools/prepare_proposals.py --dataset {name} --output {file}."
            )


@contextlib.contextmanager
def explained(cfg: CfgNode, where: str) -> Iterator[None]:
    """Turns what Detectron2, yacs and yaml raise for a wrong config into a :class:`ConfigError`.

    Its message starts with ``where``, a file or "the options", and suggests keys of ``cfg``.
    """
    try:
        yield
    except ConfigError:
        raise
    # A type that does not fit can end in nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split()).replace('in "<byte string>"', "at")
        reason = reason or type(error).__name__
        if unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason):
            keys = [key.replace("/", ".") for key in flatten_results_dict(cfg)]
            reason = f"there is no config key {unknown[1]}.{_similar(unknown[1], keys)}"
        elif isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror}: {error.filename}"
        elif isinstance(error, (RecursionError, MemoryError)):
            reason = "it is nested too deeply"
        elif wrong := re.search(r"vs. <class '(\w+)'>\) .* config key: (\S+)$", reason):
            expected = reason.split("'")[1].rpartition(".")[2].replace("CfgNode", "section")
            reason = f"Type mismatch: {wrong[2]} is of type {wrong[1]}, expected {expected}"
        raise ConfigError(f"{where}: {reason[:500]}" if where else reason) from error


@contextlib.contextmanager
def told_in_a_line(program: str, go_on: Callable[[], str] = str) -> Iterator[None]:
    """Ends a program with one line where it would end in a traceback; REGIONSPOT_DEBUG=1 shows it.

    That is also so for errors in processes that Detectron2's ``launch`` starts, and in loaders.

    Args:
        program: its name, for the line.
        go_on: after Ctrl-C or SIGTERM, says what is done and how to go on. The exit status is 130.
    """
    try:
        with stoppable():
            yield
    except KeyboardInterrupt:
        print(f"{program}: stopped. {go_on()}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("REGIONSPOT_DEBUG") == "1":
            raise
        told = f"{program}: {cause(error)}"
        if _KILLED.search(told):
            told = f"{told.rstrip('.')}. If memory ran out, lower DATALOADER.NUM_WORKERS. {go_on()}"
        if not isinstance(error.__cause__, KeyboardInterrupt):
            sys.exit(told)
        print(told, file=sys.stderr)
        sys.exit(INTERRUPTED)


def cause(error: BaseException) -> str:
    """What a person is told of an error: its message, or that of the process that failed."""
    text, kind = str(error), type(error).__name__
    # The frames of a traceback are indented; the error stands below the last of them.
    if raised := re.search(r"^([A-Za-z_][\w.]*)(?:: (.*))?\Z", _below_traceback(text), re.DOTALL):
        kind, text = raised[1].rpartition(".")[2], raised[2] or ""
    expected = kind in _EXPECTED or isinstance(error, (OSError, ValueError))
    return text.strip() if text and expected else f"{kind}: {text.strip()}".rstrip(": ")


def _below_traceback(text: str) -> str:
    _, found, frames = text.rpartition("Traceback (most recent call last):\n")
    lines = frames.splitlines()
    start = next((i for i, line in enumerate(lines) if line[:1].strip()), len(lines))
    return "\n".join(lines[start:]).strip() if found else ""


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" Similar: {', '.join(close)}." if close else ""
