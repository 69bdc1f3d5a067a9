"""Vocabularies: templates, unit length, the caches, and names that are refused."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from regionspot_d2.modeling.names import check_names, clean_name, raw_name
from regionspot_d2.modeling.vocabulary import TextEmbedder

from .tiny import tiny_model


class CountingModel(SimpleNamespace):
    """Encodes a text as (letters, words, 1) and counts the texts it has seen."""

    def __init__(self, fingerprint: str = "a", templates: tuple[str, ...] = ("{}", "a {}")) -> None:
        super().__init__(fingerprint=fingerprint, templates=templates, text_dim=3, seen=[])

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        return torch.tensor([[len(t), len(t.split()), 1.0] for t in texts])


def test_mean_of_raw_template_embeddings_then_unit_length():
    words = TextEmbedder(CountingModel())(["cat", "big_dog"])
    expected = torch.tensor([[(3 + 5) / 2, (1 + 2) / 2, 1], [(7 + 9) / 2, (2 + 3) / 2, 1]])
    torch.testing.assert_close(words, expected / expected.norm(dim=1, keepdim=True))


def test_a_known_vocabulary_is_not_encoded_again(tmp_path):
    model = CountingModel()
    first = TextEmbedder(model, tmp_path)
    words = first(["cat", "dog"])
    first(["cat", "dog"])
    assert len(model.seen) == 4
    model = CountingModel()
    assert torch.equal(TextEmbedder(model, tmp_path)(["cat", "dog"]), words)
    assert model.seen == []


def test_a_cache_that_may_only_be_read_is_used(tmp_path, monkeypatch, caplog):
    TextEmbedder(CountingModel(), tmp_path)(["cat", "dog"])
    model = CountingModel()

    def refuse(*arguments: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    TextEmbedder(model, tmp_path)(["cat", "dog"])
    assert model.seen == [] and not caplog.records


@pytest.mark.parametrize(
    "model, names",
    [
        (CountingModel(fingerprint="b"), ["cat", "dog"]),
        (CountingModel(templates=("{}",)), ["cat", "dog"]),
        (CountingModel(), ["dog", "cat"]),
        (CountingModel(), ["cat dog"]),
    ],
    ids=["other weights", "other templates", "other order", "other names"],
)
def test_the_cache_answers_only_for_what_it_was_made_of(tmp_path, model, names):
    TextEmbedder(CountingModel(), tmp_path)(["cat", "dog"])
    TextEmbedder(model, tmp_path)(names)
    assert len(model.seen) == len(names) * len(model.templates)


def test_a_damaged_cache_file_is_made_again(tmp_path):
    words = TextEmbedder(CountingModel(), tmp_path)(["cat"])
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(TextEmbedder(CountingModel(), tmp_path)(["cat"]), words)
    again = CountingModel()
    TextEmbedder(again, tmp_path)(["cat"])
    assert again.seen == []


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "empty"),
        ("cat", "one string"),
        (["cat", " "], "Name 1"),
        (["cat", "dog", "Cat"], "places 0 and 2"),
        (["traffic light", "traffic_light"], "twice"),
        (["cat", "cat\u200b"], "twice"),
        (["cat", "\u200b"], "non-empty text"),
    ],
)
def test_names_that_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check_names(names)


def test_class_lists_of_datasets_may_repeat_a_name():
    words = TextEmbedder(CountingModel())(["cat", "dog", "cat"])
    assert torch.equal(words[0], words[2])


@pytest.mark.parametrize(
    "options, texts",
    [
        ({"raw_names": True}, ["big_dog", "a big_dog"]),
        ({"templates": ["{}"]}, ["big dog"]),
        ({"raw_names": True, "templates": ["{}"]}, ["big_dog"]),
    ],
    ids=str,
)
def test_other_names_and_templates_have_other_vectors_in_the_cache(tmp_path, options, texts):
    ours = TextEmbedder(CountingModel(), tmp_path)(["big_dog"])
    model = CountingModel()
    found = TextEmbedder(model, tmp_path, **options)(["big_dog"])
    assert model.seen == texts and not torch.equal(found, ours)
    again = CountingModel()
    assert torch.equal(TextEmbedder(again, tmp_path, **options)(["big_dog"]), found)
    assert torch.equal(TextEmbedder(again, tmp_path)(["big_dog"]), ours)
    assert again.seen == []


def test_raw_name():
    assert raw_name("aerosol_can") == "aerosol_can"
    assert raw_name("wall-other-merged") == "wall" and raw_name("food-stuff") == "food"
    assert raw_name("stuffed-bear") == "stuffed-bear"


@pytest.mark.parametrize("template", ["a photo", "{} or {}", "{name}", "{0}", "{", 5])
def test_a_template_without_a_place_for_the_name_is_refused(template):
    with pytest.raises(ValueError, match="MODEL.VISION_LANGUAGE.TEMPLATES holds .*{}"):
        TextEmbedder(CountingModel(), templates=[template])


def test_clean_name():
    assert clean_name(" bell_pepper  (red) ") == "bell pepper (red)"


def test_memory_and_disk_are_bounded(tmp_path):
    model = CountingModel()
    one_file = len(np_file_of(["name 0", "other"], tmp_path / "measure"))
    embedder = TextEmbedder(model, tmp_path / "cache", max_disk_bytes=50 * one_file)
    vocabularies = [[f"name {i}", "other"] for i in range(200)]
    for names in vocabularies:
        embedder(names)
        # In use all the time: it stays in memory, and on disk while it is the newest.
        embedder(vocabularies[0])
    files = list((tmp_path / "cache").iterdir())
    assert sum(file.stat().st_size for file in files) <= 50 * one_file
    encoded = len(model.seen)
    for names in [vocabularies[0], *vocabularies[-31:]]:
        embedder(names)
    assert len(model.seen) == encoded
    # The newest are on disk for the next process, the oldest were dropped.
    again = CountingModel()
    reader = TextEmbedder(again, tmp_path / "cache", max_disk_bytes=50 * one_file)
    reader(vocabularies[-1])
    assert again.seen == []
    reader(vocabularies[1])
    assert again.seen != []


def np_file_of(names: list[str], folder) -> bytes:
    TextEmbedder(CountingModel(), folder)(names)
    [file] = folder.iterdir()
    return file.read_bytes()


class ModelOfKnownNames(CountingModel):
    """Knows "cat" and "dog", and takes their plurals for them."""

    def known_names(self, texts: list[str]) -> list[str]:
        return [text.removesuffix("s") for text in texts]

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return super().encode_text(self.known_names(texts))


def test_names_that_known_ones_stand_in_for_are_listed():
    embedder = TextEmbedder(ModelOfKnownNames())
    assert embedder.stood_in(["cats", "tiny_dog"]) == {"cats": "cat"}
    assert torch.equal(embedder(["cats"]), embedder(["cat"]))
    embedder.check_apart(["cats", "tiny_dog"])


@pytest.mark.parametrize("names", [["cat", "lion", "cats"], ["cats", "lion", "cat"]])
def test_a_known_name_may_not_stand_in_twice(names):
    embedder = TextEmbedder(ModelOfKnownNames())
    with pytest.raises(ValueError, match="'cats?' and 'cats?', which both go by 'cat'"):
        embedder.check_apart(names)


@pytest.mark.parametrize(
    "pair",
    [
        ("caf\u00e9", "cafe\u0301"),  # composed or not
        ("rock &amp; roll", "rock & roll"),
        ("men\u2019s shoe", "men's shoe"),
        ("\uff43\uff41\uff54", "cat"),
        ("\ufb01sh", "fish"),
        ("cat\x07", "cat"),
    ],
)
def test_two_spellings_that_the_text_side_reads_alike_are_refused(pair, tiny_models):
    embedder = tiny_model().text_embedder
    with pytest.raises(ValueError, match="are one name to the text side and would share") as caught:
        embedder.check_apart(["lion", pair[0], "bread", pair[1]])
    assert "\n" not in str(caught.value) and "\x07" not in str(caught.value)
    embedder.check_apart(["lion", pair[0], "bread", "cup"])
    # The texts of one class may be alike.
    embedder.check_apart({"lion": "lion", "other": list(pair)})


def test_many_names_are_told_apart():
    rows = F.normalize(torch.randn(2000, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    rows[1500] = F.normalize(rows[20] + 1e-8, dim=0)
    rows[700] = rows[30] = rows[1999]
    model = ModelOfKnownNames(templates=("{}",))
    model.encode_text = lambda texts: rows[[int(text) for text in texts]]
    embedder = TextEmbedder(model)
    apart = [str(number) for number in range(2000) if number not in (20, 30, 700)]
    embedder.check_apart(apart)
    for first, second in (("20", "1500"), ("30", "1999"), ("700", "1999")):
        with pytest.raises(ValueError, match=f"'{first}' and '{second}'|'{second}' and '{first}'"):
            embedder.check_apart([*apart, first])


def test_a_text_side_that_gives_no_numbers_is_told():
    model = CountingModel()
    model.encode_text = lambda texts: torch.full((len(texts), 3), float("nan"))
    with pytest.raises(ValueError, match="VISION_LANGUAGE.WEIGHTS are damaged"):
        TextEmbedder(model)(["cat"])


def test_a_file_without_line_breaks_is_no_name():
    with pytest.raises(ValueError, match="Name 1 of the vocabulary, 'dog dog .*has 400000 char"):
        check_names(["cat", "dog " * 100_000])
