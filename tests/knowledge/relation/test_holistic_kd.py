from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import Distillation, TaskLoss
from tutelage.knowledge.relation import holistic_kd as module
from tutelage.knowledge.relation.holistic_kd import GraphEncoder, HolisticKD, info_nce, neighbour_graph
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record
from tutelage.views import Batch, Inputs

# Losses, norms of gradients, and the memories after each step, computed in float64 with the authors' published GNNLoss
# (its graph library replaced by dense matrices, the negatives given) for the inputs of `published` below.
PUBLISHED = [
    {
        "loss": 19.606262915621695,
        "student": 2.2478400832449643,
        "embed_student": 7.550012435495624,
        "embed_teacher": 7.935718058273087,
        "encode_student": 5.857248722819882,
        "encode_teacher": 4.712223446284487,
        "memory_student": -2.680458880603358,
        "memory_teacher": 36.37232860518369,
    },
    {
        "loss": 17.149679796826383,
        "student": 2.1363033989219407,
        "embed_student": 5.487649245196097,
        "embed_teacher": 6.058099573480346,
        "encode_student": 3.70226701610885,
        "encode_teacher": 2.973444136160849,
        "memory_student": -2.1179392688201153,
        "memory_teacher": 38.14366229478999,
    },
]


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def built(loss, s, t, z_s, z_t, ids, labels=None):
    """The loss on bare tensors."""
    loss.pairs = [("e", "e"), ("@logits", "@logits")]

    def call(s, t, z_s, z_t, ids, labels=None):
        batch = Batch(Inputs((s,)), Inputs((t,)), labels, ids)
        return loss(Record(z_s, {"e": s}), Record(z_t, {"e": t}), batch)

    loss.build(Record(z_s, {"e": s}), Record(z_t, {"e": t}), Batch(Inputs((s,)), Inputs((t,)), labels, ids))
    return call


def inputs(seed=0, count=5):
    return (
        random(50 + seed, count, 12),
        random(60 + seed, count, 16),
        random(70 + seed, count, 4),
        random(80 + seed, count, 4),
    )


def test_two_steps_have_the_values_of_the_authors_code(monkeypatch):
    loss = HolisticKD(features=8, k=6, neighbours=3, samples=20, negatives="all")
    call = built(loss, *inputs(), torch.arange(5))
    parts = (loss.embed_student, loss.embed_teacher, loss.encode_student, loss.encode_teacher)
    with torch.no_grad():
        for seed, parameter in enumerate(p for part in parts for p in part.parameters()):
            parameter.copy_(random(seed, *parameter.shape) / 3)
    loss.memory_student.copy_(random(40, 20, 8) / 4)
    loss.memory_teacher.copy_(random(41, 20, 8) / 4)
    for step, expected in enumerate(PUBLISHED):
        s, *others = inputs(step)
        s.requires_grad_()
        rng = np.random.RandomState(90 + step)
        ids, negatives = torch.from_numpy(rng.permutation(20)[:5]), torch.from_numpy(rng.randint(0, 20, (5, 6)))
        monkeypatch.setattr(module, "other_samples", lambda *_, negatives=negatives: negatives)
        loss.zero_grad()
        value = call(s, *others, ids)
        value.backward()
        found = {
            "loss": value,
            "student": s.grad.norm(),
            "embed_student": loss.embed_student.weight.grad.norm(),
            "embed_teacher": loss.embed_teacher.weight.grad.norm(),
            "encode_student": loss.encode_student.linear.weight.grad.norm(),
            "encode_teacher": loss.encode_teacher.linear.bias.grad.norm(),
            "memory_student": loss.memory_student.sum(),
            "memory_teacher": loss.memory_teacher.abs().sum(),
        }
        assert {name: v.item() for name, v in found.items()} == pytest.approx(expected, rel=1e-10)


def test_info_nce_is_the_loop_over_samples():
    positive, negative = random(0, 4), random(1, 4, 3)
    total = 0.0
    for i in range(4):
        others = sum(math.exp(x) for x in negative[i].tolist())
        total -= math.log(math.exp(positive[i]) / (math.exp(positive[i]) + others))
    assert info_nce(positive, negative).item() == pytest.approx(total / 4)
    assert info_nce(positive + 500, negative + 500).item() == pytest.approx(total / 4)
    extreme = info_nce(torch.tensor([-500.0], requires_grad=True), torch.tensor([[500.0]]))
    assert extreme.item() == pytest.approx(1000)


