from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tutelage import CRD, KD, Distillation, RGBToGrey, Stage, TaskLoss, distill
from tutelage.data import CropFlip
from tutelage.knowledge.relation.sskd import (
    SSKD,
    CopiedBatch,
    Rotations,
    copy_contrast,
    copy_similarities,
    selected,
    similarity_divergence,
)
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.models import SmallCNN
from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.views import UNLABELLED, Inputs, Paired

# What the loop of the authors' published student.py calculates in float64, for the inputs of `published` below: its
# loss without the cross-entropy, and norms of that gradient. Their four rotations of an image follow one another in a
# batch. Where the selection cuts, ranks differ: among equal ones it takes any.
PUBLISHED = [
    ((1.0, 0.75), 29.74391356941936, 0.1977728421430449, 1.2677580730023095, 0.44502373356879543),
    ((0.75, 0.75), 29.474409882925926, 0.1977728421430449, 1.3696544372443813, 0.44502373356879543),
    ((0.25, 0.0), 23.87328461918169, 0.1909200049264422, 1.9661062917169478, 0.35399115141516685),
]
PUBLISHED_HEAD = 1.5817529407069189, 0.22442848609226027


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def fill(head, seed):
    with torch.no_grad():
        for k, parameter in enumerate(head.parameters()):
            parameter.copy_(random(seed + k, *parameter.shape) / len(parameter) ** 0.5)


def published(loss):
    features, logits = random(0, 20, 6).requires_grad_(), (3 * random(2, 20, 7)).requires_grad_()
    labels = torch.from_numpy(np.random.RandomState(4).randint(0, 7, 5))
    labels = torch.cat([labels, torch.full((15,), UNLABELLED)])
    batch = CopiedBatch(Inputs((features,)), Inputs((features,)), labels, copies=3)
    records = Record(None, {"f": features, "@logits": logits}), Record(None, {"f": random(1, 20, 8)})
    for record, z in zip(records, (logits, 3 * random(3, 20, 7)), strict=True):
        record.output = z
    loss.pairs = [("f", "f"), ("@logits", "@logits")]
    loss.build(*records, batch)
    if not loss.first:
        fill(loss.head_student, 10)
    fill(loss.head_teacher, 20)
    return loss(*records, batch), features, logits


@pytest.mark.parametrize(("ratios", "expected", "features", "logits", "head"), PUBLISHED)
def test_the_term_has_the_values_of_the_authors_code(ratios, expected, features, logits, head):
    loss = SSKD(transformed_ratio=ratios[0], similarity_ratio=ratios[1])
    value, f, z = published(loss)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert f.grad.norm().item() == pytest.approx(features, rel=1e-12)
    assert z.grad.norm().item() == pytest.approx(logits, rel=1e-12)
    assert loss.head_student[0].weight.grad.norm().item() == pytest.approx(head, rel=1e-12)
    assert all(p.grad is None for p in loss.head_teacher.parameters())


def test_the_head_learns_by_the_authors_contrast():
    loss = SSKD(train="teacher head")
    value, f, z = published(loss)
    value.backward()
    assert value.item() == pytest.approx(PUBLISHED_HEAD[0], rel=1e-12)
    assert loss.head_teacher[0].weight.grad.norm().item() == pytest.approx(PUBLISHED_HEAD[1], rel=1e-12)
    assert f.grad is None
    assert z.grad is None


def test_similarities_and_contrast_are_loops_over_pairs():
    features = random(0, 12, 5)
    similarities = copy_similarities(features, copies=2)
    assert similarities.shape == (8, 4)
    total = 0.0
    for i in range(8):
        cosines = [
            (features[4 + i] @ features[j] / features[4 + i].norm() / features[j].norm()).item() for j in range(4)
        ]
        assert similarities[i].tolist() == pytest.approx(cosines)
        total -= math.log(math.exp(cosines[i % 4]) / sum(map(math.exp, cosines)))
    assert copy_contrast(features, copies=2).item() == pytest.approx(total / 8)


