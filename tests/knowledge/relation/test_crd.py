from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import Distillation, TaskLoss
from tutelage.knowledge.relation import crd as module
from tutelage.knowledge.relation.crd import (
    CRD,
    bank_nce,
    bank_scores,
    contrastive_nce,
    log_mean_exp,
    other_classes,
    other_samples,
    softplus,
)

# Losses, norms of gradients, and the memory after each step, computed with the authors' published code (CRDLoss of
# RepDistiller, in float64, with the negatives given) for the inputs of `published` below.
PUBLISHED = [
    {
        "loss": 12.84576012873722,
        "student": 1.8517152234888397,
        "embed_student": 2.085751169136705,
        "embed_teacher": 1.1345725767395831,
        "memory_student": 3.2657857096139637,
        "memory_teacher": 35.12150398335727,
    },
    {
        "loss": 13.828538966722693,
        "student": 2.249756732171488,
        "embed_student": 1.7744712225043648,
        "embed_teacher": 1.2260070055489898,
        "memory_student": 2.7967131333237183,
        "memory_teacher": 38.061348592949685,
    },
]
PUBLISHED_Z = 1029.9940578778533, 5970.129817114923


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def test_two_steps_have_the_values_of_the_authors_code(bound, monkeypatch):
    crd = CRD(features=8, k=8, samples=20)
    call = bound(crd, random(10, 5, 12), random(20, 5, 16))
    crd.embed_student.load_state_dict({"weight": random(0, 8, 12), "bias": random(1, 8)})
    crd.embed_teacher.load_state_dict({"weight": random(2, 8, 16), "bias": random(3, 8)})
    crd.memory_student.copy_(random(4, 20, 8) / 4)
    crd.memory_teacher.copy_(random(5, 20, 8) / 4)
    for step, expected in enumerate(PUBLISHED):
        student, teacher = random(10 + step, 5, 12).requires_grad_(), random(20 + step, 5, 16)
        rng = np.random.RandomState(30 + step)
        ids, negatives = torch.from_numpy(rng.permutation(20)[:5]), torch.from_numpy(rng.randint(0, 20, (5, 8)))
        monkeypatch.setattr(module, "other_samples", lambda *_, negatives=negatives: negatives)
        crd.zero_grad()
        loss = call(student, teacher, ids)
        loss.backward()
        found = {
            "loss": loss,
            "student": student.grad.norm(),
            "embed_student": crd.embed_student.weight.grad.norm(),
            "embed_teacher": crd.embed_teacher.weight.grad.norm(),
            "memory_student": crd.memory_student.sum(),
            "memory_teacher": crd.memory_teacher.abs().sum(),
        }
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=2e-6)
        # log(Z / N), which the first step fixes
        z = [20 * math.exp(value) for value in crd.log_mean.tolist()]
        assert z == pytest.approx(PUBLISHED_Z, rel=1e-6)


def test_the_loss_is_the_loop_over_samples_and_negatives():
    torch.manual_seed(0)
    anchors = nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64))
    bank = nn.functional.normalize(torch.randn(7, 4, dtype=torch.float64))
    own, negatives = torch.tensor([2, 0, 6]), torch.tensor([[1, 1, 3, 5], [2, 4, 4, 6], [0, 1, 2, 3]])
    z, count, samples, total = 3.0, 4, 7, 0.0
    for i in range(3):

        def critic(row, anchor=anchors[i]):
            ratio = math.exp((anchor @ bank[row]).item() / 0.07) / (z * samples)
            return ratio / (ratio + count / samples)

        total -= math.log(critic(own[i]))
        total -= sum(math.log(1 - critic(row)) for row in negatives[i])
    scores = bank_scores(anchors, bank, torch.cat([own[:, None], negatives], dim=1))
    value = contrastive_nce(scores[:, 0], scores[:, 1:], torch.tensor(z, dtype=torch.float64).log())
    assert value.item() == pytest.approx(total / 3)


def test_the_constant_is_the_mean_over_positives_and_kept_negatives():
    positive, negative = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    keep = torch.tensor([[True, False], [True, True]])
    assert log_mean_exp(positive, negative).exp().item() == pytest.approx(sum(math.exp(x) for x in range(1, 7)) / 6)
    kept = sum(math.exp(x) for x in (1, 2, 3, 5, 6)) / 5
    assert log_mean_exp(positive, negative, keep).exp().item() == pytest.approx(kept)


