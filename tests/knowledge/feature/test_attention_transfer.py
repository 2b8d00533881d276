from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation
from tutelage.knowledge.feature.attention_transfer import AttentionTransfer, attention_map, attention_transfer
from tutelage.models import SmallCNN


@pytest.mark.parametrize("entry", ["attention_transfer", "attention_transfer_resize"])
def test_reference_values(agrees, entry):
    agrees(entry, attention_transfer)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_is_the_loop_over_positions_and_channels(p):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 5, 2, 4, dtype=torch.float64)

    def attention(sample):
        channels, height, width = sample.shape
        sums = [
            sum(abs(sample[c, y, x].item()) ** p for c in range(channels)) for y in range(height) for x in range(width)
        ]
        norm = sum(a**2 for a in sums) ** 0.5
        return [a / norm for a in sums]

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum((a - b) ** 2 for a, b in zip(attention(s), attention(t), strict=True))
    assert attention_transfer(student, teacher, p).item() == pytest.approx(total / (2 * 8))


def test_maps_have_unit_length_and_forget_scale_sign_and_the_number_of_channels():
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(attention_map(features).norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(attention_map(-7 * features), attention_map(features))
    torch.testing.assert_close(attention_map(features.repeat(1, 3, 1, 1)), attention_map(features))


@pytest.mark.parametrize(("mine", "theirs"), [((8, 6), (4, 6)), ((4, 4), (8, 2)), ((3, 5), (7, 7))])
def test_the_larger_features_are_pooled_before_their_attention_is_taken(mine, theirs):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, *mine), torch.randn(2, 5, *theirs)
    size = tuple(min(a, b) for a, b in zip(mine, theirs, strict=True))
    pooled = [F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
    torch.testing.assert_close(attention_transfer(student, teacher), attention_transfer(*pooled))


def test_sequences_are_maps_with_their_channels_last():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    tokens = [x.flatten(2).mT for x in (student, teacher)]
    torch.testing.assert_close(attention_transfer(*tokens), attention_transfer(student, teacher))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same tokens"):
        attention_transfer(torch.ones(2, 5, 3), torch.ones(2, 6, 3))
    with pytest.raises(ValueError, match="cannot be compared"):
        attention_transfer(torch.ones(2, 5, 3), torch.ones(2, 6, 3, 3))
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        attention_transfer(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"p=0\.5"):
        attention_transfer(torch.ones(2, 5, 3), torch.ones(2, 5, 3), p=0.5)
    with pytest.raises(ValueError, match="p=0"):
        AttentionTransfer(p=0)


def test_by_default_every_stage_is_read_and_they_are_summed():
    torch.manual_seed(0)
    student, teacher = SmallCNN(4), SmallCNN(8)
    inputs = torch.randn(4, 1, 16, 16)
    every = AttentionTransfer()
    single = [AttentionTransfer(f"stage{i}", name=f"{i}") for i in (1, 2, 3)]
    losses = Distillation(student, teacher, losses=[every, *single]).bind(inputs)(inputs)
    assert [s for s, _ in every.pairs] == ["stage1", "stage2", "stage3"]
    torch.testing.assert_close(losses["AttentionTransfer"], losses["1"] + losses["2"] + losses["3"])
    assert every.weight == 1000


def test_training_turns_the_students_attention_to_where_the_teachers_is():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid())
    with torch.no_grad():  # a teacher that looks at vertical edges
        teacher[0].weight.copy_(torch.tensor([[4.0, 0.0, -4.0]]).expand(8, 1, 3, 3))
        teacher[0].bias.fill_(-3.0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid())
    inputs = torch.randn(32, 1, 8, 8)

    def overlap():
        with torch.no_grad():
            return (attention_map(student(inputs)) * attention_map(teacher(inputs))).sum(1).mean()

    before = overlap()
    d = Distillation(student, teacher, losses=[AttentionTransfer("1")]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert overlap() > 0.95 > before
