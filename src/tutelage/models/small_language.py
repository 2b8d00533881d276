"""Two language models that train in seconds on a processor: a causal transformer and an LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutelage.models.small_transformer import Block, TransformerOutput


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")


class _LanguageModel(nn.Module):
    """What the two share: ``embedding``, ``head``, and the methods by which transformers' models give them."""

    embedding: nn.Embedding
    head: nn.Linear

    def _words(self, vocabulary: int, width: int, tied: bool) -> None:
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # logits of about 1 where the head is the same matrix
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class SmallLanguageModel(_LanguageModel):
    """A causal transformer in small: tokens and learned positions, pre-norm layers, ``head`` on every token.

    It predicts at each position the token after it, from those up to it. Its dropout is on the embedded tokens and
    before the head, so attention probabilities are the same in training.

    Args:
        vocabulary: how many tokens there are.
        width: of the embedded tokens; a multiple of ``heads``.
        depth: how many layers.
        heads: of the attention.
        length: the longest sequence.
        dropout: the part of the numbers that is left out in training.
        tied: whether the head's matrix is the embedding's; it then has no bias.

    Raises:
        ValueError: sizes that do not fit, or a sequence that is too long.

    Tappable parts: ``embedding``, ``layers.0``, ``layers.1``, ... and ``layers.0.attention[1]``, its probabilities,
    ``norm``, ``head``; ``@hidden_states[i]`` and ``@attentions[i]`` of the output.

    Memory: T² for each head and layer.

    Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762

    >>> output = SmallLanguageModel(vocabulary=50, width=16, depth=2, heads=2)(torch.zeros(3, 7, dtype=torch.long))
    >>> output.logits.shape, output.hidden_states[-1].shape, output.attentions[0].shape
    (torch.Size([3, 7, 50]), torch.Size([3, 7, 16]), torch.Size([3, 2, 7, 7]))
    """

    def __init__(
        self,
        vocabulary: int = 2000,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        length: int = 128,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        _check(vocabulary=vocabulary, width=width, depth=depth, heads=heads, length=length)
        if width % heads:
            raise ValueError(f"width={width}, heads={heads}: expected a width that is a multiple of heads")
        self._words(vocabulary, width, tied)
        self.positions = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> TransformerOutput:
        """The output for token numbers ``(B, T)``, T up to ``length``."""
        tokens = input_ids.shape[1]
        if tokens > len(self.positions):
            raise ValueError(f"input_ids: a sequence of {tokens} tokens, and length={len(self.positions)}")
        states, attentions = [self.dropout(self.embedding(input_ids) + self.positions[:tokens])], list[Tensor]()
        for layer in self.layers:
            states.append(layer(states[-1], attentions))
        return TransformerOutput(self.head(self.dropout(self.norm(states[-1]))), tuple(states), tuple(attentions))


class SmallLSTM(_LanguageModel):
    """An LSTM language model: ``embedding``, ``lstm``, ``head`` on every token; it returns the logits ``(B, T, V)``.

    It predicts at each position the token after it. Each sequence begins with an empty memory.

    Args:
        vocabulary: how many tokens there are.
        width: of the embedded tokens and of each layer's memory.
        depth: how many layers.
        dropout: the part of the numbers that is left out in training, after the embedding and after each layer.
        tied: whether the head's matrix is the embedding's; it then has no bias.

    Raises:
        ValueError: sizes below 1.

    Tappable parts: ``embedding``, ``lstm[0]`` (the last layer's states), ``head``.

    Zaremba, Sutskever, Vinyals 2014, "Recurrent Neural Network Regularization", https://arxiv.org/abs/1409.2329

    >>> SmallLSTM(vocabulary=50, width=16)(torch.zeros(3, 7, dtype=torch.long)).shape
    torch.Size([3, 7, 50])
    """

    def __init__(
        self, vocabulary: int = 2000, width: int = 64, depth: int = 1, dropout: float = 0.0, tied: bool = True
    ) -> None:
        super().__init__()
        _check(vocabulary=vocabulary, width=width, depth=depth)
        self._words(vocabulary, width, tied)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``(B, T, vocabulary)`` of token numbers ``(B, T)``."""
        states, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        return self.head(self.dropout(states))
