"""What a vocabulary holds: class names, and the texts or vectors that regions are compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arrays import as_numbers
from .names import repeated_name


@runtime_checkable
class NamedVector(Protocol):
    """A class given by a point of text space, such as the mean of a few examples.

    Attributes:
        name: the class name.
        vector: (D,).
    """

    @property
    def name(self) -> str: ...

    @property
    def vector(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Member:
    """A class of a vocabulary: a name, and the texts or vectors that stand for it.

    Attributes:
        name: the class name.
        texts: what the text side embeds; by default the name, unless there are vectors.
        vectors: (K, D) or (D,), points of text space beside the texts, such as embeddings of
            regions. They are scaled to unit length.
        by_mean: whether all of them are averaged into one vector. Otherwise the nearest decides:
            the logit of the class is the largest of its own.
    """

    name: str
    texts: tuple[str, ...] = ()
    vectors: Tensor | None = field(default=None, repr=False)
    by_mean: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"A class of the vocabulary is {self.name!r:.60}: give text.")
        # Text is a sequence too, of letters.
        if not isinstance(self.texts, Sequence) or isinstance(self.texts, str):
            raise ValueError(
                f"The texts of '{self.name:.60}' are {self.texts!r:.60}; a list is expected."
            )
        if self.vectors is None:
            object.__setattr__(self, "texts", tuple(self.texts) or (self.name,))
            return
        vectors = as_numbers(self.vectors, f"vectors of '{self.name:.60}'").float().cpu()
        vectors = torch.atleast_2d(vectors)
        units = F.normalize(vectors, dim=-1)
        # Of length zero, infinite or not a number: none of them can be scaled to 1.
        if units.dim() != 2 or 0 in units.shape or not (units.norm(dim=1) > 0.5).all():
            raise ValueError(
                f"The vectors of '{self.name:.60}' have the shape {tuple(vectors.shape)}; (D,) or "
                "(K, D) is expected, all of them finite and none of them zero."
            )
        object.__setattr__(self, "vectors", units)

    @property
    def is_plain_name(self) -> bool:
        """Whether nothing but its name stands for the class."""
        return self.vectors is None and self.texts == (self.name,)

    @property
    def size(self) -> int:
        """The number of vectors that the class is compared by."""
        own = 0 if self.vectors is None else len(self.vectors)
        return 1 if self.by_mean else len(self.texts) + own


class Group(NamedTuple):
    """A part of a vocabulary that answers for itself, such as the colors beside the objects.

    Attributes:
        title: its name; "" where there is only one.
        names: the places of its class names in the vocabulary.
        members: the places of its members.
        leaves: the places of these members among the class names: all but the inner nodes.
    """

    title: str
    names: range
    members: range
    leaves: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A vocabulary that was read and checked. It cannot change, so that what it costs is paid once.

    Attributes:
        names: C class names, in the order of ``pred_classes``, group after group.
        members: M classes that are compared with regions, group after group; the background last.
        groups: at least one; each answers for itself.
        background: the places of the members that take part and are never answered.
        parents: with a hierarchy, for each name the place of the one above it, or -1.
        key: tells what the vocabulary holds, for caches.
        repeated: what is wrong if one of the names occurs twice, as in the class lists of some
            datasets; "" if none does.
    """

    names: tuple[str, ...]
    members: tuple[Member, ...] = field(repr=False)
    groups: tuple[Group, ...]
    background: range
    parents: tuple[int, ...] = field(repr=False)
    key: str = field(repr=False)
    repeated: str = field(repr=False)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What the text side embeds, member after member."""
        return tuple(text for member in self.members for text in member.texts)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the logits of names are those of the members, and one softmax joins them."""
        return len(self.groups) == 1 and not self.background and not self.parents

    @cached_property
    def is_list(self) -> bool:
        """Whether there is nothing but class names."""
        return self.is_plain and all(member.is_plain_name for member in self.members)

    @cached_property
    def lonely_name(self) -> str:
        """A name that a softmax would compare with nothing; "" if there is none."""
        alone = [group for group in self.groups if len(group.members) == 1]
        return self.names[alone[0].names[0]] if alone and not self.background else ""

    def vectors(self, embeddings: Tensor) -> Tensor:
        """What regions are compared with.

        Args:
            embeddings: of :attr:`texts`, rows of unit length.

        Returns:
            (T, D), rows of unit length, those of a member together.
        """
        if all(member.vectors is None and not member.by_mean for member in self.members):
            return embeddings
        rows, start = [], 0
        for member in self.members:
            own = embeddings[start : start + len(member.texts)]
            start += len(member.texts)
            if member.vectors is not None:
                if member.vectors.shape[1] != embeddings.shape[1]:
                    raise ValueError(
                        f"The vectors of '{member.name:.60}' have the width "
                        f"{member.vectors.shape[1]}, and the text side of this model "
                        f"{embeddings.shape[1]}: they are of another model."
                    )
                own = torch.cat([own, member.vectors.to(own)])
            rows.append(F.normalize(own.mean(0, keepdim=True), dim=1) if member.by_mean else own)
        return torch.cat(rows)

    def reduce(self, logits: Tensor) -> Tensor:
        """From the logits of vectors (R, T) to those of members (R, M): each has its largest.

        Before a softmax rather than after it: more texts for a class then take nothing away from
        it, and a class of one text is what it is in a list.
        """
        if logits.shape[1] == len(self.members):
            return logits
        owners = self._owners.to(logits.device).expand(len(logits), -1)
        found = logits.new_full((len(logits), len(self.members)), -torch.inf)
        return found.scatter_reduce(1, owners, logits, "amax")

    @cached_property
    def _owners(self) -> Tensor:
        """For each vector the place of its member."""
        sizes = torch.tensor([member.size for member in self.members])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)


def build_vocabulary(
    names: tuple[str, ...],
    members: tuple[Member, ...],
    groups: tuple[Group, ...],
    parents: tuple[int, ...] = (),
    background: tuple[Member, ...] = (),
) -> Vocabulary:
    """Checks the whole: of a group, no two names and no two texts may be the same."""
    repeated = ""
    for group in groups:
        compared = [members[place] for place in group.members] + list(background)
        own = tuple(names[place] for place in group.names)
        texts = tuple(text for member in compared for text in member.texts)
        repeated = repeated or repeated_name(own) or repeated_name(texts)
    members += background
    content = [
        [member.name, member.texts, _digest(member.vectors), member.by_mean] for member in members
    ]
    whole = [content, [[*group] for group in map(_plain, groups)], parents, len(background)]
    key = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    outside = range(len(members) - len(background), len(members))
    return Vocabulary(names, members, groups, outside, parents, key, repeated)


def _plain(group: Group) -> list[Any]:
    return [group.title, len(group.names), group.leaves]


def _digest(vectors: Tensor | None) -> str | None:
    return None if vectors is None else hashlib.sha256(vectors.numpy().tobytes()).hexdigest()