def test_of_the_wrong_rows_the_least_wrong_are_selected():
    torch.manual_seed(0)
    scores, truth = torch.randn(40, 6), torch.arange(40) % 6
    rank = [int((scores[i] > scores[i, truth[i]]).sum()) for i in range(40)]
    wrong = sum(r > 0 for r in rank)
    for ratio in (0.0, 0.3, 0.75, 1.0):
        keep = selected(scores, truth, ratio).tolist()
        assert sum(keep) == 40 - wrong + int(ratio * wrong)
        kept, left = ([r for r, k in zip(rank, keep, strict=True) if k is side] for side in (True, False))
        assert all(r > 0 for r in left)
        assert not left or max(kept) <= min(left)
    order = torch.randperm(40)
    assert torch.equal(selected(scores[order], truth[order], 0.3), selected(scores, truth, 0.3)[order])


def test_an_unlabelled_row_counts_and_equal_ranks_go_by_the_probability():
    scores = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 9.0]])
    truth = torch.tensor([0, 0, 0, UNLABELLED])
    assert selected(scores, truth, 0.4).tolist() == [True, False, False, True]
    assert selected(scores, truth, 0.0).tolist() == [False, False, False, True]


def test_the_divergence_is_the_loop_over_selected_rows():
    student, teacher = random(0, 8, 5), random(1, 8, 3)
    s, t = copy_similarities(student, 1), copy_similarities(teacher, 1)
    keep, total = selected(t, torch.arange(4), 0.5), 0.0
    for i in range(4):
        if keep[i]:
            p, q = (t[i] / 0.2).softmax(0), (s[i] / 0.2).softmax(0)
            total += (p * (p / q).log()).sum().item() * 0.2**2
    assert 0 < keep.sum() < 4
    value = similarity_divergence(student, teacher, copies=1, temperature=0.2, ratio=0.5)
    assert value.item() == pytest.approx(total / int(keep.sum()))


def test_only_angles_between_rows_matter():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 16, 6, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    value = similarity_divergence(student, teacher)
    lengths = torch.rand(16, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(similarity_divergence(5 * lengths * student @ turn, lengths * teacher), value)
    assert similarity_divergence(teacher @ turn, teacher).abs() < 1e-12


def test_rows_that_are_no_originals_with_copies_are_refused():
    with pytest.raises(ValueError, match="7 rows are not originals with 3 copies"):
        copy_contrast(torch.ones(7, 2))
    with pytest.raises(ValueError, match="0 copies"):
        copy_similarities(torch.ones(4, 2), copies=0)
    with pytest.raises(ValueError, match="differ in shape"):
        similarity_divergence(torch.ones(4, 2), torch.ones(8, 2))


def test_rotations_are_those_of_numpy_and_unlabelled():
    images, labels, ids = torch.randn(3, 2, 5, 5), torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])
    batch = Rotations()((images, labels, ids))
    assert batch.copies == 3
    assert batch.labels.tolist() == [4, 5, 6, *[UNLABELLED] * 9]
    assert batch.ids.tolist() == [7, 8, 9] * 4
    assert batch.student is batch.teacher
    for k in range(4):
        turned = np.rot90(images.numpy(), k, axes=(2, 3))
        np.testing.assert_array_equal(batch.student.args[0][3 * k : 3 * k + 3].numpy(), turned)
    assert Rotations()(images).labels is None


def test_rotations_keep_the_memory_format_and_the_sides_apart():
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert Rotations()(images).student.args[0].is_contiguous(memory_format=torch.channels_last)
    batch = Rotations()(RGBToGrey(keep_channels=False)((images, torch.tensor([0, 1]))))
    assert batch.student.args[0].shape == (8, 1, 4, 4)
    assert batch.teacher.args[0].shape == (8, 3, 4, 4)
    named = Paired(student="a", teacher="b")({"a": images, "b": 2 * images})
    torch.testing.assert_close(Rotations()(named).teacher.args[0], 2 * Rotations()(named).student.args[0])


def test_only_the_turned_images_are_augmented():
    torch.manual_seed(0)
    images = torch.rand(4, 1, 6, 6) + 1
    plain, shifted = (Rotations(augment)(images).student.args[0] for augment in (None, CropFlip(2, flip=False)))
    assert torch.equal(plain[:4], shifted[:4])
    assert (shifted[4:] != plain[4:]).flatten(1).any(1).sum() > 6


