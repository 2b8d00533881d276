"""Batch normalisation for the networks that feature losses learn: also of a batch that is a single value."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of maps, also where a channel has one value: one sample, of size 1×1.

    Such a channel has no variance, and ``nn.BatchNorm2d`` ends the training there, which the last batch of an epoch
    would. Here the running averages normalise it, and stay what they are.

    >>> import torch
    >>> BatchNorm(2)(torch.ones(1, 2, 1, 1)).flatten()
    tensor([1.0000, 1.0000], grad_fn=<ViewBackward0>)
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)