def test_a_negative_that_is_not_kept_does_not_count():
    torch.manual_seed(0)
    positive, negative, log_mean = torch.randn(1), torch.randn(1, 4), torch.tensor(0.3)
    keep = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(
        contrastive_nce(positive, negative, log_mean, keep), contrastive_nce(positive, negative[:, ::2], log_mean)
    )


@pytest.mark.parametrize("score", [500.0, -500.0, 1e4])
def test_extreme_scores_are_finite(score):
    positive = torch.tensor([score, -score], requires_grad=True)
    negative = torch.full((2, 3), score, requires_grad=True)
    value = contrastive_nce(positive, negative, log_mean_exp(positive, negative).detach())
    value.backward()
    assert value.isfinite()
    assert positive.grad.isfinite().all()
    assert negative.grad.isfinite().all()


@pytest.mark.parametrize("count", [2, 400])
def test_both_ways_to_the_scores_agree_though_the_bank_changes_before_the_backward_pass(count):
    # few candidates: their rows are looked up; many: all products are taken
    torch.manual_seed(0)
    anchors = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bank, candidates = torch.randn(50, 4, dtype=torch.float64), torch.randint(50, (3, count))
    expected = torch.stack([bank[candidates[i]] @ anchors[i] for i in range(3)]) / 0.5
    (wanted,) = torch.autograd.grad(expected.square().sum(), anchors)
    scores = bank_scores(anchors, bank, candidates, temperature=0.5)
    bank.zero_()
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(torch.autograd.grad(scores.square().sum(), anchors)[0], wanted)


def test_many_negatives_do_not_need_their_rows_side_by_side():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    anchors, bank = torch.randn(8, 32, requires_grad=True), torch.randn(100, 32)
    candidates = torch.randint(100, (8, 1000))
    with Watch():
        bank_scores(anchors, bank, candidates).sum().backward()
    assert largest == 8 * 1000 < 8 * 1000 * 32


@pytest.mark.parametrize("count", [3, 400])
def test_the_banks_loss_is_the_scores_loss_with_its_gradient_though_the_bank_changes_before_the_backward_pass(count):
    torch.manual_seed(0)
    anchors = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bank, candidates = torch.randn(50, 4, dtype=torch.float64), torch.randint(50, (3, count))
    log_mean = torch.tensor(0.3, dtype=torch.float64)
    scores = bank_scores(anchors, bank, candidates, temperature=0.5)
    expected = contrastive_nce(scores[:, 0], scores[:, 1:], log_mean)
    (wanted,) = torch.autograd.grad(2 * expected, anchors)
    value = bank_nce(anchors, bank, candidates, log_mean, temperature=0.5)
    bank.zero_()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(2 * value, anchors)[0], wanted)


def test_softplus_is_exact_to_rounding():
    x = torch.cat([torch.linspace(-110, 110, 100_001), torch.linspace(-1e-3, 1e-3, 1001)])
    expected = x.double().exp().log1p()
    torch.testing.assert_close(softplus(x).double(), expected, rtol=3e-7, atol=1e-44)
    assert softplus(torch.tensor([-torch.inf, torch.inf])).tolist() == [0, torch.inf]
    assert softplus(torch.tensor(torch.nan)).isnan()


def test_other_samples_are_drawn_uniformly_and_never_the_own():
    torch.manual_seed(0)
    drawn = other_samples(torch.tensor([0, 3, 5]), 6, 60_000)
    for own, row in zip((0, 3, 5), drawn, strict=True):
        share = row.bincount(minlength=6) / 60_000
        assert share[own] == 0
        assert share[torch.arange(6) != own].sub(0.2).abs().max() < 0.01


