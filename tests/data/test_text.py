"""Next tokens of Python's documentation: what is predicted, what is unknown, and what nobody has read before."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from tutelage.data import TokenSet, pydoc_loaders, pydoc_topics
from tutelage.data.text import END, UNKNOWN
from tutelage.evaluation import evaluate
from tutelage.models import SmallLSTM
from tutelage.views import UNLABELLED

PARTS = ("train", "validation", "test")


def texts(data: TokenSet) -> list[list[str]]:
    """The texts of a set, put together again from what is to be predicted."""
    flat = [[data.words[n] for n in row if n != UNLABELLED] for row in data.labels.tolist()]
    found: list[list[str]] = [[]]
    for row in flat:
        found[-1].extend(row)
        if len(row) < data.labels.shape[1]:  # filled up: here a text ends
            found.append([])
    return [text for text in found if text]


def test_each_token_is_predicted_once_from_the_one_before_it():
    words = [UNKNOWN, END, *"abcdef"]
    first, second = list("abcxdef"), list("fed")
    data = TokenSet([first, second], words, length=4)
    assert texts(data) == [["a", "b", "c", UNKNOWN, "d", "e", "f"], second]
    assert data.inputs.tolist() == [[1, 2, 3, 4], [0, 5, 6, 1], [1, 7, 6, 1]]
    assert data.labels.tolist() == [[2, 3, 4, 0], [5, 6, 7, UNLABELLED], [7, 6, 5, UNLABELLED]]
    item = data[2]
    assert (item["ids"], set(item)) == (2, {"input_ids", "labels", "ids"})


def test_a_text_that_fills_its_sequences_has_nothing_to_fill_up():
    data = TokenSet([list("abab")], [UNKNOWN, END, "a", "b"], length=2)
    assert data.labels.tolist() == [[2, 3], [2, 3]]
    assert data.inputs.tolist() == [[1, 2], [3, 2]]


@pytest.mark.parametrize("level", ["words", "characters"])
@pytest.mark.parametrize("seed", [0, 3])
def test_no_topic_and_no_paragraph_is_in_two_parts(level, seed):
    vocabulary = 500 if level == "words" else 60
    parts = pydoc_loaders(level=level, vocabulary=vocabulary, length=16, validation=100, seed=seed)
    sets = [getattr(parts, name).dataset for name in PARTS]
    assert len({tuple(s.words) for s in sets}) == 1
    paragraphs = []
    for data in sets:
        text = " ".join(data.words[n] for n in data.labels.flatten().tolist() if n != UNLABELLED)
        # long ones: a short one may become equal to another by its unknown words
        paragraphs.append({p.strip() for p in text.split(END) if len(p.split()) > 20 and p.count(UNKNOWN) < 3})
    assert all(paragraphs)
    assert not paragraphs[0] & paragraphs[1]
    assert not paragraphs[0] & paragraphs[2]
    assert not paragraphs[1] & paragraphs[2]


def test_the_topics_keep_their_paragraphs_and_none_stands_twice():
    from pydoc_data.topics import topics

    found = pydoc_topics()
    every = [p for paragraphs in found.values() for p in paragraphs]
    assert len(every) == len(set(every))
    assert set(found) <= set(topics)
    assert all(" ".join(topics[name].split()).startswith(found[name][0][:8]) for name in ("assert", "lambda", "import"))


def test_the_test_part_is_always_the_same_and_the_others_follow_the_seed():
    first, again, other = (pydoc_loaders(vocabulary=500, seed=seed) for seed in (0, 0, 1))
    for name in PARTS:
        one, two, three = (getattr(loaders, name).dataset for loaders in (first, again, other))
        assert torch.equal(one.labels, two.labels)
        known = {*one.words} & {*three.words}
        words = [[d.words[n] for n in d.labels.flatten().tolist() if n > 1] for d in (one, three)]
        common = [[w for w in some if w in known] for some in words]
        assert (common[0] == common[1]) == (name == "test")
    assert len(first.validation.dataset) == len(other.validation.dataset) == 200


def test_the_vocabulary_is_the_most_frequent_words_of_the_training_topics():
    loaders = pydoc_loaders(vocabulary=300, validation=50)
    data = loaders.train.dataset
    assert (len(data.words), data.words[:2]) == (300, [UNKNOWN, END])
    counts = torch.bincount(data.labels[data.labels >= 0], minlength=300)
    assert (counts[2:-1] >= counts[3:]).all(), "in the order of their frequency"
    assert all(word == word.lower() for word in data.words)
    limited = pydoc_loaders(vocabulary=300, validation=50, limit=40).train.dataset
    assert (len(limited), limited.words) == (40, data.words)
    rows = {tuple(row) for row in data.labels.tolist()}
    assert all(tuple(row) in rows for row in limited.labels.tolist())


def test_characters_are_few_and_mostly_known():
    data = pydoc_loaders(level="characters", vocabulary=80, length=64, limit=100).train.dataset
    known = data.labels[data.labels >= 0]
    assert (known == 0).float().mean() < 0.01
    assert {"a", "A", " "} <= set(data.words)


def test_perplexity_is_exp_of_the_nll_whatever_the_batches():
    loaders = pydoc_loaders(vocabulary=200, validation=60, length=24)
    torch.manual_seed(0)
    model, data = SmallLSTM(200, width=8), loaders.validation.dataset
    total, count = 0.0, 0
    for row, labels in zip(data.inputs, data.labels.tolist(), strict=True):  # token by token
        said = model(row[None])[0].log_softmax(1).tolist()
        for t, label in enumerate(labels):
            if label != UNLABELLED:
                total, count = total - said[t][label], count + 1
    found = evaluate(model, loaders.validation)
    assert found.samples == count
    assert math.exp(found.nll) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_transformers_models_take_the_batches():
    transformers = pytest.importorskip("transformers")
    loaders = pydoc_loaders(vocabulary=100, validation=20, limit=20)
    config = transformers.GPT2Config(vocab_size=100, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    assert evaluate(transformers.GPT2LMHeadModel(config), loaders.validation).nll == pytest.approx(math.log(100), 0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": "letters"}, r"level='letters': expected 'words' or 'characters'"),
        ({"length": 0}, r"length=0: expected 1 or more"),
        ({"validation": 0}, r"validation=0: expected 1 or more"),
        ({"limit": 0}, r"limit=0: expected 1 or more"),
        ({"validation": 10**6}, r"validation=1000000: more sequences of 32 tokens than there are"),
        ({"vocabulary": 2}, r"vocabulary=2: expected 3 to \d+, the words of the training topics and two more"),
        ({"level": "characters"}, r"vocabulary=2000: expected 3 to \d+, the characters of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        pydoc_loaders(**wrong)


def test_a_python_without_its_documentation_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"no pydoc_data.topics.*another data set"):
        pydoc_loaders()
