"""What people write finds a known name, or is refused; it never finds a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from regionspot_d2.data.datasets.vocabularies import VOCABULARIES, class_synonyms
from regionspot_d2.mini.text_vectors import TextVectors
from regionspot_d2.mini.vision_language import imagenet_names, imagenet_text_vectors
from regionspot_d2.mini.words import plain

WORDS = Path(__file__).parents[2] / "regionspot_d2" / "mini" / "words.json"


def classes_of_the_vocabularies() -> list[list[str]]:
    return [names for name in VOCABULARIES for names in class_synonyms(name)]


def random_vectors(count: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def before() -> TextVectors:
    """The names of the four vocabularies; their vectors do not matter here."""
    classes = classes_of_the_vocabularies()
    return TextVectors(classes, random_vectors(len(classes)))


@pytest.fixture(scope="module")
def names(before: TextVectors) -> TextVectors:
    """With the names of ImageNet."""
    return before.extended(imagenet_names(), random_vectors(1000))


@pytest.mark.parametrize(
    ("phrase", "known"),
    [
        # Plurals, regular and not.
        ("cats", "cat"),
        ("buses", "bus"),
        ("dishes", "dish"),
        ("boxes", "box"),
        ("watches", "watch"),
        ("cherries", "cherry"),
        ("ponies", "pony"),
        ("potatoes", "potato"),
        ("mice", "mouse"),
        ("geese", "goose"),
        ("knives", "knife"),
        ("wolves", "wolf"),
        ("calves", "calf"),
        ("scarves", "scarf"),
        ("people", "person"),
        ("men", "man"),
        ("women", "woman"),
        ("children", "child"),
        ("traffic lights", "traffic light"),
        ("washing machines", "washing machine"),
        ("wine glasses", "wine glass"),
        ("computer mice", "computer mouse"),
        # The other way round, for what is known in the plural.
        ("scissor", "scissors"),
        ("brussels sprout", "brussels sprouts"),
        # Articles, numbers and adjectives.
        ("two red mugs", "mug"),
        ("2 dogs", "dog"),
        ("a wine bottle", "wine bottle"),
        ("my red mug", "mug"),
        ("the old electric scooter", "scooter"),
        ("electric scooter", "scooter"),
        ("a big yellow school bus", "school bus"),
        ("brown leather sofa", "sofa"),
        ("black and white cat", "cat"),
        ("the man's hat", "hat"),
        ("running dog", "dog"),
        ("two black bats", "bat"),
        ("café table", "table"),
        # Written together, apart, with hyphens; other spellings and everyday synonyms.
        ("tshirt", "t shirt"),
        ("white t-shirts", "t shirt"),
        ("winebottle", "wine bottle"),
        ("sea horse", "seahorse"),
        ("star fish", "starfish"),
        ("skate board", "skateboard"),
        ("smartphone", "smart phone"),
        ("smartphones", "smart phone"),
        ("tyre", "tire"),
        ("flat tyres", "tire"),
        ("licence plate", "license plate"),
        ("parking metre", "parking meter"),
        ("pink doughnuts", "doughnut"),
        ("old aeroplanes", "aeroplane"),
        ("hard hat", "helmet"),
        ("hoodie", "sweatshirt"),
        ("fridge", "refrigerator"),
        ("lorries", "truck"),
        ("plane", "airplane"),
        ("motor bike", "motorcycle"),
        ("electric bikes", "bicycle"),
        ("cargo pants", "pants"),
        ("police officers", "person"),
        ("black labrador", "labrador retriever"),
        # The head of a phrase.
        ("cup of coffee", "cup"),
        ("man with a red hat", "man"),
        ("dog on a sofa", "dog"),
        ("two women holding umbrellas", "woman"),
        ("man riding horse", "man"),
        ("dog without a tail", "dog"),
        ("dog-shaped balloon", "balloon"),
        ("pair of glasses", "glasses"),
        ("a slice of pizza", "pizza"),
        ("roll of toilet paper", "toilet paper"),
        ("two glasses of wine", "glass"),
        ("a bunch of bananas", "banana"),
        ("an old chest of drawers", "chest of drawers"),
        ("wooden bow and arrow", "bow and arrow"),
        # Names of ImageNet.
        ("Golden Retrievers", "golden retriever"),
        ("a fluffy Siberian husky", "siberian husky"),
        ("two great white sharks", "great white shark"),
        ("xylophones", "xylophone"),
    ],
)
def test_a_phrase_goes_by_a_known_name(names, phrase, known):
    assert names.known_names([phrase]) == [known]
    assert torch.equal(names([phrase]), names([known]))


@pytest.mark.parametrize(
    "phrase",
    [
        "hot dog",
        "Hot_Dog",
        "T shirt",
        "TRAFFIC LIGHT",
        "traffic-light",
        "pyjamas",
        "jewellery",
        "aeroplane",
        "doughnut",
        "guinea pig",
        "golden retriever",
        "Golden Retriever",
        "orca",
        "volcano",
        "swim trunks / shorts",
        "bat_(animal)",
        "glasses",
    ],
)
def test_nothing_stands_in_for_a_known_name(names, phrase):
    assert names.known_names([phrase]) == [phrase]


@pytest.mark.parametrize(
    "phrase",
    [
        # The head is not known, though another word is.
        "cat food",
        "peacock feather",
        "nail polish",
        "woman's head",
        "bus stop",
        "dog 2",
        # Two things, or none.
        "cat and dog",
        "cats or dogs",
        "cat, dog",
        "cats/dogs",
        "dog & cat",
        "no dog",
        "not a cat",
        "no pair of glasses",
        # Something else than the head says.
        "toy car",
        "fake potted plant",
        "prairie dog",
        "prairie dogs",
        "corn dogs",
        "toilet paper roll",
        "a horse shoe",
        "parking ticket",
        # Another sense than the known one.
        "cricket bat",
        "due date",
        "kick boxer",
        "water glass",
        "ear",
        "head",
        # Nothing at all.
        "with hat",
        "of",
        "the",
        "short",
        "bass",
        "gas",
        "cowboy",
        "chien",
        "zzz",
        "日本",
        "'s",
    ],
)
def test_a_phrase_is_refused_rather_than_misread(names, phrase):
    with pytest.raises(ValueError, match="The mini model knows") as error:
        names.known_names([phrase])
    assert f"'{phrase}': " in str(error.value)


def test_every_everyday_synonym_leads_to_a_known_name(names):
    lists = json.loads(WORDS.read_text())
    synonyms = lists["synonyms"]
    assert names.known_names(list(synonyms)) == list(synonyms.values())
    assert names.known_names(list(synonyms.values())) == list(synonyms.values())


def test_a_refused_name_comes_with_the_closest_known_ones(names):
    with pytest.raises(ValueError) as error:
        names(["cat food", "bycicle", "red bag"])
    message = str(error.value)
    assert "'cat food': close: cat," in message
    assert "'bycicle': close: bicycle" in message
    assert "punch bag" in message


def test_names_known_before_keep_their_vectors_bit_for_bit(before, names):
    known = {plain(name) for all_names in classes_of_the_vocabularies() for name in all_names}
    assert len(known) > 2000
    assert torch.equal(before(sorted(known)), names(sorted(known)))
    assert torch.equal(before.mean, names.mean)
    assert names.fingerprint != before.fingerprint


def test_every_class_of_imagenet_is_a_known_name(names):
    classes = imagenet_names()
    assert len(classes) == 1000
    every = [name for class_names in classes for name in class_names]
    assert names.known_names(every) == every


def test_as_words_two_breeds_differ_and_lie_close_to_their_kind():
    # Kinds: dog, dog, cat, and a scene that is no kind of anything.
    kinds = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    answers = torch.tensor([[9.0, 6, 3, 0], [6, 9, 0, 0], [1, 0, 9, 0], [0, 4, 5, 9]])
    words = imagenet_text_vectors(answers, kinds)
    golden, labrador, tabby, _ = words
    similar = F.cosine_similarity
    assert similar(golden, kinds[0], dim=0) > 0.9 > similar(golden, tabby, dim=0)
    assert 0.9 < similar(golden, labrador, dim=0) < 1
    # An image that is all dog goes by "dog".
    assert kinds[0] @ kinds[0] > golden @ kinds[0] > tabby @ kinds[0]
