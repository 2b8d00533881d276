"""Bringing a student's tensor to the shape of a teacher's: sizes by pooling, channels by a learned projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two feature maps to the size of the smaller, each axis by itself.

    Args:
        student: (B, C, H, W).
        teacher: (B, D, H', W').

    >>> import torch
    >>> a, b = match_size(torch.ones(1, 2, 8, 6), torch.ones(1, 3, 4, 6))
    >>> a.shape, b.shape
    (torch.Size([1, 2, 4, 6]), torch.Size([1, 3, 4, 6]))
    """
    (h, w), (other_h, other_w) = student.shape[2:], teacher.shape[2:]
    size = (min(h, other_h), min(w, other_w))
    pool = F.adaptive_avg_pool2d
    return (
        student if tuple(student.shape[2:]) == size else pool(student, size),
        teacher if tuple(teacher.shape[2:]) == size else pool(teacher, size),
    )


def projector(student_shape: Sequence[int], teacher_shape: Sequence[int], *, bias: bool = True) -> nn.Module:
    """A learned linear map from the student's channels to the teacher's: 1×1 convolution or linear layer.

    Args:
        student_shape: of a (B, C, H, W) map, a (B, N, C) sequence or a (B, C) vector.
        teacher_shape: likewise, with the same number of axes.
        bias: whether it has one.

    Raises:
        ValueError: different numbers of axes, or other than two to four.

    >>> projector((8, 16, 4, 4), (8, 32, 2, 2))
    Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1))
    >>> projector((8, 16), (8, 32))
    Linear(in_features=16, out_features=32, bias=True)
    """
    if len(student_shape) != len(teacher_shape) or len(student_shape) not in (2, 3, 4):
        raise ValueError(
            f"cannot project a student's tensor of shape {tuple(student_shape)} to a teacher's of "
            f"{tuple(teacher_shape)}: expected the same number of axes, two to four"
        )
    if len(student_shape) == 4:
        return nn.Conv2d(student_shape[1], teacher_shape[1], 1, bias=bias)
    return nn.Linear(student_shape[-1], teacher_shape[-1], bias=bias)
