"""What one model said about one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def logits_of(output: Any) -> Tensor | None:
    """The logits inside a model's output: a tensor, ``.logits``, ``["logits"]`` or the first item of a tuple.

    >>> logits_of((torch.ones(2, 3), None)).shape
    torch.Size([2, 3])
    >>> logits_of({"features": torch.ones(2)}) is None
    True
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    if getattr(output, "logits", None) is not None:
        return output.logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def in_float32(value: Tensor) -> Tensor:
    """Half-precision tensors in float32, others as they are: losses calculate in float32 whatever autocast says."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


@dataclass
class Record:
    """What one model said about one batch: its output and the tapped tensors by address.

    Args:
        output: what the model returned, ``None`` if its forward pass was stopped after the last tap.
        taps: address → tensor, in float32.

    >>> record = Record(torch.zeros(2, 3), {"fc:input": torch.ones(2, 8)})
    >>> record.logits.shape, record["fc:input"].shape
    (torch.Size([2, 3]), torch.Size([2, 8]))
    """

    output: Any = None
    taps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """The model's logits in float32; a ``ValueError`` if its output has none."""
        logits = logits_of(self.output)
        if logits is None:
            raise ValueError(
                f"no logits in an output of type {type(self.output).__name__}: expected a tensor, a field "
                "'logits' or a tuple that begins with a tensor"
            )
        return in_float32(logits)

    def __getitem__(self, address: str) -> Tensor:
        if address == "@logits":
            return self.logits
        try:
            return self.taps[address]
        except KeyError:
            raise KeyError(f"{address!r} was not tapped; tapped: {', '.join(self.taps) or 'nothing'}") from None

    def rows(self, index: slice | Tensor) -> Record:
        """What was said about some of the samples; logits and tapped tensors have a row for each sample.

        >>> Record(torch.arange(6).reshape(3, 2)).rows(slice(1, 3)).logits
        tensor([[2, 3],
                [4, 5]])
        """
        logits = logits_of(self.output)
        return Record(
            output=None if logits is None else logits[index],
            taps={address: value[index] for address, value in self.taps.items()},
        )

    def detach(self) -> Record:
        """The same record outside the autograd graph (what a peer or an exit says to another)."""
        logits = logits_of(self.output)
        return Record(
            output=None if logits is None else logits.detach(),
            taps={address: value.detach() for address, value in self.taps.items()},
        )
