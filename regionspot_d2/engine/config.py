"""From a command line to a config that can run, or to one line that says why it cannot."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.file_io import PathManager

from ..config import add_regionspot_config
from ..data.datasets import (
    AnnotationsError,
    checked_annotations,
    register_coco_format,
    source_file,
)
from ..data.proposals import proposals_exist
from ..files import data_root, expand_data_root


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
        config_file: a yaml file, or "" for the defaults. ``$DETECTRON2_DATASETS`` in its paths
            stands for the folder of all datasets.
        opts: alternating keys and values, as on a command line.
        training: whether ``DATASETS.TRAIN`` is needed.
        testing: True if ``DATASETS.TEST`` is needed; None if it may be empty, but must exist if
            given; False if it is not checked.

    Raises:
        ConfigError: a key, a value or a file is wrong or missing.
    """
    cfg = get_cfg()
    add_regionspot_config(cfg)
    with explained(cfg, config_file):
        if config_file:
            cfg.merge_from_file(config_file)
    with explained(cfg, "the options"):
        cfg.merge_from_list(list(opts))
    with explained(cfg, ""):
        register_coco_format(cfg.DATASETS.COCO_FORMAT)
    files = map(expand_data_root, cfg.DATASETS.PROPOSAL_FILES_TEST)
    cfg.DATASETS.PROPOSAL_FILES_TEST = tuple(files)
    cfg.INPUT.TOKEN_CACHE = expand_data_root(cfg.INPUT.TOKEN_CACHE)
    if testing is not False:
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
        if cfg.MODEL.LOAD_PROPOSALS:
            _check_proposals(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST)
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


def check_datasets(key: str, names: Iterable[str]) -> None:
    """Raises a ConfigError about ``key`` if a dataset is not registered or has no annotations."""
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(
                f"{key}: there is no dataset '{name}'.{_similar(name, DatasetCatalog.list())} "
                'Register your own by DATASETS.COCO_FORMAT "[[name, json, image folder], ...]".'
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and not PathManager.isfile(path := source_file(json_file)):
            raise ConfigError(
                f"{key}: the annotations of '{name}' are not there: no file '{path}'. The folder "
                f"of all datasets, DETECTRON2_DATASETS, is '{data_root()}'; datasets/README.md "
                "says where to get them."
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
    except (AssertionError, AttributeError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error)
        if unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason):
            keys = [key.replace("/", ".") for key in flatten_results_dict(cfg)]
            reason = f"there is no config key {unknown[1]}.{_similar(unknown[1], keys)}"
        elif isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror}: {error.filename}"
        elif isinstance(error, AttributeError):  # yacs expects the yaml to hold a dict
            reason = "this is not a config file, which maps keys to values"
        raise ConfigError(f"{where}: {reason}" if where else reason) from error


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" Similar: {', '.join(close)}." if close else ""
