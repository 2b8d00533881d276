from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tutelage as tl
from tutelage import Distillation, Stage, TaskLoss
from tutelage.knowledge.feature.factor_transfer import FactorTransfer, Paraphraser, factor_transfer, translator
from tutelage.models import MLP, SmallCNN


def images(count=4):
    torch.manual_seed(0)
    return torch.randn(count, 1, 16, 16)


def first_stage(student, teacher, inputs, *taps, steps=3, **options):
    d = Distillation(student, teacher, losses=[FactorTransfer(*taps, train="paraphraser", **options)]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    return d


def both_stages(student, teacher, inputs, *taps, **options):
    first = first_stage(student, teacher, inputs, *taps, **options)
    loss = FactorTransfer(*taps, **options)
    return Distillation(student, teacher, losses=[loss]).continue_from(first).bind(inputs), loss, first


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_is_the_loop_over_normalised_entries(p):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        norm_s, norm_t = (sum(v**2 for v in x) ** 0.5 for x in (s, t))
        total += sum(abs(a / norm_s - b / norm_t) ** p for a, b in zip(s, t, strict=True))
    assert factor_transfer(student, teacher, p).item() == pytest.approx(total / student.numel())


def test_factors_are_equal_up_to_a_positive_scale_and_opposite_ones_are_farthest():
    torch.manual_seed(0)
    factors, other = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    scales = torch.tensor([0.1, 3.0, 700.0], dtype=torch.float64).view(3, 1, 1, 1)
    assert factor_transfer(scales * factors, factors) < 1e-15
    # 1 − cos between −1 and 1: with p = 2 opposite factors reach the largest possible value, 4 / entries
    assert factor_transfer(-factors, factors, 2).item() == pytest.approx(4 / factors[0].numel())
    assert factor_transfer(other, factors, 2) < factor_transfer(-factors, factors, 2)


def test_a_sample_of_zeros_has_gradient_zero():
    student = torch.zeros(2, 4)
    student[1] = 1.0
    student.requires_grad_()
    factor_transfer(student, torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)).backward()
    assert student.grad[0].abs().sum() == 0
    assert student.grad[1].abs().sum() > 0


def test_refusals(bound):
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        factor_transfer(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"p=0\.5: expected at least 1"):
        factor_transfer(torch.ones(2, 3), torch.ones(2, 3), 0.5)
    with pytest.raises(ValueError, match=r"p=0"):
        FactorTransfer(p=0)
    with pytest.raises(ValueError, match="rate=0: expected a positive number"):
        FactorTransfer(rate=0)
    with pytest.raises(ValueError, match="train='teacher'"):
        FactorTransfer(train="teacher")
    with pytest.raises(ValueError, match="reconstruction='l1'"):
        FactorTransfer(reconstruction="l1")
    for mine, theirs in (((2, 4, 8), (2, 5, 8)), ((2, 4), (2, 4, 3, 3))):
        with pytest.raises(ValueError, match="no factors to compare"):
            bound(FactorTransfer(), torch.ones(mine), torch.ones(theirs))


def test_the_networks_are_the_published_ones():
    paraphraser, mine = Paraphraser(64, 32), translator(16, 32)
    parts = [*paraphraser.encoder, *paraphraser.decoder]
    convolutions = [m for m in parts if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        (64, 64), (64, 32), (32, 32), (32, 32), (32, 64), (64, 64),
    ]  # fmt: skip
    assert {(m.kernel_size, m.stride, m.padding) for m in convolutions} == {((3, 3), (1, 1), (1, 1))}
    assert all(m.negative_slope == 0.1 for m in parts[1::2])
    assert [(m.in_channels, m.out_channels) for m in mine[::2]] == [(16, 16), (16, 32), (32, 32)]


