from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, TaskLoss
from tutelage.functional import kd_divergence
from tutelage.knowledge.feature.feature_norm import FeatureNorm, feature_normalized_kd, norm_temperature
from tutelage.models import SmallCNN
from tutelage.views import read_batch


def four(rows=6, classes=5):
    """Logits of both and features of both, the student's first."""
    torch.manual_seed(0)
    shapes = (rows, classes), (rows, classes), (rows, 4), (rows, 7)
    return [2 * torch.randn(*shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
def test_is_the_loop_over_samples_and_classes(tau):
    student, teacher, features_s, features_t = four()

    def probabilities(logits, features):
        norm = math.sqrt(sum(v * v for v in features.tolist()))
        powers = [math.exp(z * min(norm, tau) / norm) for z in logits.tolist()]
        return [v / sum(powers) for v in powers]

    total = 0.0
    for z_s, z_t, f_s, f_t in zip(student, teacher, features_s, features_t, strict=True):
        q, p = probabilities(z_s, f_s), probabilities(z_t, f_t)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    value = feature_normalized_kd(student, teacher, features_s, features_t, tau)
    assert value.item() == pytest.approx(total / 6)


def test_is_the_cross_entropy_of_classifiers_that_read_features_cut_to_tau():
    """The authors' way: features are scaled before the classifier, here without its bias."""
    _, _, features_s, features_t = four()
    torch.manual_seed(1)
    classifiers = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    features_s.requires_grad_()
    logits = [f @ w.T for f, w in zip((features_s, features_t), classifiers, strict=True)]
    cut = [F.normalize(f, dim=1) * f.norm(dim=1, keepdim=True).clamp(0, 3.0) for f in (features_s, features_t)]
    log_q, log_p = (F.log_softmax(f @ w.T, dim=1) for f, w in zip(cut, classifiers, strict=True))
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    authors = -(log_p.exp() * log_q).sum(1).mean()
    value = feature_normalized_kd(*logits, features_s, features_t, tau=3.0)
    torch.testing.assert_close(value, authors - entropy)
    # without T² but with the gradient of the features' length
    mine, theirs = (torch.autograd.grad(x, features_s, retain_graph=True)[0] for x in (value, authors))
    torch.testing.assert_close(mine, theirs)


def test_equal_lengths_are_one_temperature_for_all():
    student, teacher, features_s, features_t = four()
    features_s, features_t = (6 * F.normalize(f, dim=1) for f in (features_s, features_t))
    value = feature_normalized_kd(student, teacher, features_s, features_t, tau=2.0)
    torch.testing.assert_close(value, kd_divergence(student, teacher, temperature=3.0) / 9)


def test_samples_have_their_own_temperature_and_short_features_one():
    lengths = torch.tensor([0.0, 1.0, 2.0, 3.0, 500.0])
    features = lengths[:, None] * F.normalize(torch.ones(5, 4), dim=1)
    torch.testing.assert_close(norm_temperature(features).flatten(), torch.tensor([1.0, 1.0, 1.0, 1.5, 250.0]))


def test_an_input_scaled_through_a_linear_head_does_not_count_where_features_are_long():
    student, teacher, features_s, features_t = four()
    features_s, features_t = (9 * F.normalize(f, dim=1) for f in (features_s, features_t))
    value = feature_normalized_kd(student, teacher, features_s, features_t)
    scale = torch.rand(6, 1, dtype=torch.float64) + 1
    torch.testing.assert_close(feature_normalized_kd(scale * student, teacher, scale * features_s, features_t), value)


def test_the_gradient_reaches_the_students_logits_and_features_and_nothing_of_the_teacher():
    tensors = [x.requires_grad_() for x in four()]
    feature_normalized_kd(*tensors).backward()
    student, teacher, features_s, features_t = tensors
    assert student.grad.abs().sum() > 0
    assert features_s.grad.abs().sum() > 0
    assert teacher.grad is None
    assert features_t.grad is None


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3, 4)])
def test_sequences_and_maps_are_rows(shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape)
    axis = 1 if len(shape) == 4 else 2
    wide = [7 if i == axis else n for i, n in enumerate(shape)]
    features = 3 * torch.randn(wide)
    rows = [x.movedim(axis, -1).flatten(0, -2) for x in (student, teacher, features, features)]
    expected = feature_normalized_kd(*rows)
    torch.testing.assert_close(feature_normalized_kd(student, teacher, features, features), expected)


