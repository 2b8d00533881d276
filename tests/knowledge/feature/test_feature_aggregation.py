from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, FeatureAggregation, TaskLoss
from tutelage.knowledge.feature.feature_aggregation import aggregate, aggregated_hint, bridge_loss
from tutelage.knowledge.feature.fitnets import hint_loss
from tutelage.models import SmallCNN

STAGE3 = [("stage3", f"stage3.{i}") for i in range(3)]


def batch(count=8):
    torch.manual_seed(0)
    return torch.randn(count, 1, 12, 12), torch.arange(count) % 10


def searching(student=None, *, taps=STAGE3, lr=0.1, **options):
    loss = FeatureAggregation(*taps, train="aggregation", lr=lr, **options)
    return loss, Distillation(student or SmallCNN(4), SmallCNN(8), losses=[loss]).bind(batch())


def test_the_hint_and_the_bridge_are_their_loops():
    torch.manual_seed(0)
    student, *layers = torch.randn(4, 2, 3, 2, 2).double()
    weights, logits, labels = torch.tensor([0.5, 0.2, 0.3]).double(), torch.randn(2, 4).double(), torch.tensor([3, 0])
    squares, entropies = [], []
    for b in range(2):
        for c in range(3):
            for y in range(2):
                for x in range(2):
                    mixed = sum(w.item() * layer[b, c, y, x].item() for w, layer in zip(weights, layers, strict=True))
                    squares.append((student[b, c, y, x].item() - mixed) ** 2)
        exponentials = [math.exp(z) for z in logits[b].tolist()]
        entropies.append(-math.log(exponentials[labels[b]] / sum(exponentials)))
    hint, entropy = sum(squares) / len(squares), sum(entropies) / 2
    assert aggregated_hint(student, layers, weights).item() == pytest.approx(hint)
    bridge = bridge_loss(student, layers, weights, logits, labels, 0.7, 2.0)
    assert bridge.item() == pytest.approx(0.7 * hint + 2.0 * entropy)


def test_with_all_weight_on_one_layer_it_is_the_plain_hint():
    torch.manual_seed(0)
    student, *layers = torch.randn(4, 2, 3, 5, 5)
    for n, layer in enumerate(layers):
        weights = F.one_hot(torch.tensor(n), 3).float()
        torch.testing.assert_close(aggregated_hint(student, layers, weights), hint_loss(student, layer))
    assert aggregated_hint((layers[0] + layers[1]) / 2, layers[:2], torch.tensor([0.5, 0.5])).item() == 0


def test_the_order_of_the_layers_means_nothing():
    torch.manual_seed(0)
    student, *layers = torch.randn(4, 2, 3, 5, 5)
    weights = torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(
        aggregated_hint(student, layers[::-1], weights.flip(0)), aggregated_hint(student, layers, weights)
    )


def test_the_gradient_reaches_the_weights_and_the_student_but_not_the_teachers_layers():
    torch.manual_seed(0)
    student, *layers = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3))
    weights = torch.tensor([0.4, 0.6], requires_grad=True)
    aggregated_hint(student, layers, weights).backward()
    assert min(student.grad.abs().sum(), weights.grad.abs().sum()) > 0
    assert all(layer.grad is None for layer in layers)


def test_sizes_meet_at_the_smaller_and_other_shapes_are_refused():
    torch.manual_seed(0)
    large, small = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    one = torch.ones(1)
    torch.testing.assert_close(aggregated_hint(large, [small], one), hint_loss(F.avg_pool2d(large, 2), small))
    torch.testing.assert_close(aggregated_hint(small, [large], one), hint_loss(small, F.avg_pool2d(large, 2)))
    with pytest.raises(ValueError, match="features differ in shape"):
        aggregated_hint(torch.ones(2, 4, 8, 8), [large], one)
    with pytest.raises(ValueError, match="expected equal shapes"):
        aggregate([large, small], torch.ones(2))
    with pytest.raises(ValueError, match="a weight for each layer"):
        aggregate([large], torch.ones(2))