def test_the_first_stage_reconstructs_and_runs_nothing_of_the_student():
    student, teacher, inputs = SmallCNN(4), SmallCNN(8), images(16)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    calls = []
    student.stage1.register_forward_hook(lambda *_: calls.append("student"))
    teacher.linear.register_forward_hook(lambda *_: calls.append("head"))
    d = Distillation(student, teacher, losses=[FactorTransfer("stage3", train="paraphraser")]).bind(inputs)
    calls.clear()
    optimizer = torch.optim.AdamW(d.parameters(), lr=0.01, weight_decay=0.1)
    start = d(inputs)["FactorTransfer"]
    for _ in range(40):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert d(inputs)["FactorTransfer"] < 0.7 * start
    assert not calls
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("kind", "power"), [("L1", 1), ("L2", 2)])
def test_the_reconstruction_is_the_mean_of_the_difference(kind, power):
    teacher, inputs = SmallCNN(8), images()
    loss = FactorTransfer("stage3", train="paraphraser", reconstruction=kind)
    d = Distillation(SmallCNN(4), teacher, losses=[loss]).bind(inputs)
    value = d(inputs)["FactorTransfer"]
    with torch.no_grad():
        features = teacher.stage3(teacher.pool(teacher.stage2(teacher.pool(teacher.stage1(inputs)))))
        torch.testing.assert_close(value, (loss.paraphrasers[0](features) - features).abs().pow(power).mean())


def test_the_second_stage_goes_on_with_a_frozen_paraphraser():
    student, teacher, inputs = SmallCNN(4), SmallCNN(8), images(8)
    d, loss, first = both_stages(student, teacher, inputs, "stage3")
    earlier, paraphraser = first.losses["FactorTransfer"].paraphrasers[0], loss.paraphrasers[0]
    for mine, theirs in zip(paraphraser.parameters(), earlier.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    optimizer = torch.optim.SGD((p for p in d.parameters() if p.requires_grad), lr=0.1)
    d(inputs).total.backward()
    assert all(p.grad is None for p in paraphraser.parameters())
    assert all(p.grad.abs().sum() > 0 for p in loss.translators.parameters())
    assert student.stage3[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(paraphraser.parameters(), earlier.parameters(), strict=True))
    with torch.no_grad():
        d.eval()
        value = d(inputs)["FactorTransfer"]
        features = [m.stage3(m.pool(m.stage2(m.pool(m.stage1(inputs))))) for m in (student, teacher)]
        expected = factor_transfer(loss.translators[0](features[0]), paraphraser.encoder(features[1]))
    torch.testing.assert_close(value, expected)


def test_the_second_stage_needs_the_first():
    with pytest.raises(
        ValueError, match=r"FactorTransfer: its first stage has taught it nothing.*FactorTransfer\(train="
    ):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[FactorTransfer("stage3")]).bind(images())
    first = first_stage(SmallCNN(4), SmallCNN(8), images(), "stage3", rate=0.25)
    second = Distillation(SmallCNN(4), SmallCNN(8), losses=[FactorTransfer("stage3")]).continue_from(first)
    with pytest.raises(ValueError, match="cannot go on with what it learned"):
        second.bind(images())
    idle = first_stage(SmallCNN(4), SmallCNN(8), images(), "stage3", steps=0)
    with pytest.raises(ValueError, match="taught it nothing"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[FactorTransfer("stage3")]).continue_from(idle).bind(images())


def test_a_second_binding_makes_everything_anew_and_is_untrained_again():
    student, teacher, inputs = SmallCNN(4), SmallCNN(8), images()
    _, loss, _ = both_stages(student, teacher, inputs, "stage3")
    with pytest.raises(ValueError, match="taught it nothing"):
        Distillation(student, teacher, losses=[loss]).bind(inputs)
    assert len(loss.paraphrasers) == len(loss.translators) == 1


def test_what_it_learned_is_saved_without_the_student():
    student, teacher, inputs = SmallCNN(4), SmallCNN(8), images()
    names = list(student.state_dict())
    d, loss, _ = both_stages(student, teacher, inputs, "stage3")
    assert {k.split(".")[0] for k in loss.state_dict()} == {"learned", "paraphrasers", "translators"}
    assert {id(p) for p in loss.translators.parameters()} <= {id(p) for p in d.parameters()}
    other, again, _ = both_stages(SmallCNN(4), teacher, inputs, "stage3")
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(other.eval()(inputs).total, d.eval()(inputs).total)
    incomplete = {k: v for k, v in loss.state_dict().items() if k != "translators.0.0.weight"}
    with pytest.raises(RuntimeError, match=r"translators\.0\.0\.weight"):
        again.load_state_dict(incomplete)
    assert list(student.state_dict()) == names