@pytest.mark.parametrize("samples", [101, 2**20 + 1])
def test_other_samples_are_independent_though_they_come_in_order(samples):
    torch.manual_seed(0)
    ids = torch.tensor([0, samples // 2, samples - 1])
    drawn = other_samples(ids, samples, 10_000)
    assert (drawn.diff(dim=1) >= 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < samples
    # counts in 100 equal parts: 100 ± 10 each, as of independent draws, where evenly spread ones would have 100 ± 0
    others = drawn - (drawn > ids.unsqueeze(1)).long()
    counts = torch.stack([row.bincount(minlength=100) for row in others * 100 // (samples - 1)]).double()
    assert counts.shape == (3, 100)
    assert 7.5 < counts.std() < 12.5
    assert counts.mean() == 100


def test_other_classes_are_drawn_uniformly_however_unequal_they_are():
    torch.manual_seed(0)
    # classes of 1, 2 and 6 samples, and one that has not been seen
    known = torch.tensor([2, 0, 2, 2, 1, 2, -1, 1, 2, 2])
    drawn = other_classes(torch.tensor([0, 1, 2, -100]), known, 60_000)
    for own, row in zip((0, 1, 2, -100), drawn, strict=True):
        share = row.bincount(minlength=10) / 60_000
        allowed = known != own
        assert share[~allowed].sum() == 0
        assert (share[allowed] - 1 / allowed.sum()).abs().max() < 0.01


def test_one_class_alone_has_no_negatives():
    with pytest.raises(ValueError, match="all samples have the same label"):
        other_classes(torch.tensor([1]), torch.tensor([1, 1, 1]), 2)


def test_the_memory_follows_with_momentum(bound):
    torch.manual_seed(0)
    crd = CRD(features=4, k=3, samples=6, momentum=0.8)
    student, teacher, ids = torch.randn(2, 5), torch.randn(2, 7), torch.tensor([4, 1])
    call = bound(crd, student, teacher, ids=ids)
    before = crd.memory_student.clone(), crd.memory_teacher.clone()
    call(student, teacher, ids)
    for memory, old, embed, features in (
        (crd.memory_student, before[0], crd.embed_student, student),
        (crd.memory_teacher, before[1], crd.embed_teacher, teacher),
    ):
        for row, number in enumerate(ids):
            vector = embed(features[row])
            moved = 0.8 * old[number] + 0.2 * vector / vector.norm()
            torch.testing.assert_close(memory[number], (moved / moved.norm()).detach())
        untouched = [0, 2, 3, 5]
        assert torch.equal(memory[untouched], old[untouched])
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(6))
        assert not memory.requires_grad


def test_a_sample_that_comes_twice_is_remembered_as_it_came_first(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 7)
    memories = []
    for rows, ids in (([0, 1, 2], [4, 1, 4]), ([0, 1], [4, 1])):
        torch.manual_seed(1)
        crd = CRD(features=4, k=3, samples=6)
        bound(crd, student, teacher)(student[rows], teacher[rows], torch.tensor(ids))
        memories.append(crd.memory_student)
    torch.testing.assert_close(*memories)


@pytest.mark.parametrize("memory", ["bank", "queue"])
def test_neither_evaluation_nor_a_pass_without_gradients_changes_the_memory(bound, memory):
    torch.manual_seed(0)
    crd = CRD(features=4, k=3, queue=8, samples=6, memory=memory, negatives="other classes")
    student, teacher, ids, labels = torch.randn(3, 5), torch.randn(3, 7), torch.arange(3), torch.tensor([0, 1, 0])
    call = bound(crd, student, teacher, ids=ids, labels=labels)
    before = {name: value.clone() for name, value in crd.named_buffers()}

    def unchanged():
        return all(torch.equal(before[n].nan_to_num(-9), v.nan_to_num(-9)) for n, v in crd.named_buffers())

    crd.eval()
    call(student, teacher, ids, labels)
    assert unchanged()
    crd.train()
    with torch.no_grad():
        call(student, teacher, ids, labels)
    assert unchanged()
    call(student, teacher, ids, labels)
    assert not unchanged()


@pytest.mark.parametrize("memory", ["bank", "queue"])
def test_the_gradient_reaches_the_student_and_both_projections_and_not_the_teacher(bound, memory):
    torch.manual_seed(0)
    crd = CRD(features=4, k=3, queue=8, samples=6, memory=memory)
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    call = bound(crd, student, teacher)
    call(student, teacher, torch.arange(3)).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert len(list(crd.parameters())) == 4
    assert all(p.grad.abs().sum() > 0 for p in crd.parameters())


@pytest.mark.parametrize("memory", ["bank", "queue"])
def test_degenerate_embeddings_are_finite(bound, memory):
    torch.manual_seed(0)
    crd = CRD(features=4, k=3, queue=8, samples=6, memory=memory)
    student, teacher = 500 * torch.randn(4, 5), torch.randn(4, 7)
    call = bound(crd, student, teacher)
    nn.init.zeros_(crd.embed_student.bias)
    student[0], student[2], teacher[3] = 0, student[1], 0
    for rows in (4, 1):
        value = call(student[:rows].requires_grad_(), teacher[:rows], torch.arange(rows))
        value.backward()
        assert value.isfinite()
        assert all(p.grad.isfinite().all() for p in crd.parameters())
        assert crd.memory_student.isfinite().all()
        assert crd.embed_student.weight.grad.abs().max() < 1e6


def test_queue_alone_the_batch_is_its_own_negatives(bound):
    torch.manual_seed(0)
    crd = CRD(features=4, memory="queue", queue=0, temperature=0.5)
    student, teacher = torch.randn(3, 5), torch.randn(3, 7)
    value = bound(crd, student, teacher)(student, teacher)
    s = nn.functional.normalize(crd.embed_student(student))
    t = nn.functional.normalize(crd.embed_teacher(teacher))
    total = 0.0
    for mine, theirs in ((s, t), (t, s)):
        scores = (mine @ theirs.T / 0.5).tolist()
        mean = sum(math.exp(x) for row in scores for x in row) / 9
        for i, row in enumerate(scores):
            for j, x in enumerate(row):
                ratio = math.exp(x) / mean
                total -= math.log(ratio / (ratio + 2) if i == j else 2 / (ratio + 2)) / 3
    assert value.item() == pytest.approx(total, rel=1e-5)


def test_the_queue_is_written_in_a_circle(bound):
    torch.manual_seed(0)
    crd = CRD(features=4, memory="queue", queue=5)
    batches = [(torch.randn(n, 5), torch.randn(n, 7)) for n in (3, 3, 7)]
    call = bound(crd, *batches[0])
    embedded = [nn.functional.normalize(crd.embed_student(s)).detach() for s, _ in batches]
    call(*batches[0])
    call(*batches[1])
    expected = torch.cat([embedded[1][2:], embedded[0][1:], embedded[1][:2]])
    torch.testing.assert_close(crd.memory_student, expected)
    assert crd.pointer == 1
    call(*batches[2])  # longer than the queue: its last five
    assert {tuple(row) for row in crd.memory_student.tolist()} == {tuple(row) for row in embedded[2][2:].tolist()}


def test_queue_negatives_of_the_own_class_are_left_out(bound):
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 5), torch.randn(4, 7), torch.tensor([0, 1, 0, -100])
    crd = CRD(features=4, memory="queue", queue=2, negatives="other classes")
    bound(crd, student, teacher, labels=labels)
    crd.memory_labels.copy_(torch.tensor([1, 0]))
    assert crd._allowed(labels).tolist() == [
        [False, True, False, True, True, False],
        [True, False, True, True, False, True],
        [False, True, False, True, True, False],
        [True, True, True, False, True, True],
    ]


def networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3)) for n in (6, 32)]


