"""Vocabularies as people write them: a list, a dict of texts, a hierarchy, groups."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .members import Group, Member, NamedVector, Vocabulary, build_vocabulary
from .names import check_names

# Vocabularies that are remembered.
MAX_VOCABULARIES = 32

# What people write: see :func:`as_vocabulary`.
Words: TypeAlias = (
    Sequence[str | Member | NamedVector] | Mapping[str, Any] | np.ndarray | Vocabulary
)

_remembered: OrderedDict[tuple[Any, ...], Vocabulary] = OrderedDict()
_lock = Lock()


def as_vocabulary(words: Words, *, repeats: bool = False) -> Vocabulary:
    """Reads a vocabulary as people write it.

    Args:
        words: a list of class names and of objects with a ``name`` and a ``vector`` (D,), side by
            side; or a dict from class names to what stands for each: a text, a vector (D,), a list
            of these, of which the nearest decides, None for the name itself, or a dict of the
            classes below it, which makes a hierarchy. A :class:`Member` may stand anywhere.
        repeats: whether a name may occur twice. In a vocabulary that a person typed it is a slip.

    Raises:
        ValueError: it is none of these, is empty, or a name is empty, too long or given twice.
    """
    if isinstance(words, Vocabulary):
        found = words
    elif isinstance(words, Mapping):
        found = _grouped({"": words})
    else:
        found = _listed_vocabulary(words)
    if found.repeated and not repeats:
        raise ValueError(found.repeated)
    return found


def checked_words(words: Words) -> Words:
    """A vocabulary that was checked, as a list of its own if it is one of names.

    Raises:
        ValueError: as :func:`as_vocabulary`.
    """
    vocabulary = as_vocabulary(words)
    return list(vocabulary.names) if vocabulary.is_list else vocabulary


def grouped_vocabulary(groups: Mapping[str, Words]) -> Vocabulary:
    """A vocabulary of groups, each of which answers for itself: ``{"object": ..., "color": ...}``.

    Raises:
        ValueError: as :func:`as_vocabulary`, or there are no groups.
    """
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(
            f"groups is {groups!r:.60}; a dict from names to vocabularies is expected."
        )
    found = _grouped(groups)
    if found.repeated:
        raise ValueError(found.repeated)
    return found


def _listed_vocabulary(words: Any) -> Vocabulary:
    """The vocabulary of a list. One that comes again costs a look-up, not a reading."""
    names = tuple(words) if type(words) in (list, tuple) else ()
    try:
        with _lock:
            if found := _remembered.get(names):
                _remembered.move_to_end(names)
                return found
    except TypeError:  # something that is no key is no name either
        pass
    if any(isinstance(name, Member | NamedVector | Tensor) for name in names):
        return _grouped({"": names})
    check_names(words, repeats=True)
    names = tuple(words)
    every = range(len(names))
    group = Group("", every, every, tuple(every))
    found = build_vocabulary(names, tuple(map(Member, names)), (group,))
    with _lock:
        _remembered[names] = found
        if len(_remembered) > MAX_VOCABULARIES:
            _remembered.popitem(last=False)
    return found


def _grouped(groups: Mapping[str, Any]) -> Vocabulary:
    try:
        return _grouped_vocabulary(groups)
    except RecursionError:
        pass  # told here, where there is room on the stack again
    raise ValueError("The vocabulary is nested too deeply, or holds itself.")


def _grouped_vocabulary(groups: Mapping[str, Any]) -> Vocabulary:
    names: list[str] = []
    parents: list[int] = []
    members: list[Member] = []
    found = []
    for title, words in groups.items():
        first, leaves = (len(names), len(members)), []
        for name, above, member in _nodes(words):
            parents.append(first[0] + above if above >= 0 else -1)
            if member is not None:
                leaves.append(len(names))
                members.append(member)
            names.append(name)
        if not leaves:
            raise ValueError("The vocabulary is empty; give at least one name.")
        spans = range(first[0], len(names)), range(first[1], len(members))
        found.append(Group(str(title), *spans, tuple(leaves)))
    deep = tuple(parents) if max(parents) >= 0 else ()
    return build_vocabulary(tuple(names), tuple(members), tuple(found), deep)


def _nodes(words: Any) -> list[tuple[str, int, Member | None]]:
    """Names in order, each with the place of the one above it, or -1, and what stands for it."""
    if not isinstance(words, Mapping):
        return [(member.name, -1, member) for member in _listed(words, "vocabulary")]
    found: list[tuple[str, int, Member | None]] = []
    for name, given in words.items():
        if not isinstance(name, str):
            raise ValueError(f"A class of the vocabulary is {name!r:.60}: give text.")
        if isinstance(given, Mapping):
            if not given:
                raise ValueError(f"The vocabulary has nothing below '{name:.60}'.")
            here = len(found)
            found.append((name, -1, None))
            for child, above, member in _nodes(given):
                found.append((child, here if above < 0 else here + 1 + above, member))
        else:
            found.append((name, -1, _member(name, given)))
    return found


def _member(name: str, given: Any) -> Member:
    if given is None:
        return Member(name)
    if isinstance(given, Member):
        return replace(given, name=name)
    several = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | NamedVector)
    several = several and not _is_vector(given)
    parts = [
        part.vector if isinstance(part, NamedVector) else part
        for part in (given if several else [given])
    ]
    vectors = [torch.atleast_2d(torch.as_tensor(part)) for part in parts if _is_vector(part)]
    texts: list[Any] = [part for part in parts if not _is_vector(part)]
    if not parts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"The vocabulary has {given!r:.60} for '{name:.60}'; a text, a vector (D,), a list of "
            "these or a dict of classes is expected."
        )
    if texts:
        check_names(texts, repeats=True)
    return Member(name, tuple(texts), torch.cat(vectors) if vectors else None)


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind == "f")


def _listed(words: Any, what: str) -> tuple[Member, ...]:
    """Members of a list of names and members."""
    if isinstance(words, str | bytes | Mapping) or not isinstance(words, Iterable):
        raise ValueError(f"The {what} is {words!r:.60}; a list of class names is expected.")
    return tuple(map(as_member, words))


def as_member(name: str | Member | NamedVector) -> Member:
    """The member that an entry of a list stands for; ValueError if it has no name."""
    if isinstance(name, Member):
        return name
    if isinstance(name, NamedVector):
        return Member(name.name, vectors=name.vector)
    if isinstance(name, Tensor):
        raise ValueError("A vector of the vocabulary has no name: pass a dict, {name: vector}.")
    if not isinstance(name, str):
        raise ValueError(f"A name of the vocabulary is {name!r:.60}: give non-empty text.")
    return Member(name)


def with_background(vocabulary: Vocabulary, names: Iterable[str | Member]) -> Vocabulary:
    """The same classes with other background names, which take part and are never answered.

    Raises:
        ValueError: ``names`` is not a list of names, or holds one of the vocabulary.
    """
    given = tuple(names) if type(names) in (list, tuple) else _listed(names, "background")
    try:
        found = _with_background(vocabulary, given)
    except TypeError:  # something that is no key is no name either
        found = _with_background(vocabulary, _listed(names, "background"))
    if found.repeated and not vocabulary.repeated:
        raise ValueError(f"background: {found.repeated}")
    return found


# A vocabulary is a key by its identity: one that comes again is the same.
@lru_cache(maxsize=MAX_VOCABULARIES)
def _with_background(vocabulary: Vocabulary, names: tuple[Any, ...]) -> Vocabulary:
    members = vocabulary.members[: vocabulary.background.start]
    background = _listed(names, "background")
    return build_vocabulary(
        vocabulary.names, members, vocabulary.groups, vocabulary.parents, background
    )
