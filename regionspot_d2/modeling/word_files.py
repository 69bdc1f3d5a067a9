"""Vocabularies in files: lists, dicts of texts, hierarchies, groups and the background."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

from ..safe_loading import read_plain_yaml
from .members import Group
from .words import Vocabulary, as_vocabulary, grouped_vocabulary, with_background

_PARTS = ("vocabulary", "groups", "background")


def read_words(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a vocabulary from a yaml or json file, which cannot run code.

    The file holds what :func:`words_of` takes.

    Raises:
        ValueError: it is not such a file, or the vocabulary is refused; the message names it.
        OSError: it cannot be read.
    """
    try:
        return words_of(read_plain_yaml(os.fspath(path), "vocabulary"))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{os.fspath(path)}' is no vocabulary: {reason}") from error


def words_of(content: Any) -> Vocabulary:
    """Reads a vocabulary from plain values.

    Args:
        content: what ``predict`` takes as ``vocabulary``; or a mapping with the keys ``vocabulary``
            or ``groups``, and if there is one ``background``.

    Raises:
        ValueError: it is none of these, or the vocabulary is refused.
    """
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


def plain_words(vocabulary: Vocabulary) -> Any:
    """A vocabulary as plain values, which :func:`words_of` reads.

    Raises:
        ValueError: it has vectors, which are no text.
    """
    for member in vocabulary.members:
        if member.vectors is not None:
            raise ValueError(f"'{member.name:.60}' stands for vectors: they cannot be written.")
    if vocabulary.is_list:
        return list(vocabulary.names)
    groups = {group.title: _tree(vocabulary, group) for group in vocabulary.groups}
    content = {"groups": groups} if len(groups) > 1 else {"vocabulary": next(iter(groups.values()))}
    outside = [member.name for member in vocabulary.members[vocabulary.background.start :]]
    return {**content, "background": outside} if outside else content


def _tree(vocabulary: Vocabulary, group: Group) -> dict[str, Any]:
    """A group as nested dicts."""
    texts = dict(zip(group.leaves, (vocabulary.members[place].texts for place in group.members)))
    nodes: dict[int, Any] = {
        place: list(texts[place]) if place in texts else {} for place in group.names
    }
    top: dict[str, Any] = {}
    for place, content in nodes.items():
        above = vocabulary.parents[place] if vocabulary.parents else -1
        (top if above < 0 else nodes[above])[vocabulary.names[place]] = content
    return top