def test_binding_remembers_nothing_and_training_does():
    student, teacher = networks()
    batch = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    crd = CRD(features=4, negatives="other classes")
    d = Distillation(student, teacher, losses=[crd]).bind(batch, population=10)
    assert crd.memory_student.shape == (10, 4)
    assert crd.log_mean.isnan().all()
    assert (crd.memory_labels == -1).all()
    d(batch)
    assert crd.log_mean.isfinite().all()
    assert crd.memory_labels.tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1, -1]
    fixed = crd.log_mean.clone()
    d(batch)
    assert torch.equal(crd.log_mean, fixed)


@pytest.mark.parametrize("memory", ["bank", "queue"])
def test_the_run_goes_on_exactly_from_its_state(memory):
    batch = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)

    def distillation():
        return Distillation(
            *networks(), losses=[CRD(features=4, k=3, queue=16, memory=memory, negatives="other classes")]
        ).bind(batch, population=10)

    first, second = distillation(), distillation()
    first(batch)
    second.load_state_dict(first.state_dict())
    values = []
    for d in (first, second):
        torch.manual_seed(7)
        values.append([d(batch).total for _ in range(2)])
    assert values[0] == values[1]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_negatives_come_from_the_global_generator(bound):
    torch.manual_seed(0)
    crd = CRD(features=4, k=3, samples=50).eval()
    student, teacher, ids = torch.randn(4, 5), torch.randn(4, 7), torch.arange(4)
    call = bound(crd, student, teacher)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(call(student, teacher, ids).item())
    assert values[0] == values[1] != values[2]