@pytest.mark.parametrize("shape", [(6,), (5, 6)])
def test_vectors_and_sequences_have_layers_over_their_channels(bound, shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, *shape), torch.randn(3, *shape[:-1], 8)
    first, second = FactorTransfer(train="paraphraser"), FactorTransfer(name="FactorTransfer")
    assert bound(first, student, teacher)(student, teacher) > 0
    with pytest.raises(ValueError, match="taught it nothing"):
        bound(second, student, teacher)
    second.load_state_dict(first.state_dict())
    second.pairs = [("s", "t")]
    value = second(tl.Record(None, {"s": student}), tl.Record(None, {"t": teacher}), None)
    assert value > 0
    assert second.translators[0][0].kernel_size == (1, 1)
    order = torch.tensor([2, 0, 1])
    moved = second(tl.Record(None, {"s": student[order]}), tl.Record(None, {"t": teacher[order]}), None)
    torch.testing.assert_close(moved, value)


def test_maps_of_different_sizes_meet_at_the_smaller_and_float64_stays(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, 6).double(), torch.randn(2, 6, 4, 6).double()
    first, second = FactorTransfer(train="paraphraser"), FactorTransfer()
    bound(first, student, teacher)(student, teacher)
    with pytest.raises(ValueError, match="taught it nothing"):
        bound(second, student, teacher)
    second.load_state_dict(first.state_dict())
    value = second(tl.Record(None, {"s": student}), tl.Record(None, {"t": teacher}), None)
    pooled = nn.functional.adaptive_avg_pool2d(second.translators[0](student), (4, 6))
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, factor_transfer(pooled, second.paraphrasers[0].encoder(teacher)))


def test_by_default_the_last_stage_is_read_and_the_weight_is_the_authors():
    loss = FactorTransfer(train="paraphraser")
    Distillation(SmallCNN(4), SmallCNN(8), losses=[loss]).bind(images())
    assert loss.pairs == [(":input", "stage3")]
    assert loss.weight == 1
    assert FactorTransfer().weight == 500
    assert FactorTransfer(weight=3, train="paraphraser").weight == 3


def test_stages_of_distill_carry_the_paraphraser_over():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, 16, 16), torch.arange(8) % 10) for _ in range(2)]
    stages = [
        Stage([FactorTransfer("stage3", train="paraphraser")], epochs=1),
        Stage([TaskLoss(), FactorTransfer("stage3")], epochs=1),
    ]
    result = tl.distill(SmallCNN(4), SmallCNN(8), batches, batches, stages=stages, progress=False)
    terms = [set(line["losses"]) - {"loss"} for line in result.history]
    assert terms == [{"FactorTransfer"}, {"FactorTransfer", "TaskLoss"}]


def test_factors_say_of_unseen_samples_what_the_students_labels_do_not():
    """The teacher knows eight kinds of samples, the student's labels two; a translator is fitted to both students."""
    torch.manual_seed(0)
    kinds = torch.randn(8, 16)

    def batch(classes=2, count=64):
        kind = torch.randint(8, (count,))
        return kinds[kind] + 0.5 * torch.randn(count, 16), kind % classes

    def trained(d, steps, classes=2):
        d.bind(batch(classes))
        optimizer = torch.optim.Adam((p for p in d.parameters() if p.requires_grad), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            d(batch(classes)).total.backward()
            optimizer.step()
        return d.eval()

    teacher, taught = MLP(16, (32, 32), 8), MLP(16, (24, 24), 8)
    alone, unseen = copy.deepcopy(taught), batch(count=256)
    trained(Distillation(teacher), 60, classes=8)
    first = trained(Distillation(taught, teacher, [FactorTransfer("hidden.1", train="paraphraser")]), 60)
    trained(Distillation(taught, teacher, [TaskLoss(), FactorTransfer("hidden.1")]).continue_from(first), 100)
    trained(Distillation(alone), 100)

    def distance(student):
        student.requires_grad_(False)
        torch.manual_seed(1)
        fitted = Distillation(student, teacher, [FactorTransfer("hidden.1")]).continue_from(first)
        return trained(fitted, 60)(unseen)["FactorTransfer"]

    assert distance(taught) < 0.5 * distance(alone)
