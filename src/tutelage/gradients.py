"""How much each term pulls at the student."""

from __future__ import annotations

from typing import Any

import torch

from tutelage.distillation import Distillation, untouched


def gradient_shares(distillation: Distillation, batch: Any) -> dict[str, float]:
    """Each term's share of the gradient on one batch: ‖∂(wᵢLᵢ)/∂θ‖ / Σⱼ ‖∂(wⱼLⱼ)/∂θ‖, θ the student's parameters.

    A term of 0.1 may pull harder than one of 10: what moves the student is the gradient. The norms add up to more than
    the norm of the sum where the terms disagree, so a share says how strong a term is and not where it points.

    One forward pass and one backward pass a term; no gradient, buffer, mode or random number is left changed, and what
    learns beside the student does not learn.

    Args:
        distillation: bound already.
        batch: what the loader gave, on the student's device.

    Returns:
        A share in [0, 1] by term; they sum to 1, unless every gradient is 0 or one is not finite, then ``{}``.

    >>> from tutelage import KD, Distillation, TaskLoss
    >>> batch = torch.eye(4, 8), torch.tensor([0, 1, 2, 0])
    >>> student, teacher = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
    >>> d = Distillation(student, teacher, losses=[TaskLoss(weight=0.5), KD(temperature=4)]).bind(batch)
    >>> shares = gradient_shares(d, batch)
    >>> list(shares), round(sum(shares.values()), 6), student.weight.grad is None
    (['TaskLoss', 'KD'], 1.0, True)
    """
    parameters = [p for p in distillation.student.parameters() if p.requires_grad]
    with untouched(distillation.student, distillation.owned), torch.enable_grad():
        distillation.student.train()
        distillation.owned.eval()  # a loss in eval mode does not change what it remembers
        values, weights = distillation.terms_on(batch)
        squares = []
        for name, value in values.items():
            found: Any = (None,)
            if value.requires_grad:  # an auxiliary term may not depend on the student
                found = torch.autograd.grad(weights[name] * value, parameters, retain_graph=True, allow_unused=True)
            squares.append(sum((g.float().square().sum() for g in found if g is not None), torch.zeros(())))
        norms = torch.stack([s.to(distillation.device) for s in squares]).sqrt() if squares else torch.zeros(0)
    total = float(norms.sum())
    if not 0 < total < float("inf"):
        return {}
    return dict(zip(values, (norms / total).tolist(), strict=True))