def test_what_cannot_be_rotated_is_named():
    with pytest.raises(ValueError, match=r"expected square images .* shape \(2, 1, 4, 5\)"):
        Rotations()(torch.ones(2, 1, 4, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 8\)"):
        Rotations()(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        Rotations()(torch.ones(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"labels of type torch\.float32"):
        Rotations()((torch.ones(2, 1, 4, 4), torch.rand(2, 3)))


def networks():
    torch.manual_seed(0)
    return SmallCNN(2, num_classes=4), SmallCNN(4, num_classes=4)


def images(seed=0, count=6):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=draw), torch.randint(4, (count,), generator=draw)


def head_stage(student, teacher, batch, steps=1, lr=0.01):
    d = Distillation(student, teacher, [SSKD(train="teacher head")], Rotations()).bind(batch)
    optimizer = torch.optim.Adam((p for p in d.parameters() if p.requires_grad), lr=lr)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = d(batch)
        losses.total.backward()
        optimizer.step()
        values.append(losses.total.item())
    return d, values


def test_the_first_stage_trains_the_teachers_head_and_runs_no_student():
    student, teacher = networks()
    calls = []
    student.stage1.register_forward_hook(lambda *_: calls.append(1))

    def states():
        return [v.clone() for model in (student, teacher) for v in model.state_dict().values()]

    before = states()
    d = Distillation(student, teacher, [SSKD(train="teacher head")], Rotations()).bind(images())
    calls.clear()  # choosing the embedding looks through the student, when binding
    _, values = head_stage(student, teacher, images(), steps=30)
    assert d.losses["SSKD"].pairs == [(":input", "linear:input")]
    calls.clear()
    d(images()).total.backward()
    assert not calls
    assert values[-1] < values[0] - 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, states(), strict=True)), "running statistics too"
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))


def test_the_second_stage_goes_on_with_the_head_and_lets_it_be():
    student, teacher = networks()
    first, _ = head_stage(student, teacher, images())
    learned = {k: v.clone() for k, v in first.losses["SSKD"].head_teacher.state_dict().items()}
    d = Distillation(student, teacher, [TaskLoss(weight=0.1), SSKD()], Rotations())
    d.continue_from(first).bind(images())
    loss = d.losses["SSKD"]
    assert loss.pairs == [("linear:input", "linear:input"), ("@logits", "@logits")]
    own = {id(p) for p in loss.parameters() if p.requires_grad}
    assert own == {id(p) for p in loss.head_student.parameters()}
    optimizer = torch.optim.SGD((p for p in d.parameters() if p.requires_grad), lr=0.1)
    start = [p.clone() for p in loss.head_student.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        d(images()).total.backward()
        optimizer.step()
    assert all(torch.equal(v, loss.head_teacher.state_dict()[k]) for k, v in learned.items())
    assert not any(torch.equal(p, before) for p, before in zip(loss.head_student.parameters(), start, strict=True))
    assert student.stage1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert set(student.state_dict()) == set(networks()[0].state_dict())


def test_the_heads_are_saved_with_the_run():
    student, teacher = networks()
    first, _ = head_stage(student, teacher, images())
    d = Distillation(student, teacher, [SSKD()], Rotations()).continue_from(first).bind(images())
    other = Distillation(copy.deepcopy(student), teacher, [SSKD()], Rotations())
    other.continue_from(first).bind(images())
    with torch.no_grad():
        other.losses["SSKD"].head_student[2].weight.mul_(-20)
    assert other(images()).total > d(images()).total + 0.01
    state = d.state_dict()
    assert {
        "losses.SSKD.head_teacher.trained",
        "losses.SSKD.head_teacher.0.weight",
        "losses.SSKD.head_student.2.bias",
    } <= set(state)
    other.load_state_dict(state)
    assert other(images()).total == d(images()).total


def test_a_second_stage_without_the_first_is_refused():
    student, teacher = networks()
    with pytest.raises(ValueError, match="SSKD: the teacher's head has learned nothing"):
        Distillation(student, teacher, [SSKD()], Rotations()).bind(images())
    first, _ = head_stage(student, teacher, images())
    with pytest.raises(ValueError, match="other: the teacher's head has learned nothing"):
        Distillation(student, teacher, [SSKD(name="other")], Rotations()).continue_from(first).bind(images())
    with pytest.raises(ValueError, match="SSKD cannot go on with what it learned"):
        Distillation(student, SmallCNN(6, num_classes=4), [SSKD()], Rotations()).continue_from(first).bind(images())
    Distillation(student, teacher, [SSKD(similarity=0)], Rotations()).bind(images())  # which has no heads to learn


def test_batches_and_networks_that_do_not_fit_are_named():
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"no transformed copies .* views=Rotations\(\)"):
        Distillation(student, teacher, [SSKD(train="teacher head")]).bind(images())
    with pytest.raises(ValueError, match="needs at least 2 in a batch"):
        Distillation(student, teacher, [SSKD(similarity=0)], Rotations()).bind(images(count=1))
    with pytest.raises(ValueError, match="one pair of embeddings, not 2"):
        Distillation(student, teacher, [SSKD("stage1", "stage2")], Rotations()).bind(images())
    with pytest.raises(ValueError, match="logits differ in shape"):
        Distillation(SmallCNN(2, num_classes=3), teacher, [SSKD(similarity=0)], Rotations()).bind(images()[0])
    with pytest.raises(ValueError, match="needs labels"):
        Distillation(student, teacher, [SSKD(similarity=0, transformed_ratio=0.5)], Rotations()).bind(images()[0])
    dense = images()[0], torch.zeros(6, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"one class number for each sample, not labels of shape \(24, 8\)"):
        Distillation(student, teacher, [SSKD(similarity=0, transformed_ratio=0.5)], Rotations()).bind(dense)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train", "head"),
        ("normal", -1.0),
        ("temperature", 0.0),
        ("similarity_temperature", -1.0),
        ("transformed_ratio", 1.5),
        ("similarity_ratio", -0.1),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"SSKD: {argument}={value!r}"):
        SSKD(**{argument: value})


