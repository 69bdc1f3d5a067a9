"""From a command line to a config that can run, or a message that says why it cannot."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import add_regionspot_config
from ..data.datasets import expand_root, register_coco_format, source_file
from ..data.proposals import proposals_exist


class ConfigError(ValueError):
    """A config file or an option cannot be used; the message says which, and what to do."""


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    training: bool = True,
    testing: bool | None = None,
) -> CfgNode:
    """Reads a config, registers its own data, and checks that the files of its datasets are there.

    ``$DETECTRON2_DATASETS`` in the paths of data sets, token caches and proposal files is the folder of all data sets.

    Args:
        config_file: a yaml file.
        opts: keys and values in turn, as they come after the options of a command.
        training: whether ``DATASETS.TRAIN`` is needed.
        testing: whether ``DATASETS.TEST`` is needed. By default it may be empty, but what it names must be there; with
            False it may name what is not there yet.

    Returns:
        The config, frozen.

    Raises:
        ConfigError: if anything does not fit.
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
    cfg.INPUT.TOKEN_CACHE = expand_root(cfg.INPUT.TOKEN_CACHE)
    cfg.DATASETS.PROPOSAL_FILES_TEST = tuple(map(expand_root, cfg.DATASETS.PROPOSAL_FILES_TEST))
    if testing is not False:
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
        _check_proposals(cfg)
    if testing and not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TEST is empty: there is nothing to evaluate; the configs named eval_* have data sets, or add "
            "DATASETS.TEST \"('name',)\"."
        )
    if training:
        if not cfg.DATASETS.TRAIN:
            raise ConfigError("DATASETS.TRAIN is empty: there is nothing to train on.")
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    cfg.freeze()
    return cfg


def check_datasets(key: str, names: Iterable[str]) -> None:
    """Checks that data sets are registered and their annotations there.

    Args:
        key: the config key or option that names them.
        names: of the data sets.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(
                f"{key}: there is no dataset '{name}'.{_similar(name, DatasetCatalog.list())} "
                'Own data is registered by DATASETS.COCO_FORMAT "[[name, json, image folder], ...]".'
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        path = source_file(json_file) if json_file else ""
        if path and not PathManager.isfile(path):
            root = os.environ.get("DETECTRON2_DATASETS", "datasets")
            raise ConfigError(
                f"{key}: the annotations of '{name}' are not there: no file '{path}'. Datasets lie in "
                f"DETECTRON2_DATASETS, which is '{root}'; datasets/README.md tells where to get them."
            )


def _check_proposals(cfg: CfgNode) -> None:
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    names, files = cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST
    if len(names) != len(files):
        raise ConfigError(
            f"DATASETS.PROPOSAL_FILES_TEST has {len(files)} files for the {len(names)} datasets of DATASETS.TEST; "
            "one for each is expected, in the same order."
        )
    for name, file in zip(names, files):
        if not proposals_exist(file):
            raise ConfigError(
                f"DATASETS.PROPOSAL_FILES_TEST: the boxes for '{name}' are not there: no file '{file}'. "
                f"tools/prepare_proposals.py --dataset {name} --output {file} writes it, from any source of boxes."
            )


@contextlib.contextmanager
def explained(cfg: CfgNode, where: str) -> Iterator[None]:
    """Turns what Detectron2 and yacs raise for a wrong config into one kind of error.

    Args:
        cfg: the config that is filled, for names similar to an unknown one.
        where: what is read, a file or "the options"; the message starts with it.

    Raises:
        ConfigError: in the place of those.
    """
    try:
        yield
    except (AssertionError, AttributeError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        reason = (
            f"{error.strerror}: {error.filename}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason)
        if unknown:
            reason = f"there is no config key {unknown[1]}.{_similar(unknown[1], _keys(cfg))}"
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