def test_float64_stays_float64(bound):
    student, teacher = torch.randn(3, 5).double(), torch.randn(3, 7).double()
    for memory in ("bank", "queue"):
        crd = CRD(features=4, samples=5, memory=memory, queue=4)
        assert bound(crd, student, teacher)(student, teacher, torch.arange(3)).dtype == torch.float64


def test_ids_of_any_integer_type(bound):
    student, teacher = torch.randn(3, 5), torch.randn(3, 7)
    crd = CRD(features=4, samples=5)
    assert bound(crd, student, teacher)(student, teacher, torch.arange(3, dtype=torch.int32)).isfinite()


def test_what_is_missing_is_named():
    batch = torch.randn(4, 8), torch.zeros(4, dtype=torch.long), torch.arange(4)

    def bind(crd, batch=batch, population=None):
        Distillation(*networks(), losses=[crd]).bind(batch, population=population)

    with pytest.raises(ValueError, match="number is unknown"):
        bind(CRD())
    with pytest.raises(ValueError, match="needs sample ids"):
        bind(CRD(samples=10), batch[:2])
    with pytest.raises(ValueError, match="needs labels"):
        bind(CRD(memory="queue", negatives="other classes"), batch[0])
    with pytest.raises(ValueError, match=r"a sample id is not in 0\.\.2"):
        bind(CRD(samples=3))
    with pytest.raises(ValueError, match=r"a sample id is not in 0\.\.9"):
        bind(CRD(), (*batch[:2], -torch.arange(4)), population=10)
    with pytest.raises(ValueError, match="one class number for each sample"):
        bind(CRD(memory="queue", negatives="other classes"), (batch[0], torch.rand(4, 3)))
    with pytest.raises(ValueError, match="one pair of embeddings, not 2"):
        bind(CRD("0", "1", memory="queue"))
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        bind(CRD(memory="queue", queue=0), batch[0][:1])
    bind(CRD(memory="queue"), batch[0])  # needs nothing


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("negatives", "classes"),
        ("memory", "list"),
        ("features", 0),
        ("k", 0),
        ("queue", -1),
        ("temperature", 0.0),
        ("momentum", 1.0),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"CRD: {argument}={value!r}"):
        CRD(**{argument: value})


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")
def test_two_processes_remember_what_one_would_of_both_batches(tmp_path):
    script = Path(__file__).with_name("crd_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", tmp_path / "meet", out],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outputs)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    results = [torch.load(out, weights_only=True) for out in outputs]
    specification = importlib.util.spec_from_file_location("crd_process", script)
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    for memory in ("bank", "queue"):
        first, second = (result[memory] for result in results)
        alone = worker.run(None, memory)
        for name in set(first) - {"local"}:
            assert torch.equal(first[name], second[name]), name
        for name in set(first) - {"local", "log_mean"}:
            torch.testing.assert_close(first[name], alone[name], msg=lambda text, name=name: f"{name}: {text}")
        # the constants: the mean over the samples of both, which had 4 and 2 in the first step
        both = (4 * first["local"].exp() + 2 * second["local"].exp()) / 6
        torch.testing.assert_close(first["log_mean"], both.log())
        assert (first["local"] != second["local"]).all()


def cka(a, b):
    """Linear centred kernel alignment of two sets of features of the same samples."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())


@pytest.mark.parametrize(("memory", "negatives"), [("bank", "all"), ("bank", "other classes"), ("queue", "all")])
def test_training_brings_the_students_embedding_closer_to_the_teachers(memory, negatives):
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    labels = teacher(inputs).argmax(1)
    ids = torch.arange(256)

    def trained(*losses):
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        d = Distillation(student, teacher, losses=[TaskLoss(), *losses])
        d.bind((inputs[:64], labels[:64], ids[:64]), population=256)
        optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
        for _ in range(15):
            for part in torch.randperm(256).split(64):
                optimizer.zero_grad()
                d((inputs[part], labels[part], ids[part])).total.backward()
                optimizer.step()
        fresh = torch.randn(256, 8, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return cka(student[:2](fresh), teacher[:2](fresh))

    crd = CRD(features=32, k=64, queue=128, memory=memory, negatives=negatives, temperature=0.2)
    assert trained(crd) > trained() + 0.03