def test_at_least_one_part_is_needed():
    with pytest.raises(ValueError, match="all 0"):
        SSKD(normal=0, transformed=0, similarity=0)


def test_kd_beside_it_is_its_first_two_parts_in_one():
    student, teacher = networks()
    batch = images()
    parts = Distillation(student, teacher, [SSKD(similarity=0)], Rotations()).bind(batch)
    whole = Distillation(student, teacher, [KD(weight=3.6)], Rotations()).bind(batch)
    torch.testing.assert_close(parts(batch).total, whole(batch).total)
    views = Rotations()(batch)
    with torch.no_grad():
        s, t = student(views.student.args[0]), teacher.eval()(views.student.args[0])
    expected = 0.9 * kd_divergence(s[:6], t[:6]) + 2.7 * kd_divergence(s[6:], t[6:])
    torch.testing.assert_close(parts(batch).total.detach(), expected)


def test_the_labels_are_those_of_the_originals():
    student, teacher = networks()
    (inputs, labels), wrong = images(count=12), 0
    d = Distillation(student, teacher, [SSKD(normal=0, similarity=0, transformed_ratio=0.0)], Rotations())
    d.bind((inputs, labels))
    turned = Rotations()(inputs).student.args[0]
    with torch.no_grad():
        s, t = student(turned)[12:], teacher(turned)[12:]
    right = t.argmax(1) == labels.repeat(3)
    wrong = int((~right).sum())
    assert 0 < wrong < 36
    torch.testing.assert_close(d((inputs, labels)).total.detach(), 2.7 * kd_divergence(s[right], t[right]))
    unlabelled = torch.full_like(labels, UNLABELLED)
    torch.testing.assert_close(d((inputs, unlabelled)).total.detach(), 2.7 * kd_divergence(s, t))


def test_supervised_losses_see_the_originals_alone_and_memories_their_ids():
    student, teacher = networks()
    inputs, labels = images()
    batch = inputs, labels, torch.arange(6)
    d = Distillation(student, teacher, [TaskLoss(), CRD(features=4, k=3), SSKD(similarity=0)], Rotations())
    d.bind(batch, population=6)
    losses = d(batch)
    losses.total.backward()
    with torch.no_grad():
        student.train()
        logits = student(Rotations()(inputs).student.args[0])[:6]
    torch.testing.assert_close(losses["TaskLoss"], nn.functional.cross_entropy(logits, labels))
    assert losses["CRD"].isfinite()


