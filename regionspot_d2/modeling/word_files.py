"""Vocabularies in yaml files: lists, dicts of texts, hierarchies, groups and the background."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

from ..safe_loading import read_plain_yaml
from .words import Vocabulary, as_vocabulary, grouped_vocabulary, with_background

_PARTS = ("vocabulary", "groups", "background")


def read_words(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a vocabulary from a yaml file, which cannot run code.

    The file holds what ``predict`` takes as ``vocabulary``, or a mapping with the keys
    ``vocabulary`` or ``groups``, and if there is one ``background``.

    Raises:
        ValueError: it is not such a file, or the vocabulary is refused; the message names it.
        OSError: it cannot be read.
    """
    try:
        content = read_plain_yaml(os.fspath(path), "vocabulary")
        parts: Mapping[str, Any] = {"vocabulary": content}
        if isinstance(content, Mapping) and content and set(content) <= set(_PARTS):
            parts = content
        if ("vocabulary" in parts) == ("groups" in parts):
            raise ValueError("either a vocabulary or groups are expected")
        if "groups" in parts:
            found = grouped_vocabulary(parts["groups"])
        else:
            found = as_vocabulary(parts["vocabulary"])
        return with_background(found, parts.get("background") or ())
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{os.fspath(path)}' is no vocabulary: {reason}") from error
