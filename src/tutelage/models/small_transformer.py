"""A transformer for small images that says what it attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TransformerOutput(NamedTuple):
    """What :class:`SmallTransformer` says, by the names that the transformers library uses.

    Args:
        logits: (B, num_classes).
        hidden_states: (B, T, width) of the embedded tokens and after each layer, ``depth + 1`` of them.
        attentions: (B, heads, T, T) probabilities of each layer: rows are queries and sum to 1.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]


class SelfAttention(nn.Module):
    """Multi-head self-attention, which returns its probabilities beside its result.

    Args:
        width: of the tokens; a multiple of ``heads``.
        heads: how many.
        causal: no token attends to a later one.

    >>> y, probabilities = SelfAttention(8, heads=2)(torch.zeros(1, 3, 8))
    >>> y.shape, probabilities.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 3]))
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        probabilities = scores.softmax(-1)
        return self.out((probabilities @ value).transpose(1, 2).flatten(2)), probabilities


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the probabilities are added to the list that is given."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attentions: list[Tensor]) -> Tensor:
        attended, probabilities = self.attention(self.norm1(x))
        attentions.append(probabilities)
        x = x + attended
        return x + self.mlp(self.norm2(x))


class SmallTransformer(nn.Module):
    """A vision transformer in small: patches and a class token, pre-norm layers, ``linear`` on the class token.

    It has no dropout, so attention probabilities are the same in training.

    Args:
        width: of the tokens; a multiple of ``heads``.
        depth: how many layers.
        heads: of the attention.
        patch: the side of a patch; ``image_size`` is a multiple of it.
        in_channels: 1 for grey images, 3 for colour.
        image_size: height and width.
        num_classes: the number of logits.

    Raises:
        ValueError: sizes that do not fit.

    Tappable parts: ``patches``, ``layers.0``, ``layers.1``, ... and ``layers.0.attention[1]``, its probabilities,
    ``norm``, ``linear``; ``@hidden_states[i]`` and ``@attentions[i]`` of the output.

    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929

    >>> output = SmallTransformer(width=16, depth=2, heads=2)(torch.zeros(3, 1, 28, 28))
    >>> output.logits.shape, output.hidden_states[-1].shape, output.attentions[0].shape
    (torch.Size([3, 10]), torch.Size([3, 17, 16]), torch.Size([3, 2, 17, 17]))
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 7,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if min(width, depth, heads, patch) < 1 or width % heads or image_size % patch:
            raise ValueError(
                f"width={width}, depth={depth}, heads={heads}, patch={patch}, image_size={image_size}: expected whole "
                "numbers from 1 up, width a multiple of heads and image_size a multiple of patch"
            )
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, width))
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> TransformerOutput:
        """The output for images ``(N, in_channels, image_size, image_size)``."""
        tokens = self.patches(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], dim=1) + self.positions
        states, attentions = [x], list[Tensor]()
        for layer in self.layers:
            states.append(layer(states[-1], attentions))
        return TransformerOutput(self.linear(self.norm(states[-1])[:, 0]), tuple(states), tuple(attentions))
