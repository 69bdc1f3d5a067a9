"""Logits to scores: what a score is, and when it is too low for a name."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from torch import Tensor

from .members import Member, Vocabulary, build_vocabulary
from .names import clean_name
from .word_files import read_words
from .words import MAX_VOCABULARIES, as_member

KINDS = ("softmax", "sigmoid")
#: Of a temperature and a bias: far beyond all that can be meant, and scores stay numbers.
MOST = 1e6


@dataclass(frozen=True)
class Scoring:
    """How the logits of a region become the scores of names.

    Attributes:
        kind: "softmax" compares the names of a vocabulary, and their scores sum to 1. "sigmoid"
            takes each for itself, for heads that were trained so.
        threshold: names that score less are not given.
        background: names that take part in every question and are never answered.
        words: has the texts for class names of other vocabularies, such as those of datasets.
        temperature: logits are divided by it before a softmax; fitted by ``tools/calibrate.py``.
        sigmoid_temperature, sigmoid_bias: logits are divided by the one before a sigmoid, then the
            other is added.
    """

    kind: str = "softmax"
    threshold: float = 0.0
    background: tuple[str | Member, ...] = ()
    words: Vocabulary | None = None
    temperature: float = 1.0
    sigmoid_temperature: float = 1.0
    sigmoid_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"scores is {self.kind!r:.60}; 'softmax' or 'sigmoid' is expected.")
        if not _is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r:.60}; scores are in 0..1.")
        for value in (self.temperature, self.sigmoid_temperature):
            if not _is_number(value) or not 1 / MOST <= value <= MOST:
                raise ValueError(
                    f"A temperature is {value!r:.60}; it must be in {1 / MOST:g}..{MOST:g}."
                )
        if not _is_number(self.sigmoid_bias) or abs(self.sigmoid_bias) > MOST:
            raise ValueError(
                f"The bias is {self.sigmoid_bias!r:.60}; it must be in {-MOST:g}..{MOST:g}."
            )
        # Numbers of any kind are taken; PyTorch does not compare itself with fractions.
        for name, value in (
            ("threshold", self.threshold),
            ("temperature", self.temperature),
            ("sigmoid_temperature", self.sigmoid_temperature),
            ("sigmoid_bias", self.sigmoid_bias),
        ):
            object.__setattr__(self, name, float(value))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Scoring:
        """As ``MODEL.NAMING`` says."""
        naming = cfg.MODEL.NAMING
        words = read_words(naming.WORDS) if naming.WORDS else None
        more = () if words is None else words.members[words.background.start :]
        return cls(
            kind=naming.SCORES,
            threshold=naming.THRESHOLD,
            background=(*naming.BACKGROUND, *more),
            words=words,
            temperature=naming.TEMPERATURE,
            sigmoid_temperature=naming.SIGMOID_TEMPERATURE,
            sigmoid_bias=naming.SIGMOID_BIAS,
        )

    def changed(self, threshold: float | None, kind: str | None) -> Scoring:
        """The same with another threshold or kind, where one is given."""
        if threshold is None and kind is None:
            return self
        return replace(
            self,
            threshold=self.threshold if threshold is None else threshold,
            kind=self.kind if kind is None else kind,
        )

    def joined(self, vocabulary: Vocabulary) -> Vocabulary:
        """A vocabulary with these words for its names, and this background if it has none."""
        if not self.background and self.words is None:
            return vocabulary
        return _joined(vocabulary, self.background, self.words)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits as the softmax or the sigmoid takes them."""
        if self.kind == "sigmoid":
            return logits / self.sigmoid_temperature + self.sigmoid_bias
        return logits if self.temperature == 1 else logits / self.temperature

    def squash(self, logits: Tensor) -> Tensor:
        """Scores in 0..1 of names that take part together (R, N)."""
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(1)

    def warn_of_one_name(self, vocabulary: Vocabulary) -> None:
        """Warns, once, of a vocabulary that a softmax makes no use of."""
        if self.kind == "softmax" and (name := vocabulary.lonely_name):
            log_first_n(
                logging.WARNING,
                f"The vocabulary has one name, '{name:.60}', so its score is 1.0 for every region: "
                "a score compares names. Add names of what else may be there, as background= if "
                'they are no answers; or take scores="sigmoid" if the head was trained so.',
                name=__name__,
            )