def test_the_graph_holds_each_sample_and_its_nearest():
    logits = random(0, 9, 4)
    graph = neighbour_graph(logits, k=3)
    p = logits.softmax(1)
    for i in range(9):
        nearness = [(p[i] @ p[j] / p[i].norm() / p[j].norm()).item() for j in range(9)]
        nearest = sorted(range(9), key=lambda j: -nearness[j])[:3]
        assert i in nearest
        assert [j for j in range(9) if graph[i, j] > 0] == sorted(nearest)
    torch.testing.assert_close(graph.sum(1), torch.ones(9, dtype=torch.float64))
    order = torch.randperm(9)
    torch.testing.assert_close(neighbour_graph(logits[order], k=3), graph[order][:, order])
    torch.testing.assert_close(neighbour_graph(logits + 7, k=3), graph, msg="a constant changes no prediction")
    assert torch.equal(neighbour_graph(logits, k=1), torch.eye(9, dtype=torch.float64))
    assert torch.equal(neighbour_graph(logits[:2], k=8), torch.full((2, 2), 0.5, dtype=torch.float64))
    assert not neighbour_graph(logits.clone().requires_grad_(), k=2).requires_grad
    with pytest.raises(ValueError, match="k=0"):
        neighbour_graph(logits, k=0)


def test_the_encoder_is_the_sum_over_hops():
    torch.manual_seed(0)
    encoder, rows = GraphEncoder(4, hops=2).double(), random(0, 5, 4)
    graph = neighbour_graph(random(1, 5, 3), k=2)
    found = encoder(rows, graph)
    parts = encoder.linear.weight.split(4, dim=1)
    for i in range(5):
        once = sum(rows[j] for j in range(5) if graph[i, j] > 0) / 2
        twice = sum(graph[i, j] * (graph[j] @ rows) for j in range(5))
        row = parts[0] @ rows[i] + parts[1] @ once + parts[2] @ twice + encoder.linear.bias
        torch.testing.assert_close(found[i], row / row.norm())


def test_a_neighbours_embedding_changes_a_samples():
    torch.manual_seed(0)
    encoder, rows = GraphEncoder(4), random(0, 5, 4).float()
    graph = neighbour_graph(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.0]]), k=2)
    changed = rows.clone()
    changed[0] += 1
    moved = (encoder(changed, graph) != encoder(rows, graph)).any(1)
    assert moved[:2].all()
    assert not moved[2:].any()


def networks():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3)) for n in (4, 16))
    return student, teacher


def batch(count=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=draw), torch.arange(count) % 3, torch.arange(count)


def bind(loss, data=None, population=10):
    student, teacher = networks()
    return Distillation(student, teacher, losses=[loss]).bind(data or batch(), population=population), student, teacher


def test_it_reads_the_embedding_and_the_logits():
    loss = HolisticKD(features=4, k=3)
    bind(loss)
    assert loss.pairs == [("2:input", "2:input"), ("@logits", "@logits")]


def test_the_gradient_reaches_the_student_and_the_encoders_and_not_the_teacher():
    d, student, teacher = bind(HolisticKD(features=4, k=3, neighbours=2))
    d(batch()).total.backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in d.losses.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    # the graph is a constant: through the logits flows nothing
    assert student[2].weight.grad is None


def test_the_memories_follow_training_alone():
    loss = HolisticKD(features=4, k=3, momentum=0.5)
    d, *_ = bind(loss)
    before = loss.memory_student.clone(), loss.memory_teacher.clone(), loss.memory_labels.clone()
    assert before[2].tolist() == [-1] * 10

    def unchanged():
        after = loss.memory_student, loss.memory_teacher, loss.memory_labels
        return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]

    with torch.no_grad():
        d(batch())
    d.eval()
    d(batch())
    assert unchanged() == [True, True, True]
    d.train()
    with torch.no_grad():
        e = unit_rows(loss.embed_student(d.student[:2](batch()[0])))
    d(batch()).total.backward()
    assert unchanged() == [False, False, False]
    torch.testing.assert_close(loss.memory_student[:6], unit_rows(0.5 * before[0][:6] + 0.5 * e))
    assert torch.equal(loss.memory_student[6:], before[0][6:])
    assert loss.memory_labels.tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1, -1]