def test_masked_positions_do_not_count():
    student, teacher, features_s, features_t = four()
    mask = torch.tensor([1, 0, 1, 1, 0, 0]) > 0
    value = feature_normalized_kd(student, teacher, features_s, features_t, mask=mask)
    kept = [x[mask] for x in (student, teacher, features_s, features_t)]
    torch.testing.assert_close(value, feature_normalized_kd(*kept))
    nothing = feature_normalized_kd(student.requires_grad_(), teacher, features_s, features_t, mask=mask & False)
    nothing.backward()
    assert nothing == 0
    assert student.grad.abs().max() == 0


def test_tokens_without_a_label_do_not_count_in_the_loss():
    class Words(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.linear = nn.Embedding(9, width), nn.Linear(width, 4)

        def forward(self, ids):
            return self.linear(self.embed(ids))

    torch.manual_seed(0)
    words, labels = torch.randint(9, (2, 3)), torch.tensor([[1, 2, -100], [0, -100, -100]])
    student, teacher = Words(5), Words(6)
    loss = FeatureNorm(tau=1.0)
    value = Distillation(student, teacher, losses=[loss]).bind((words, labels))((words, labels))["FeatureNorm"]
    kept = labels != -100
    rows = [m(words)[kept] for m in (student, teacher)] + [m.embed(words)[kept] for m in (student, teacher)]
    torch.testing.assert_close(value, feature_normalized_kd(*rows, tau=1.0))
    assert loss.units(read_batch((words, labels))) == 3


def test_it_reads_what_the_classifier_reads_and_the_logits():
    torch.manual_seed(0)
    student, teacher, inputs = SmallCNN(4), SmallCNN(8), torch.randn(4, 1, 16, 16)
    loss, named = FeatureNorm(), FeatureNorm(("avgpool", "linear:input"), name="named")
    d = Distillation(student, teacher, losses=[loss, named]).bind(inputs)
    assert loss.pairs == [("linear:input", "linear:input"), ("@logits", "@logits")]
    assert (loss.weight, loss.tau) == (9, 2)
    values = d(inputs)
    features = [m.avgpool(m.stage3(m.pool(m.stage2(m.pool(m.stage1(inputs)))))).flatten(1) for m in (student, teacher)]
    expected = feature_normalized_kd(student.linear(features[0]), teacher.linear(features[1]), *features)
    torch.testing.assert_close(values["FeatureNorm"], expected.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(values["named"], values["FeatureNorm"])
    assert not list(loss.parameters())


def test_binding_twice_reads_the_same():
    inputs, loss = torch.randn(4, 1, 16, 16), FeatureNorm()
    for _ in range(2):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[loss]).bind(inputs)
        assert len(loss.pairs) == 2


def test_refusals():
    student, teacher, features_s, features_t = four()
    with pytest.raises(ValueError, match="tau=0: expected a positive number"):
        feature_normalized_kd(student, teacher, features_s, features_t, tau=0)
    with pytest.raises(ValueError, match="FeatureNorm: tau=-1"):
        FeatureNorm(tau=-1)
    with pytest.raises(ValueError, match="logits differ in shape"):
        feature_normalized_kd(student, teacher[:, :3], features_s, features_t)
    with pytest.raises(ValueError, match=r"features of shape \(6, 7, 2, 2\) \(teacher\) beside logits of shape"):
        feature_normalized_kd(student, teacher, features_s, torch.ones(6, 7, 2, 2))
    inputs = torch.randn(4, 1, 16, 16)
    with pytest.raises(ValueError, match="5 classes"):
        Distillation(SmallCNN(4, num_classes=5), SmallCNN(4), losses=[FeatureNorm()]).bind(inputs)
    two = FeatureNorm("avgpool", "linear:input")
    with pytest.raises(ValueError, match="one pair of penultimate features, not 2"):
        Distillation(SmallCNN(4), SmallCNN(4), losses=[two]).bind(inputs)


def test_beside_other_losses_it_runs_each_model_once():
    inputs, labels = torch.randn(4, 1, 16, 16), torch.arange(4)
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[TaskLoss(), KD(), FeatureNorm()]).bind((inputs, labels))
    calls = []
    d.student.linear.register_forward_hook(lambda *_: calls.append(1))
    d((inputs, labels)).total.backward()
    assert len(calls) == 1


def test_training_brings_the_softened_answers_to_unseen_images_closer_to_the_teachers(lessons):
    alone, taught = lessons.student(), lessons.student(FeatureNorm())
    assert lessons.distance(taught, FeatureNorm()) < 0.8 * lessons.distance(alone, FeatureNorm())
