"""What a score means: none of these, thresholds, sigmoids, groups of words and hierarchies."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling.members import Member
from regionspot_d2.modeling.panoptic import panoptic_segments
from regionspot_d2.modeling.scoring import Scoring, scores_of_names
from regionspot_d2.modeling.word_files import plain_words, read_words, words_of
from regionspot_d2.modeling.words import as_vocabulary

from .tiny import WORDS as VOCABULARIES
from .tiny import golden, tiny_cfg, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")

WORDS = ["cat", "dog", "bird", "bus"]
BOXES = golden()["boxes"]


class Example(NamedTuple):
    name: str
    vector: Tensor


@pytest.fixture
def predictor() -> RegionSpotPredictor:
    predictor = RegionSpotPredictor(tiny_model(), vocabulary=WORDS)
    predictor.set_image(golden()["image"])
    return predictor


def logits(predictor: RegionSpotPredictor, names: list[str]) -> Tensor:
    return predictor.model.score(predictor.region_embeddings(boxes=BOXES), names)


def test_background_names_take_part_and_are_never_answered(predictor):
    found = predictor.predict(boxes=BOXES, background=["bus", "dog"], vocabulary=["cat", "bird"])
    expected = logits(predictor, ["cat", "bird", "bus", "dog"]).softmax(1)[:, :2].max(1)
    torch.testing.assert_close(found.scores, expected.values)
    assert torch.equal(found.pred_classes, expected.indices)
    assert predictor.vocabulary == ["cat", "bird"]
    # They stay, like the vocabulary; another vocabulary comes without them.
    assert torch.equal(predictor.predict(boxes=BOXES).scores, found.scores)
    alone = predictor.predict(boxes=BOXES, vocabulary=["cat", "bird"])
    assert (alone.scores > found.scores).all()


def test_a_background_name_that_is_in_the_vocabulary_is_refused(predictor):
    with pytest.raises(ValueError, match="background: .*'Cat' twice"):
        predictor.predict(boxes=BOXES, background=["Cat"])
    for background in ("cat", [3], {"wall": "wall"}):
        with pytest.raises(ValueError, match="background|vocabulary"):
            predictor.predict(boxes=BOXES, background=background)
    assert predictor.vocabulary == WORDS


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_higher_threshold_gives_fewer_names(predictor, scores):
    plain = predictor.predict(boxes=BOXES, scores=scores)
    counts = []
    for threshold in (0.0, *plain.scores.sort().values.tolist(), 1.0):
        found = predictor.predict(boxes=BOXES, scores=scores, threshold=threshold)
        none = plain.scores < threshold
        assert torch.equal(found.pred_classes, plain.pred_classes.masked_fill(none, -1))
        assert torch.equal(found.scores, plain.scores) and len(found) == len(BOXES)
        counts.append(int((found.pred_classes >= 0).sum()))
    assert counts[0] == 7 and counts[-1] == 0 and counts == sorted(counts, reverse=True)


def test_a_sigmoid_takes_each_name_for_itself(predictor):
    found = predictor.predict(boxes=BOXES, scores="sigmoid", topk=4)
    expected = logits(predictor, WORDS).sigmoid().sort(1, descending=True).values
    torch.testing.assert_close(found.scores.view(7, 4), expected)
    alone = predictor.predict(boxes=BOXES, vocabulary=["cat"], scores="sigmoid")
    torch.testing.assert_close(alone.scores, logits(predictor, ["cat"]).sigmoid()[:, 0])


def nested(depth: int) -> dict[str, Any]:
    words: Any = ["cat"]
    for number in range(depth):
        words = {f"animal {number}": words}
    return words


ONE = torch.tensor([1])
HOLDS_ITSELF: dict[str, Any] = {"cat": "cat"}
HOLDS_ITSELF["animal"] = HOLDS_ITSELF


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scores": "logits"}, "'softmax' or 'sigmoid'"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": "high"}, "threshold is 'high'"),
        ({"groups": []}, "groups is"),
        ({"groups": {"object": []}}, "empty"),
        ({"groups": {"object": WORDS}, "vocabulary": WORDS}, "pass one"),
        ({"vocabulary": {}}, "empty"),
        ({"vocabulary": {"animal": {}}}, "nothing below 'animal'"),
        ({"vocabulary": {"animal": 3}}, "has 3 for 'animal'"),
        ({"vocabulary": {"animal": ["cat", 3]}}, "for 'animal'"),
        ({"vocabulary": {"animal": "cat", "pet": "Cat"}}, "'Cat' twice"),
        ({"vocabulary": [torch.ones(8)]}, "has no name"),
        ({"vocabulary": {"logo": torch.ones(3)}}, "width 3"),
        ({"vocabulary": {"logo": torch.zeros(8)}}, "none of them zero"),
        ({"vocabulary": {"logo": torch.full((8,), math.inf)}}, "all of them finite"),
        ({"vocabulary": {"logo": torch.ones(2, 8).index_fill(0, ONE, math.nan)}}, "finite"),
        ({"vocabulary": {"logo": np.full(8, 1e300)}}, "all of them finite"),
        ({"vocabulary": HOLDS_ITSELF}, "nested too deeply, or holds itself"),
        ({"vocabulary": nested(5000)}, "nested too deeply, or holds itself"),
        ({"groups": {"object": HOLDS_ITSELF}}, "nested too deeply, or holds itself"),
        ({"threshold": np.float32("nan")}, "threshold is"),
    ],
)
def test_what_makes_no_sense_is_refused(predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(boxes=BOXES, **arguments)
    assert predictor.vocabulary == WORDS


def test_a_threshold_is_a_number_of_any_type(predictor):
    expected = predictor.predict(boxes=BOXES, threshold=0.5).pred_classes
    for threshold in (np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)):
        assert torch.equal(
            predictor.predict(boxes=BOXES, threshold=threshold).pred_classes, expected
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-300},
        {"temperature": math.inf},
        {"sigmoid_temperature": 1e-30},
        {"sigmoid_bias": 1e30},
        {"sigmoid_bias": -math.inf},
    ],
)
def test_scores_that_would_be_no_numbers_are_refused(settings):
    with pytest.raises(ValueError, match="^(A temperature|The bias) is .*; it must be in"):
        Scoring(**settings)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_scores_at_the_limits_are_numbers(kind, temperature):
    scoring = Scoring(kind, temperature=temperature, sigmoid_temperature=temperature)
    scores = scores_of_names(100 * torch.tensor([[-1.0, 0.5, 1.0]]), None, scoring)
    assert scores.isfinite().all() and scores[0, 0] <= scores[0, 1] <= scores[0, 2]


def test_a_model_whose_numbers_are_none_says_so(predictor):
    with torch.no_grad():
        next(predictor.model.region_head.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="what is not a number: the weights of the model"):
        predictor.predict(boxes=BOXES)


def test_a_member_is_made_of_texts():
    for texts in (None, "cat", 3):
        with pytest.raises(ValueError, match=f"texts of 'pet' are {texts!r}; a list is expected"):
            Member("pet", texts)


def test_a_dict_of_one_text_each_is_a_list(predictor):
    expected = predictor.predict(boxes=BOXES, topk=4)
    same: list[dict] = [{w: [w] for w in WORDS}, {w: w for w in WORDS}, {w: None for w in WORDS}]
    for words in same:
        found = predictor.predict(boxes=BOXES, vocabulary=words, topk=4)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_classes, expected.pred_classes)


def test_the_nearest_of_several_texts_decides(predictor):
    found = predictor.predict(boxes=BOXES, vocabulary={"pet": ["cat", "dog"], "bus": "bus"}, topk=2)
    separate = logits(predictor, ["cat", "dog", "bus"])
    together = torch.stack([separate[:, :2].amax(1), separate[:, 2]], dim=1).softmax(1)
    torch.testing.assert_close(found.scores.view(7, 2), together.sort(1, descending=True).values)
    assert predictor.vocabulary == ["pet", "bus"]


def test_texts_vectors_and_named_vectors_side_by_side(predictor):
    regions = predictor.region_embeddings(boxes=BOXES)
    found = predictor.predict(boxes=BOXES, vocabulary=["cat", Example("this one", regions[3])])
    assert found.pred_classes[3] == 1
    text = logits(predictor, ["cat"])[:, 0]
    scale = predictor.model.vision_language.logit_scale.exp()
    likeness = scale * (regions @ regions[3])
    torch.testing.assert_close(found.scores, torch.stack([text, likeness]).softmax(0).amax(0))
    by_dict = predictor.predict(boxes=BOXES, vocabulary={"cat": "cat", "this one": regions[3]})
    torch.testing.assert_close(by_dict.scores, found.scores)
    # Of a text and vectors for one name the nearest decides.
    mixed = {"cat": "cat", "thing": ["dog", Example("x", regions[3]), regions[:2].numpy()]}
    assert (predictor.predict(boxes=BOXES, vocabulary=mixed).pred_classes[[0, 1, 3]] == 1).all()


TREE = {"animal": {"cat": None, "bird": ["bird", "duck"]}, "vehicle": {"bus": None}}


def test_a_hierarchy_answers_with_the_deepest_name_that_passes(predictor):
    names = ["animal", "cat", "bird", "vehicle", "bus"]
    leaves = predictor.predict(boxes=BOXES, vocabulary=TREE, threshold=0.0)
    assert predictor.vocabulary == names
    assert set(leaves.pred_classes.tolist()) <= {1, 2, 4}
    flat = logits(predictor, ["cat", "bird", "duck", "bus"])
    flat = torch.stack([flat[:, 0], flat[:, 1:3].amax(1), flat[:, 3]], dim=1).softmax(1)
    torch.testing.assert_close(leaves.scores, flat.amax(1))
    animal, vehicle = flat[:, :2].sum(1), flat[:, 2]
    threshold = float(torch.stack([animal, vehicle]).amax(0).min()) - 1e-4
    found = predictor.predict(boxes=BOXES, threshold=threshold)
    for row in range(7):
        inside = [float(flat[row, 0]), float(flat[row, 1]), float(flat[row, 2])]
        passing = [place for place, p in zip((1, 2, 4), inside) if p >= threshold]
        place = int(found.pred_classes[row])
        assert place in passing if passing else place in (0, 3)
        assert found.scores[row] >= threshold
    none = predictor.predict(boxes=BOXES, threshold=1.0)
    assert (none.pred_classes == -1).all() and (none.scores >= 0).all()


def test_each_group_answers_for_itself(predictor):
    groups = {"object": ["cat", "bus"], "color": {"red": ["dog"], "blue": ["bird"]}}
    found = predictor.predict(boxes=BOXES, groups=groups)
    assert predictor.vocabulary == ["cat", "bus", "red", "blue"]
    assert found.region_index.tolist() == [i for i in range(7) for _ in range(2)]
    assert found.group_index.tolist() == [0, 1] * 7
    for group, names in enumerate((["cat", "bus"], ["dog", "bird"])):
        alone = logits(predictor, names).softmax(1).max(1)
        torch.testing.assert_close(found.scores[group::2], alone.values)
        assert torch.equal(found.pred_classes[group::2], alone.indices + 2 * group)
    # The same names in a batch of images.
    [batch] = predictor.predict_batch([golden()["image"]], [BOXES], groups=groups)
    torch.testing.assert_close(batch.scores, found.scores, atol=1e-5, rtol=0)


def test_all_texts_of_a_vocabulary_are_encoded_at_once(predictor, monkeypatch):
    asked = []
    encode = predictor.model.vision_language.encode_text
    monkeypatch.setattr(
        predictor.model.vision_language, "encode_text", lambda t: asked.append(t) or encode(t)
    )
    words = {"vehicle": {"car": ["car", "red car"], "truck": None}, "person": None}
    for _ in range(3):
        predictor.predict(boxes=BOXES, vocabulary=words, background=["road"])
    assert sum(map(len, asked)) == 5 * len(predictor.model.vision_language.templates)


def test_a_config_has_background_threshold_and_words(tmp_path):
    (tmp_path / "words.yaml").write_text("cat: [kitten, tomcat]\nbus:\n")
    cfg = tiny_cfg()
    cfg.MODEL.NAMING.WORDS = str(tmp_path / "words.yaml")
    cfg.MODEL.NAMING.BACKGROUND = ["wall"]
    cfg.MODEL.NAMING.THRESHOLD = 0.4
    cfg.MODEL.NAMING.TEMPERATURE = 0.5
    predictor = RegionSpotPredictor(cfg)
    predictor.set_image(golden()["image"])
    found = predictor.predict(boxes=BOXES)
    assert predictor.vocabulary == ["cat", "bus"]
    separate = logits(predictor, ["kitten", "tomcat", "bus", "wall"]) / 0.5
    together = torch.cat([separate[:, :2].amax(1, keepdim=True), separate[:, 2:]], dim=1).softmax(1)
    torch.testing.assert_close(found.scores, together[:, :2].amax(1))
    assert torch.equal(found.pred_classes < 0, found.scores < 0.4)
    # The words serve the names of other vocabularies too, such as a dataset's.
    other = predictor.predict(boxes=BOXES, vocabulary=["dog", "cat"])
    text = predictor.predict(boxes=BOXES, vocabulary={"dog": "dog", "cat": ["kitten", "tomcat"]})
    torch.testing.assert_close(other.scores, text.scores)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "sigmoid", "sigmoid_temperature": 2.0, "sigmoid_bias": -1.0}, {"temperature": 3.0}],
)
def test_calibrated_scores_keep_the_order_of_names(predictor, settings):
    predictor.model.scoring = Scoring(**settings)
    try:
        found = predictor.predict(boxes=BOXES, topk=4)
    finally:
        predictor.model.scoring = Scoring()
    plain = predictor.predict(boxes=BOXES, topk=4)
    assert torch.equal(found.pred_classes, plain.pred_classes)
    assert not torch.allclose(found.scores, plain.scores)


def test_pairs_below_the_threshold_are_no_results_of_a_detector(predictor):
    model = predictor.model
    dataset = next(iter(VOCABULARIES))
    x = {"image": torch.from_numpy(golden()["image"]).permute(2, 0, 1), "dataset_name": dataset}
    proposals = [predictor.predict(boxes=BOXES)]
    try:
        every = model.inference([x], proposals)[0]["instances"]
        model.scoring = Scoring(threshold=1 / 3)  # of three names, some have less
        some = model.inference([x], proposals)[0]["instances"]
    finally:
        model.scoring = Scoring()
    assert 0 < len(some) < len(every) and (some.pred_classes >= 0).all()


def test_regions_of_no_name_get_no_pixels(predictor):
    found = predictor.predict(boxes=BOXES)
    segments = panoptic_segments(found, set(), min_area=0)
    assert segments[1]
    found.pred_classes[:] = -1
    panoptic, information = panoptic_segments(found, set(), min_area=0)
    assert not panoptic.any() and information == []


@pytest.mark.parametrize(
    "content",
    [
        ["cat", "dog"],
        {"pet": ["cat", "dog"], "bus": ["bus"]},
        {"vocabulary": TREE, "background": ["wall"]},
        {"groups": {"object": ["cat"], "color": TREE}},
    ],
)
def test_vocabularies_are_written_as_they_are_read(content, tmp_path):
    written = plain_words(words_of(content))
    assert words_of(written).key == words_of(content).key
    assert plain_words(words_of(written)) == written


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat", "list of names"),
        ("", "vocabulary"),
        ("groups: {}", "groups"),
        ("groups: {a: [cat]}\nvocabulary: [cat]", "either"),
        ("background: [wall]", "either"),
        ("a: &x {b: [cat], c: 1}", "has 1 for 'c'"),
        ("!!python/object/apply:os.system ['true']", "vocabulary"),
        ("[cat", "vocabulary"),
    ],
)
def test_files_that_hold_no_vocabulary(text, message, tmp_path):
    (tmp_path / "words.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_words(tmp_path / "words.yaml")
    assert "words.yaml" in str(error.value) and "\n" not in str(error.value)


def test_vectors_are_no_text_to_be_written():
    vocabulary = as_vocabulary({"logo": np.ones(4, dtype=np.float32)})
    with pytest.raises(ValueError, match="'logo' stands for vectors"):
        plain_words(vocabulary)
