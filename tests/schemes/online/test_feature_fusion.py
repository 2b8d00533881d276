from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Branches, Cohort, Distillation, FeatureFusion, FitNets, FusedFeatures, TaskLoss
from tutelage.models import MLP, SmallCNN, resnet8
from tutelage.schemes.online.feature_fusion import FusionModule

SHAPE = (1, 28, 28)


def student(seed=0, widths=(4, 4)) -> FusedFeatures:
    torch.manual_seed(seed)
    return FusedFeatures(Cohort([SmallCNN(width=w) for w in widths]), SHAPE)


def batch(n=6, shape=SHAPE):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, *shape, generator=g), torch.randint(0, 10, (n,), generator=g)


def kl(target, mine, t=3.0):
    p, log_q = (target.detach() / t).softmax(1), (mine / t).log_softmax(1)
    return t * t * (p * (p.log() - log_q)).sum(1).mean()


@pytest.mark.parametrize("widths", [(4, 4), (4, 6, 5)])
def test_total_and_gradients_equal_the_naive_form(widths):
    s = student(widths=widths)
    naive = copy.deepcopy(s)
    x, y = batch()
    d = Distillation(s, FeatureFusion(), losses=FeatureFusion().losses()).bind((x, y))
    d.progress = 1.0
    said = d((x, y))
    said.total.backward()

    maps = [p.stage3(p.pool(p.stage2(p.pool(p.stage1(x))))) for p in naive.peers]
    logits = [p.linear(m.mean((2, 3))) for p, m in zip(naive.peers, maps, strict=True)]
    f = naive.fusion
    h = F.relu(f.norms[0](f.depthwise(torch.cat(maps, 1))))
    fused = f.classifier(F.relu(f.norms[1](f.pointwise(h))).mean((2, 3)))
    total = F.cross_entropy(fused, y) + kl(sum(logits) / len(logits), fused)
    total = total + sum(F.cross_entropy(z, y) + kl(fused, z) for z in logits)
    total.backward()
    torch.testing.assert_close(said.total, total)
    for (name, mine), theirs in zip(s.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_fusion_is_depthwise_and_then_pointwise():
    fusion = FusionModule([3, 5], width=4, classes=2)
    assert fusion.depthwise.weight.shape == (8, 1, 3, 3)
    assert fusion.pointwise.weight.shape == (4, 8, 1, 1)
    assert fusion.classifier.weight.shape == (2, 4)
    # a channel of the concatenated map meets its own filter alone
    fusion.eval()
    maps = [torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4)]
    maps[1][:, 2] = 1.0
    assert fusion.depthwise(torch.cat(maps, 1)).abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [5]


def test_maps_of_different_sizes_are_brought_to_the_smallest():
    torch.manual_seed(0)
    fusion = FusionModule([3, 5], width=4, classes=2).eval()
    large, small = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(fusion([large, small]), fusion([F.avg_pool2d(large, 2), small]))
    torch.manual_seed(0)
    s = FusedFeatures(Cohort([resnet8(), SmallCNN(width=4, in_channels=3)]), (3, 32, 32))
    assert [shape[1:] for shape in s.shapes] == [(64, 8, 8), (16, 8, 8)]
    other = FusedFeatures(Cohort([resnet8(), SmallCNN(width=4, in_channels=3)]), (3, 32, 32), at=["layer2", "stage3"])
    assert [shape[1:] for shape in other.shapes] == [(32, 16, 16), (16, 8, 8)]
    for fused in (s, other):
        x, y = batch(4, (3, 32, 32))
        losses = FeatureFusion().losses()
        Distillation(fused, FeatureFusion(), losses=losses)((x, y)).total.backward()
        assert all(p.grad is not None for p in fused.parameters())


def test_who_teaches_whom():
    s, teacher = student(), FeatureFusion()
    d = Distillation(s, teacher, losses=[KD(), FitNets("stage2")]).bind(batch())
    seen = d.views(batch())
    record = d.observer(seen.student)
    fused, *others = teacher.lessons(seen, record)
    ensemble = torch.stack(record.output.peers).mean(0)
    torch.testing.assert_close(fused.student.logits, record.output.fused)
    torch.testing.assert_close(fused.teacher.logits, ensemble.detach())
    for lesson, said in zip(others, record.output.peers, strict=True):
        torch.testing.assert_close(lesson.student.logits, said)
        torch.testing.assert_close(lesson.teacher.logits, record.output.fused.detach())


def test_the_fused_classifier_teaches_the_layers_below_it_through_their_maps():
    s = student()
    d = Distillation(s, FeatureFusion(), losses=[TaskLoss()]).bind(batch())
    lessons = d.teacher.lessons
    d.teacher.lessons = lambda *given: [lesson for lesson in lessons(*given) if lesson.key == "fused"]
    d(batch()).total.backward()
    for peer in s.peers:
        assert peer.stage1[0].weight.grad.abs().sum() > 0
        assert peer.linear.weight.grad is None


def test_what_cannot_be_fused_is_refused_by_name():
    with pytest.raises(ValueError, match="has no feature maps"):
        FusedFeatures(Cohort([MLP(6, (8,), 3), MLP(6, (8,), 3)]), (6,))
    with pytest.raises(ValueError, match=r"can be fused; got \{'peers\.0\.linear:input': \(2, 16\)"):
        FusedFeatures(Cohort([SmallCNN(width=4), SmallCNN(width=4)]), SHAPE, at="linear:input")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        FusedFeatures(Cohort([SmallCNN(width=4)]), SHAPE)
    branches = Branches(SmallCNN(width=4), "stage2", 2, SHAPE)
    with pytest.raises(TypeError, match="teaches a tutelage FusedFeatures, got Branches"):
        Distillation(branches, FeatureFusion(), losses=[TaskLoss()]).bind(batch())
    s = student(widths=(4, 6))
    with pytest.raises(ValueError, match=r"'stage3': the peers' tensors are .* no mean to learn from"):
        Distillation(s, FeatureFusion(), losses=[FitNets("stage3")]).bind(batch())


def test_half_precision_networks():
    s = student().to(torch.bfloat16).eval()
    assert s(batch(2)[0].bfloat16()).fused.isfinite().all()
    assert nn.Module.__call__(s.fused(), batch(2)[0].bfloat16()).shape == (2, 10)