def test_the_same_network_costs_nothing_but_its_heads_difference():
    _, teacher = networks()
    student = copy.deepcopy(teacher).eval()
    first, _ = head_stage(student, teacher, images(), steps=30)
    d = Distillation(student, teacher, [SSKD()], Rotations()).continue_from(first).bind(images()).eval()
    loss = d.losses["SSKD"]
    assert d(images()).total > 1e-2
    loss.head_student.load_state_dict(loss.head_teacher.state_dict())
    assert d(images()).total.item() == pytest.approx(0, abs=1e-6)


def test_the_order_of_the_batch_does_not_matter():
    student, teacher = networks()
    inputs, labels = images(count=8)
    first, _ = head_stage(student, teacher, (inputs, labels))
    options = {"transformed_ratio": 0.5, "similarity_ratio": 0.5}
    d = Distillation(student, teacher, [SSKD(**options)], Rotations()).continue_from(first).bind((inputs, labels))
    order = torch.tensor([3, 0, 7, 5, 1, 4, 2, 6])
    torch.testing.assert_close(d((inputs[order], labels[order])).total, d((inputs, labels)).total)


def test_a_batch_of_one_after_binding_is_finite():
    student, teacher = networks()
    first, _ = head_stage(student, teacher, images())
    d = Distillation(student, teacher, [SSKD()], Rotations()).continue_from(first).bind(images())
    value = d(images(count=1)).total
    value.backward()
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in d.parameters())


def test_distill_carries_the_head_from_stage_to_stage(tmp_path):
    student, teacher = networks()
    data = [images(seed, 8) for seed in range(3)]
    stages = [
        Stage([SSKD(train="teacher head")], epochs=1, name="head"),
        Stage([TaskLoss(weight=0.1), SSKD()], epochs=1, name="student"),
    ]
    folder = tmp_path / "run"
    result = distill(student, teacher, data, data, stages=stages, views=Rotations(), out=folder, progress=False)
    assert result.metrics.samples == 24, "the turned images are not judged"
    assert np.isfinite(result.history[0]["losses"]["SSKD"])
    assert set(load_file(folder / "student.safetensors")) == set(student.state_dict())


def stripes(count, seed):
    """Images whose class is where a bright bar stands, with noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=draw)
    images = 0.7 * torch.randn(count, 1, 8, 8, generator=draw)
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 2 * label] += 2
        images[i, 0, :, label] += 1
    return images, labels


def test_training_brings_turned_images_and_their_similarities_to_the_teachers():
    torch.manual_seed(0)
    inputs, labels = stripes(96, 1)
    fresh = stripes(96, 2)
    teacher = SmallCNN(8, num_classes=4)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(inputs), labels).backward()
        optimizer.step()
    batch = inputs, labels

    def trained(*, transfer):
        torch.manual_seed(1)
        student = SmallCNN(4, num_classes=4)
        first, values = head_stage(student, teacher, batch, steps=40)
        assert values[-1] < values[0] - 0.3
        d = Distillation(student, teacher, [TaskLoss(weight=0.1), SSKD()], Rotations()).continue_from(first).bind(batch)
        loss = d.losses["SSKD"]
        optimizer = torch.optim.Adam((p for p in d.parameters() if p.requires_grad), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            if transfer:
                d(batch).total.backward()
            else:  # the labels teach the student, and the head alone learns from the teacher
                inside = Rotations()(batch).student
                mine = Observer(student, ["linear:input", "@logits"])(inside)
                with torch.no_grad():
                    theirs = loss.head_teacher(Observer(teacher, ["linear:input"])(inside)["linear:input"])
                head = similarity_divergence(loss.head_student(mine["linear:input"].detach()), theirs)
                (0.1 * nn.functional.cross_entropy(mine.logits[:96], labels) + 10 * head).backward()
            optimizer.step()
        d.eval()
        loss.normal = 0.0
        found = {}
        for part, other in (("transformed", "similarity"), ("similarity", "transformed")):
            kept = getattr(loss, other)
            setattr(loss, other, 0.0)
            with torch.no_grad():
                found[part] = d(fresh)["SSKD"].item()
            setattr(loss, other, kept)
        return found

    with_it, without = trained(transfer=True), trained(transfer=False)
    assert with_it["transformed"] < 0.5 * without["transformed"]
    assert with_it["similarity"] < 0.9 * without["similarity"]