def plain(width):
    """A network without batch-norm, whose samples do not see each other."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 9, 10),
    )


def test_the_search_shows_the_rest_of_the_student_the_aggregation_in_the_place_of_its_layer():
    torch.manual_seed(0)
    student, teacher = plain(4), plain(6)
    loss = FeatureAggregation(("1", "0"), ("1", "1"), train="aggregation")
    images, labels = batch()
    d = Distillation(student, teacher, losses=[loss]).bind((images, labels)).eval()
    value = d((images, labels))["FeatureAggregation"]
    with torch.no_grad():
        layers = [teacher[:1](images), teacher[:2](images)]
        mixed = (layers[0] + layers[1]) / 2
        learnable = hint_loss(loss.to_teacher[0](student[:2](images)), mixed)
        informative = F.cross_entropy(student[2:](loss.to_student[0](mixed)), labels)
    torch.testing.assert_close(value, learnable + informative)


def test_groups_are_judged_one_by_one_and_summed():
    torch.manual_seed(0)
    student, teacher = plain(4), plain(6)
    pairs = [("1", "0"), ("1", "1"), ("3", "2"), ("3", "3")]
    both, one, other = (
        FeatureAggregation(*part, train="aggregation", name=f"{n}")
        for n, part in enumerate((pairs, pairs[:2], pairs[2:]))
    )
    d = Distillation(student, teacher, losses=[both, one, other]).bind(batch()).eval()
    for n, single in enumerate((one, other)):
        for part in ("to_teacher", "to_student"):
            getattr(single, part)[0].load_state_dict(getattr(both, part)[n].state_dict())
    losses = d(batch())
    torch.testing.assert_close(losses["0"], losses["1"] + losses["2"])
    assert both.groups == {"1": ["0", "1"], "3": ["2", "3"]}


def test_odd_samples_teach_the_weights_and_even_samples_the_student():
    images, labels = batch()
    changed = {}
    for name, altered in (("nothing", None), ("odd", slice(1, None, 2)), ("even", slice(0, None, 2))):
        torch.manual_seed(0)
        student, teacher = plain(4), plain(6)
        x, y = images.clone(), labels.clone()
        if altered is not None:
            x[altered], y[altered] = x[altered].flip(3), 9 - y[altered]
        found = []
        for lr in (0.0, 0.1):  # with a fixed aggregation, and with one that moves
            descent = partial(torch.optim.SGD, lr=lr)  # whose steps, unlike Adam's first, have the gradient's size
            loss = FeatureAggregation(("1", "0"), ("1", "1"), train="aggregation", optimizer=descent)
            d = Distillation(student, teacher, losses=[loss]).bind((images, labels))
            d.zero_grad()
            d((x, y)).total.backward()
            found.append(loss.alphas[0] if lr else student[0].weight.grad.clone())
        changed[name] = found
    for kind, teaches in ((0, "even"), (1, "odd")):
        other = "odd" if teaches == "even" else "even"
        torch.testing.assert_close(changed[other][kind], changed["nothing"][kind], rtol=0, atol=0)
        assert (changed[teaches][kind] - changed["nothing"][kind]).abs().max() > 1e-6


def test_the_search_leaves_running_averages_hooks_and_the_teacher_alone():
    student = SmallCNN(4)
    _, d = searching(student)
    buffers = {k: v.clone() for k, v in student.named_buffers()}
    d.student.train()
    d(batch()).total.backward()
    # one forward pass of the student, not three
    torch.testing.assert_close(student.stage1[1].num_batches_tracked, buffers["stage1.1.num_batches_tracked"] + 1)
    with torch.no_grad():
        images = batch()[0]
        expected = nn.BatchNorm2d(4).train()
        expected(student.stage1[0](images))
    torch.testing.assert_close(student.stage1[1].running_mean, expected.running_mean)
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m._forward_hooks for m in student.modules())
    assert torch.is_grad_enabled()
    assert not any(m.training for m in d.teacher.module.modules())
    assert all(p.grad is None for p in d.teacher.module.parameters())


def test_the_weights_are_nobodys_parameters_and_move_only_in_training():
    loss, d = searching()
    assert list(d.side_learners()) == ["FeatureAggregation.scores"]
    known = {id(p) for p in d.parameters()}
    assert not known & {id(p) for p in loss.scores.module.parameters()}
    assert {id(p) for p in [*loss.to_teacher.parameters(), *loss.to_student.parameters()]} <= known
    torch.testing.assert_close(loss.alphas[0], torch.full((3,), 1 / 3))
    with torch.no_grad():
        d(batch())
    d.eval()(batch()).total.backward()
    torch.testing.assert_close(loss.alphas[0], torch.full((3,), 1 / 3))
    d.train()(batch()).total.backward()
    assert (loss.alphas[0] - 1 / 3).abs().max() > 0.01
    assert loss.alphas[0].sum().item() == pytest.approx(1)
    assert set(d.student.state_dict()) == set(SmallCNN(4).state_dict())


def test_the_second_stage_goes_on_with_the_weights_and_keeps_them():
    first, d = searching()
    d(batch()).total.backward()
    second = FeatureAggregation(*STAGE3)
    after = Distillation(d.student, d.teacher, losses=[TaskLoss(), second]).continue_from(d).bind(batch())
    found = first.alphas[0]
    torch.testing.assert_close(second.alphas[0], found)
    torch.testing.assert_close(second.to_teacher[0].weight, first.to_teacher[0].weight)
    for _ in range(2):
        after(batch()).total.backward()
    torch.testing.assert_close(second.alphas[0], found, rtol=0, atol=0)
    assert all(p.grad is None for p in second.to_student.parameters())
    assert (first.weight, second.weight) == (1.0, 100.0)
    assert second.units(second_batch := after.views(batch())) == len(second_batch) == 2 * first.units(second_batch)


def test_a_second_stage_without_weights_is_refused():
    with pytest.raises(ValueError, match="no weights were searched for"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[FeatureAggregation(*STAGE3)]).bind(batch())
    _, unused = searching()
    with pytest.raises(ValueError, match="no weights were searched for"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[FeatureAggregation(*STAGE3)]).continue_from(unused).bind(batch())


def test_known_weights_need_no_search_nor_labels():
    loss = FeatureAggregation(*STAGE3, aggregation=[[0.0, 0.25, 0.75]])
    student, teacher = SmallCNN(4), SmallCNN(8)
    d = Distillation(student, teacher, losses=[loss]).bind(batch()[0])
    torch.testing.assert_close(loss.alphas[0], torch.tensor([0.0, 0.25, 0.75]))
    value = d(batch()[0])["FeatureAggregation"]
    with torch.no_grad():
        mine, images = student.train()(batch()[0]), batch()[0]
        assert mine.shape == (8, 10)
        theirs = teacher.pool(teacher.stage2(teacher.pool(teacher.stage1(images))))
        layers = [teacher.stage3[: n + 1](theirs) for n in range(3)]
        own = student.stage3(student.pool(student.stage2(student.pool(student.stage1(images)))))
        expected = hint_loss(loss.to_teacher[0](own), 0.25 * layers[1] + 0.75 * layers[2])
    torch.testing.assert_close(value, expected)


def test_by_default_the_groups_are_the_blocks_of_the_stages():
    class Block(nn.Module):
        def __init__(self, before, width, stride):
            super().__init__()
            self.conv = nn.Conv2d(before, width, 3, stride, padding=1)

        def forward(self, x):
            return self.conv(x).relu()

    def network(width, blocks):
        return nn.Sequential(
            nn.Sequential(*(Block(1 if n == 0 else width, width, 1) for n in range(blocks))),
            nn.Sequential(*(Block(width, width, 2 if n == 0 else 1) for n in range(blocks))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        )

    loss = FeatureAggregation(train="aggregation")
    d = Distillation(network(4, 1), network(6, 3), losses=[loss]).bind(batch())
    assert loss.groups == {"0": ["0.0", "0.1", "0.2"], "1": ["1.0", "1.1", "1.2"]}
    assert d(batch()).total.isfinite()


def test_a_pattern_names_a_group_at_once():
    loss, _ = searching(taps=[("stage3", "stage3.*")])
    assert loss.groups == {"stage3": ["stage3.0", "stage3.1", "stage3.2"]}
    with pytest.raises(ValueError, match="FeatureAggregation: teacher tap 'stage9"):
        searching(taps=[("stage3", "stage9.*")])


def test_what_makes_no_sense_is_refused():
    for arguments, message in (
        ({"train": "both"}, "train='both'"),
        ({"aggregation": [[0.5, 0.6]]}, "sum 1"),
        ({"aggregation": [[1.0]], "train": "aggregation"}, "give one of them"),
        ({"student_to_teacher": -1.0}, "student_to_teacher=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureAggregation(*STAGE3, **arguments)
    with pytest.raises(ValueError, match="nothing to search for"):
        searching(taps=["stage3"])
    with pytest.raises(ValueError, match="expected equal ones"):
        searching(taps=[("stage3", "stage2"), ("stage3", "stage3")])
    with pytest.raises(ValueError, match="'1:input' is not"):
        searching(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)),
            taps=[("1:input", "stage3.0"), ("1:input", "stage3.1")],
        )
    with pytest.raises(ValueError, match="expected maps"):
        searching(taps=[("linear", "stage3.0"), ("linear", "stage3.1")])
    with pytest.raises(ValueError, match=r"\[2\] weights for groups of \[3\]"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[FeatureAggregation(*STAGE3, aggregation=[[0.5, 0.5]])]).bind(
            batch()
        )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches_are_searched_with_as_far_as_they_go(count):
    loss, d = searching(plain(4), taps=[("1", "stage2.0"), ("1", "stage2.1")])
    before = loss.alphas[0]
    d(batch(count)).total.backward()
    assert d.student[0].weight.grad.isfinite().all()
    assert bool((loss.alphas[0] != before).any()) == (count > 1)


def test_the_paths_pull_towards_what_is_learnable_and_towards_what_is_informative():
    """One layer of the teacher is nearly constant, which is easy to learn; the other shows the class."""

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.easy, self.telling = nn.Identity(), nn.Identity()

        def forward(self, x):
            easy = self.easy(0.01 * torch.ones_like(x).expand(-1, 3, -1, -1))
            telling = self.telling(torch.cat([x, x.flip(2).sign(), x.roll(1, 3)], 1))
            return (easy + telling).mean((2, 3))

    torch.manual_seed(0)
    labels = torch.arange(64) % 3
    images = F.one_hot(labels, 3).float()[:, None, None, :].expand(64, 1, 3, 3) * 2 + 0.3 * torch.randn(64, 1, 3, 3)
    found = {}
    for path in ("student_to_teacher", "teacher_to_student"):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
        other = {"student_to_teacher", "teacher_to_student"} - {path}
        loss = FeatureAggregation(
            ("1", "easy"), ("1", "telling"), train="aggregation", lr=0.05, **dict.fromkeys(other, 0.0)
        )
        d = Distillation(student, Teacher(), losses=[loss]).bind((images, labels))
        optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            d((images, labels)).total.backward()
            optimizer.step()
        found[path] = loss.alphas[0][0].item()  # of the easy layer
    assert found["student_to_teacher"] > 0.7
    assert found["teacher_to_student"] < 0.3


def test_a_resumed_search_goes_on_where_it_was():
    _, d = searching()
    d(batch()).total.backward()
    loss, again = searching()
    again.load_state_dict(d.state_dict())
    for name, side in d.side_learners().items():
        again.side_learners()[name].load_own_state(side.own_state())
    torch.testing.assert_close(loss.alphas, d.losses["FeatureAggregation"].alphas)
    assert bool(loss.learned.yes)


def test_float64_stays(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, 5).double(), torch.randn(3, 6, 5, 5).double()
    assert bound(FeatureAggregation(aggregation=[[1.0]]), student, teacher)(student, teacher).dtype == torch.float64


def test_training_brings_unseen_maps_closer_to_the_aggregation(lessons):
    def aggregation():
        return FeatureAggregation(*STAGE3[1:], aggregation=[[0.3, 0.7]], weight=20.0)

    alone, taught = lessons.student(), lessons.student(aggregation())
    assert lessons.distance(taught, aggregation()) < 0.9 * lessons.distance(alone, aggregation())
