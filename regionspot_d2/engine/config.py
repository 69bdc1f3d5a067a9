"""From a command line to a config that can run, or to one line that says why it cannot."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import add_regionspot_config
from ..data.datasets import register_coco_format, source_file
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
    """Reads a config, registers its own datasets, and checks that their files are there.

    ``$DETECTRON2_DATASETS`` in the paths of datasets, token caches and proposal files stands for
    the folder of all datasets.

    Args:
        config_file: a yaml file, or "" for the defaults.
        opts: alternating keys and values, as they follow the options of a command.
        training: whether ``DATASETS.TRAIN`` is needed.
        testing: True if ``DATASETS.TEST`` is needed; None if it may be empty, but must exist if
            given; False if it is not checked.

    Returns:
        The config, frozen.

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
    cfg.INPUT.TOKEN_CACHE = expand_data_root(cfg.INPUT.TOKEN_CACHE)
    cfg.DATASETS.PROPOSAL_FILES_TEST = tuple(
        map(expand_data_root, cfg.DATASETS.PROPOSAL_FILES_TEST)
    )
    if testing is not False:
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
        _check_proposals(cfg)
    if testing and not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TEST is empty: there is nothing to evaluate. Use one of the configs named "
            "eval_*, or add DATASETS.TEST \"('name',)\"."
        )
    if training:
        if not cfg.DATASETS.TRAIN:
            raise ConfigError("DATASETS.TRAIN is empty: there is nothing to train on.")
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    cfg.freeze()
    return cfg


def check_datasets(key: str, names: Iterable[str]) -> None:
    """Checks that datasets are registered and that their annotation files exist.

    Args:
        key: the config key or option that names them, for the message.
        names: the names of the datasets.

    Raises:
        ConfigError: a dataset is not registered, or its annotations are missing.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(
                f"{key}: there is no dataset '{name}'.{_similar(name, DatasetCatalog.list())} "
                "Your own data is registered by DATASETS.COCO_FORMAT "
                '"[[name, json, image folder], ...]".'
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        path = source_file(json_file) if json_file else ""
        if path and not PathManager.isfile(path):
            raise ConfigError(
                f"{key}: the annotations of '{name}' are not there: no file '{path}'. The folder "
                f"of all datasets, DETECTRON2_DATASETS, is '{data_root()}'; datasets/README.md "
                "says where to get them."
            )


def _check_proposals(cfg: CfgNode) -> None:
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    names, files = cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST
    if len(names) != len(files):
        raise ConfigError(
            f"DATASETS.PROPOSAL_FILES_TEST has {len(files)} files for the {len(names)} datasets "
            "of DATASETS.TEST; one for each is expected, in the same order."
        )
    for name, file in zip(names, files):
        if not proposals_exist(file):
            raise ConfigError(
                f"DATASETS.PROPOSAL_FILES_TEST: the boxes for '{name}' are not there: no file "
                f"'{file}'. tools/prepare_proposals.py --dataset {name} --output {file} writes "
                "it, from any source of boxes."
            )


@contextlib.contextmanager
def explained(cfg: CfgNode, where: str) -> Iterator[None]:
    """Turns whatever Detectron2, yacs and yaml raise for a wrong config into one kind of error.

    Args:
        cfg: the config being filled; its keys are suggested for a misspelled one.
        where: what is being read, a file or "the options"; the message starts with it.

    Raises:
        ConfigError: in place of the original error.
    """
    try:
        yield
    except (AssertionError, AttributeError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error)
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason)
        if unknown:
            reason = f"there is no config key {unknown[1]}.{_similar(unknown[1], _keys(cfg))}"
        elif isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror}: {error.filename}"
        elif isinstance(error, AttributeError):
            reason = "this is not a config file, which maps keys to values"
        raise ConfigError(f"{where}: {reason}" if where else reason) from error


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in cfg.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return keys


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" Similar: {', '.join(close)}." if close else ""
