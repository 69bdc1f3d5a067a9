"""From what people write to names that are known: "two red mugs" goes by "mug".

Plurals are a table of rules rather than a library such as inflect: every guess is looked up among
the known names, so that a rule may guess too much, while a library that turns "bus" into "bu" would
need the same check.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

_LISTS = Path(__file__).with_suffix(".json")
_PLURALS = (
    ("ves", "f"),
    ("ves", "fe"),
    ("ies", "y"),
    ("ies", "ie"),
    ("s", ""),
    ("es", ""),
)


def plain(name: str) -> str:
    """A name as its words: lower case, without underscores, hyphens, slashes and the like."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


class KnownWords:
    """Finds the known name that stands in for what a person wrote.

    A phrase goes by the longest known name at its end, before any "of", "with" or "riding": that is
    the head of an English noun phrase. Plurals, British spellings, everyday synonyms, and words
    written together or apart count as the known name. There is none where the head would mislead:
    "cat and dog", "toy car", "guinea pig", or "cricket bat" where the known bat is the animal.

    ``words.json`` lists the words that matter: ``prepositions`` and ``verbs`` end the head;
    ``measures`` are heads that name nothing ("a pair of glasses"); ``refused`` join or deny names;
    ``privatives`` make something else of the thing after them; ``neutral`` words and ``colors``
    suit any sense of the word they describe; ``misleading`` phrases are not what their last word
    says; ``ambiguous`` words are class names with a more common sense; ``certain`` ones have no
    other sense, though a list of names qualifies them.
    """

    def __init__(self, names: Collection[str], ambiguous: Collection[str] = ()) -> None:
        """
        Args:
            names: the known names, as :func:`plain` writes them.
            ambiguous: those with senses of which only some are known, such as "bat". They stand in
                behind words that suit every sense ("two black bats"), and behind no others.
        """
        self._names = names
        self._ambiguous = {*ambiguous, *_words("ambiguous")} - _words("certain")
        self._joined: dict[str, str] = {}
        for name in names:
            self._joined.setdefault(name.replace(" ", ""), name)
        # Of the rules; what they find depends on the names too.
        self.fingerprint = hashlib.sha256(
            Path(__file__).read_bytes() + json.dumps(_lists()).encode()
        ).hexdigest()

    def stand_in(self, phrase: str) -> str | None:
        """The known name for a phrase, itself if it is known; None if there is none."""
        if plain(phrase) in self._names:
            return plain(phrase)
        letters = unicodedata.normalize("NFKD", re.sub(r"[,;/|&+]", " and ", phrase))
        letters = "".join(c for c in letters if not unicodedata.combining(c))
        british = _lists()["british"]
        words = plain(re.sub(r"['’]s?(?!\w)", " ", letters)).split()
        return self._of_phrase(_without_color_pairs([british.get(word, word) for word in words]))

    def _of_phrase(self, words: list[str]) -> str | None:
        ends = _words("prepositions") | _words("verbs")
        if not words or words[0] in _words("prepositions"):
            return None
        for end in range(1, len(words)):
            if words[end] not in ends:
                continue
            # A known name may hold such a word: "an old chest of drawers".
            if found := self._of_tails(words, end):
                return found
            head = words[:end]
            if words[end] == "of" and head[-1] in _words("measures"):
                refused = not _words("refused").isdisjoint(head)
                return None if refused else self._of_phrase(words[end + 1 :])
            if words[end] == "of" and head[-1] == "glasses":  # not those on a nose
                head = [*head[:-1], "glass"]
            found = self._of_tails(head, end)
            # "A red playing card" has no head before its verb.
            if found or words[end] in _words("prepositions"):
                return found
        return self._of_tails(words, len(words))

    def _of_tails(self, words: list[str], starts: int) -> str | None:
        """The longest known tail that begins before place ``starts``."""
        for start in range(starts):
            tail = words[start:]
            for name in self._spellings(tail):
                return name if self._may_describe(words[:start], name) else None
            if not _words("misleading").isdisjoint(map(" ".join, _numbers(tail))):
                return None
        return None

    def _spellings(self, words: list[str]) -> Iterator[str]:
        """The known names that are these words in another spelling or number, best first."""
        synonyms = _lists()["synonyms"]
        for form in map(" ".join, _numbers(words)):
            name = synonyms.get(form, form)
            if name in self._names:
                yield name
        for [form] in _numbers(["".join(words)]):
            name = self._joined.get(form) or synonyms.get(form)
            if name in self._names and len(form) > 3:
                yield name

    def _may_describe(self, modifiers: list[str], name: str) -> bool:
        if not (_words("refused") | _words("privatives")).isdisjoint(modifiers):
            return False
        neutral = _words("neutral") | _words("colors")
        return name not in self._ambiguous or all(
            word in neutral or word.isdecimal() for word in modifiers
        )


@functools.cache
def _lists() -> dict[str, Any]:
    with PathManager.open(str(_LISTS)) as file:
        return json.load(file)


@functools.cache
def _words(kind: str) -> frozenset[str]:
    return frozenset(_lists()[kind])


def _numbers(words: list[str]) -> Iterator[list[str]]:
    """Words, with possible singulars of the last, and its plural ("scissor" for "scissors")."""
    *front, last = words
    yield words
    for plural, singular in _lists()["irregular"].items():
        if last.endswith(plural):
            yield [*front, last.removesuffix(plural) + singular]
    for plural, singular in _PLURALS:
        if last.endswith(plural) and not last.endswith("ss") and len(last) > len(plural) + 1:
            form = last.removesuffix(plural) + singular
            yield [*front, _lists()["british"].get(form, form)]
    if not last.endswith("s") and last not in _words("neutral"):
        yield [*front, f"{last}s"]


def _without_color_pairs(words: list[str]) -> list[str]:
    """Takes "black and" out of "black and white cat"."""
    kept = list(words)
    for place in range(len(words) - 3, -1, -1):
        first, middle, second = words[place : place + 3]
        if middle == "and" and {first, second} <= _words("colors"):
            del kept[place : place + 2]
    return kept