def test_equal_ids_get_the_first_ones_row():
    inputs, labels, _ = batch()
    loss = HolisticKD(features=4, k=3, momentum=0.0)
    d, *_ = bind(loss)
    d((inputs, labels, torch.tensor([3, 3, 5, 5, 5, 1]))).total.backward()
    with torch.no_grad():
        e = unit_rows(loss.embed_student(d.student[:2](inputs)))
    torch.testing.assert_close(loss.memory_student[[3, 5, 1]], e[[0, 2, 5]])


def test_negatives_are_of_other_classes(monkeypatch):
    drawn = []
    plain = module.bank_scores

    def spy(anchors, bank, candidates, temperature):
        drawn.append(candidates)
        return plain(anchors, bank, candidates, temperature)

    monkeypatch.setattr(module, "bank_scores", spy)
    d, *_ = bind(HolisticKD(features=4, k=5, samples=6))
    d(batch())
    labels = batch()[1]
    assert drawn[-1].shape == (12, 5)
    assert (labels[drawn[-1]] != labels.repeat(2).unsqueeze(1)).all()
    assert torch.equal(drawn[-1], drawn[-2]), "both models are told from the same samples"


def test_the_batch_of_two_processes_is_remembered_whole(monkeypatch):
    torch.manual_seed(0)
    s, t, z_s, z_t = inputs(count=6)
    ids, labels = torch.tensor([4, 0, 7, 1, 2, 9]), torch.tensor([1, 1, 0, 2, 0, 2])

    def remembered(part):
        torch.manual_seed(1)
        loss = HolisticKD(features=4, k=3, samples=10)
        call = built(loss, s, t, z_s, z_t, ids, labels)
        other = slice(3, 6)
        if part != slice(None):
            e_s, e_t = unit_rows(loss.embed_student(s[other])), unit_rows(loss.embed_teacher(t[other]))
            numbers = torch.stack([ids[other], labels[other]], dim=1)

            def gathered(a, b, n, mean):
                return torch.cat([a, e_s]), torch.cat([b, e_t]), torch.cat([n, numbers]), mean

            monkeypatch.setattr(module, "process_count", lambda: 2)
            monkeypatch.setattr(module, "gathered", gathered)
        call(s[part], t[part], z_s[part], z_t[part], ids[part], labels[part])
        return loss.memory_student, loss.memory_teacher, loss.memory_labels

    whole = remembered(slice(None))
    for one, both in zip(remembered(slice(0, 3)), whole, strict=True):
        torch.testing.assert_close(one, both)


def test_neither_order_nor_process_matters_to_the_value(monkeypatch):
    loss = HolisticKD(features=4, k=3, neighbours=2)
    d, *_ = bind(loss)
    d.eval()
    data, order = batch(), torch.tensor([3, 0, 5, 1, 4, 2])
    fixed = torch.randint(10, (10, 3))
    monkeypatch.setattr(module, "other_classes", lambda labels, known, count: fixed[current])
    current = data[2]
    value = d(data).total
    current = data[2][order]
    torch.testing.assert_close(d(tuple(x[order] for x in data)).total, value)


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_candidates_rows_are_not_gathered():
    count, rows, width, k = 16, 400, 64, 350
    s, t, z_s, z_t = inputs(count=count)
    ids, labels = torch.arange(count), torch.arange(count) % 4
    call = built(HolisticKD(features=width, k=k, samples=rows), s, t, z_s, z_t, ids, labels)
    with Largest() as largest:
        call(s.requires_grad_(), t, z_s, z_t, ids, labels).backward()
    assert largest.numbers <= max(rows * width, 2 * count * rows)
    assert largest.numbers < count * k * width / 10


