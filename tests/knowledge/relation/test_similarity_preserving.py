from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import Distillation
from tutelage.knowledge.relation.similarity_preserving import SimilarityPreserving, similarity_preserving
from tutelage.models import SmallCNN


def test_reference_value(agrees):
    agrees("similarity_preserving", similarity_preserving)


def test_is_the_loop_over_pairs_of_samples():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def rows(features):
        gram = [[(a * b).sum().item() for b in features] for a in features]
        return [[g / sum(x**2 for x in row) ** 0.5 for g in row] for row in gram]

    pairs = zip(rows(student), rows(teacher), strict=True)
    total = sum((a - b) ** 2 for s, t in pairs for a, b in zip(s, t, strict=True))
    assert similarity_preserving(student, teacher).item() == pytest.approx(total / 16)


def test_forgets_rotation_and_scale_of_either_side():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(
        similarity_preserving(3 * student, 5 * teacher @ rotation), similarity_preserving(student, teacher)
    )
    assert similarity_preserving(teacher @ rotation, teacher) < 1e-20


def test_half_precision_whose_products_overflow():
    torch.manual_seed(0)
    student, teacher = 300 * torch.randn(4, 64, 4, 4), torch.randn(4, 64, 4, 4)
    assert (student.half().flatten(1) @ student.half().flatten(1).T).isinf().any()
    value = similarity_preserving(student.half(), teacher.half())
    torch.testing.assert_close(value, similarity_preserving(student, teacher), rtol=1e-2, atol=1e-5)


def test_different_samples_are_refused():
    with pytest.raises(ValueError, match="3 of the student, 4 of the teacher"):
        similarity_preserving(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        Distillation(SmallCNN(4), SmallCNN(4), losses=[SimilarityPreserving()]).bind(torch.randn(1, 1, 16, 16))


def test_reads_the_last_stage_and_sums_what_is_named():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    default, two = SimilarityPreserving(), SimilarityPreserving("stage3", "stage2", name="two")
    extra = SimilarityPreserving("stage2", name="extra")
    losses = Distillation(SmallCNN(4), SmallCNN(8), losses=[default, two, extra]).bind(inputs)(inputs)
    assert default.pairs == [("stage3", "stage3")]
    assert default.weight == 3000
    torch.testing.assert_close(losses["two"], losses["SimilarityPreserving"] + losses["extra"])


def test_training_makes_the_same_samples_alike():
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(8, n), nn.Tanh(), nn.Linear(n, 3)) for n in (32, 12))
    inputs = torch.randn(64, 8)
    d = Distillation(student, teacher, losses=[SimilarityPreserving("1")]).bind(inputs)
    before = d(inputs)["SimilarityPreserving"]
    optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    fresh = torch.randn(64, 8)
    with torch.no_grad():
        assert similarity_preserving(student[:2](fresh), teacher[:2](fresh)) < 0.5 * before