@lru_cache(maxsize=MAX_VOCABULARIES)
def _joined(
    vocabulary: Vocabulary, background: tuple[str | Member, ...], words: Vocabulary | None
) -> Vocabulary:
    known = {} if words is None else {_written(member.name): member for member in words.members}
    inside = vocabulary.members[: vocabulary.background.start]
    members = tuple(
        (
            replace(known.get(_written(member.name), member), name=member.name)
            if member.is_plain_name
            else member
        )
        for member in inside
    )
    outside = vocabulary.members[len(inside) :]
    if not outside:
        names = {_written(member.name) for member in inside}
        outside = tuple(
            member for member in map(as_member, background) if _written(member.name) not in names
        )
    return build_vocabulary(
        vocabulary.names, members, vocabulary.groups, vocabulary.parents, outside
    )


def _written(name: str) -> str:
    return clean_name(name).lower()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def scores_of_names(logits: Tensor, vocabulary: Vocabulary | None, scoring: Scoring) -> Tensor:
    """The scores of all class names.

    Args:
        logits: (R, M), of the members of the vocabulary, the background last.
        vocabulary: by default the names are the members, and compared with each other.
        scoring: what a score is.

    Returns:
        (R, C). In a hierarchy, the score of a name that does not answer is -1: it is less than the
        threshold, or one below it is not.
    """
    logits = scoring.calibrated(logits)
    if vocabulary is None or vocabulary.is_plain:
        return scoring.squash(logits)
    outside = logits[:, vocabulary.background.start :]
    found = []
    for group in vocabulary.groups:
        own = logits[:, group.members.start : group.members.stop]
        scores = scoring.squash(torch.cat([own, outside], dim=1))
        scores, others = scores[:, : own.shape[1]], scores[:, own.shape[1] :]
        if scoring.kind == "sigmoid" and others.shape[1]:
            # A region is a name and no background at most with this probability.
            scores = scores.minimum(1 - others.amax(1, keepdim=True))
        if vocabulary.parents:
            first = group.names.start
            above = [
                max(place - first, -1) for place in vocabulary.parents[first : group.names.stop]
            ]
            leaves = [place - first for place in group.leaves]
            scores = _answering(_of_nodes(scores, leaves, above, scoring), above, scoring.threshold)
        found.append(scores)
    return torch.cat(found, dim=1)


def _of_nodes(
    scores: Tensor, leaves: Sequence[int], above: Sequence[int], scoring: Scoring
) -> Tensor:
    """From the scores of leaves (R, L) to those of all nodes (R, N), which follow those above them.

    A node is at least as likely as what is below it: the sum of scores that compare names, the
    largest of scores that do not.
    """
    columns = list(scores.new_zeros(len(above), len(scores)))
    for place, column in zip(leaves, scores.unbind(1)):
        columns[place] = column
    for place in reversed(range(len(above))):
        if above[place] >= 0:
            both = columns[above[place]], columns[place]
            columns[above[place]] = sum(both) if scoring.kind == "softmax" else torch.maximum(*both)
    return torch.stack(columns, dim=1)


def _answering(scores: Tensor, above: Sequence[int], threshold: float) -> Tensor:
    """Leaves the scores of the deepest nodes that pass, and of those on top where none does."""
    passes = scores >= threshold
    answers = passes.clone()
    for place, parent in enumerate(above):
        if parent >= 0:
            answers[:, parent] &= ~passes[:, place]
        else:
            answers[:, place] |= ~passes[:, place]
    return scores.masked_fill(~answers, -1)