def test_what_it_learns_and_remembers_is_saved_and_is_not_the_students():
    loss = HolisticKD(features=4, k=3)
    d, student, _ = bind(loss)
    keys = set(student.state_dict())
    d(batch()).total.backward()
    assert {id(p) for p in loss.parameters()} < {id(p) for p in d.parameters()}
    assert len(list(loss.parameters())) == 8
    other = HolisticKD(features=4, k=3)
    d_2, *_ = bind(other)
    with torch.no_grad():
        other.embed_student.weight.zero_()
    d_2.load_state_dict(d.state_dict())
    assert torch.equal(other.memory_teacher, loss.memory_teacher)
    assert torch.equal(other.memory_labels, loss.memory_labels)
    for one in (d, d_2):
        one.eval()
    values = []
    for one in (d, d_2):
        torch.manual_seed(3)
        values.append(one(batch()).total)
    assert values[0] == values[1]
    assert set(student.state_dict()) == keys


@pytest.mark.parametrize("spoil", ["zeros", "equal", "extreme"])
def test_degenerate_batches_have_finite_values_and_sane_gradients(spoil):
    s, t, z_s, z_t = (x.float() for x in inputs())
    ids, labels = torch.arange(5), torch.arange(5) % 2
    loss = HolisticKD(features=4, k=3, neighbours=2, samples=10)
    call = built(loss, s, t, z_s, z_t, ids, labels)
    with torch.no_grad():
        loss.embed_student.bias.zero_()
        loss.embed_teacher.bias.zero_()
        for x in (s, t, z_s, z_t):
            if spoil == "zeros":
                x.zero_()
            elif spoil == "equal":
                x[:] = x[0].clone()
            else:
                x.copy_(500 * x.sign())
    value = call(s.requires_grad_(), t, z_s, z_t, ids, labels)
    value.backward()
    assert value.isfinite()
    assert s.grad.abs().max() < 1e4
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    one = call(s[:1], t[:1], z_s[:1], z_t[:1], ids[:1], labels[:1])
    assert one.isfinite()


def test_float64_stays_float64():
    s, t, z_s, z_t = inputs()
    loss = HolisticKD(features=4, k=3, samples=10)
    call = built(loss, s, t, z_s, z_t, torch.arange(5), torch.arange(5) % 2)
    assert call(s, t, z_s, z_t, torch.arange(5), torch.arange(5) % 2).dtype == torch.float64


def test_what_is_missing_is_named():
    def bound(loss, data=None, population=None):
        bind(loss, data, population)

    inputs, labels, ids = batch()
    with pytest.raises(ValueError, match="HolisticKD: the memory has a row for each training sample"):
        bound(HolisticKD())
    with pytest.raises(ValueError, match="needs sample ids"):
        bound(HolisticKD(samples=10), (inputs, labels))
    with pytest.raises(ValueError, match="needs labels"):
        bound(HolisticKD(samples=10), {"x": inputs, "ids": ids})
    bound(HolisticKD(samples=10, negatives="all"), {"x": inputs, "ids": ids})
    with pytest.raises(ValueError, match=r"a sample id is not in 0\.\.2"):
        bound(HolisticKD(samples=3))
    with pytest.raises(ValueError, match="one class number for each sample"):
        bound(HolisticKD(samples=10), (inputs, torch.rand(6, 3), ids))
    with pytest.raises(ValueError, match="one pair of embeddings, not 2"):
        bound(HolisticKD("0", "1", samples=10))
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        bound(HolisticKD(samples=10), tuple(x[:1] for x in batch()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("negatives", "classes"),
        ("features", 0),
        ("neighbours", 0),
        ("hops", 0),
        ("k", 0),
        ("temperature", 0.0),
        ("momentum", 1.0),
        ("smoothing", -0.1),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"HolisticKD: {argument}={value!r}"):
        HolisticKD(**{argument: value})


def cka(a, b):
    """Linear centred kernel alignment of two sets of features of the same samples."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())


def test_training_brings_the_students_embedding_closer_to_the_teachers():
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    labels, ids = teacher(inputs).argmax(1), torch.arange(256)

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

    assert trained(HolisticKD(features=32, k=64)) > trained() + 0.1
