"""Real text that needs no download: the documentation inside Python itself, as batches to learn the next token from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tutelage.data.loaders import Loaders
from tutelage.views import UNLABELLED

UNKNOWN, END = "<unk>", "<end>"
"""The tokens 0 and 1: what is not in the vocabulary, and the end of a paragraph."""

TEST_SHARE = 0.1


def pydoc_topics() -> dict[str, list[str]]:
    """The paragraphs of each topic of Python's ``help()``: parts of its language reference, in English (PSF licence).

    Topics quote one another, so each paragraph stands only in the first topic that has it, in alphabetical order, and
    a topic without a paragraph of its own is left out. Line breaks, and lines that are drawn, have become spaces. About
    340,000 characters; the text depends on the version of Python.

    Raises:
        FileNotFoundError: this Python came without its documentation.

    >>> topics = pydoc_topics()
    >>> len(topics) > 50, topics["lambda"][0]
    (True, 'Lambdas')
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "this Python has no pydoc_data.topics, the documentation that CPython brings along: install Python with "
            "its whole standard library, or take another data set"
        ) from error
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name in sorted(topics):
        for raw in re.split(r"\n\s*\n", topics[name]):
            paragraph = " ".join(re.sub(r"[-+=|*]{3,}", " ", raw).split())
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                found.setdefault(name, []).append(paragraph)
    return found


class TokenSet(Dataset[dict[str, Any]]):
    """Sequences of tokens, each beside the same sequence one token on.

    Items are ``{"input_ids": (T,), "labels": (T,), "ids": number}``; ``labels[t]`` is the token after
    ``input_ids[t]``, and -100 after the end of a text, where ``input_ids`` is filled up with ``<end>``. So nothing has
    to be shifted any more, and nobody may: give a model of transformers the ``input_ids`` alone.

    Each text begins with ``<end>``, which makes its first token one to predict like the others.

    Args:
        texts: each of them as tokens.
        words: the vocabulary; a token's number is its place in it, and that of ``<unk>`` for others.
        length: T. A text is cut into as many sequences as it takes.

    >>> item = TokenSet([["a", "b", "c"]], ["<unk>", "<end>", "a", "b"], length=2)[1]
    >>> item["input_ids"], item["labels"]
    (tensor([3, 1]), tensor([   0, -100]))
    """

    def __init__(self, texts: Iterable[Sequence[str]], words: Sequence[str], length: int):
        self.words = list(words)
        numbers = {word: number for number, word in enumerate(words)}
        unknown, end = numbers[UNKNOWN], numbers[END]
        inputs, labels = [], []
        for text in texts:
            tokens = [numbers.get(token, unknown) for token in text]
            missing = -len(tokens) % length
            inputs.append(torch.tensor([end, *tokens[:-1], *[end] * missing]).view(-1, length))
            labels.append(torch.tensor([*tokens, *[UNLABELLED] * missing]).view(-1, length))
        self.inputs, self.labels = torch.cat(inputs), torch.cat(labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.inputs[index], "labels": self.labels[index], "ids": index}

    def keep(self, chosen: slice | np.ndarray) -> TokenSet:
        """Let only these sequences be; returns itself."""
        self.inputs, self.labels = self.inputs[chosen], self.labels[chosen]
        return self


def _tokens(paragraphs: Iterable[str], level: str) -> list[str]:
    """The paragraphs of one text, each with ``<end>`` after it."""
    split = (re.findall(r"\w+|[^\w\s]", p.lower()) if level == "words" else list(p) for p in paragraphs)
    return list(chain.from_iterable((*tokens, END) for tokens in split))


def pydoc_loaders(
    *,
    level: Literal["words", "characters"] = "words",
    vocabulary: int = 2000,
    length: int = 32,
    batch_size: int = 32,
    validation: int = 200,
    limit: int | None = None,
    seed: int = 0,
) -> Loaders:
    """The next token of Python's own documentation (:func:`pydoc_topics`), for language models that train in seconds.

    Whole topics are in one of the three parts, and each paragraph in one topic, so nothing that is judged was read in
    training. The topics of the test part, a tenth of the text, are always the same. Batches are mappings of
    ``input_ids``, ``labels`` (moved on by one already, see :class:`TokenSet`) and ``ids``. Every token of a text is
    predicted once; perplexity is exp of the validation's ``nll``. ``loaders.train.dataset.words`` is the vocabulary.

    Args:
        level: ``"words"``, in lower case, numbers and marks being words too; or ``"characters"``.
        vocabulary: so many tokens: ``<unk>``, ``<end>`` and the most frequent ones of the training topics.
        length: tokens of a sequence. A model sees nothing from before its sequence.
        batch_size: sequences of a training batch; evaluation uses 50.
        validation: sequences to choose by, from topics of their own.
        limit: use only so many training sequences, chosen at random, for short runs; the vocabulary stays.
        seed: of the split and the choice (not of the training).

    Raises:
        FileNotFoundError: this Python came without its documentation.
        ValueError: an argument that is out of range, or more tokens than the training topics have.

    >>> loaders = pydoc_loaders(vocabulary=1000)
    >>> batch = next(iter(loaders.train))
    >>> batch["input_ids"].shape, bool((batch["labels"][:, :-1] == batch["input_ids"][:, 1:]).float().mean() > 0.9)
    (torch.Size([32, 32]), True)
    """
    if level not in ("words", "characters"):
        raise ValueError(f"level={level!r}: expected 'words' or 'characters'")
    for name, value in (("length", length), ("batch_size", batch_size), ("validation", validation), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    texts = {name: _tokens(paragraphs, level) for name, paragraphs in pydoc_topics().items()}
    rest = _shuffled(sorted(texts), 0)
    whole = sum(map(len, texts.values()))
    test = _taken(rest, texts, lambda chosen: sum(map(len, chosen)) >= TEST_SHARE * whole)
    rest = _shuffled(sorted(rest), seed)
    judged = _taken(rest, texts, lambda chosen: sum(-(-len(text) // length) for text in chosen) >= validation)
    if not rest:
        raise ValueError(f"validation={validation}: more sequences of {length} tokens than there are")
    training = [texts[name] for name in sorted(rest)]
    counts = Counter(token for token in chain.from_iterable(training) if token != END)
    if not 2 < vocabulary <= len(counts) + 2:
        raise ValueError(
            f"vocabulary={vocabulary}: expected 3 to {len(counts) + 2}, the {level} of the training topics and two more"
        )
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[: vocabulary - 2]
    words = [UNKNOWN, END, *frequent]
    train = TokenSet(training, words, length)
    if limit is not None and limit < len(train):
        train.keep(np.sort(np.random.RandomState(seed).permutation(len(train))[:limit]))
    return Loaders(
        DataLoader(train, batch_size=batch_size, shuffle=True),
        DataLoader(TokenSet(judged, words, length).keep(slice(validation)), batch_size=50),
        DataLoader(TokenSet(test, words, length), batch_size=50),
    )


def _shuffled(names: list[str], seed: int) -> list[str]:
    """In a random order: numpy's ``RandomState``, whose stream is frozen."""
    return [names[i] for i in np.random.RandomState(seed).permutation(len(names))]


def _taken(rest: list[str], texts: dict[str, list[str]], enough: Callable[[list[list[str]]], bool]) -> list[list[str]]:
    """Texts from the front of ``rest``, which are no longer in it, until they are enough."""
    chosen: list[list[str]] = []
    while rest and not enough(chosen):
        chosen.append(texts[rest.pop(0)])
    return chosen
