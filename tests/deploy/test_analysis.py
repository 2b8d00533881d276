from __future__ import annotations

import random
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.data import ArrayLoader
from tutelage.deploy.analysis import BINS, Analysis, analyse, calibration_error
from tutelage.deploy.similarity import linear_cka
from tutelage.distilling import distill
from tutelage.evaluation import evaluate
from tutelage.models import SmallCNN
from tutelage.run import random_state
from tutelage.schemes.online.cohort import Cohort
from tutelage.schemes.self_distillation.be_your_own_teacher import Exits
from tutelage.views import Paired


class Says(nn.Module):
    """Looks the logits of sample i up: the input is i."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, x):
        return self.logits[x.long().flatten()]


def numbers(n, labels=None, batch=4):
    x = torch.arange(n)[:, None]
    marks = torch.zeros(n, dtype=torch.long) if labels is None else torch.as_tensor(labels)
    return [(x[i : i + batch], marks[i : i + batch]) for i in range(0, n, batch)]


def random_pair(n=50, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(n, classes, generator=g) for _ in range(2)]
    return *map(Says, logits), torch.randint(classes, (n,), generator=g)


def images(n=40, channels=1, size=28, seed=0, **options):
    g = np.random.default_rng(seed)
    pixels = g.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    return ArrayLoader(pixels, g.integers(0, 10, n), batch_size=16, mean=0.3, std=0.2, **options)


def test_confusion_is_counted_as_by_hand():
    student, teacher, labels = random_pair()
    found = analyse(student, teacher, numbers(50, labels))
    mine, theirs = student.logits.argmax(1).tolist(), teacher.logits.argmax(1).tolist()
    by_hand = {}
    for t, s in zip(theirs, mine, strict=True):
        by_hand[t, s] = by_hand.get((t, s), 0) + 1
    assert {(t, s): n for t, s, n in found.confusion} == by_hand
    assert [n for _, _, n in found.confusion] == sorted(by_hand.values(), reverse=True)
    assert found.samples == 50
    assert found.differing == sum(t != s for t, s in zip(theirs, mine, strict=True))


def test_bins_are_those_of_the_definition():
    student, teacher, labels = random_pair(200)
    found = analyse(student, teacher, numbers(200, labels))
    for model, bins in ((student, found.student_bins), (teacher, found.teacher_bins)):
        sure, choice = model.logits.detach().softmax(1).max(1)
        assert len(bins) == BINS
        for b in bins:
            inside = (sure > b.low) & (sure <= b.high)
            assert b.count == int(inside.sum())
            if b.count:
                assert b.confidence == pytest.approx(float(sure[inside].mean()), abs=1e-6)
                assert b.accuracy == pytest.approx(float((choice == labels)[inside].float().mean()), abs=1e-6)
        other = evaluate(model, numbers(200, labels)).ece
        assert calibration_error(bins) == pytest.approx(other, abs=1e-5)


def test_sure_answers_fall_into_the_last_bin():
    found = analyse(Says([[500.0, -500.0], [-500.0, 500.0]]), None, numbers(2))
    assert found.student_bins[-1].count == 2
    assert calibration_error(found.student_bins) == pytest.approx(0.5)


def test_the_worst_disagreements_are_those_of_which_both_are_surest():
    student, teacher, labels = random_pair(100)
    found = analyse(student, teacher, numbers(100, labels, batch=7), worst=5, classes=["a", "b", "c", "d"])
    (p, mine), (q, theirs) = (m.logits.detach().softmax(1).max(1) for m in (student, teacher))
    score = torch.where(mine != theirs, p * q, 0.0)
    expected = score.argsort(descending=True)[:5].tolist()
    assert [(e.student_confidence, e.teacher_confidence) for e in found.worst] == [
        (pytest.approx(float(p[i])), pytest.approx(float(q[i]))) for i in expected
    ]
    first = found.worst[0]
    assert (first.label, first.teacher, first.student) == tuple(
        "abcd"[int(v[expected[0]])] for v in (labels, theirs, mine)
    )
    assert analyse(student, student, numbers(100, labels)).worst == []
    assert len(analyse(student, teacher, numbers(100, labels), worst=10_000).worst) == found.differing


def test_unlabelled_samples_are_left_out_and_without_labels_there_is_no_calibration():
    student, teacher, labels = random_pair(20)
    marks = labels.clone()
    marks[::2] = -100
    found = analyse(student, teacher, numbers(20, marks))
    assert found.samples == 10 == sum(b.count for b in found.student_bins)
    assert sum(n for _, _, n in found.confusion) == 10
    bare = analyse(student, teacher, [x for x, _ in numbers(20)])
    assert bare.samples == 20
    assert bare.student_bins == bare.teacher_bins == []
    assert bare.differing == sum(n for t, s, n in bare.confusion if t != s)
    assert all(e.label == "" for e in bare.worst)


def test_similarity_is_that_of_the_stages():
    torch.manual_seed(0)
    student, teacher, loader = SmallCNN(width=2), SmallCNN(width=3), images()
    found = analyse(student, teacher, loader, similarity_samples=1000)
    assert found.student_stages == found.teacher_stages == ["stage1", "stage2", "stage3"]
    assert found.similarity_samples == 40
    x = torch.cat([inputs for inputs, _, _ in loader])

    def stage3(model):
        model.eval()
        with torch.no_grad():
            return model.stage3(model.pool(model.stage2(model.pool(model.stage1(x)))))

    # 7 × 7 positions: these are compared as they are.
    assert found.similarity[2][2] == pytest.approx(float(linear_cka(stage3(student), stage3(teacher))), abs=1e-5)
    same = analyse(student, student, loader)
    assert [same.similarity[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    fewer = analyse(student, teacher, loader, similarity_samples=20)
    assert fewer.similarity_samples == 20
    assert fewer.samples == 40
    assert analyse(student, teacher, loader, similarity_samples=0).similarity == []


def test_a_network_without_stages_has_no_similarity():
    student, teacher, labels = random_pair(20)
    found = analyse(student, teacher, numbers(20, labels))
    assert found.similarity == found.student_stages == []


def test_batches_of_another_size_are_left_out_of_the_similarity_alone():
    torch.manual_seed(0)
    student, teacher = SmallCNN(width=2), SmallCNN(width=3)
    data = [(torch.randn(8, 1, size, size), torch.arange(8) % 3) for size in (16, 24, 16)]
    found = analyse(student, teacher, data)
    assert (found.samples, found.similarity_samples) == (24, 16)


def test_a_report_of_a_run_has_the_analysis_only_where_data_are_given():
    torch.manual_seed(0)
    loader = images()
    result = distill(SmallCNN(width=2), SmallCNN(width=3), loader, loader, epochs=2, control=True, progress=False)
    cheap = result.report()
    assert cheap.analysis is None
    assert len(cheap.history) == 2
    assert set(cheap.history[0]["losses"]) >= {"TaskLoss", "KD"}
    report = result.report("t", data=loader, classes=list("abcdefghij"), recipe="r", command="c")
    assert (report.title, report.recipe, report.command) == ("t", "r", "c")
    assert report.analysis.samples == 40
    assert report.analysis.name_of(2) == "c"
    student, control = report.rows[1:]
    assert report.analysis.differing == round(40 * (1 - student.agreement[0]))
    assert student.last_accuracy == [result.last_metrics.accuracy]
    best = result.runs[0].best_epoch
    assert student.validation == [result.runs[0].history[best].metrics["accuracy"]]
    times = [1000 * line.seconds / 3 for line in result.control.runs[0].history]
    assert control.step_ms == pytest.approx(sum(times) / 2)


def test_nothing_changes():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = SmallCNN(width=2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            torch.rand(1)
            np.random.rand()  # noqa: NPY002
            random.random()
            return self.net(x)

    student, teacher = Counting().train(), Counting().train()
    student.net.stage1.eval()
    loader = images(shuffle=True)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (student, teacher)]
    modes = [m.training for m in (*student.modules(), *teacher.modules())]
    state = random_state()
    analyse(student, teacher, loader)
    after = random_state()
    assert torch.equal(state["torch"], after["torch"])
    assert state["numpy"] == after["numpy"]
    assert state["python"] == after["python"]
    for model, values in zip((student, teacher), before, strict=True):
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in (*student.modules(), *teacher.modules())] == modes


@pytest.mark.parametrize("kind", ["cohort", "exits"])
def test_of_several_answers_the_kept_networks_counts(kind):
    torch.manual_seed(0)
    plain, other, teacher, loader = SmallCNN(width=2), SmallCNN(width=3), SmallCNN(width=3), images()
    student = Cohort([plain, other]) if kind == "cohort" else Exits(plain, at=["stage1"], example=(1, 28, 28))
    found, alone = analyse(student, teacher, loader), analyse(plain, teacher, loader)
    assert found.confusion == alone.confusion
    assert found.student_bins == alone.student_bins
    assert found.similarity == alone.similarity
    assert found.student_stages == ["stage1", "stage2", "stage3"]


def test_without_a_teacher_or_its_logits_the_student_is_looked_at_alone():
    class Features(nn.Module):
        def forward(self, x):
            return {"features": x}

    student, _, labels = random_pair(20)
    for teacher in (None, Features()):
        found = analyse(student, teacher, numbers(20, labels))
        assert found.differing is None
        assert len(found.student_bins) == BINS
        assert found.teacher_bins == found.confusion == found.worst == found.similarity == []
    with pytest.raises(ValueError, match="no logits in the output of Features"):
        analyse(Features(), None, numbers(4))


def test_pictures_are_the_data_sets_own_pixels_or_stretched_inputs():
    torch.manual_seed(0)
    loader = images(channels=3, indices=np.arange(39, -1, -1))
    student, teacher = (SmallCNN(width=2, in_channels=3) for _ in range(2))
    worst = analyse(student, teacher, loader, worst=100).worst
    assert worst
    pixels = loader.dataset.images.numpy()
    labels = loader.dataset.labels.tolist()
    for e in worst:
        assert any(np.array_equal(e.image, p) and e.label == str(y) for p, y in zip(pixels, labels, strict=True))
    for e in analyse(student, teacher, [(x, y) for x, y, _ in loader], worst=100).worst:
        assert e.image.dtype == np.uint8
        assert e.image.shape == (28, 28, 3)
        assert (e.image.min(), e.image.max()) == (0, 255)


def test_texts_are_shown():
    class Reads(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[sign, -sign]]))

        def forward(self, length):
            return length[:, None] * self.weight

    data = [{"text": ["good", "awful"], "length": torch.tensor([1.0, 2.0]), "label": torch.tensor([0, 1])}]
    found = analyse(Reads(1.0), Reads(-1.0), data, classes=["pro", "contra"])
    assert [(e.text, e.label, e.teacher, e.student) for e in found.worst] == [
        ("awful", "contra", "contra", "pro"),
        ("good", "pro", "contra", "pro"),
    ]
    assert all(e.image is None for e in found.worst)


def test_dense_outputs_count_by_position():
    class Tokens(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 3, generator=torch.Generator().manual_seed(seed)))

        def forward(self, x):
            return self.table[x]

    x = torch.arange(9).repeat(2)[:12].reshape(3, 4)
    y = torch.where(x > 6, -100, x % 3)
    student, teacher = Tokens(0), Tokens(1)
    found = analyse(student, teacher, [(x, y)])
    kept = x[y != -100]
    mine, theirs = student.table[kept].argmax(1), teacher.table[kept].argmax(1)
    assert found.samples == len(kept)
    assert found.differing == int((mine != theirs).sum())


def test_views_give_each_its_own_inputs():
    student, teacher, labels = random_pair(20)
    x = torch.arange(20)[:, None]
    data = [{"mine": x, "theirs": x.flip(0), "label": labels}]
    found = analyse(student, teacher, data, views=Paired(student="mine", teacher="theirs"))
    differing = student.logits.argmax(1) != teacher.logits.argmax(1).flip(0)
    assert found.differing == int(differing.sum())


def test_class_names_come_from_the_data_set():
    student, teacher, labels = random_pair(8)

    @dataclass
    class Named:
        classes: tuple = ("ant", "bee", "cow", "doe")

    class Loader(list):
        dataset = Named()

    found = analyse(student, teacher, Loader(numbers(8, labels)))
    assert found.classes == ["ant", "bee", "cow", "doe"]
    assert {e.label for e in found.worst} <= set(found.classes)
    assert found.name_of(1) == "bee"
    assert found.name_of(7) == "7"


def test_mistakes_are_named():
    student, teacher, _ = random_pair(4)
    with pytest.raises(ValueError, match="gave no sample"):
        analyse(student, teacher, [])
    with pytest.raises(ValueError, match=r"labels are torch.float32 of shape \(4, 4\)"):
        analyse(student, teacher, [(torch.arange(4)[:, None], torch.ones(4, 4))])


def test_most_confused_classes():
    found = Analysis(0, confusion=[(0, 0, 99), (1, 2, 9), (4, 3, 5), (3, 5, 5), (6, 0, 1)])
    assert found.most_confused(3) == [1, 2, 3]
    assert found.most_confused() == [0, 1, 2, 3, 4, 5, 6]


def test_an_analysis_as_plain_values_is_the_same_again():
    student, teacher, labels = random_pair(20)
    found = analyse(student, teacher, numbers(20, labels))
    assert asdict(Analysis.from_plain(asdict(found))) == asdict(found)
