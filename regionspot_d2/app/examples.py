"""Class names that examples show, beside those that text stands for."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from ..data.images import read_image
from ..exemplars import Exemplar, Exemplars
from ..modeling.members import Vocabulary
from ..modeling.words import as_vocabulary
from ..predictor import RegionSpotPredictor
from .example_files import Examples, check_names_apart
from .inputs import plain_name, tell, tell_if_single
from .names import one_line


def as_list(vocabulary: list[str] | Vocabulary | None) -> list[str]:
    """The names of --vocabulary, if it has nothing but names, as --examples expects it.

    Raises:
        ValueError: it has more.
    """
    if isinstance(vocabulary, Vocabulary) and not vocabulary.is_list:
        raise ValueError(
            "--examples: the yaml file of --vocabulary has more than names; beside examples, a "
            "plain list of names is expected."
        )
    return list(vocabulary.names if isinstance(vocabulary, Vocabulary) else vocabulary or ())


def show_examples(predictor: RegionSpotPredictor, examples: Examples, texts: list[str]) -> None:
    """Makes texts and examples the predictor's vocabulary. A name that has a text keeps it.

    Args:
        predictor: its image is then that of an example.
        examples: of ``example_files.find_examples``.
        texts: class names that their text stands for.

    Raises:
        ValueError: the texts or the names are refused, an image cannot be read, or a box makes no
            sense.
    """
    embedder = predictor.model.text_embedder
    if texts:  # what is wrong with them is told before images are encoded
        embedder(vocabulary := as_vocabulary(texts))
        embedder.check_apart(vocabulary)
    try:
        members = _encode(predictor, examples, {plain_name(name) for name in texts})
        predictor.set_vocabulary([*texts, *members])
    except (OSError, ValueError) as error:
        raise ValueError(f"--examples {examples.source}: {error}") from error
    tell_if_single(predictor.vocabulary, "--examples")


def _encode(predictor: RegionSpotPredictor, examples: Examples, known: set[str]) -> list[Exemplar]:
    """The names with their vectors, without those that are known."""
    names, found = examples.names, Exemplars(predictor)
    if not names:
        found = Exemplars.load(examples.files[0], predictor)
        names = list(found.vectors)
        check_names_apart(names)
    kept = [name for name in names if plain_name(name) in known]
    _tell_of_kept(kept)
    for path, regions in tqdm(
        examples.regions.items(), desc="Encoding examples", unit="image", disable=None
    ):
        new = {name: boxes for name, boxes in regions.items() if plain_name(name) not in known}
        if new:
            image = read_image(path, max_pixels=predictor.max_pixels)
            predictor.set_image(image)
            whole = [[0, 0, image.shape[1], image.shape[0]]]
            for name, boxes in new.items():
                try:
                    found.add(name, None, boxes=whole if boxes is None else boxes)
                except ValueError as error:
                    raise ValueError(f"{path}, '{name}': {error}") from error
    members = {member.name: member for member in found.members()}
    return [members[name] for name in names if name not in kept]


def _tell_of_kept(names: list[str]) -> None:
    if len(names) == 1:
        what = f"'{names[0]}' is in --vocabulary and keeps its text; its"
    else:
        first = ", ".join(f"'{name}'" for name in names[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        what = f"{first}{more} are in --vocabulary and keep their text; their"
    if names:
        tell(one_line(f"--examples: {what} examples are left out."))


def texts_of(vocabulary: Vocabulary) -> list[list[Any]]:
    """Names and their texts, also of the background, without names that examples show."""
    texts = [member for member in vocabulary.members if member.vectors is None]
    return [[member.name, list(member.texts)] for member in texts]
