"""Samples as rows: flattened in float32, and of unit length with a gradient that exists at zero."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.record import in_float32


def flat_rows(features: Tensor) -> Tensor:
    """(B, ...) as (B, D), half precision in float32.

    >>> flat_rows(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 48])
    """
    return in_float32(features).flatten(1)


def unit_rows(rows: Tensor) -> Tensor:
    """Each row of the last axis divided by its L2 norm; a row of zeros stays zero and has gradient zero.

    Dividing by max(norm, ε) instead gives a zero row a gradient of 1/ε.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norm.masked_fill(norm == 0, torch.inf)
